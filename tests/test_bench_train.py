"""The training benchmark: the same rows and the same loss, however they are trained."""

import json
from collections import Counter
from pathlib import Path

import pytest
from trl.trainer.utils import compute_flops_per_token

from pipeline.base.random import shape_config
from pipeline.bench.dialogues import SYSTEM, write_support, write_tool_chats
from pipeline.bench.train import SETTINGS, Timing, count_operations, table, write_generated
from pipeline.data.prepare import prepare
from pipeline.data.store import read_rows
from pipeline.plan.shape import read_shape
from pipeline.recipe import Data
from pipeline.tree import count_tree_tokens


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_tool_chats_are_four_questions_each_answered_after_a_call(tmp_path: Path) -> None:
    write_tool_chats(tmp_path / "a.jsonl", 5)
    write_tool_chats(tmp_path / "b.jsonl", 5)
    write_tool_chats(tmp_path / "c.jsonl", 5, seed=1)

    chats = read(tmp_path / "a.jsonl")
    assert chats == read(tmp_path / "b.jsonl") != read(tmp_path / "c.jsonl")
    for chat in chats:
        roles = Counter(message["role"] for message in chat["messages"])
        assert roles == {"system": 1, "user": 4, "assistant": 8, "tool": 4}
        assert chat["messages"][0]["content"] == SYSTEM
        known = {tool["function"]["name"] for tool in chat["tools"]}
        called = [c for m in chat["messages"] for c in m.get("tool_calls", ())]
        assert {call["function"]["name"] for call in called} <= known
    assert len({json.dumps(chat) for chat in chats}) == 5


def test_the_support_sets_talks_of_several_turns_all_have_its_tools(tmp_path: Path) -> None:
    write_support(Path("data/support"), tmp_path / "support.jsonl", 50)

    talks = read(tmp_path / "support.jsonl")
    assert len(talks) == 50
    assert all(talk["tools"] == talks[0]["tools"] for talk in talks)
    assert all(sum(m["role"] == "assistant" for m in talk["messages"]) > 1 for talk in talks)


@pytest.mark.slow
def test_every_way_of_training_has_the_same_loss_over_the_same_tokens(
    tiny_base: Path, tmp_path: Path
) -> None:
    from pipeline.bench.fit import fit_ours, fit_trl

    write_tool_chats(tmp_path / "chats.jsonl", 1)
    write_tool_chats(tmp_path / "held.jsonl", 1, seed=1)
    data = Data.model_validate(
        {
            "sources": [{"path": str(tmp_path / "chats.jsonl")}],
            "eval": {"path": str(tmp_path / "held.jsonl")},
            "max_tokens": 100_000,
        }
    )
    report = prepare(data, tiny_base, 0, tmp_path / "data")
    rows = tmp_path / "data" / "train.arrow"
    # All rows in one step and one pack, so that a mean over steps is one over tokens.
    settings = SETTINGS.model_copy(update={"dtype": "float32", "micro_tokens": 100_000})

    found = {
        "tree": fit_ours("tree", tiny_base, rows, settings),
        "none": fit_ours("none", tiny_base, rows, settings.model_copy(update={"micro_tokens": 1})),
        "padded": fit_trl("padded", tiny_base, rows, settings),
        "bfd": fit_trl("bfd", tiny_base, rows, settings),
        "equal": fit_trl("equal", tiny_base, rows, settings),
    }

    for timing in found.values():
        assert timing["supervised_tokens"] == report["train"]["supervised_tokens"]
        assert timing["loss"] == pytest.approx(found["tree"]["loss"], abs=1e-4)
        assert 0 < timing["seconds"] < timing["first_step_seconds"] + timing["seconds"]
    row_tokens = report["train"]["prompt_tokens"] + report["train"]["supervised_tokens"]
    assert found["none"]["tokens"] == found["padded"]["tokens"] == row_tokens
    assert found["tree"]["tokens"] < row_tokens / 2


def test_the_table_compares_each_with_ours_on_the_same_rows() -> None:
    def timing(rows: str, how: str, seconds: float) -> Timing:
        return Timing(rows, how, 4, seconds, 3.0, seconds - 4.0, 500, 1000, 2.0, 900.0)

    timings = [
        timing("chats", "ours", 10.0),
        timing("chats", "TRL", 30.0),
        timing("generated", "ours", 19.0),
    ]

    lines = table(timings).splitlines()

    assert "| 100.0 | 50.0 | 1.00x |" in lines[2]
    assert "| 33.3 | 16.7 | 3.00x |" in lines[3]
    assert "| 50.0 | 25.0 | 1.00x |" in lines[4], "750 tokens in 15 seconds"
    assert lines[-1].startswith("Measured on ")


def test_operations_of_a_token_are_those_of_the_models_products(tmp_path: Path) -> None:
    config = shape_config("qwen3-8b").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shape = read_shape(tmp_path)

    # Weights but the input embeddings, 4 each; TRL counts 3 times a forward pass over whole rows.
    forward = compute_flops_per_token(shape_config("qwen3-8b"), 4096) / 3
    attention = 4 * shape.layers * shape.queries * 4096
    assert count_operations(shape, 4096) == 2 * (forward - attention) + 1.5 * attention
    assert count_operations(shape, 4096) == pytest.approx(33.9e9, rel=1e-3)


def test_generated_rows_fill_their_length_and_share_nothing(
    tiny_base: Path, tmp_path: Path
) -> None:
    write_generated(tiny_base, tmp_path / "generated" / "train.arrow")

    rows = list(read_rows(tmp_path / "generated" / "train.arrow"))
    pairs = [(row.prompt_ids, row.completion_ids) for row in rows]
    assert len(rows) % SETTINGS.batch_rows == 0
    assert {len(prompt) + len(completion) for prompt, completion in pairs} == {256}
    assert count_tree_tokens(pairs) == 256 * len(rows)
    assert max(max(completion) for _, completion in pairs) < 320
