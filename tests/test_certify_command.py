"""`pipeline certify --artefact`: any checkpoint or GGUF file, whoever made it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapters import make_adapter
from conftest import Pipeline, conversation
from safetensors.torch import load_file

from pipeline.base.checkpoint import SINGLE
from pipeline.certify.foreign import kind_of
from pipeline.errors import RunError
from pipeline.export import export_gguf
from pipeline.merge import merge


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter, what was made of it, what was not, and conversations in a foreign format."""
    folder = tmp_path_factory.mktemp("foreign")
    make_adapter(tiny_base, folder / "adapter", b_scale=2e-3)
    merge(tiny_base, folder / "adapter", folder / "merged")
    answers = [
        {
            "conversations": [
                {"from": "human", "value": f"How many are {number} shops?"},
                {"from": "gpt", "value": f"They are {number}, if nobody opens one more today."},
            ]
        }
        for number in range(8)
    ]
    text = "".join(json.dumps(answer) + "\n" for answer in answers)
    (folder / "chats.jsonl").write_text(text, encoding="utf-8")
    return folder


def options(base: Path, folder: Path, /, **others: Path) -> list[str]:
    paths = {
        "artefact": folder / "merged",
        "adapter": folder / "adapter",
        "base": base,
        "prompts": folder / "chats.jsonl",
    }
    return [word for name, path in (paths | others).items() for word in (f"--{name}", str(path))]


def test_a_true_merge_by_anybody_passes_and_a_base_as_gguf_does_not(
    tiny_base: Path, tiny_gguf: Path, folder: Path, pipeline: Pipeline
) -> None:
    out = folder / "certificate.json"
    said = pipeline("certify", *options(tiny_base, folder), "--out", str(out))
    assert said.code == 0, said.err
    certificate = json.loads(said.out)
    assert certificate == json.loads(out.read_text())
    assert certificate["artefacts"].keys() == {"merged"}
    assert certificate["artefacts"]["merged"]["effect"] > 0.95
    assert "wrong_values" not in certificate["artefacts"]["merged"]

    said = pipeline("certify", *options(tiny_base, folder, artefact=tiny_gguf))
    assert said.code == 3
    assert said.err.splitlines()[-1].startswith("error: not certified: bf16: effect preserved ")
    assert json.loads(said.out)["artefacts"]["bf16"]["passed"] is False


def test_an_adapter_of_a_base_in_4_bit_is_held_against_that(
    tiny_base: Path, folder: Path, pipeline: Pipeline
) -> None:
    said = pipeline("certify", *options(tiny_base, folder), "--trained-on", "nf4")
    assert json.loads(said.out)["artefacts"]["merged"]["mean_kl"] > 1e-4


