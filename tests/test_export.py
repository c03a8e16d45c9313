"""Checkpoints to GGUF files, by llama.cpp's own converter."""

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
from conftest import Pipeline
from gguf import GGUFReader
from safetensors.torch import load_file

from pipeline.base.checkpoint import tensor_bytes
from pipeline.errors import BaseError, RunError
from pipeline.export import Unmerged, adapter, export, export_gguf, quantise, stage
from pipeline.recipe import Export, GgufFormat, MinEffect


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


def test_the_template_and_the_end_of_a_turn_are_in_the_file(
    tiny_base: Path, tiny_gguf: Path
) -> None:
    reader = GGUFReader(tiny_gguf)
    template = (tiny_base / "chat_template.jinja").read_text(encoding="utf-8")
    assert reader.get_field("tokenizer.chat_template").contents() == template
    end = reader.get_field("tokenizer.ggml.eos_token_id").contents()
    assert reader.get_field("tokenizer.ggml.tokens").contents()[end] == "<|im_end|>"


def test_a_checkpoint_that_is_cut_off_is_refused_by_name(tiny_base: Path, tmp_path: Path) -> None:
    cut = tmp_path / "merged"
    shutil.copytree(tiny_base, cut)
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(RunError, match=r"merged/model\.safetensors is cut off or broken"):
        export_gguf(cut, tmp_path / "exports", "x", ["bf16"])
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (tiny_base / "model.safetensors").stat().st_size
    # 16 bits a value as converted, 4.9 as quantised: more than the checkpoint, less than two
    free = int(size * 1.2)
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free))
    with pytest.raises(RunError, match=r"q4_k_m of .* GB and the disk has 0\.0 GB free"):
        export_gguf(tiny_base, tmp_path / "exports", "x", ["q4_k_m"])
    assert not list(tmp_path.iterdir())
    settings = Export(gguf=("bf16",), adapter="gguf")
    unmerged = Unmerged(tmp_path, tiny_base, tiny_base, "tiny")
    with pytest.raises(RunError, match=r"GB and the disk has"):  # with a base beside it, two
        export(tiny_base, tmp_path / "exports", "x", settings, unmerged)
    assert not list(tmp_path.iterdir())


def test_a_format_without_its_library_is_refused_before_the_others_are_written(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline
) -> None:
    monkeypatch.setattr(quantise, "libgguf", None)
    monkeypatch.setattr(stage, "convert", lambda *_: pytest.fail("hours of work before the error"))
    with pytest.raises(RunError, match="q6_k cannot be written: libgguf is not installed"):
        export_gguf(tiny_base, tmp_path / "exports", "x", ["bf16", "q6_k"])

    said = pipeline("export", "--format", "list")
    lines = dict(line.split(maxsplit=1) for line in said.out.splitlines())
    assert lines.keys() == MinEffect.model_fields.keys() - {"merged"}
    works = {name for name in get_args(GgufFormat) if lines[name] == "works"}
    assert works == {"f16", "bf16", "q8_0"}
    assert lines["adapter"] == lines["adapter_gguf"] == "works"
    assert lines["q4_k_m"].startswith("libgguf is not installed: run pip install")


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
    monkeypatch.setattr(stage, "convert", lambda _, file, __: file.write_bytes(b"GGUF"))
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
    monkeypatch.setattr(stage, "convert", lambda _, file, __: file.write_bytes(b"GGUF"))
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "tokenizer.json").write_text("{}")
    with pytest.raises(BaseError, match="a checkpoint needs its chat template"):
        export_gguf(tmp_path / "checkpoint", tmp_path / "exports", "x", ["bf16"])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.fixture
def converted(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The formats the converter is asked for; what it writes is `tiny` in bfloat16."""
    formats: list[str] = []

    def convert(_: Path, file: Path, gguf_format: str) -> None:
        formats.append(gguf_format)
        shutil.copyfile(tiny_gguf, file)

    monkeypatch.setattr(stage, "convert", convert)
    monkeypatch.setattr(adapter, "convert", convert)
    return formats


def files_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_k_quants_are_made_from_bfloat16_which_does_not_stay(
    tiny_base: Path, tmp_path: Path, converted: list[str]
) -> None:
    out = tmp_path / "exports"
    export_gguf(tiny_base, out, "x", ["q4_k_m", "q8_0", "q6_k"])
    assert converted == ["q8_0", "bf16"], "once for both"
    names = {"x-q4_k_m.gguf", "x-q8_0.gguf", "x-q6_k.gguf"}
    assert files_in(out) == names | {"tokenizer.json", "chat_template.jinja"}
    types = {field: GGUFReader(out / field).get_field("general.file_type") for field in names}
    assert types["x-q4_k_m.gguf"].contents() == 15
    assert types["x-q6_k.gguf"].contents() == 18


def test_k_quants_are_made_from_the_bfloat16_file_where_one_is_wanted(
    tiny_base: Path, tmp_path: Path, converted: list[str]
) -> None:
    out = tmp_path / "exports"
    export_gguf(tiny_base, out, "x", ["q5_k_m", "bf16"])
    assert converted == ["bf16"]
    assert {"x-q5_k_m.gguf", "x-bf16.gguf"} < files_in(out)


def test_a_run_gets_a_modelfile_and_the_adapter_it_asked_for(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path, converted: list[str]
) -> None:
    out = tmp_path / "exports"
    settings = Export(gguf=("bf16", "q8_0"), adapter="gguf")
    unmerged = Unmerged(tiny_adapter, tiny_base, tiny_base, "tiny")
    export(tiny_base, out, "x", settings, unmerged)
    beside = {"x-lora.gguf", "base-bf16.gguf", "tokenizer.json", "chat_template.jinja"}
    assert {path.name for path in (out / "adapter").iterdir()} == beside
    assert (out / "Modelfile").read_text(encoding="utf-8").startswith("FROM ./x-q8_0.gguf\n")

    export(tiny_base, out, "x", Export(gguf=("bf16",)), None)
    names = {"x-bf16.gguf", "tokenizer.json", "chat_template.jinja", "Modelfile"}
    assert files_in(out) == names, "nothing of the older export is left"


def test_a_template_that_is_not_qwen3s_gets_no_modelfile(
    tiny_base: Path, tmp_path: Path, converted: list[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    export(other, tmp_path / "exports", "x", Export(gguf=("bf16",)), None)
    assert "Modelfile" not in files_in(tmp_path / "exports")
