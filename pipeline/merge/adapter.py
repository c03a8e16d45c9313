"""An adapter in PEFT's layout: what it makes of each weight, and which kinds are refused."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.base.checkpoint import DTYPES, Tensor, adapter_file, copy_blocks, read_header
from pipeline.errors import RunError
from pipeline.merge.change import (
    BiasAddition,
    Chain,
    Change,
    Dora,
    EmbeddingDora,
    Lora,
    Replacement,
    TokenRows,
)
from pipeline.merge.settings import Settings, read_settings

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]"
    r"|lora_magnitude_vector|token_adapter\.trainable_tokens_delta)"
)
_LINEAR = {"lora_A.weight", "lora_B.weight"}
_EMBEDDING = {"lora_embedding_A", "lora_embedding_B"}
_MAGNITUDE, _BIAS = "lora_magnitude_vector", "lora_B.bias"
_TOKENS = "token_adapter.trainable_tokens_delta"


def read_adapter(adapter: Path) -> dict[str, Change]:
    """What an adapter has learnt, by the name of the weight it changes.

    Raises RunError for a kind of adapter that cannot be merged here, for tensors that are no part
    of one and for values that are not finite; BaseError for a file that is not safetensors.
    """
    settings = read_settings(adapter)
    parts, whole = _sort(adapter, _read_tensors(adapter))
    for saved in settings.modules_to_save or ():
        if not any(saved in name for name in whole):
            raise RunError(f"{adapter} names {saved} in modules_to_save and has no weights of it")
    if settings.trainable_token_indices and not any(_TOKENS in found for found in parts.values()):
        raise RunError(f"{adapter} names trainable_token_indices and has no rows of them")
    changes: dict[str, Change] = {name: Replacement(tensor) for name, tensor in whole.items()}
    for name, found in parts.items():
        module = _Module(adapter, settings, name, found, whole.get(f"{name}.weight"))
        for weight, change in module.changes():
            before = changes.get(weight)
            changes[weight] = Chain((before, change)) if before else change
    return changes


def _read_tensors(adapter: Path) -> list[Tensor]:
    """Where an adapter's tensors lie; their values are known to be finite then."""
    tensors = read_header(adapter_file(adapter))
    for tensor in tensors:
        for block in copy_blocks(tensor):
            if not torch.isfinite(torch.frombuffer(block, dtype=DTYPES[tensor.dtype])).all():
                raise RunError(
                    f"{adapter}: {tensor.name} holds values that are not finite; train again"
                )
    if not tensors:
        raise RunError(f"{adapter} holds no weights; save it again")
    return tensors


def _sort(
    adapter: Path, tensors: list[Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The parts of each adapted module, and the model's own tensors that came along, by name."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    whole: dict[str, Tensor] = {}
    for tensor in tensors:
        name = tensor.name.removeprefix(_PREFIX)
        if found := _PART.fullmatch(name):
            parts[found["module"]][found["part"]] = tensor
        elif name == tensor.name or "lora_" in name or "token_adapter" in name:
            raise RunError(f"{adapter} cannot be merged: {tensor.name} is no part of a known kind")
        else:
            # PEFT loads whatever has a name of the model's; `base_layer` is its wrapper's word.
            whole[name.replace(".base_layer.", ".")] = tensor
    return parts, whole


@dataclass(frozen=True)
class _Module:
    """What an adapter holds of one module."""

    adapter: Path
    settings: Settings
    name: str
    parts: Mapping[str, Tensor]
    start: Tensor | None
    """The weight it was trained on, if that came along."""

    def changes(self) -> Iterator[tuple[str, Change]]:
        """What becomes of its weights, by their names."""
        given = self.parts.keys()
        if given == {_TOKENS}:
            yield f"{self.name}.weight", self._token_rows(self.parts[_TOKENS])
        elif _LINEAR <= given <= _LINEAR | {_MAGNITUDE, _BIAS}:
            a, b = self.parts["lora_A.weight"], self.parts["lora_B.weight"]
            lora = Lora(a, b, self.settings.scale(self.name))
            yield f"{self.name}.weight", self._dora(lora)
            if _BIAS in given:
                yield f"{self.name}.bias", BiasAddition(self.parts[_BIAS], lora.scale)
        elif _EMBEDDING <= given <= _EMBEDDING | {_MAGNITUDE}:
            a, b = self.parts["lora_embedding_A"], self.parts["lora_embedding_B"]
            lora = Lora(a, b, self.settings.scale(self.name), "embedding")
            yield f"{self.name}.weight", self._dora(lora)
        else:
            raise RunError(
                f"{self.adapter}: {self.name} has only {', '.join(sorted(given))}; save it again"
            )

    def _dora(self, lora: Lora) -> Change:
        """LoRA's change, or DoRA's where the adapter is one."""
        self._check_rank(lora)
        magnitude = self.parts.get(_MAGNITUDE)
        if (magnitude is not None) != bool(self.settings.use_dora):
            there = "missing" if magnitude is None else "there"
            raise RunError(
                f"{self.adapter}: use_dora is {self.settings.use_dora}, and {self.name}."
                f"{_MAGNITUDE} is {there}; save the adapter again"
            )
        if magnitude is None:
            return lora
        length = lora.shape[0 if lora.of == "linear" else 1]
        if magnitude.shape != (length,):
            raise RunError(
                f"{self.adapter}: {magnitude.name} is {magnitude.shape}, not ({length},); save the "
                "adapter again"
            )
        if lora.of == "linear":
            return Dora(lora, magnitude)
        if self.start is None or self.start.shape != lora.shape:
            raise RunError(
                f"{self.adapter}: DoRA of {self.name} is by the lengths of its whole columns; save "
                "the adapter with save_embedding_layers=True"
            )
        return EmbeddingDora(lora, magnitude, self.start)

    def _check_rank(self, lora: Lora) -> None:
        rank = self.settings.rank(self.name)
        for factor, axis in ((lora.a, 0), (lora.b, 1)):
            if len(factor.shape) != 2 or factor.shape[axis] != rank:
                raise RunError(
                    f"{self.adapter}: {factor.name} is {factor.shape}, and the rank is {rank} in "
                    "adapter_config.json; save the adapter again"
                )

    def _token_rows(self, values: Tensor) -> TokenRows:
        said = self.settings.trainable_token_indices or []
        if isinstance(said, dict):
            said = next((ids for name, ids in said.items() if self.name.endswith(name)), [])
        if len(values.shape) != 2 or not 0 < len(said) == len({*said}) == values.shape[0]:
            raise RunError(
                f"{self.adapter}: {values.name} is {values.shape}, and trainable_token_indices "
                f"names {len({*said})} tokens for it; save the adapter again"
            )
        return TokenRows(values, tuple(said))
