"""The layers as torch compiles them: one graph for all of a kind and for packs of any length."""

from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer


def compile_layers(model: Any, backend: str = "inductor") -> None:
    """Have torch compile each decoder layer when it is first used.

    In place, so that weights keep their names in checkpoints and a sharded layer its hooks. Lengths
    are symbolic: packs differ in theirs, and what is fused, norms and activations, gains nothing
    from knowing them. The layers are all of one shape, so the first one's graph serves all.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True, backend=backend)
