"""Adapters served unmerged: over the base as trained they are the model as trained."""

import asyncio
import json
import logging
import shutil
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import kl, make_adapter
from conftest import Pipeline
from gguf import GGUFReader
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.base.nf4 import load_as_trained
from pipeline.base.nf4_base import write_nf4_base
from pipeline.base.yarn import read_config, under_yarn
from pipeline.engine.llamacpp import LlamaCpp
from pipeline.engine.protocol import Engine
from pipeline.errors import EngineError, RunError
from pipeline.export import Unmerged, export_gguf, find_unmerged, stage
from pipeline.export.adapter import write_adapter
from pipeline.export.vllm import vllm_options, why_not_vllm
from pipeline.recipe import parse_recipe
from pipeline.run import Run
from pipeline.serve.offer.artefact import find_artefact, load
from pipeline.stages import Context

PROMPT = (72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100)
MAX_KL = 0.001


def ask(start: AbstractAsyncContextManager[Engine]) -> dict[int, float]:
    """The next token after PROMPT."""

    async def answer() -> dict[int, float]:
        async with start as engine:
            return await engine.next_token_logprobs(PROMPT, 320)

    return asyncio.run(answer())


@asynccontextmanager
async def llamacpp(gguf: Path, lora: Path | None, folder: Path) -> AsyncIterator[LlamaCpp]:
    log = folder / "log"
    start = LlamaCpp.start(gguf, slots=1, context_tokens=64, log=log, adapter=lora)
    async with await start as engine:
        yield engine


