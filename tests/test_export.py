"""Checkpoints to GGUF files, by llama.cpp's own converter."""

import json
import shutil
from pathlib import Path

import pytest
from gguf import GGUFReader
from safetensors.torch import load_file

from pipeline import export
from pipeline.base.checkpoint import tensor_bytes
from pipeline.errors import BaseError, RunError
from pipeline.export import export_gguf


def test_a_checkpoint_becomes_a_gguf_file_of_the_same_weights(
    tiny_base: Path, tiny_gguf: Path
) -> None:
    reader = GGUFReader(tiny_gguf)
    weights = load_file(tiny_base / "model.safetensors")
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == len(weights)
    head = bytes(tensor_bytes(weights["lm_head.weight"]))
    assert found["output.weight"].data.tobytes() == head, "bf16 stays bf16"
    assert reader.get_field("general.architecture").contents() == "qwen3"
    assert reader.get_field("qwen3.rope.freq_base").contents() == 1_000_000.0
    assert reader.get_field("tokenizer.ggml.pre").contents() == "qwen2"


def test_the_dialogues_files_lie_beside(tiny_base: Path, tiny_gguf: Path) -> None:
    folder = tiny_gguf.parent
    names = {"tokenizer.json", "chat_template.jinja"}
    assert {path.name for path in folder.iterdir()} == {tiny_gguf.name, *names}
    for name in names:
        assert (folder / name).read_bytes() == (tiny_base / name).read_bytes()
    assert [path.name for path in folder.parent.iterdir()] == ["exports"]


def test_a_folder_that_is_no_checkpoint_is_refused_with_the_converters_last_words(
    tmp_path: Path,
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "run" / "exports"
    (out / "older").mkdir(parents=True)
    with pytest.raises(RunError, match=r"could not be converted to GGUF: .*config\.json") as caught:
        export_gguf(empty, out, "none", ["bf16"])
    assert "\n" not in str(caught.value)
    assert [path.name for path in out.parent.rglob("*")] == ["exports", "older"]


def test_a_template_kept_in_the_tokenizers_config_becomes_a_file(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_convert", lambda _, file, __: file.write_bytes(b"GGUF"))
    old = tmp_path / "old"
    shutil.copytree(tiny_base, old)
    template = (old / "chat_template.jinja").read_text(encoding="utf-8")
    (old / "chat_template.jinja").unlink()
    config = json.loads((old / "tokenizer_config.json").read_text(encoding="utf-8"))
    (old / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))

    export_gguf(old, tmp_path / "exports", "x", ["bf16"])

    served = (tmp_path / "exports" / "chat_template.jinja").read_text(encoding="utf-8")
    assert served == template


def test_a_checkpoint_without_a_template_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_convert", lambda _, file, __: file.write_bytes(b"GGUF"))
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "tokenizer.json").write_text("{}")
    with pytest.raises(BaseError, match="a checkpoint needs its chat template"):
        export_gguf(tmp_path / "checkpoint", tmp_path / "exports", "x", ["bf16"])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
