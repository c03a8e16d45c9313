"""TRL's trainer, given whole steps: each item of its data set is a step's micro-batches."""

from contextlib import nullcontext
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn import functional
from trl import SFTTrainer

from pipeline.errors import RunError
from pipeline.train.attention import block_mask, dense_mask
from pipeline.tree import IGNORED


class PackTrainer(SFTTrainer):
    """Sums a step's loss over its packs and divides by its supervised tokens."""

    num_supervised_tokens = 0
    num_tokens = 0
    num_row_tokens = 0

    def training_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Gradients of one step's share; returns its part of the step's mean loss."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        self.num_supervised_tokens += inputs["num_supervised"]
        self.num_tokens += inputs["num_tokens"]
        self.num_row_tokens += inputs["num_row_tokens"]
        # Gradients are averaged over processes, and so is the loss that is logged.
        scale = self.accelerator.num_processes / max(1, inputs["num_supervised"])
        total = torch.zeros((), device=self.accelerator.device)
        packs = inputs["packs"]
        for index, pack in enumerate(packs):
            is_last = index == len(packs) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                loss = self.sum_loss(model, pack) * scale
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def sum_loss(self, model: Any, pack: dict[str, torch.Tensor]) -> torch.Tensor:
        """The sum of a pack's losses, through the model's own forward, wrapped as it may be.

        On a GPU by TRL's fused head, which scores labelled positions alone and never holds their
        logits. Without Triton that head scores every position, measured at 2.6 times the time of a
        whole step of the demo; so a CPU asks for the logits of the labelled positions.
        """
        inputs = {key: pack[key] for key in ("input_ids", "position_ids")}
        labels = pack["labels"]
        if labels.is_cuda:
            blocks = block_mask(pack["ends"])
            outputs = model(**inputs, attention_mask=blocks, labels=labels, fused_lm_head=True)
            loss: torch.Tensor = -outputs.log_probs.sum()
            return loss
        places = (labels[0, 1:] != IGNORED).nonzero().flatten()
        mask = dense_mask(pack["ends"])
        logits = model(**inputs, attention_mask=mask, logits_to_keep=places, use_cache=False).logits
        return functional.cross_entropy(logits[0].float(), labels[0, places + 1], reduction="sum")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Into the folder of what is not whole yet; every process takes part."""
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # the three ways a disk is full
            step = self.state.global_step
            raise RunError(f"the checkpoint of step {step} cannot be written: {error}") from error

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None for a checkpoint: it is gone when the training ends."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None are counted here: the plan knows them better than tokens times six."""
        return 0
