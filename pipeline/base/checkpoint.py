"""Safetensors checkpoints, tensor by tensor: read with pread, written as a stream.

The format (huggingface/safetensors, README "Format"): 8 bytes little-endian header length, a JSON
header of name to {dtype, shape, data_offsets}, then the tensors' bytes. Reading and writing it
directly keeps memory bounded by one block of one tensor, whatever the model's size.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.base.names import refuse_pickles
from pipeline.errors import BaseError, RunError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: where its bytes lie in which shard."""

    name: str
    dtype: str
    """As safetensors spells it, such as BF16."""
    shape: tuple[int, ...]
    shard: Path
    begin: int
    """Offset of its first byte in the shard's file."""
    num_bytes: int


def read_layout(folder: Path) -> dict[str, list[Tensor]]:
    """The tensors of each shard, by the shard's file name, in the order of the files.

    Raises BaseError for a missing, truncated or foreign file; a pickle is never opened.
    """
    return {name: read_header(folder / name) for name in shard_names(folder)}


def shard_names(folder: Path) -> list[str]:
    """The files a checkpoint's weights lie in; BaseError where they are no safetensors."""
    index = folder / INDEX
    if index.is_file():
        try:
            found = json.loads(index.read_text("utf-8"))
            names = sorted(set(found["weight_map"].values()))
            (found.get("metadata") or {}).keys()  # raises for what is no table
            if any(Path(name).name != name for name in names):  # a merge writes under these names
                raise ValueError("a shard outside of the folder")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BaseError(f"{index} is not an index of safetensors shards") from error
        return names
    if (folder / SINGLE).is_file():
        return [SINGLE]
    refuse_pickles(folder)
    if any(folder.glob("*.safetensors")):
        raise BaseError(f"{folder} has shards but no {INDEX}; fetch the checkpoint again")
    raise BaseError(f"{folder} holds no weights: {SINGLE} is missing")


def adapter_file(adapter: Path) -> Path:
    """The file an adapter's weights lie in, in PEFT's layout; RunError where it is a pickle."""
    file, pickled = adapter / "adapter_model.safetensors", adapter / "adapter_model.bin"
    if not file.is_file() and pickled.is_file():
        raise RunError(f"{pickled} is a pickle, which can run code; save it as safetensors")
    if not file.is_file():
        raise RunError(f"{adapter} is not an adapter: {file.name} is missing")
    return file


def read_header(shard: Path) -> list[Tensor]:
    """The tensors of one safetensors file, in the order of their bytes."""
    try:
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if not 0 < length <= min(size, _MAX_HEADER_BYTES):
                raise ValueError("no header")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = [_parse(name, entry, shard, 8 + length) for name, entry in header.items()]
    except FileNotFoundError as error:
        raise BaseError(f"{shard} is missing, though the index names it") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise BaseError(f"{shard} is not a safetensors file; fetch it again") from error
    tensors.sort(key=lambda tensor: tensor.begin)
    if tensors and tensors[-1].begin + tensors[-1].num_bytes > size:
        raise BaseError(f"{shard} is cut off: {size} bytes on disk; fetch it again")
    return tensors


def _parse(name: str, entry: dict[str, Any], shard: Path, start: int) -> Tensor:
    """One tensor of a header; ValueError and its like where it is not as the format says."""
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in DTYPES:
        raise BaseError(f"{shard}: {name} is {dtype}; only {', '.join(DTYPES)} can be read")
    if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name} has sizes that are no whole numbers")
    if end - begin != DTYPES[dtype].itemsize * _product(shape):
        raise ValueError(f"{name} does not fill its bytes")
    return Tensor(name, dtype, shape, shard, start + begin, end - begin)


def read_bytes(tensor: Tensor, begin: int, num_bytes: int) -> bytearray:
    """Some of a tensor's bytes, `begin` counted from its own first byte."""
    block = bytearray(num_bytes)
    with tensor.shard.open("rb", buffering=0) as file:
        view, offset = memoryview(block), tensor.begin + begin
        while view:
            read = os.preadv(file.fileno(), [view], offset)
            if read == 0:
                raise BaseError(f"{tensor.shard} ended in the middle of {tensor.name}")
            view, offset = view[read:], offset + read
    return block


def read_tensor(tensor: Tensor) -> torch.Tensor:
    """A whole tensor, in the dtype it is stored in."""
    return _values(tensor, read_bytes(tensor, 0, tensor.num_bytes)).view(tensor.shape)


def read_rows(tensor: Tensor, first: int, last: int) -> torch.Tensor:
    """Rows first to last (exclusive) of a tensor, in the dtype it is stored in."""
    row_bytes = tensor.num_bytes // tensor.shape[0]
    block = read_bytes(tensor, first * row_bytes, (last - first) * row_bytes)
    return _values(tensor, block).view(last - first, *tensor.shape[1:])


def _values(tensor: Tensor, block: bytearray) -> torch.Tensor:
    return torch.frombuffer(block, dtype=DTYPES[tensor.dtype])


def copy_blocks(tensor: Tensor, block_bytes: int = 1 << 24) -> Iterator[bytearray]:
    """A tensor's bytes, unchanged, block by block."""
    for begin in range(0, tensor.num_bytes, block_bytes):
        yield read_bytes(tensor, begin, min(block_bytes, tensor.num_bytes - begin))


def tensor_bytes(values: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    array: Any = values.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


Shape = tuple[str, tuple[int, ...]]
"""dtype as safetensors spells it, and the sizes."""


def write_shard(
    path: Path, tensors: Mapping[str, Shape], blocks: Iterable[bytearray | memoryview]
) -> None:
    """Write one shard: `blocks` are the bytes of all `tensors`, in their order, however cut."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        num_bytes = DTYPES[dtype].itemsize * _product(shape)
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + num_bytes],
        }
        offset += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start aligned, as the library writes it
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in blocks:
            file.write(block)
        if file.tell() != 8 + len(text) + offset:
            raise AssertionError(f"{path}: {file.tell()} bytes written, not what the header says")


def write_index(folder: Path, shards: Mapping[str, Sequence[str]], total_bytes: int) -> None:
    """Write the index of a checkpoint of several shards; shard file name to tensor names."""
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
