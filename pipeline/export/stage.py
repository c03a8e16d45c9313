"""The export stage: what other programs serve, written from the merged checkpoint."""

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from pipeline.chat import template_text
from pipeline.errors import RunError
from pipeline.export.adapter import Unmerged, write_adapter
from pipeline.export.compress import compress, compressed_bytes, why_not_compress
from pipeline.export.convert import CONVERTED, convert, why_not_convert
from pipeline.export.mix import MIXES
from pipeline.export.ollama import has_qwen3_dialogue, write_modelfile
from pipeline.export.quantise import quantise, why_not_quantise
from pipeline.recipe import CompressedFormat, Export, GgufFormat
from pipeline.run import whole_folder

log = logging.getLogger(__name__)

# About how many bits a value takes; more where rows are no whole number of blocks of 256.
_BITS = {"f16": 16, "bf16": 16, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q4_k_m": 4.9}
_SOURCE = "bf16"
"""What K-quants are made from: nothing of a merged checkpoint is lost in it."""


def export(
    merged: Path,
    out: Path,
    name: str,
    settings: Export,
    unmerged: Unmerged | None,
    rows: Sequence[Sequence[int]] = (),
) -> None:
    """Write all that a recipe asks for into a folder: GGUF files, a Modelfile, the adapter, …

    `unmerged` is None where there is no adapter; `rows` of token ids are what int4 is calibrated
    on. Raises RunError in one sentence, also for a disk that is too small or fails; nothing is left
    under `out` then.
    """
    with whole_folder(out) as temporary:
        _check_compressing(merged, temporary, settings.compressed)
        if unmerged is not None:  # first: an adapter that is refused is so before hours of work
            bases = [_SOURCE] if settings.adapter == "gguf" else []
            _check_space(merged, temporary, settings.gguf, bases)
            write_adapter(unmerged, temporary, name, settings.adapter)
        _write_ggufs(merged, temporary, name, settings.gguf)
        if has_qwen3_dialogue(template_text(merged)):
            write_modelfile(merged, _file_name(name, settings.gguf[-1]), temporary / "Modelfile")
        else:
            log.info("no Modelfile: %s has not Qwen3's chat template", merged)
        for wanted in settings.compressed:
            folder = temporary / f"{name}-{wanted}"
            log.info("writing %s", folder.name)
            compress(merged, folder, wanted, rows, out.with_name("compressor.log"))


def export_gguf(checkpoint: Path, out: Path, name: str, formats: Sequence[str]) -> None:
    """Write NAME-FORMAT.gguf for each format into a folder, with the dialogue's files beside them.

    The server renders by these files, not by the template inside the GGUF, so that it needs no
    torch. Raises as `export` does.
    """
    with whole_folder(out) as temporary:
        _write_ggufs(checkpoint, temporary, name, formats)


def list_formats() -> Iterator[tuple[str, str]]:
    """What can be exported, as certificates name it, and why not here, or nothing."""
    for gguf_format in get_args(GgufFormat):
        reason = why_not_quantise() if gguf_format in MIXES else ""
        yield gguf_format, reason or why_not_convert()
    for compressed in get_args(CompressedFormat):
        yield compressed, why_not_compress()
    yield "adapter", ""
    yield "adapter_gguf", why_not_convert()  # of the base it is put on


def _check_compressing(checkpoint: Path, folder: Path, formats: Sequence[CompressedFormat]) -> None:
    """Refuse what cannot be compressed here, before the hours of converting."""
    if not formats:
        return
    if reason := why_not_compress():
        raise RunError(f"{formats[0]} cannot be written: {reason}")
    needed = sum(compressed_bytes(checkpoint, wanted) for wanted in formats)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"{', '.join(formats)} of {checkpoint} need about {needed / 1e9:.1f} GB and the disk "
            f"has {free / 1e9:.1f} GB free"
        )


def _write_ggufs(checkpoint: Path, folder: Path, name: str, formats: Sequence[str]) -> None:
    _check_space(checkpoint, folder, formats)
    files = {f: folder / _file_name(name, f) for f in formats}
    mixed = [f for f in formats if f in MIXES]
    if mixed and (reason := why_not_quantise()):  # before the hours of converting
        raise RunError(f"{mixed[0]} cannot be written: {reason}")
    source = files.get(_SOURCE, folder / "source.gguf")
    for gguf_format, file in files.items():
        if gguf_format in CONVERTED:
            log.info("writing %s", file.name)
            convert(checkpoint, file, gguf_format)
    if mixed and not source.exists():
        convert(checkpoint, source, _SOURCE)
    for gguf_format in mixed:
        log.info("writing %s", files[gguf_format].name)
        quantise(source, files[gguf_format], gguf_format)
    if _SOURCE not in files:
        source.unlink(missing_ok=True)
    shutil.copyfile(checkpoint / "tokenizer.json", folder / "tokenizer.json")
    # Older checkpoints keep the template in tokenizer_config.json; a server gets it as a file.
    (folder / "chat_template.jinja").write_text(template_text(checkpoint), encoding="utf-8")


def _file_name(name: str, gguf_format: str) -> str:
    return f"{name}-{gguf_format}.gguf"


def _check_space(
    checkpoint: Path, folder: Path, formats: Sequence[str], bases: Sequence[str] = ()
) -> None:
    """Refuse to begin what a disk cannot hold; checkpoints are of 16 bits a value, or more.

    `bases` are the formats of files of the same size that are written beside.
    """
    bits = sum(_BITS[f] for f in (*formats, *bases))
    if _SOURCE not in formats and any(f in MIXES for f in formats):
        bits += _BITS[_SOURCE]
    values = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) / 2
    needed, free = values * bits / 8, shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"{', '.join(formats)} of {checkpoint} need about {needed / 1e9:.1f} GB and the disk "
            f"has {free / 1e9:.1f} GB free"
        )