@torch.no_grad()
def off(trained: Any, found: dict[int, float]) -> float:
    """How far an engine's answer is from PEFT's own distribution, in nats."""
    return kl(trained.eval()(torch.tensor([PROMPT])).logits[0, -1], found)


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` with larger weights, so that it matters how they are rounded."""
    folder = shutil.copytree(tiny_base, tmp_path_factory.mktemp("bases") / "loud")
    weights = load_file(folder / "model.safetensors")
    louder = {name: w if "norm" in name else 5 * w for name, w in weights.items()}
    save_file(louder, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that changes a lot."""
    return make_adapter(base, tmp_path_factory.mktemp("strong") / "adapter", b_scale=0.03)


@pytest.fixture(scope="module")
def nf4_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bases") / "loud-nf4"
    write_nf4_base(base, "a hash", {}, out)
    return out


@pytest.fixture(scope="module")
def qlora_run(
    base: Path, nf4_base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run's exports: the base alone as `merged`, which it is not, and the adapter unmerged."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    export_gguf(base, run / "exports", "mine", ["bf16"])
    unmerged = Unmerged(adapter, base, nf4_base, "loud-nf4")
    write_adapter(unmerged, run / "exports", "mine", "gguf")
    return run


def test_a_qlora_adapter_over_its_base_in_nf4_is_the_model_as_trained(
    qlora_run: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    trained = PeftModel.from_pretrained(load_as_trained(base, "qlora"), str(adapter))
    folder = qlora_run / "exports"
    lora = folder / "adapter" / "mine-lora.gguf"

    def found(gguf: Path, lora: Path | None) -> float:
        return off(trained, ask(llamacpp(gguf, lora, tmp_path)))

    right = folder / "adapter" / "base-bf16.gguf"
    assert found(right, lora) < MAX_KL
    assert found(folder / "mine-bf16.gguf", lora) > 5 * MAX_KL, "the original base is another"
    assert found(right, None) > 20 * MAX_KL, "the adapter does matter"


@pytest.mark.parametrize("recommended", ["adapter", "merged"])
def test_serve_puts_the_adapter_on_its_base_where_that_is_recommended(
    qlora_run: Path, base: Path, adapter: Path, tmp_path: Path, recommended: str
) -> None:
    artefacts = {name: {"passed": True} for name in ("bf16", "adapter_gguf")}
    certificate = {"artefacts": artefacts, "recommended": recommended, "passed": True}
    (qlora_run / "certificate.json").write_text(json.dumps(certificate))

    files = load(find_artefact(qlora_run), {}, "llamacpp")
    answer = ask(llamacpp(files.weights, next(iter(files.adapters.values()), None), tmp_path))

    trained = PeftModel.from_pretrained(load_as_trained(base, "qlora"), str(adapter))
    merged = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    served, other = (trained, merged) if recommended == "adapter" else (merged, trained)
    assert off(served, answer) < MAX_KL
    assert off(other, answer) > 20 * MAX_KL


def spoil(lora: bytes, how: str) -> bytes:
    kinds = {"cut": lora[:-3000], "rubbish": b"hello"}
    return kinds[how] if how in kinds else lora.replace(b"qwen3", b"llama")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut", "file is corrupted or incomplete"),
        ("rubbish", "failed to load lora adapter from file"),
        ("other architecture", "model arch and LoRA arch mismatch"),
        ("a model", "expect general.type to be 'adapter'"),
        ("missing", "is missing: llama.cpp needs a GGUF file"),
    ],
)
def test_an_adapter_llama_cpp_cannot_take_is_one_sentence(
    qlora_run: Path, tmp_path: Path, how: str, said: str
) -> None:
    folder = qlora_run / "exports" / "adapter"
    lora = tmp_path / "lora.gguf"
    if how == "a model":
        shutil.copyfile(folder / "base-bf16.gguf", lora)
    elif how != "missing":
        lora.write_bytes(spoil((folder / "mine-lora.gguf").read_bytes(), how))

    with pytest.raises(EngineError, match=said) as caught:
        asyncio.run(
            LlamaCpp.start(
                folder / "base-bf16.gguf",
                slots=1,
                context_tokens=64,
                log=tmp_path / "log",
                adapter=lora,
            )
        )
    assert "\n" not in str(caught.value)
    assert str(lora) in str(caught.value)


@pytest.mark.slow
def test_under_yarn_the_base_has_the_context_it_was_trained_with(
    base: Path,
    nf4_base: Path,
    adapter: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    longer = tmp_path / "longer"
    shutil.copytree(base, longer)
    config = under_yarn(read_config(base), 32_768, 4.0)
    (longer / "config.json").write_text(json.dumps(config))
    (tmp_path / "exports").mkdir()

    with caplog.at_level(logging.INFO):
        write_adapter(
            Unmerged(adapter, longer, nf4_base, "loud-nf4"), tmp_path / "exports", "x", "gguf"
        )

    reader = GGUFReader(tmp_path / "exports" / "adapter" / "base-bf16.gguf")
    assert reader.get_field("qwen3.context_length").contents() == 4 * 32_768
    assert reader.get_field("qwen3.rope.scaling.factor").contents() == 4.0
    _, _, told = caplog.messages[-1].partition("--hf-overrides ")
    overrides = json.loads(told.strip("'"))
    assert overrides["rope_parameters"]["factor"] == 4.0
    assert overrides["max_position_embeddings"] == 4 * 32_768


RECIPE = """
base: {base}
data: {{sources: [{{path: chats.jsonl}}]}}
train: {{method: {method}}}
export: {{gguf: [bf16], adapter: peft}}
"""


def export_by_hand(pipeline: Pipeline, tiny_base: Path, base: str, method: str) -> Run:
    """`pipeline export` of a run whose earlier stages were made by hand."""
    Path("mine.yaml").write_text(RECIPE.format(base=base, method=method), encoding="utf-8")
    run = Run(Path("runs", "mine"))
    make_adapter(tiny_base, run.adapter)
    shutil.copytree(tiny_base, run.merged, dirs_exist_ok=True)
    run.record("merge", {}, [run.merged])
    said = pipeline("export", "mine.yaml")
    assert said.code == 0, said.err
    return run


@pytest.mark.parametrize(("method", "named"), [("lora", "tiny"), ("qlora", "tiny-nf4")])
def test_an_exported_adapter_names_its_base_and_no_path(
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pipeline: Pipeline,
    method: str,
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage, "convert", lambda _, file, __: file.write_bytes(b"GGUF"))
    shutil.copytree(tiny_base, tmp_path / "bases" / "tiny")

    run = export_by_hand(pipeline, tiny_base, "bases/tiny", method)

    exported = run.exports / "adapter"
    config = json.loads((exported / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], config["revision"]) == (named, None)
    assert str(tmp_path) not in (exported / "adapter_config.json").read_text(encoding="utf-8")
    base = AutoModelForCausalLM.from_pretrained(f"bases/{named}", dtype=torch.float32)
    found = PeftModel.from_pretrained(base, str(exported))
    trained = PeftModel.from_pretrained(load_as_trained(tiny_base, method), str(run.adapter))
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        torch.testing.assert_close(found.eval()(ids).logits, trained.eval()(ids).logits)


def test_a_base_from_the_hub_is_named_by_id_and_commit(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(tmp_path / "runs" / "mine")
    run.describe(base_commit="c0ffee")
    for method, named, revision in (
        ("lora", "Qwen/Qwen3-8B", "c0ffee"),
        ("qlora", "Qwen3-8B-nf4", None),
    ):
        recipe = parse_recipe(
            {
                "name": "mine",
                "base": "Qwen/Qwen3-8B",
                "data": {"sources": [{"path": "a.jsonl"}]},
                "train": {"method": method},
            },
            "here",
        )
        context = Context(recipe, run, tiny_base)
        unmerged = find_unmerged(context, context)
        assert unmerged is not None
        assert (unmerged.named, unmerged.revision) == (named, revision)
    assert not (tmp_path / "bases").exists(), "nobody asked for the base in NF4"


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"use_dora": True}, "it does not know DoRA; it has no place for .*magnitude"),
        ({"modules_to_save": ["lm_head"]}, "it does not know modules_to_save; it has no place"),
        ({"trainable_token_indices": [3]}, "it does not know trainable tokens; it has no place"),
        ({"bias": "all"}, "^it does not know a bias$"),
        ({"rank_pattern": {"q_proj": 600}}, "^rank 600 is above its 512$"),
    ],
)
def test_what_vllm_would_not_load_is_refused_with_its_reason(
    tiny_base: Path, tmp_path: Path, lora: dict[str, Any], said: str
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", **lora)
    (tmp_path / "exports").mkdir()
    with pytest.raises(RunError, match=r"vLLM does not load .*; remove export.adapter: peft"):
        write_adapter(
            Unmerged(adapter, tiny_base, tiny_base, "tiny"), tmp_path / "exports", "x", "peft"
        )
    assert not list((tmp_path / "exports").iterdir())
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(why_not_vllm(adapter))


def test_a_beginning_that_changes_the_base_is_not_vllms(adapter: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(adapter, tmp_path / "changed")
    config = json.loads((changed / "adapter_config.json").read_text(encoding="utf-8"))
    for begun, fine in (("pissa_niter_4", False), ("olora", False), ("eva", True), (True, True)):
        text = json.dumps(config | {"init_lora_weights": begun})
        (changed / "adapter_config.json").write_text(text, encoding="utf-8")
        assert (why_not_vllm(changed) == "") is fine


@pytest.mark.parametrize(("rank", "most"), [(4, 8), (16, 16), (17, 32), (512, 512)])
def test_vllm_is_told_the_least_rank_it_knows(
    adapter: Path, tmp_path: Path, rank: int, most: int
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank}), encoding="utf-8")
    assert vllm_options(tmp_path) == f"--enable-lora --max-lora-rank {most}"
    assert why_not_vllm(adapter) == ""
