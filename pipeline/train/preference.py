"""Learning from preference pairs on prefix trees: DPO and KTO, against the base under the adapter.

DPO is equation 7 of Rafailov et al. 2023, KTO equations 7 and 8 of Ethayarajh et al. 2024. Both
look at a reply's log ratio: how much likelier the model makes it than the base does.
"""

from typing import Any

import torch
from torch.nn import functional

from pipeline.recipe import Train
from pipeline.train.trainer import PackTrainer


class PreferenceTrainer(PackTrainer):
    """Sums a step's loss over its pairs and divides by their number; of KTO a pair has two."""

    def __init__(self, settings: Train, **given: Any) -> None:
        super().__init__(**given)
        self._objective = settings.objective
        self._beta = settings.preference.beta
        self._divergence = torch.zeros((), device=self.accelerator.device)
        self._rewards = torch.zeros(3, device=self.accelerator.device)

    def training_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As of `PackTrainer`; what the pairs' rewards are is logged with the loss."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        means = self.accelerator.reduce(self._rewards) / self.count(inputs)
        accuracy, chosen, rejected = means.tolist()
        told = {
            "reward_accuracy": accuracy,
            "reward_margin": chosen - rejected,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
        }
        if self._objective == "kto":
            told["divergence"] = float(self._divergence)
        for key, value in told.items():
            self._metrics["train"][key].append(value)
        return loss

    def count(self, inputs: dict[str, Any]) -> int:
        """The step's pairs."""
        return int(inputs["num_pairs"])

    def begin(self, model: Any, inputs: dict[str, Any]) -> None:
        """The base's log-probabilities for each pack, and of KTO the step's reference point."""
        model.eval()  # no dropout where nothing is learnt
        with torch.no_grad():
            with self.model.disable_adapter():
                for pack in (*inputs["packs"], *inputs["mismatched"]):
                    pack["base_scores"] = self.score(model, pack)
            if self._objective == "kto":
                self._divergence = self._diverge(model, inputs)
        self._rewards = torch.zeros_like(self._rewards)

    def _diverge(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """How far the model is from the base: z0 of the paper, in nats a reply.

        The mean log ratio of replies to other prompts, and not below 0, as the paper and TRL have
        it; 0 for a step of one pair, which has none.
        """
        total = torch.zeros((), device=self.accelerator.device)
        for pack in inputs["mismatched"]:
            total += self.compare(model, pack).sum()
        divergence: torch.Tensor = self.accelerator.reduce(total) / (2 * self.count(inputs))
        return divergence.clamp(min=0)

    def sum_loss(self, model: Any, pack: dict[str, Any]) -> torch.Tensor:
        """The sum of a pack's losses; `begin` must have seen its step."""
        rewards = self._beta * self.compare(model, pack)
        chosen, rejected = rewards.unbind(1)
        if torch.is_grad_enabled():
            found = rewards.detach()
            wins = (found[:, 0] > found[:, 1]).float().sum()
            self._rewards += torch.stack([wins, *found.sum(0)])
        if self._objective == "dpo":
            return -functional.logsigmoid(chosen - rejected).sum()
        zero = self._beta * self._divergence
        losses = 2 - functional.sigmoid(chosen - zero) - functional.sigmoid(zero - rejected)
        return losses.sum() / 2

    def compare(self, model: Any, pack: dict[str, Any]) -> torch.Tensor:
        """The log ratio of each reply of a pack, (pairs, 2): of the chosen and of the rejected.

        Token by token: the difference of two sums would be lost in their rounding.
        """
        ratios = self.score(model, pack) - pack["base_scores"]
        rows = ratios.new_zeros(2 * pack["num_pairs"])
        sums: torch.Tensor = rows.index_add(0, pack["owners"][0, 1:], ratios)
        return sums.view(pack["num_pairs"], 2)
