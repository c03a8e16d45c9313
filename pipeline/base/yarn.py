"""Longer contexts than a base was trained on, by static YaRN: its files beside another config."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import BaseError, RunError
from pipeline.recipe import Recipe
from pipeline.run import whole_folder

log = logging.getLogger(__name__)

CONFIG = "config.json"
# Qwen3's 40,960 positions are 32,768, which it was trained on, and 8,192 for a prompt before them
# (Qwen3, docs/source/deployment/vllm.md); YaRN counts from what was trained on.
TRAINED_ON = {40_960: 32_768}
STEP = 4
"""`auto` takes whole quarters: a few tokens more in the data are not another base."""
MANY_SHORT = 0.9


def with_room(base: Path, recipe: Recipe, report: Mapping[str, Any], out: Path) -> Path:
    """The base to train on: `base` itself, or `out`, where it is under YaRN.

    `out` then holds links to the base's files, and a config.json that says the factor and the
    context. `auto` takes the least factor that holds the longest row of the data stage's `report`;
    a row holds its reply. Raises RunError for a row that has no room, BaseError for a config that
    cannot be extended.
    """
    config, yarn = read_config(base), recipe.yarn
    longest = _longest(report, recipe.data.max_tokens)
    if yarn == "none" or (yarn == "auto" and longest <= trained_on(config, base)):
        _check_room(config, longest, base)
        return base
    trained = trained_on(config, base)
    factor = math.ceil(longest * STEP / trained) / STEP if yarn == "auto" else yarn
    extended = under_yarn(config, trained, float(factor))
    _check_room(extended, longest, base)
    if not _stands(base, extended, out):
        room = extended["max_position_embeddings"]
        log.info("YaRN: a context of %s tokens instead of %s", f"{room:,}", f"{trained:,}")
        _speak_of_short_rows(report, trained)
        _write(base, extended, out)
    return out


def read_config(base: Path) -> dict[str, Any]:
    """A base's config.json; BaseError where it is none."""
    try:
        config = json.loads((base / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseError(f"{base / CONFIG} cannot be read; fetch the base again") from error
    if not isinstance(config, dict):
        raise BaseError(f"{base / CONFIG} is no model's config; fetch the base again")
    return config


def trained_on(config: Mapping[str, Any], base: Path) -> int:
    """The context in tokens a base was trained on; BaseError where it says none, or is extended."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise BaseError(f"{base} has a {kind} scaling of its own already; set yarn: none")
    positions = room_of(config)
    if positions is None:
        raise BaseError(f"{base / CONFIG} gives no max_position_embeddings for YaRN to extend")
    return TRAINED_ON.get(positions, positions)


def under_yarn(config: Mapping[str, Any], trained: int, factor: float) -> dict[str, Any]:
    """The config of a context `factor` times as long as `trained` tokens.

    max_position_embeddings is set, too: some versions of transformers and llama.cpp take the factor
    or the context from it.
    """
    room = int(factor * trained)
    scaling = {
        "rope_type": "yarn",
        "factor": room / trained,
        "original_max_position_embeddings": trained,
    }
    extended = dict(config) | {"max_position_embeddings": room, "rope_scaling": scaling}
    return in_both_spellings(extended)


def in_both_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose rotary embeddings are told in the words of transformers 4 and of 5.

    The former and most engines read rope_theta and rope_scaling, the latter and llama.cpp's
    converter rope_parameters; whoever finds only the other words falls back to a theta of 10,000,
    or to no scaling, without a word. Where both are there, rope_scaling is what holds, as in
    transformers 5.
    """
    told, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    theta = told.get("rope_theta", config.get("rope_theta"))
    if theta is None:  # one for each kind of layer, or none at all: left as it is
        return dict(config)
    rope = {"rope_type": scaling.get("type", "default")} | told | scaling | {"rope_theta": theta}
    rope.pop("type", None)
    both = dict(config) | {"rope_theta": theta, "rope_parameters": rope}
    if rope["rope_type"] != "default":
        both["rope_scaling"] = {key: rope[key] for key in rope if key != "rope_theta"}
    return both


def _longest(report: Mapping[str, Any], max_tokens: int) -> int:
    """Tokens of the longest row; of a pair the report tells those of both replies together."""
    parts: list[dict[str, int]] = [report[part] for part in ("train", "eval")]
    pair = max(part.get("longest_pair", 0) for part in parts)
    return max(min(pair, max_tokens), *(part["longest_row"] for part in parts))


def room_of(config: Mapping[str, Any]) -> int | None:
    """The context in tokens, as a config says; None where it does not."""
    room = config.get("max_position_embeddings")
    return room if type(room) is int and room > 0 else None


def _check_room(config: Mapping[str, Any], longest: int, base: Path) -> None:
    room = room_of(config)
    if room is not None and longest > room:
        raise RunError(
            f"the longest row has {longest:,} tokens and {base} has room for {room:,}: set "
            "yarn: auto, or a lower data.max_tokens"
        )


def _speak_of_short_rows(report: Mapping[str, Any], trained: int) -> None:
    """Static YaRN is in force for short texts, too."""
    sizes = report["histograms"]["train"]["row_tokens"]
    short = sum(count for size, count in sizes.items() if int(size) <= trained)
    share = short / max(1, sum(sizes.values()))
    if share > MANY_SHORT:
        log.warning(
            "%.0f%% of the rows would do without YaRN, which makes the model a little worse on "
            "short texts; for those, consider a run of their own with yarn: none",
            100 * share,
        )


def _stands(base: Path, config: Mapping[str, Any], out: Path) -> bool:
    try:
        links = {path.name: path.resolve() for path in out.iterdir() if path.name != CONFIG}
        return links == _files(base) and read_config(out) == config
    except (OSError, BaseError):
        return False


def _write(base: Path, config: Mapping[str, Any], out: Path) -> None:
    with whole_folder(out) as temporary:
        for name, path in _files(base).items():
            (temporary / name).symlink_to(path)
        text = json.dumps(config, indent=2) + "\n"
        (temporary / CONFIG).write_text(text, encoding="utf-8")


def _files(base: Path) -> dict[str, Path]:
    """Every file of a base but its config."""
    files = (path for path in base.iterdir() if path.is_file() and path.name != CONFIG)
    return {path.name: path.resolve() for path in files}
