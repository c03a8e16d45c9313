"""Stages: a change is noticed by every stage that is made from it, and by no other."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RunError
from pipeline.recipe import Recipe, parse_recipe
from pipeline.run import Run
from pipeline.stages import STAGES, Context, Inputs, find_stage, stale_before

NAMES = [stage.name for stage in STAGES]
# A file of each stage's products, in the order the stages run.
FILES = {
    "data": ("data/train.arrow", "data/eval.arrow", "data/eval_pairs.arrow", "data/report.json"),
    "train": ("adapter/adapter_config.json",),
    "merge": ("merged/config.json",),
    "export": ("exports/mine-q8_0.gguf", "before/base-q8_0.gguf"),
    "certify": ("certificate.json",),
    "evaluate": ("evaluation.json",),
}


def make(context: Context, stage: str, inputs: Inputs, **texts: str) -> None:
    """Let a stage have run: write its files and record it."""
    for name in FILES[stage]:
        path = context.run.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts.get(path.stem, name), encoding="utf-8")
    context.run.record(stage, inputs, find_stage(stage).products(context.run))


def recipe(**more: Any) -> Recipe:
    values = {
        "name": "mine",
        "base": "base",
        "data": {"sources": [{"path": "a.jsonl"}]},
        "evaluate": {"questions": "q.jsonl"},
    }
    return parse_recipe(values | more, "here")


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    """A run every stage of which is finished."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "q.jsonl", "held.jsonl"):
        Path(name).write_text(name, encoding="utf-8")
    base = tmp_path / "base"
    base.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "config.json", "model.safetensors"):
        (base / name).write_text(name, encoding="utf-8")
    context = Context(recipe(), Run.named("mine"), base)
    for stage in STAGES:
        make(context, stage.name, stage.inputs(context))
    return context


def stale(context: Context) -> dict[str, list[str]]:
    """Which finished stages differ, and in what."""
    changes = {
        stage.name: context.run.changed(stage.name, stage.inputs(context)) for stage in STAGES
    }
    return {name: changed for name, changed in changes.items() if changed}


def with_recipe(context: Context, **more: Any) -> Context:
    return Context(recipe(**more), context.run, context.base)


def test_nothing_is_stale_where_nothing_changed(context: Context) -> None:
    assert stale(context) == {}
    assert all(stale_before(name, context) == {} for name in NAMES)


def test_stages_are_found_by_name_in_the_order_they_run() -> None:
    assert NAMES == ["data", "train", "merge", "export", "certify", "evaluate"]
    assert [find_stage(name).name for name in NAMES] == NAMES


def test_each_stages_product_lies_in_its_run() -> None:
    run = Run(Path("runs/mine"))

    products = [path for stage in STAGES for path in stage.products(run)]

    assert len(set(products)) == len(products) > len(STAGES)
    assert all(run.folder in product.parents for product in products)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("a.jsonl", {"data": ["a.jsonl"]}),
        ("q.jsonl", {"evaluate": ["questions"]}),
        ("held.jsonl", {}),
    ],
)
def test_a_changed_file_is_noticed_by_the_stages_made_from_it(
    context: Context, file: str, expected: dict[str, list[str]]
) -> None:
    Path(file).write_text("something else", encoding="utf-8")

    assert stale(context) == expected


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            {"data": {"sources": [{"path": "a.jsonl"}], "max_tokens": 9}},
            {"data": ["data"]},
        ),
        (
            {"data": {"sources": [{"path": "a.jsonl"}], "eval": {"path": "held.jsonl"}}},
            {"data": ["data", "held.jsonl"]},
        ),
        ({"train": {"rank": 1}}, {"train": ["train"]}),
        ({"train": {"seed": 1}}, {"data": ["data"], "train": ["train"]}),
        ({"train": {"method": "qlora"}}, {"train": ["train"], "merge": ["method"]}),
        ({"export": {"gguf": ["bf16"]}}, {"export": ["export"]}),
        ({"certify": {"gguf_positions": 9}}, {"certify": ["certify"]}),
        (
            {"evaluate": {"questions": "q.jsonl", "direct": 9}},
            {"evaluate": ["evaluate"]},
        ),
    ],
)
def test_a_changed_recipe_is_noticed_by_the_stages_made_from_it(
    context: Context, more: dict[str, Any], expected: dict[str, list[str]]
) -> None:
    assert stale(with_recipe(context, **more)) == expected


