"""Bytes a device holds during training, line by line, derived from the layers' own code."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.plan.shape import Shape
from pipeline.recipe import Train

BYTES = {"bfloat16": 2.0, "float32": 4.0}
# NF4 with double quantisation: 4 bit a value, 8 bit a block of 64 for its absmax, and float32
# scales for blocks of 256 of these (Dettmers et al. 2023, QLoRA, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
MOMENT_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0 + 8 / 256}
"""Of the optimizer's two moments, a trained value; in 8 bit with a scale for each block of 256."""
GPU_BYTES = 1.0e9
"""Fixed: the driver's context, about half of it, libraries' workspaces and compiled kernels."""
CPU_BYTES = 0.97e9
"""Fixed: the interpreter with torch, transformers and the other libraries. Measured, as are the
next three, with the demo base."""
CPU_HOLES = 0.33
"""Of the float32 casts of an adapter's inputs, what is lost: freed, they leave gaps in the heap
that what is kept does not fill. On a GPU the margin of its memory is for that."""
CPU_DORA_HOLES = 4
"""The same of DoRA's float32 copies of weights, a base weight that has an adapter."""
CPU_LOGIT_BYTES = 18
"""A logit: its log-softmax, the gradients of both, and casts."""
SHARED_INPUTS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Linear layers whose input is that of another."""
TILE_ROWS, TILE_COLUMNS = 4096, 32768
"""What TRL's fused head holds of the logits at a time, on a GPU."""


@dataclass(frozen=True)
class Load:
    """What goes through the model at once."""

    tokens: int
    supervised: int
    """How many of them are trained: the head scores these alone."""
    is_cpu: bool
    devices: int = 1


def hold(settings: Train, shape: Shape, load: Load) -> dict[str, int]:
    """Bytes on each device at the peak of a step, by what they hold; they add up to the peak."""
    trained = shape.num_trained(settings)
    is_full = settings.method == "full"
    # With several devices each also has the buckets it exchanges gradients in.
    gradients = 4 * trained * (2 if load.devices > 1 else 1)
    lines = {
        "weights": _weights(settings, shape, load.is_cpu),
        "adapter": 0 if is_full else _adapter(settings, shape, load.is_cpu),
        "optimizer": MOMENT_BYTES[settings.optimizer] * trained,
        "gradients": gradients,
        "activations": load.tokens * _activations(settings, shape, load.is_cpu),
        "logits": _logits(settings, shape, load),
        "mask": _mask(settings, shape, load),
        "fixed": CPU_BYTES if load.is_cpu else GPU_BYTES,
    }
    return {name: int(size) for name, size in lines.items()}


