"""What lies at a path, and what of it an engine is given."""

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest

from pipeline.engine.choose import Kind
from pipeline.errors import BaseError, GateMissed, PipelineError
from pipeline.run import Run
from pipeline.serve.offer.artefact import find_artefact, load, name_adapters
from pipeline.serve.offer.choice import Chosen


@pytest.fixture
def run_folder(tmp_path: Path, chat_folder: Path) -> Path:
    folder = tmp_path / "runs" / "my run"
    shutil.copytree(chat_folder, folder / "exports")
    for name in ("a-bf16.gguf", "a-q8_0.gguf", "a-q4_k_m.gguf"):
        (folder / "exports" / name).touch()
    return folder


def test_a_run_folder_its_exports_and_a_file_are_all_understood(run_folder: Path) -> None:
    exports = run_folder / "exports"

    assert find_artefact(run_folder).chosen.gguf == exports / "a-q8_0.gguf"
    assert find_artefact(run_folder).name == find_artefact(exports).name == "my-run"
    assert find_artefact(exports / "a-bf16.gguf").name == "a-bf16"
    (exports / "a-q8_0.gguf").unlink()
    assert find_artefact(run_folder).chosen.gguf == exports / "a-bf16.gguf"


def test_what_is_not_there_is_said_with_what_to_do(run_folder: Path) -> None:
    exports = run_folder / "exports"
    with pytest.raises(PipelineError, match="does not exist"):
        find_artefact(run_folder / "nothing")
    with pytest.raises(PipelineError, match=r"is not a \.gguf file"):
        find_artefact(exports / "tokenizer.json")
    (exports / "chat_template.jinja").unlink()
    with pytest.raises(BaseError, match=r"chat_template\.jinja is missing"):
        find_artefact(run_folder)
    (exports / "tokenizer.json").unlink()
    with pytest.raises(PipelineError, match=r"has no tokenizer\.json: run `pipeline export`"):
        find_artefact(exports)


def test_a_run_without_a_gguf_file_is_found_for_an_engine_elsewhere(run_folder: Path) -> None:
    for file in run_folder.glob("exports/*.gguf"):
        file.unlink()

    artefact = find_artefact(run_folder)

    assert (artefact.slug, artefact.chosen.gguf) == ("local/my-run", None)
    assert artefact.tokenizer == run_folder / "exports" / "tokenizer.json"


@pytest.mark.parametrize(("line", "name"), [("name: other", "other"), ("", "mine")])
def test_a_recipe_means_the_run_it_names(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, line: str, name: str
) -> None:
    monkeypatch.chdir(run_folder.parent.parent)
    recipe = Path("mine.yaml")
    recipe.write_text(f"{line}\nbase: b\ndata: {{sources: [{{path: c.jsonl}}]}}\n")
    with pytest.raises(PipelineError, match=f"runs/{name} does not exist: run the stages of mine"):
        find_artefact(recipe)
    run_folder.rename(run_folder.with_name(name))

    artefact = find_artefact(recipe)

    assert (artefact.slug, artefact.folder) == (f"local/{name}", Path("runs", name, "exports"))


@pytest.fixture
def merged_run(run_folder: Path, chat_folder: Path) -> Path:
    """The same with a merged checkpoint and without GGUF files."""
    for file in run_folder.glob("exports/*.gguf"):
        file.unlink()
    checkpoint_in(run_folder / "merged", chat_folder)
    return run_folder


def checkpoint_in(folder: Path, chat_folder: Path) -> Path:
    shutil.copytree(chat_folder, folder)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    return folder


def test_every_engine_is_given_the_form_it_loads(merged_run: Path, chat_folder: Path) -> None:
    merged, other = merged_run / "merged", checkpoint_in(merged_run.parent / "hf", chat_folder)
    (merged_run / "exports" / "a-bf16.gguf").touch()

    assert find_artefact(merged_run).chosen.gguf == merged_run / "exports" / "a-bf16.gguf"
    for_vllm = find_artefact(merged_run, kind="vllm")
    assert (for_vllm.slug, for_vllm.chosen.checkpoint) == ("local/my-run", merged)
    assert load(for_vllm, {}, "vllm").weights == merged
    assert find_artefact(merged_run, kind="elsewhere").chosen == Chosen(None)
    for kind in get_args(Kind)[:2]:
        found = find_artefact(other, kind=kind)
        assert (found.slug, found.chosen.checkpoint) == ("local/hf", other)
    with pytest.raises(PipelineError, match="vLLM does not load GGUF files"):
        find_artefact(merged_run / "exports" / "a-bf16.gguf", kind="vllm")
    with pytest.raises(PipelineError, match="vLLM does not load GGUF files, and q8_0"):
        find_artefact(merged_run, "q8_0", "vllm")
    with pytest.raises(PipelineError, match="q8_0 is a run's"):
        find_artefact(other, "q8_0")


