"""What the recipes and their table say: it is there, and it is what is predicted."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.base.names import SHAPES
from pipeline.plan import predict, read_job
from pipeline.plan.machine import planned_machine
from pipeline.recipe import load_recipe

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
ROW = re.compile(r"\| `([^`]+)\.yaml` \| (.+?) \| ([\d.]+) GB(, measured)? \| (.+?) \| .+ \|")
TABLE = {
    found[1]: found
    for line in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    if (found := ROW.fullmatch(line))
}
PREDICTED = [path for path in RECIPES if path.stem in TABLE and not TABLE[path.stem][4]]


def header(path: Path) -> str:
    """The comment a recipe begins with, as one line."""
    text = path.read_text(encoding="utf-8")
    lines = text.partition("\nbase:")[0].splitlines()
    assert all(line.startswith("# ") for line in lines)
    return " ".join(line.removeprefix("# ") for line in lines)


def base_like(base: str, folder: Path) -> Path:
    """Of a hub's Qwen3, by its name: a config.json is all that a prediction needs."""
    hidden, inner, layers, heads, tied = SHAPES[base.removeprefix("Qwen/").lower()]
    config = {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": tied,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def report_of(max_tokens: int) -> dict[str, Any]:
    """A million tokens in rows, or in pairs, a quarter as long as the longest; half are learnt."""
    million = 1_000_000
    counts = {
        "rows": 4 * million // max_tokens,
        "prompt_tokens": million // 2,
        "supervised_tokens": million // 2,
        "longest_row": max_tokens,
        "pairs": 4 * million // max_tokens,
        "pair_tokens": million,
        "shared_pair_tokens": million,
        "supervised_pair_tokens": million // 2,
        "longest_pair": max_tokens,
    }
    return {"train": counts, "epoch": {"shared_tokens": million}}


def test_the_table_has_a_row_for_every_recipe_and_no_other() -> None:
    assert TABLE.keys() == {path.stem for path in RECIPES}
    assert len(PREDICTED) == len(RECIPES) - 1  # the demo is measured


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_header_says_what_the_table_says_and_the_one_command(path: Path) -> None:
    text, row = header(path), TABLE[path.stem]
    assert f"Memory {row[3]} GB" in text
    assert row[5] in text
    command = "`make demo`" if path.stem == "demo" else f"make all RECIPE=recipes/{path.name}"
    assert text.endswith(f"Everything: {command}")


@pytest.mark.parametrize("path", PREDICTED, ids=lambda path: path.stem)
def test_the_memory_and_the_time_that_are_told_are_predicted(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    train, row = recipe.train, TABLE[path.stem]
    machine = planned_machine(recipe.plan)
    report = report_of(recipe.data.max_tokens)
    if train.objective == "grpo":  # its rows are questions, and those of the support set are short
        report["train"] |= {"rows": 1, "prompt_tokens": 64}
    job = read_job(train, base_like(recipe.base, tmp_path), report, machine, questions=400)
    least = job.change(checkpointing="full").memory(job.rows.longest)["peak"]
    assert float(row[3]) == pytest.approx(least / 1e9, rel=0.1)

    predicted = predict(job)
    assert predicted["fits"]
    minutes, unit, gpu = re.fullmatch(r"([\d.]+) min (.+) on an (.+)", row[5]).groups()
    assert gpu == recipe.plan.gpu
    seconds = predicted["seconds"]
    if train.steps:
        assert unit == f"for {train.steps} steps"
    else:
        assert unit == "a million tokens"
        seconds /= job.num_steps * job.step_tokens / 1e6
    assert float(minutes) == pytest.approx(seconds / 60, rel=0.1)
