"""Our words to transformers': what all of its trainers are told."""

from pathlib import Path
from typing import Any

import torch

from pipeline.recipe import Train
from pipeline.train.devices import refuse_unfit


def make_arguments(kind: Any, settings: Train, scratch: Path, **own: Any) -> Any:
    """A configuration of TRL's, of some kind, with what is that trainer's `own`.

    Raises RunError if the devices at hand cannot train that way.
    """
    again: dict[str, Any] = {"use_reentrant": False}
    if settings.checkpointing == "selective":
        again["every_n_layers"] = 2
    arguments = kind(
        output_dir=str(scratch),
        num_train_epochs=1,  # the plan of the steps has all epochs
        optim="adamw_8bit" if settings.optimizer == "adamw_8bit" else "adamw_torch_fused",
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        bf16=settings.dtype == "bfloat16",
        activation_checkpointing=settings.checkpointing != "none",
        activation_checkpointing_kwargs=again,
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        save_strategy="no",  # Saver says when
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,  # a pack goes through all of the adapter
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        **own,
    )
    refuse_unfit(settings, arguments.n_gpu)
    return arguments