def test_a_run_that_was_only_merged_is_served_from_its_checkpoint(merged_run: Path) -> None:
    shutil.rmtree(merged_run / "exports")

    for path in (merged_run, merged_run / "merged"):
        found = find_artefact(path)
        assert (found.slug, found.chosen.checkpoint) == ("local/my-run", merged_run / "merged")
        assert found.run is None, "no stage of ours is known to have made it"
    (merged_run / "recipe.json").touch()
    assert find_artefact(merged_run).run == Run(merged_run)


@pytest.mark.parametrize("kind", ["llamacpp", "vllm"])
def test_a_merged_checkpoint_that_missed_its_certificate_is_not_loaded(
    merged_run: Path, kind: Kind
) -> None:
    missed = {"mean_kl": 0.5, "passed": False}
    certificate = {"artefacts": {"merged": missed, "q8_0": {"passed": True}}, "passed": False}
    (merged_run / "certificate.json").write_text(json.dumps(certificate))

    with pytest.raises(GateMissed, match="not certified: merged"):
        load(find_artefact(merged_run, kind=kind), {}, kind)


def test_vllm_is_given_the_adapter_on_its_base_where_the_certificate_says_so(
    merged_run: Path, chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(merged_run.parent.parent)
    recipe = {"name": "x", "base": "mine", "data": {"sources": [{"path": "c.jsonl"}]}}
    (merged_run / "recipe.json").write_text(json.dumps(recipe))
    artefacts = {"merged": {"passed": True}, "adapter": {"passed": True}}
    certificate = {"artefacts": artefacts, "recommended": "adapter", "passed": True}
    (merged_run / "certificate.json").write_text(json.dumps(certificate))

    found = find_artefact(merged_run, kind="vllm").chosen
    assert (found.checkpoint, found.adapter) == (merged_run / "merged", None)
    assert "it is not among the exports; set export.adapter: peft" in found.why
    with pytest.raises(PipelineError, match=r"has no adapter for vLLM: set export.adapter: peft"):
        find_artefact(merged_run, "adapter", "vllm")
    adapter = adapter_in(merged_run / "exports" / "adapter")
    with pytest.raises(PipelineError, match=r"base of .* is not here as mine: serve the merged"):
        find_artefact(merged_run, kind="vllm")
    checkpoint_in(Path("mine"), chat_folder)

    artefact = find_artefact(merged_run, kind="vllm")
    files = load(artefact, {}, "vllm")
    assert (files.weights, files.adapters) == (Path("mine"), {"local/my-run": adapter})
    assert "for the certificate recommends the adapter" in artefact.chosen.why
    assert find_artefact(merged_run, "merged", "vllm").chosen.checkpoint == merged_run / "merged"
    certificate["artefacts"]["adapter"] = {"mean_kl": 0.5, "passed": False}
    (merged_run / "certificate.json").write_text(json.dumps(certificate))
    with pytest.raises(GateMissed, match="not certified: adapter"):
        load(artefact, {}, "vllm")


def adapter_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("{}")
    return folder


def test_adapters_are_named_on_the_command_line_and_held_to_their_certificates(
    merged_run: Path,
) -> None:
    adapter = adapter_in(merged_run / "adapter")
    named = name_adapters([f"one={adapter}", f"me/two={merged_run}"])
    assert named == {"local/one": adapter, "me/two": merged_run}
    artefact = find_artefact(merged_run, kind="vllm")

    files = load(artefact, named, "vllm")

    assert files.adapters == {"local/one": adapter, "me/two": adapter}
    for wrong in ("one", "=x", "one=", "a/b/c=x", "a b=x"):
        with pytest.raises(PipelineError, match="give NAME=FOLDER"):
            name_adapters([wrong])
    with pytest.raises(PipelineError, match="two adapters are called local/one"):
        name_adapters(["one=x", "local/one=y"])
    with pytest.raises(PipelineError, match=r"is not an adapter: adapter_config\.json is missing"):
        load(artefact, {"local/one": merged_run / "exports"}, "vllm")
    certificate = {"artefacts": {"adapter": {"mean_kl": 0.5, "passed": False}}}
    (merged_run / "certificate.json").write_text(json.dumps(certificate))
    with pytest.raises(GateMissed, match="not certified: adapter"):
        load(artefact, named, "vllm")


def test_an_adapter_on_a_gguf_file_needs_to_know_its_checkpoint(run_folder: Path) -> None:
    adapter = adapter_in(run_folder / "elsewhere" / "adapter")
    own = run_folder / "own.gguf"
    own.touch()
    artefact = find_artefact(run_folder)

    assert load(artefact, {"local/own": own}, "llamacpp").adapters == {"local/own": own}
    with pytest.raises(PipelineError, match=r"a-q8_0\.gguf without its config\.json"):
        load(artefact, {"local/one": adapter}, "llamacpp")
