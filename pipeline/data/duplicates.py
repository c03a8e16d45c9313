"""Conversations that a data set holds twice, or nearly, and those it both trains and holds out.

Signatures wait on disk and are searched column by column: about half a kilobyte a conversation,
part of which is the system's file cache.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from pipeline.chat import Message, prepare_message
from pipeline.data.conversation import (
    Conversation,
    Document,
    Pair,
    Sample,
    is_trained,
    source_of,
)

ALIKE = 0.8
"""From this estimated Jaccard similarity on, two conversations are near duplicates."""
_SHINGLE = 8  # characters; no word borders, so that every language is served
_NUM_HASHES = 64
_SEED = 20_250_428  # signatures are only ever compared with one another: any fixed number will do
_POWERS = np.array([pow(0x9E3779B97F4A7C15, place, 2**64) for place in range(_SHINGLE)], np.uint64)
_PIECE_CHARACTERS = 1 << 16  # of a text hashed at a time
_BAND, _KEY = 4, 16  # hashes from the start of one band to the next's, and those sorted by
_BLOCK_PAIRS = 4096  # whose signatures are compared at a time
_NUM_EXAMPLES = 5  # of exact and of near ones
_HEAD = struct.Struct("<QQ?")
_RECORD = np.dtype(
    [("exact", "<u8"), ("place", "<u8"), ("held", "?"), ("near", "<u4", (_NUM_HASHES,))]
)

Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of a conversation to find its like."""

    source: str
    """`path:line`."""
    exact: int
    """64-bit hash of everything a model would see of it."""
    near: bytes
    """MinHash signature of what users, assistants and tools said: 64 little-endian uint32."""
    held: bool
    """Whether it belongs to the held-out part."""


def fingerprint(sample: Sample, held: bool) -> Fingerprint:
    """The fingerprint of a sample whose messages were checked."""
    if isinstance(sample, Document):
        said, whole = [sample.text], sample.text
    else:
        parts = [_known(part) for part in _parts(sample)]
        said = [text for part in parts for message, _ in part for text in _said(message)]
        whole = json.dumps([parts, sample.tools], sort_keys=True, default=str)  # Parquet has dates
    digest = hashlib.blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    text = " ".join(" ".join(said).lower().split())
    return Fingerprint(source_of(sample), int.from_bytes(digest, "big"), _signature(text), held)


def _parts(sample: Conversation | Pair) -> Iterable[Sequence[Message]]:
    if isinstance(sample, Conversation):
        return (sample.messages,)
    return (sample.messages, sample.chosen, sample.rejected)


def _known(messages: Sequence[Message]) -> list[tuple[Message, bool]]:
    """Messages as a template needs them: identifiers, dates and spellings make no difference."""
    return [(prepare_message(message), is_trained(message)) for message in messages]


def _said(message: Message) -> Iterator[str]:
    """What tells conversations apart: system messages are often a whole data set's."""
    if message["role"] == "system":
        return
    yield message.get("reasoning_content", "")
    yield message["content"]
    for call in message.get("tool_calls", ()):
        function = call["function"]
        yield function["name"]
        yield json.dumps(function["arguments"], sort_keys=True, ensure_ascii=False, default=str)