@pytest.mark.parametrize(
    ("stage", "file", "expected"),
    [
        ("data", "train", {"train": ["rows"]}),
        ("data", "eval", {"certify": ["held-out rows"]}),
        ("data", "eval_pairs", {"certify": ["held-out pairs"]}),
        ("train", "adapter_config", {"merge": ["adapter"], "certify": ["adapter"]}),
        ("merge", "config", {"export": ["merged"], "certify": ["merged"]}),
        ("export", "mine-q8_0", {"certify": ["exports"], "evaluate": ["exports"]}),
    ],
)
def test_a_stage_made_anew_makes_the_ones_after_it_stale(
    context: Context, stage: str, file: str, expected: dict[str, list[str]]
) -> None:
    found = context.run.stage(stage)
    assert found is not None
    make(context, stage, found["inputs"], **{file: "other"})

    assert stale(context) == expected


def test_a_merge_onto_another_base_than_the_adapters_own_is_refused(context: Context) -> None:
    (context.base / "model.safetensors").write_text("other weights", encoding="utf-8")

    with pytest.raises(RunError, match=r"is not the base .* was trained on"):
        find_stage("merge").inputs(context)
    assert stale_before("export", context) == {"train": ["base"]}


def test_earlier_stages_that_are_stale_are_named_with_what_changed(context: Context) -> None:
    Path("a.jsonl").write_text("more", encoding="utf-8")
    changed = with_recipe(context, train={"rank": 1})

    assert stale_before("data", changed) == {}
    assert stale_before("train", changed) == {"data": ["a.jsonl"]}
    assert stale_before("merge", changed) == {"data": ["a.jsonl"], "train": ["train"]}


def test_a_stage_that_never_ran_is_not_stale(context: Context) -> None:
    manifest = context.run.facts()
    del manifest["stages"]["data"]
    context.run.manifest.write_text(json.dumps(manifest), encoding="utf-8")
    Path("a.jsonl").write_text("more", encoding="utf-8")

    assert stale_before("train", context) == {}


@pytest.mark.parametrize(
    ("stage", "missing"), [("train", "data"), ("merge", "train"), ("export", "merge")]
)
def test_a_stage_without_the_one_before_names_the_command(
    context: Context, stage: str, missing: str
) -> None:
    fresh = Context(context.recipe, Run.named("fresh"), context.base)

    with pytest.raises(
        RunError, match=f"^runs/fresh lacks what {missing} makes: run `pipeline {missing}` first"
    ):
        find_stage(stage).inputs(fresh)


def test_a_source_that_is_gone_is_a_change_and_no_failure(context: Context) -> None:
    before = find_stage("data").inputs(context)
    Path("a.jsonl").unlink()
    after = find_stage("data").inputs(context)

    assert [name for name in before if before[name] != after[name]] == ["a.jsonl"]


def test_the_hashes_of_the_base_are_kept_so_that_it_is_read_once(context: Context) -> None:
    first = context.base_hash()
    files = context.run.facts()["base_files"]
    weights = context.base / "model.safetensors"
    status = weights.stat()

    assert files["model.safetensors"]["size"] == status.st_size
    assert context.base_hash() == first

    # A record that lies about an unchanged file is believed: the file was not read again.
    files["model.safetensors"]["sha256"] = "0"
    context.run.describe(base_files=files)
    assert context.base_hash() != first


def test_another_commit_of_a_hub_data_set_is_noticed_by_the_data_alone(context: Context) -> None:
    data = {"sources": [{"path": "a.jsonl"}, {"hub": "acme/talk"}, {"hub": "acme/code"}]}
    mixed = with_recipe(context, data=data)
    pins = {f"acme/{name}:train": {"commit": "1", "files": []} for name in ("talk", "code")}
    context.run.describe(hub_datasets=pins)
    context.run.record("data", find_stage("data").inputs(mixed), [context.run.data])
    assert stale(mixed) == {}

    moved = {"acme/talk:train": {"commit": "2", "files": []}}
    context.run.describe(hub_datasets=pins | moved)

    assert stale(mixed) == {"data": ["acme/talk:train"]}
