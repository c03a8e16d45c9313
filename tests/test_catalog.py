"""What lies at a path, and which model a word means."""

import shutil
from pathlib import Path

import pytest
from scripted import ScriptedEngine

from pipeline.chat import Chat
from pipeline.errors import PipelineError, RequestError
from pipeline.serve.catalog import Catalog, Served, find_artefact


@pytest.fixture
def run_folder(tmp_path: Path, chat_folder: Path) -> Path:
    folder = tmp_path / "runs" / "my run"
    shutil.copytree(chat_folder, folder / "exports")
    for name in ("a-bf16.gguf", "a-q8_0.gguf", "a-q4_k_m.gguf"):
        (folder / "exports" / name).touch()
    return folder


def test_a_run_folder_its_exports_and_a_file_are_all_understood(run_folder: Path) -> None:
    exports = run_folder / "exports"

    assert find_artefact(run_folder).gguf == exports / "a-q8_0.gguf"
    assert find_artefact(run_folder).name == find_artefact(exports).name == "my-run"
    assert find_artefact(exports / "a-bf16.gguf").name == "a-bf16"
    (exports / "a-q8_0.gguf").unlink()
    assert find_artefact(run_folder).gguf == exports / "a-bf16.gguf"


def test_what_is_not_there_is_said_with_what_to_do(run_folder: Path) -> None:
    exports = run_folder / "exports"
    with pytest.raises(PipelineError, match="does not exist"):
        find_artefact(run_folder / "nothing")
    with pytest.raises(PipelineError, match=r"is not a \.gguf file"):
        find_artefact(exports / "tokenizer.json")
    (exports / "chat_template.jinja").unlink()
    with pytest.raises(PipelineError, match=r"has no chat_template\.jinja"):
        find_artefact(run_folder)
    for file in exports.glob("*.gguf"):
        file.unlink()
    with pytest.raises(PipelineError, match="run `pipeline export` first"):
        find_artefact(run_folder)


def test_a_model_is_found_by_slug_by_name_or_by_default(chat: Chat) -> None:
    served = Served("tiny", chat, ScriptedEngine(), 0)
    catalog = Catalog([served])

    assert [catalog.find(word) for word in ("local/tiny", "tiny", None)] == [served] * 3
    with pytest.raises(RequestError, match="other/tiny is not a valid model ID"):
        catalog.find("other/tiny")