def test_a_bad_input_is_one_sentence(
    tiny_base: Path, folder: Path, pipeline: Pipeline, tmp_path: Path
) -> None:
    unanswered = {"messages": [{"role": "user", "content": "And?"}]}
    (tmp_path / "unanswered.jsonl").write_text(json.dumps(unanswered), encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "note.txt").write_text("no model")
    wider = Path(shutil.copytree(folder / "merged", tmp_path / "wider"))
    config = json.loads((wider / "config.json").read_text()) | {"vocab_size": 400}
    (wider / "config.json").write_text(json.dumps(config))
    awq = Path(shutil.copytree(folder / "merged", tmp_path / "awq"))
    config = json.loads((awq / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (awq / "config.json").write_text(json.dumps(config))
    cut = Path(shutil.copytree(folder / "merged", tmp_path / "cut"))
    (cut / "model.safetensors").unlink()
    cases = [
        ({"artefact": tmp_path / "none"}, "none is neither a checkpoint's folder nor a .gguf file"),
        ({"artefact": tmp_path / "note.txt"}, "is neither a checkpoint's folder"),
        ({"artefact": folder / "adapter"}, "adapter holds no checkpoint: config.json is missing"),
        ({"artefact": wider}, f"was not made from {tiny_base}: its vocab_size is 400, not 320"),
        ({"artefact": awq}, "awq is in awq; of checkpoints in fewer bits only"),
        ({"artefact": cut}, "cut holds no weights: model.safetensors is missing"),
        ({"base": tmp_path / "none"}, "none is no folder: give one with a checkpoint"),
        ({"adapter": folder / "merged"}, "merged is not an adapter: adapter_config.json is missin"),
        ({"prompts": tmp_path / "none"}, "none"),
        (
            {"prompts": tmp_path / "unanswered.jsonl"},
            "unanswered.jsonl:1: there is no assistant turn",
        ),
        ({"prompts": tmp_path / "empty.jsonl"}, "empty.jsonl"),
    ]
    for changed, words in cases:
        said = pipeline("certify", *options(tiny_base, folder, **changed))
        assert said.code == 2, words
        assert said.out == ""
        assert words in said.err.splitlines()[-1], said.err


@pytest.mark.parametrize("which", ["artefact", "adapter", "base"])
def test_a_pickle_is_refused_unopened(
    tiny_base: Path,
    folder: Path,
    pipeline: Pipeline,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    which: str,
) -> None:
    caplog.set_level("INFO")
    whole = {"artefact": folder / "merged", "adapter": folder / "adapter", "base": tiny_base}[which]
    pickled = Path(shutil.copytree(whole, tmp_path / "pickled"))
    (weights,) = pickled.glob("*model.safetensors")
    name = "adapter_model.bin" if which == "adapter" else "pytorch_model.bin"
    torch.save(load_file(weights), pickled / name)  # which PEFT and transformers would load
    weights.unlink()
    said = pipeline("certify", *options(tiny_base, folder, **{which: pickled}))
    assert (said.code, said.out) == (2, "")
    assert "which can run code" in said.err.splitlines()[-1]
    assert "comparing" not in caplog.text, "minutes of work before the error"


def test_a_run_and_a_pair_are_not_given_together(pipeline: Pipeline, workplace: Path) -> None:
    said = pipeline("certify")
    assert said.code == 2
    assert "or --artefact, --adapter, --base and --prompts" in said.err
    assert "give it alone" in pipeline("certify", "mine.yaml", "--base", "base").err
    assert pipeline("certify", "--artefact", "base", "--base", "base").code == 2


def test_a_checkpoint_is_judged_as_what_its_configuration_says(
    tiny_base: Path, folder: Path, tmp_path: Path
) -> None:
    assert kind_of(folder / "merged", tiny_base) == "merged"
    for stored, kind in (("float-quantized", "fp8"), ("pack-quantized", "int4")):
        config = json.loads((folder / "merged" / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "compressed-tensors", "format": stored}
        (tmp_path / kind).mkdir()
        (tmp_path / kind / SINGLE).touch()
        (tmp_path / kind / "config.json").write_text(json.dumps(config))
        assert kind_of(tmp_path / kind, tiny_base) == kind


def test_a_gguf_file_is_judged_as_what_it_says_it_is(
    tiny_base: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    export_gguf(tiny_base, tmp_path / "exports", "a", ["f16", "q8_0"])
    odd = shutil.copyfile(tmp_path / "exports" / "a-q8_0.gguf", tmp_path / "odd.gguf")
    assert kind_of(tiny_gguf, tiny_base) == "bf16"
    assert kind_of(tmp_path / "exports" / "a-f16.gguf", tiny_base) == "f16"
    assert kind_of(odd, tiny_base) == "q8_0"
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, or not")
    with pytest.raises(RunError, match=r"broken\.gguf is not a model's GGUF file"):
        kind_of(tmp_path / "broken.gguf", tiny_base)
    smaller = tmp_path / "smaller"
    smaller.mkdir()
    config = json.loads((tiny_base / "config.json").read_text()) | {"num_hidden_layers": 1}
    (smaller / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="its num_hidden_layers is 2, not 1"):
        kind_of(tiny_gguf, smaller)


def test_conversations_are_read_in_our_own_format_too(
    tiny_base: Path, folder: Path, pipeline: Pipeline, tmp_path: Path
) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(conversation(f"{i}?") for i in range(4)), encoding="utf-8")
    said = pipeline("certify", *options(tiny_base, folder, prompts=chats))
    assert json.loads(said.out)["artefacts"]["merged"]["by_mode"].keys() == {"thinking"}
