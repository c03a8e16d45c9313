"""TRL's trainer, given whole steps: each item of its data set is a step's micro-batches."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn import functional
from transformers import Trainer
from trl import SFTTrainer

from pipeline.errors import RunError
from pipeline.train.attention import block_mask, dense_mask, fill_block
from pipeline.train.optimizer import make_lora_plus
from pipeline.train.variants import keep_beginning
from pipeline.tree import IGNORED


class StepTrainer(Trainer):
    """What every trainer of ours does otherwise than transformers', beside one of TRL's."""

    num_supervised_tokens = 0
    num_tokens = 0
    num_row_tokens = 0
    optimizer: Any
    lora_plus_ratio: float | None = None
    """How much larger the learning rate of B is than that of A, if it is."""

    def create_optimizer(self, model: Any = None) -> Any:
        """The trainer's own, or LoRA+."""
        if self.optimizer is None and self.lora_plus_ratio is not None:
            trained = self.model if model is None else model
            kind, values = self.get_optimizer_cls_and_kwargs(self.args, trained)
            values["weight_decay"] = self.args.weight_decay
            self.optimizer = make_lora_plus(trained, kind, values, self.lora_plus_ratio)
        return super().create_optimizer(model)

    def create_accelerator_and_postprocess(self) -> None:
        """The accelerator; FSDP sums gradients, over packs and processes, in float32."""
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.mixed_precision_policy is not None:
            # No output_dtype: it would round the log-probabilities that are summed.
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Into the folder of what is not whole yet; every process takes part."""
        try:
            super()._save_checkpoint(model, trial)
            if self.is_world_process_zero():
                folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
                keep_beginning(self.model, folder)
        except (OSError, RuntimeError, SafetensorError) as error:  # the three ways a disk is full
            step = self.state.global_step
            raise RunError(f"the checkpoint of step {step} cannot be written: {error}") from error

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None for a checkpoint: it is gone when the training ends."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None are counted here: the plan knows them better than tokens times six."""
        return 0


class PackTrainer(StepTrainer, SFTTrainer):
    """Sums a step's loss over its packs and divides by its supervised tokens."""

    def training_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Gradients of one step's share; returns its part of the step's mean loss."""
        inputs = self._prepare_inputs(inputs)
        self.begin(model, inputs)
        model.train()
        self.num_supervised_tokens += inputs["num_supervised"]
        self.num_tokens += inputs["num_tokens"]
        self.num_row_tokens += inputs["num_row_tokens"]
        # Gradients are averaged over processes, and so is the loss that is logged.
        scale = self.accelerator.num_processes / max(1, self.count(inputs))
        total = torch.zeros((), device=self.accelerator.device)
        packs = inputs["packs"]
        for index, pack in enumerate(packs):
            is_last = index == len(packs) - 1
            # DeepSpeed steps within the backward pass of a pack that is said to be the last.
            self.accelerator.gradient_state._set_sync_gradients(is_last)
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                loss = self.sum_loss(model, pack) * scale
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def begin(self, model: Any, inputs: dict[str, Any]) -> None:
        """What a step's packs need to know of each other before they are learnt from: nothing."""

    def measure(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, int]:
        """The summed losses of this process's share of a step, and the whole step's `count`."""
        inputs = self._prepare_inputs(inputs)
        total = torch.zeros((), device=self.accelerator.device)
        with torch.no_grad():
            self.begin(self.model_wrapped, inputs)
            for pack in inputs["packs"]:
                total += self.sum_loss(self.model_wrapped, pack)
        return total, self.count(inputs)

    def count(self, inputs: dict[str, Any]) -> int:
        """What the sum of a step's losses is divided by: its supervised tokens."""
        return int(inputs["num_supervised"])

    def sum_loss(self, model: Any, pack: dict[str, Any]) -> torch.Tensor:
        """The sum of a pack's losses, through the model's own forward, wrapped as it may be."""
        return -self.score(model, pack).sum()

    def score(self, model: Any, pack: dict[str, Any]) -> torch.Tensor:
        """The log-probability of each token of a pack after its first, (tokens - 1); 0 unlabelled.

        On a GPU by TRL's fused head, which scores labelled positions alone and never holds their
        logits. Without Triton that head scores every position, measured at 2.6 times the time of a
        whole step of the demo; so a CPU asks for the logits of the labelled positions.
        """
        labels = pack["labels"]
        if labels.is_cuda:
            filled = fill_block(pack)
            blocks = block_mask(filled.pop("ends"))
            outputs = model(**filled, attention_mask=blocks, fused_lm_head=True)
            scores: torch.Tensor = outputs.log_probs[0, : labels.shape[1] - 1]
            return scores
        inputs = {key: pack[key] for key in ("input_ids", "position_ids")}
        places = (labels[0, 1:] != IGNORED).nonzero().flatten()
        mask = dense_mask(pack["ends"])
        logits = model(**inputs, attention_mask=mask, logits_to_keep=places, use_cache=False).logits
        losses = functional.cross_entropy(
            logits[0].float(), labels[0, places + 1], reduction="none"
        )
        return losses.new_zeros(labels.shape[1] - 1).index_copy(0, places, -losses)
