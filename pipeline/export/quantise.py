"""A GGUF file of 16-bit weights to one of K-quants, tensor by tensor, by libgguf's row kernels.

They are llama.cpp's reference kernels: the same bytes for the same row.
"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    Keys,
    ReaderField,
    ReaderTensor,
    dequantize,
    quant_shape_to_byte_shape,
)
from gguf.constants import GGML_QUANT_VERSION

from pipeline.errors import RunError
from pipeline.export.mix import MIXES, Mix, Model, choose_type

try:
    import libgguf
except ImportError:  # it has no wheel for some machines, where the other formats work all the same
    libgguf = None

_BLOCK_VALUES = 8 << 20  # 32 MiB of float32
# The writer writes these by itself, or they are no fields but parts of the file's head.
_NOT_COPIED = (Keys.General.ARCHITECTURE, Keys.General.FILE_TYPE, Keys.General.QUANTIZATION_VERSION)


def why_not_quantise() -> str:
    """Why K-quants cannot be made here, in one sentence; empty if they can."""
    if libgguf is not None:
        return ""
    return (
        "libgguf is not installed: run pip install '.[train]'; it has wheels for Linux and Windows "
        "on x86-64 and for Apple silicon"
    )


def quantise(source: Path, out: Path, gguf_format: str) -> None:
    """Write a GGUF file of 16- or 32-bit weights again in one of llama.cpp's mixes.

    In memory are one block of float32 and one tensor as it is stored. Raises RunError where libgguf
    is missing, and for weights that are not finite; OSError for a disk that fails.
    """
    if reason := why_not_quantise():
        raise RunError(f"{gguf_format} cannot be written: {reason}")
    reader, mix = GGUFReader(source), MIXES[gguf_format]
    types = _choose(reader, mix)
    with closing(GGUFWriter(out, _text(reader, Keys.General.ARCHITECTURE))) as writer:
        for field in reader.fields.values():
            if not field.name.startswith("GGUF.") and field.name not in _NOT_COPIED:
                _copy(field, writer)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        writer.add_file_type(mix.file_type)
        for tensor, kind in zip(reader.tensors, types, strict=True):
            _announce(tensor, kind, writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, kind in zip(reader.tensors, types, strict=True):
            writer.write_tensor_data(tensor.data if kind is None else _quantised(tensor, kind))


def _text(reader: GGUFReader, key: str) -> str:
    field = reader.get_field(key)
    if field is None:
        raise RunError(f"the GGUF file does not say its {key}")
    return str(field.contents())


def _copy(field: ReaderField, writer: GGUFWriter) -> None:
    kind = field.types[0]
    inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
    writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)


def _choose(reader: GGUFReader, mix: Mix) -> list[GGMLQuantizationType | None]:
    architecture = _text(reader, Keys.General.ARCHITECTURE)
    model = Model(
        num_layers=int(_text(reader, Keys.LLM.BLOCK_COUNT.format(arch=architecture))),
        is_tied=all(tensor.name != "output.weight" for tensor in reader.tensors),
    )
    return [choose_type(tensor.name, _shape(tensor), mix, model) for tensor in reader.tensors]


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    """As numpy counts: rows first."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _announce(tensor: ReaderTensor, kind: GGMLQuantizationType | None, writer: GGUFWriter) -> None:
    if kind is None:
        data: Any = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
        return
    stored = quant_shape_to_byte_shape(_shape(tensor), kind)
    writer.add_tensor_info(tensor.name, stored, np.dtype(np.uint8), _product(stored), kind)


def _quantised(tensor: ReaderTensor, kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """A tensor's bytes in another type, (…, bytes of a row)."""
    shape = _shape(tensor)
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    stored = np.empty((_product(shape[:-1]), quant_shape_to_byte_shape(shape, kind)[-1]), np.uint8)
    size = max(1, _BLOCK_VALUES // shape[-1])
    for first in range(0, len(rows), size):
        values = dequantize(rows[first : first + size], tensor.tensor_type)
        if not np.isfinite(values).all():  # the kernels would write a zero or crash
            raise RunError(f"{tensor.name} holds values that are not finite; train again")
        packed = libgguf.quantize_rows(values, kind)
        stored[first : first + size] = packed.view(np.uint8)
    return stored


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