def _signature(text: str) -> bytes:
    # Margins put a text's first and last characters into as many shingles as the others: texts
    # that differ in a last digit differ, and the shortest text has more than one shingle.
    margin = "\0" * (_SHINGLE - 1)
    text = f"{margin}{text}{margin}"
    signature = np.full(_NUM_HASHES, 2**32 - 1, dtype="<u4")
    for start in range(0, len(text) - _SHINGLE + 1, _PIECE_CHARACTERS):
        piece = text[start : start + _PIECE_CHARACTERS + _SHINGLE - 1]
        codes = np.frombuffer(piece.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        shingles = np.convolve(codes.astype(np.uint64), _POWERS, "valid")
        rows = RMinHash.digest_matrix_from_flat_token_hashes(
            shingles, [0, len(shingles)], _NUM_HASHES, _SEED
        ).to_rows()
        np.minimum(signature, np.array(rows[0], dtype="<u4"), out=signature)
    return signature.tobytes()


class Duplicates:
    """Gathers fingerprints in an unnamed file under a folder, then finds those that are alike."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Self:
        self._records: IO[bytes] = TemporaryFile(dir=self._folder)
        self._places: IO[bytes] = TemporaryFile(dir=self._folder)
        self._end = 0
        return self

    def __exit__(self, *_: object) -> None:
        self._records.close()
        self._places.close()

    def add(self, fingerprint: Fingerprint) -> None:
        """Keep a fingerprint: 273 bytes and its source, on disk."""
        head = _HEAD.pack(fingerprint.exact, self._end, fingerprint.held)
        self._records.write(head + fingerprint.near)
        place = fingerprint.source.encode("utf-8", "surrogateescape") + b"\n"
        self._end += self._places.write(place)

    def find(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is twice within a part, and which held-out conversations are also trained on.

        Both have `exact`, `near` and `examples` (pairs of `path:line`). Within a part, `exact`
        counts the copies after the first, `near` the distinct conversations that have a near
        duplicate. Of the overlap, both count held-out conversations, `near` those without an
        exact copy in training; its pairs name the trained one first.
        """
        if not self._end:
            return {"exact": 0, "near": 0, "examples": []}, {"exact": 0, "near": 0, "examples": []}
        self._records.flush()
        records = np.memmap(self._records, dtype=_RECORD, mode="r")
        exact, held = np.array(records["exact"]), np.array(records["held"])
        order = np.lexsort((held, exact))  # by content, so that the order of adding is no matter
        begins = np.ones(len(order), dtype=bool)
        begins[1:] = np.diff(exact[order]).astype(bool) | np.diff(held[order])
        group = np.cumsum(begins) - 1
        distinct = order[begins]
        trained = np.zeros(len(distinct), dtype=bool)  # held-out ones that are in training too
        trained[1:] = exact[distinct[1:]] == exact[distinct[:-1]]
        inside, across = _find_mates(records["near"], distinct, held[distinct])
        across[trained] = -1

        copies = np.bincount(group)
        repeats = np.stack([distinct[group], order], axis=1)[~begins]
        duplicates = {
            "exact": len(repeats),
            "near": int((inside >= 0).sum()),
            "examples": self._name(records, repeats)
            + self._name(records, np.sort(_pairs(distinct, inside), axis=1)),
        }
        both = np.where(trained, np.arange(len(distinct)) - 1, -1)
        overlap = {
            "exact": int(copies[trained].sum()),
            "near": int(copies[across >= 0].sum()),
            "examples": self._name(records, _pairs(distinct, both))
            + self._name(records, _pairs(distinct, across)),
        }
        return duplicates, overlap

    def _name(self, records: NDArray[Any], pairs: Indices) -> list[list[str]]:
        """The places of the first few pairs of records."""
        return [
            [self._place(int(records["place"][index])) for index in pair]
            for pair in np.unique(pairs, axis=0)[:_NUM_EXAMPLES]
        ]

    def _place(self, start: int) -> str:
        self._places.seek(start)
        return self._places.readline().decode("utf-8", "surrogateescape").rstrip("\n")


def _pairs(distinct: Indices, mates: Indices) -> Indices:
    """(mate, itself) for each distinct conversation that has a mate, as places in the records."""
    (found,) = np.nonzero(mates >= 0)
    return np.stack([distinct[mates[found]], distinct[found]], axis=1)


def _find_mates(near: NDArray[Any], distinct: Indices, held: Flags) -> tuple[Indices, Indices]:
    """For each distinct conversation one that is like it in its own part, and for each held-out
    one such in training; -1 where there is none.

    Signatures are sorted again and again, each time from another of their hashes on, and each
    is compared with those beside it: what is alike stands together sooner or later, also among
    thousands that follow one template, where buckets of hashes are full of what is not alike.
    """
    inside = np.full(len(distinct), -1)
    across = inside.copy()
    for start in range(0, _NUM_HASHES, _BAND):
        keys = near[distinct[:, None], (start + np.arange(_KEY)) % _NUM_HASHES]
        order = np.argsort(keys.view(f"S{4 * _KEY}").ravel(), kind="stable")
        beside, opposite = _neighbours(order, held)
        first, second = _keep_alike(near, distinct, keys[:, 0], beside)
        inside[second], inside[first] = first, second
        first, second = _keep_alike(near, distinct, keys[:, 0], opposite)
        across[second] = first
    return inside, across


def _neighbours(order: Indices, held: Flags) -> tuple[Indices, Indices]:
    """Pairs that follow one another within a part; (training, held-out) pairs with none between."""
    is_held = held[order]
    trained, kept = order[~is_held], order[is_held]
    follow = [np.stack([part[:-1], part[1:]]) for part in (trained, kept)]
    num_before = np.cumsum(~is_held)[is_held]
    left, right = num_before > 0, num_before < len(trained)
    opposite = [
        np.stack([trained[num_before[left] - 1], kept[left]]),
        np.stack([trained[num_before[right]], kept[right]]),
    ]
    return np.concatenate(follow, axis=1), np.concatenate(opposite, axis=1)


def _keep_alike(near: NDArray[Any], distinct: Indices, hashes: Indices, pairs: Indices) -> Indices:
    """The pairs whose signatures agree in enough hashes, the given one among them."""
    pairs = pairs[:, hashes[pairs[0]] == hashes[pairs[1]]]
    alike = [np.zeros(0, dtype=bool)]
    for start in range(0, pairs.shape[1], _BLOCK_PAIRS):
        first, second = near[distinct[pairs[:, start : start + _BLOCK_PAIRS]]]
        alike.append((first == second).mean(axis=1) >= ALIKE)
    return pairs[:, np.concatenate(alike)]