def shard(lines: dict[str, int], shape: Shape, settings: Train, devices: int) -> dict[str, int]:
    """The same with weights, gradients and optimizer spread over devices, as FSDP2 does.

    A layer's weights, and the embeddings', are gathered while they are computed with, and those of
    the next layer meanwhile.
    """
    kept = ("weights", "adapter", "optimizer", "gradients")
    value = 4.0 if settings.method == "full" else BYTES[settings.dtype]
    gathered = value * (2 * shape.num_linear() / shape.layers + shape.num_embeddings())
    parts = {name: size // devices if name in kept else size for name, size in lines.items()}
    return parts | {"weights": parts["weights"] + int(gathered)}


def _weights(settings: Train, shape: Shape, is_cpu: bool) -> float:
    """The base as it is held; the embeddings and the head keep the recipe's dtype in qlora, too."""
    value = BYTES[settings.dtype]
    if settings.method == "full":
        # Held in float32; in bfloat16 autocast keeps a copy of each weight until the step's end.
        return shape.num_weights() * (4 + (2 if settings.dtype == "bfloat16" else 0))
    if settings.method == "qlora":
        # One weight at a time stands there in 16 bit, to be computed with.
        largest = max(rows * columns for rows, columns in shape.linear().values())
        linear = shape.num_linear() * NF4_BYTES + largest * value
        if is_cpu:  # the embeddings are used as they lie in the file, so all of it stays mapped
            linear += shape.num_linear() * value
    else:
        linear = shape.num_linear() * value
    return linear + shape.num_embeddings() * value


def _adapter(settings: Train, shape: Shape, is_cpu: bool) -> float:
    """Float32, with autocast's copy; DoRA computes a weight's length from all of its values.

    For that it holds, one module at a time in float32: the identity that goes through A and B, and
    the weight, what the adapter adds, and both together.
    """
    held = shape.num_trained(settings) * (6 if settings.dtype == "bfloat16" else 4)
    if settings.variant == "dora":
        sizes = shape.adapted(settings).values()
        held += max(4 * (rows**2 + 3 * rows * columns) for rows, columns in sizes)
        if is_cpu:
            held += CPU_DORA_HOLES * shape.layers * sum(rows * columns for rows, columns in sizes)
    return held


def _activations(settings: Train, shape: Shape, is_cpu: bool) -> float:
    """Bytes a token: what the layers keep for the backward pass, and the one at work."""
    value = BYTES[settings.dtype]
    residual = 4.0 if settings.method == "full" else value
    layer = layer_bytes(settings, shape, is_cpu) + (_holes(settings, shape) if is_cpu else 0)
    # The last norm's input and output, and the embeddings' output.
    ends = (4 + 2 * residual) * shape.hidden
    # Backward through the MLP: gradients of gate, up and their product, and a float32 cast of two.
    work = (3 * value + 8) * shape.inner
    again = layers_again(settings, shape)
    at_work = layer if again else 0  # one at a time is computed again
    return (shape.layers - again) * layer + again * residual * shape.hidden + at_work + ends + work


def layers_again(settings: Train, shape: Shape) -> int:
    """How many layers keep nothing but their input, and are computed again."""
    return {"none": 0, "selective": (shape.layers + 1) // 2}.get(
        settings.checkpointing, shape.layers
    )


def layer_bytes(settings: Train, shape: Shape, is_cpu: bool) -> float:
    """Bytes a token that one layer keeps for its backward pass without recomputing.

    Read in transformers' Llama and Qwen3 layers and PEFT's, and compared with the tensors autograd
    saves in tests. Frozen linear layers keep nothing: only the gradient of their input is wanted.
    """
    value = BYTES[settings.dtype]
    queries, keys = shape.queries, shape.keys
    norms = 2 * 4.0 * shape.hidden + (4.0 * (queries + keys) if shape.has_head_norms else 0)
    # Queries, keys, values and output, and each head's sum in float32. On a CPU keys and values are
    # repeated for every head; flex attention needs that only of a number of heads that is no power
    # of two.
    is_repeated = is_cpu or shape.heads & (shape.heads - 1) != 0
    attention = value * (2 * queries + 2 * (queries if is_repeated else keys)) + 4 * shape.heads
    inner = 3 * value * shape.inner  # the gate, its activation, and what it is multiplied by
    return norms + attention + inner + _inputs(settings, shape, is_cpu)


def _holes(settings: Train, shape: Shape) -> float:
    if settings.dtype == "float32":
        return 0.0
    return CPU_HOLES * 4 * sum(rows for rows, _ in shape.adapted(settings).values())


def _inputs(settings: Train, shape: Shape, is_cpu: bool) -> float:
    """Of one layer, what is kept of the inputs of linear layers that are trained or adapted."""
    value = BYTES[settings.dtype]
    if settings.method == "full":
        # A norm keeps its result for its own weight; a cast of it goes into each linear layer.
        norms = 4.0 * 2 * shape.hidden
        if shape.has_head_norms:
            norms += value * (shape.queries + shape.keys)
        return norms + _copies(settings, shape.linear())
    adapted = shape.adapted(settings)
    kept = _copies(settings, adapted)
    kept += value * settings.rank * len(adapted)  # between A and B
    if settings.dropout:
        # Which values stay: a byte on a GPU, a float32 on a CPU.
        kept += (4 if is_cpu else 1) * sum(rows for rows, _ in adapted.values())
    if settings.variant == "dora":
        # The base's result and the adapter's, which the trained lengths are multiplied by.
        kept += 2 * value * sum(columns for _, columns in adapted.values())
    return kept


def _copies(settings: Train, modules: Mapping[str, tuple[int, int]]) -> float:
    """Bytes of inputs that are kept for linear layers.

    An adapter casts each to float32, and autocast back to bfloat16: a copy for each layer. Without
    a cast, layers share one, and o_proj's is the attention's output, which is kept anyway.
    """
    inputs = {name: rows for name, (rows, _) in modules.items()}
    if settings.dtype == "float32":
        inputs = {SHARED_INPUTS.get(name, name): rows for name, rows in inputs.items()}
        inputs.pop("o_proj", None)
    return BYTES[settings.dtype] * sum(inputs.values())


def _logits(settings: Train, shape: Shape, load: Load) -> float:
    """On a CPU the trained positions' logits; on a GPU a tile of them."""
    if load.is_cpu:
        return CPU_LOGIT_BYTES * load.supervised * shape.vocabulary
    rows = min(load.supervised, TILE_ROWS)
    tile = rows * min(shape.vocabulary, TILE_COLUMNS) * BYTES[settings.dtype]
    weight = 4.0 * shape.num_head() if settings.method == "full" else 0  # its gradient once more
    return tile + 6.0 * load.supervised * shape.hidden + weight


def _mask(settings: Train, shape: Shape, load: Load) -> float:
    """On a CPU who sees whom, for every pair of tokens; on a GPU for blocks of 128."""
    if not load.is_cpu:
        return 40.0 * (load.tokens / 128) ** 2
    # Booleans, and what is added to the scores: each layer's own copy, kept for its backward pass.
    again = layers_again(settings, shape)
    copies = shape.layers - again + (again > 0)
    return load.tokens**2 * (1 + copies * BYTES[settings.dtype])
