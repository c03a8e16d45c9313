"""A checkpoint to GGUF files, by llama.cpp's own converter in an interpreter of its own."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.base.wheels import GGUF_CONVERTER, unpacked
from pipeline.chat import template_text
from pipeline.errors import RunError
from pipeline.run import whole_folder

log = logging.getLogger(__name__)


def export_gguf(checkpoint: Path, out: Path, name: str, formats: Sequence[str]) -> None:
    """Write NAME-FORMAT.gguf for each format into a folder, with the dialogue's files beside them.

    The server renders by these files, not by the template inside the GGUF, so that it needs no
    torch. Raises RunError with the converter's last words; nothing is left under `out` then.
    """
    with whole_folder(out) as temporary:
        for gguf_format in formats:
            file = temporary / f"{name}-{gguf_format}.gguf"
            log.info("writing %s", out / file.name)
            _convert(checkpoint, file, gguf_format)
        shutil.copyfile(checkpoint / "tokenizer.json", temporary / "tokenizer.json")
        # Older checkpoints keep the template in tokenizer_config.json; a server gets it as a file.
        (temporary / "chat_template.jinja").write_text(template_text(checkpoint), encoding="utf-8")


def _convert(checkpoint: Path, file: Path, gguf_format: str) -> None:
    # The converter's wheel holds its own copy of the `gguf` package, which must not be imported
    # in this process: transformers' loader wants the one from the package index.
    converter = Path(__file__).with_name("gguf_converter.py")
    command = [sys.executable, str(converter), str(checkpoint)]
    command += ["--outtype", gguf_format, "--outfile", str(file)]
    environment = os.environ | {"PYTHONPATH": str(unpacked(GGUF_CONVERTER))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not file.is_file():
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RunError(f"{checkpoint} could not be converted to GGUF: {reason}")
