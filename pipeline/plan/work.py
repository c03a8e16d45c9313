"""Operations, seconds and money, from shapes and counts."""

from dataclasses import dataclass

from pipeline.plan.machine import Machine
from pipeline.plan.memory import BYTES, NF4_BYTES, layers_again
from pipeline.plan.rows import Rows
from pipeline.plan.shape import Shape
from pipeline.recipe import Train

EFFICIENCY = 0.42
"""Of a GPU's dense bf16 rate. Published for LoRA on 8B models: 0.42 (NVIDIA AutoModel, one H100)
and 0.41 (IBM fms-acceleration, one A100)."""
CPU_OPERATIONS = 40e9
"""A second and core: a guess, which the measured time beside it corrects."""


@dataclass(frozen=True)
class Work:
    """Operations a token, on average over an epoch; a multiplication and an addition are two."""

    useful: float
    """What the gradients take: LoRA's own count, 4 a frozen weight."""
    computed: float
    """With what checkpointing computes again and a reference model's passes."""


def count_work(settings: Train, shape: Shape, rows: Rows, is_cpu: bool) -> Work:
    """Each weight costs 2 a token forward, 2 for its input's gradient, 2 for its own if trained.

    Attention costs 2 operations for each query value and each earlier token, twice, and its
    gradient twice as much; a row's tokens see half of it on average. Only trained positions go
    through the head. Checkpointing repeats the forward pass: 6 a frozen weight.
    """
    trained = 2 if settings.method == "full" else 0
    adapter = 0 if trained else shape.num_trained(settings)
    attention = 2.0 * shape.layers * shape.queries * rows.mean_square / max(1.0, rows.mean)
    head = shape.num_head() * rows.supervised / max(1, rows.shared)
    forward = 2.0 * shape.num_linear() + 2 * adapter
    useful = (4 + trained) * shape.num_linear() + 6 * adapter + 3 * attention
    useful += (4 + trained) * head
    again = layers_again(settings, shape) / shape.layers * (forward + attention)
    again += 0 if is_cpu else 2 * head  # the fused head computes its tiles again
    # dpo: the base's log-probabilities. kto: also both models', of the mismatched replies.
    passes = {"dpo": 1, "kto": 3}.get(settings.objective, 0)
    again += passes * (forward + attention + 2 * head)
    return Work(useful, useful + again)


def step_seconds(
    settings: Train, shape: Shape, tokens: float, micro_tokens: int, work: Work, machine: Machine
) -> float | None:
    """A step of so many tokens, shared by the machine's devices; None if its rates are unknown.

    The greater of computing and of reading the weights once a pass; NF4's weights are also written
    as 16 bit and read again, which nothing overlaps.
    """
    tokens /= machine.devices
    if machine.is_cpu:
        return tokens * work.computed / (CPU_OPERATIONS * machine.cores)
    if machine.gpu is None:
        return None
    computing = tokens * work.computed / (EFFICIENCY * machine.gpu.bf16_tflops * 1e12)
    passes = (2 + layers_again(settings, shape) / shape.layers) * max(1.0, tokens / micro_tokens)
    bandwidth = machine.gpu.bandwidth_gbs * 1e9
    weights = shape.num_linear() * BYTES[settings.dtype]
    reading = passes * weights / bandwidth
    unpacking = 0.0
    if settings.method == "qlora":
        unpacking = passes * shape.num_linear() * (NF4_BYTES + BYTES["bfloat16"]) / bandwidth
    return max(computing, reading) + unpacking


def reply_seconds(settings: Train, shape: Shape, machine: Machine) -> float | None:
    """grpo's replies of a step: each of their tokens reads all weights once, for all replies.

    A lower bound, and rough: caches are not counted.
    """
    if machine.gpu is None:
        return None
    weights = shape.num_linear() + shape.num_head()
    reading = weights * BYTES["bfloat16"] / (machine.gpu.bandwidth_gbs * 1e9)
    return settings.grpo.max_tokens * reading
