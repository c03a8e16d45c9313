"""LoRA+: B learns faster than A (Hayou et al. 2024), by PEFT's own grouping."""

from typing import Any

from peft.optimizers import create_loraplus_optimizer


def make_lora_plus(model: Any, kind: Any, values: dict[str, Any], ratio: float) -> Any:
    """An optimizer of some kind with the learning rate of A, and `ratio` times that for B.

    `values` are the kind's own, such as lr, betas and weight_decay. DoRA's lengths learn as B does.
    """
    values = dict(values)
    return create_loraplus_optimizer(
        model,
        kind,
        lr=values.pop("lr"),
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=values.pop("weight_decay"),
        **values,
    )
