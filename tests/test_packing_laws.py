"""Packed rows are learnt from as if each were alone (design law 2), on a real tiny Qwen3."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st
from row_files import write_rows
from safetensors.torch import load_file
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask
from trainers import build_trainer, fill_adapter, make_talks, settings

from pipeline.chat import Chat
from pipeline.train.attention import block_mask, dense_mask
from pipeline.train.stage import read_steps, train
from pipeline.train.steps import Steps, to_tensors
from pipeline.train.trainer import PackTrainer
from pipeline.tree import IGNORED, Pack, TreeRow, lay_out

VOCABULARY = 320
FLOAT32 = 1e-5
"""What the order of additions may change, relative to the largest value."""
few = limits(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def make_forest(seed: int) -> list[TreeRow]:
    """Random conversations, some with a beginning in common, and plain texts; out of order."""
    random = Random(seed)

    def some(least: int, most: int) -> list[int]:
        return [random.randrange(VOCABULARY) for _ in range(random.randint(least, most))]

    systems = [some(0, 30) for _ in range(2)]
    rows: list[TreeRow] = []
    for _ in range(random.randint(1, 4)):
        history = list(random.choice(systems))
        for _ in range(random.randint(1, 3)):
            history += some(1, 8)
            rows.append((history + some(0, 2), some(1, 5)))
            history += some(1, 5)
    rows += [([], some(1, 9)) for _ in range(random.randint(0, 2))]
    rows.append(random.choice(rows))  # a row may stand there twice
    return random.sample(rows, len(rows))


forests = st.integers(0, 2**32).map(make_forest)


@pytest.fixture(scope="module")
def talks_file(chat: Chat, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("talks") / "train.arrow"
    write_rows(path, make_talks(chat))
    return path


@pytest.fixture(scope="module")
def trainer(tiny_base: Path, talks_file: Path) -> PackTrainer:
    """A trainer whose adapter is not zero, in float32."""
    trainer = build_trainer(tiny_base, talks_file, dtype="float32")
    fill_adapter(trainer.model)
    return trainer


def moving(trainer: PackTrainer) -> list[torch.nn.Parameter]:
    return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]


def loss_alone(model: Any, row: TreeRow) -> torch.Tensor:
    """The sum of a row's losses by the model's usual causal attention, nothing of ours in it."""
    prompt, completion = row
    ids = torch.tensor([prompt + completion])
    start = max(1, len(prompt))
    logits = model(input_ids=ids, use_cache=False).logits[0]
    return functional.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="sum")


def learn_alone(trainer: PackTrainer, rows: list[TreeRow]) -> tuple[float, list[torch.Tensor]]:
    """The sum of losses and of gradients of rows, one by one."""
    totals = [torch.zeros_like(parameter) for parameter in moving(trainer)]
    loss = 0.0
    for row in rows:
        alone = loss_alone(trainer.model, row)
        loss += alone.item()
        for total, gradient in zip(
            totals, torch.autograd.grad(alone, moving(trainer)), strict=True
        ):
            total += gradient
    return loss, totals


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """To float32's accuracy relative to the largest gradient of each tensor."""
    for one, other in zip(found, expected, strict=True):
        scale = float(other.abs().max())
        assert float((one - other).abs().max()) <= FLOAT32 * scale
    assert max(float(one.abs().max()) for one in expected) > 0


@few
@given(forests, st.booleans())
def test_loss_and_gradients_of_a_pack_are_the_sums_of_its_rows_alone(
    trainer: PackTrainer, rows: list[TreeRow], shared: bool
) -> None:
    loss, gradients = learn_alone(trainer, rows)
    pack = lay_out(rows, shared)
    together = trainer.sum_loss(trainer.model, to_tensors(pack))

    assert together.item() == pytest.approx(loss, rel=FLOAT32)
    assert_same(list(torch.autograd.grad(together, moving(trainer))), gradients)


def take_step(trainer: PackTrainer, rows: list[TreeRow], **values: Any) -> tuple[float, Any]:
    """The loss and gradients of one step of some rows, by the trainer's own step."""
    dataset = Dataset.from_dict(
        {"prompt_ids": [row[0] for row in rows], "completion_ids": [row[1] for row in rows]}
    )
    inputs = Steps(dataset, [list(range(len(rows)))], **values)([{"share": 0}])
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, inputs)
    return loss.item(), [parameter.grad.clone() for parameter in moving(trainer)]


@few
@given(
    forests,
    st.integers(1, 200),
    st.sampled_from(["tree", "none"]),
    st.randoms(use_true_random=False),
)
def test_a_steps_loss_is_the_mean_over_its_supervised_tokens_however_it_is_cut(
    trainer: PackTrainer, rows: list[TreeRow], budget: int, packing: str, random: Random
) -> None:
    num_supervised = sum(len(completion) - (not prompt) for prompt, completion in rows)
    expected_loss, gradients = learn_alone(trainer, rows)
    shuffled = random.sample(rows, len(rows))
    loss, found = take_step(trainer, shuffled, packing=packing, micro_tokens=budget)

    assert loss == pytest.approx(expected_loss / num_supervised, rel=FLOAT32)
    assert_same(found, [gradient / num_supervised for gradient in gradients])


@few
@given(forests, st.integers(1, 200), st.integers(2, 3))
def test_the_shares_of_processes_are_together_the_loss_of_one(
    trainer: PackTrainer, rows: list[TreeRow], budget: int, num_processes: int
) -> None:
    dataset = Dataset.from_dict(
        {"prompt_ids": [row[0] for row in rows], "completion_ids": [row[1] for row in rows]}
    )
    plan = [list(range(len(rows)))]
    loss, _ = take_step(trainer, rows, packing="tree", micro_tokens=budget)
    split = Steps(dataset, plan, "tree", budget, num_processes)
    scaled = []
    with torch.no_grad():
        for rank in range(num_processes):
            inputs = split([{"share": rank}])
            own = sum(float(trainer.sum_loss(trainer.model, pack)) for pack in inputs["packs"])
            scaled.append(own * num_processes / inputs["num_supervised"])

    assert sum(scaled) / num_processes == pytest.approx(loss, rel=FLOAT32)


def test_a_step_without_anything_to_learn_is_zero(trainer: PackTrainer) -> None:
    loss, gradients = take_step(trainer, [([], [5])], packing="tree", micro_tokens=9)

    assert loss == 0
    assert all(not gradient.any() for gradient in gradients)


def read_logits(trainer: PackTrainer, pack: Pack, embedded: torch.Tensor) -> torch.Tensor:
    tensors = to_tensors(pack)
    outputs = trainer.model(
        inputs_embeds=embedded,
        position_ids=tensors["position_ids"],
        attention_mask=dense_mask(tensors["ends"]),
        use_cache=False,
    )
    return outputs.logits[0]


def embed(trainer: PackTrainer, ids: list[int]) -> torch.Tensor:
    return trainer.model.get_input_embeddings()(torch.tensor([ids])).detach()


@few
@given(forests, st.randoms(use_true_random=False))
def test_no_gradient_flows_from_a_row_to_what_is_not_in_it(
    trainer: PackTrainer, rows: list[TreeRow], random: Random
) -> None:
    pack = lay_out(rows)
    leaves = [place for place, end in enumerate(pack.ends) if end == place + 1]
    last = random.choice(leaves)
    path = [key for key in range(len(pack.ids)) if key <= last < pack.ends[key]]
    trained = [place for place in path if pack.labels[place] != IGNORED]
    embedded = embed(trainer, pack.ids).requires_grad_()
    logits = read_logits(trainer, pack, embedded)
    before = [place - 1 for place in trained]
    loss = functional.cross_entropy(
        logits[before],
        torch.tensor([pack.ids[place] for place in trained], dtype=torch.long),
        reduction="sum",
    )
    (gradient,) = torch.autograd.grad(loss, embedded)

    outside = [place for place in range(len(pack.ids)) if place not in path]
    assert not gradient[0, outside].any(), "exactly zero"
    if trained:
        assert gradient[0, path[:-1]].any(dim=1).all(), "all that is before the last token counts"


@few
@given(forests, st.randoms(use_true_random=False))
def test_a_changed_token_changes_nothing_outside_its_subtree(
    trainer: PackTrainer, rows: list[TreeRow], random: Random
) -> None:
    pack = lay_out(rows)
    place = random.randrange(len(pack.ids))
    changed = list(pack.ids)
    changed[place] = (changed[place] + 1 + random.randrange(VOCABULARY - 1)) % VOCABULARY
    with torch.no_grad():
        before, after = (
            read_logits(trainer, pack, embed(trainer, ids)) for ids in (pack.ids, changed)
        )

    difference = (before - after).abs().amax(dim=1)
    inside = range(place, pack.ends[place])
    outside = [at for at in range(len(pack.ids)) if at not in inside]
    assert (difference[inside.start : inside.stop] > 0).all()
    assert not outside or float(difference[outside].max()) <= 1e-6


@few
@given(forests, st.booleans())
def test_both_masks_are_the_one_rule(rows: list[TreeRow], shared: bool) -> None:
    ends = torch.tensor([lay_out(rows, shared).ends])
    size = ends.shape[1]
    query, key = torch.arange(size)[:, None], torch.arange(size)[None, :]
    rule = [[k <= q < int(ends[0, k]) for k in range(size)] for q in range(size)]

    assert dense_mask(ends).shape == (1, 1, size, size)
    assert dense_mask(ends)[0, 0].tolist() == rule
    assert block_mask(ends).mask_mod(torch.tensor(0), torch.tensor(0), query, key).tolist() == rule
    assert dense_mask(ends)[0, 0].diagonal().all(), "there is no padding"


@few
@given(st.lists(st.integers(0, 200), min_size=1, max_size=4), st.integers(1, 700))
def test_blocks_are_those_that_torch_finds_by_trying_every_pair(
    shared: list[int], size: int
) -> None:
    rows: list[TreeRow] = [
        ([*range(num), 500 + row, 0], [1] * (size // (1 + row))) for row, num in enumerate(shared)
    ]
    mask = block_mask(torch.tensor([lay_out(rows).ends]))
    tried = create_block_mask(mask.mask_mod, None, None, *mask.seq_lengths, device="cpu")

    for name in ("", "full_"):
        for direction in ("kv", "q"):
            for what in ("num_blocks", "indices"):
                attribute = f"{name}{direction}_{what}"
                found, expected = getattr(mask, attribute), getattr(tried, attribute)
                assert found.dtype == expected.dtype
                assert torch.equal(found, expected), attribute
    assert mask.BLOCK_SIZE == tried.BLOCK_SIZE
    assert mask.seq_lengths == tried.seq_lengths


def test_flex_attention_skips_the_blocks_where_nobody_sees_anybody() -> None:
    rows: list[TreeRow] = [([], [number] * 256) for number in range(4)]
    mask = block_mask(torch.tensor([lay_out(rows).ends]))

    # Of each row two blocks on the diagonal, which the rule cuts, and one below, which it does not.
    assert mask.kv_num_blocks.sum() == 4 * 2
    assert mask.full_kv_num_blocks.sum() == 4


def read_metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def adapter_of(out: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(out / "adapter" / "adapter_model.safetensors"))


def assert_same_training(one: Path, other: Path, keys: list[str]) -> None:
    for line, again in zip(read_metrics(one), read_metrics(other), strict=True):
        assert line["loss"] == pytest.approx(again["loss"], abs=1e-5)
        assert line["grad_norm"] == pytest.approx(again["grad_norm"], rel=1e-4)
        assert [line[key] for key in keys] == [again[key] for key in keys]
    weights = adapter_of(other)
    for name, values in adapter_of(one).items():
        assert float((values - weights[name]).abs().max()) <= 1e-4
        assert values.abs().max() > 1e-3


LONG: dict[str, Any] = {
    "dtype": "float32",
    "batch_rows": 5,
    "steps": 6,
    "micro_tokens": 300,
    "learning_rate": 0.005,
}


@pytest.fixture(scope="module")
def by_trees(tiny_base: Path, talks_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trees")
    train(settings(**LONG), tiny_base, talks_file, out)
    return out


@pytest.mark.parametrize(
    "values",
    [{"packing": "none"}, {"packing": "none", "micro_tokens": 1}, {"micro_tokens": 4096}],
    ids=str,
)
def test_a_training_does_not_depend_on_the_packing(
    by_trees: Path, tiny_base: Path, talks_file: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    train(settings(**LONG | values), tiny_base, talks_file, tmp_path)

    keys = ["step", "learning_rate", "num_supervised_tokens", "num_row_tokens"]
    assert_same_training(tmp_path, by_trees, keys)
    losses = [line["loss"] for line in read_metrics(by_trees)]
    assert losses[-1] < losses[0] - 0.3, "something was learnt"


def test_trees_go_through_the_model_with_fewer_tokens(
    by_trees: Path, tiny_base: Path, talks_file: Path, tmp_path: Path
) -> None:
    train(settings(**LONG | {"packing": "none", "steps": 2}), tiny_base, talks_file, tmp_path)

    flat = read_metrics(tmp_path)
    assert all(line["num_tokens"] == line["num_row_tokens"] for line in flat)
    lines = read_metrics(by_trees)
    ratio = sum(line["num_row_tokens"] for line in lines) / sum(
        line["num_tokens"] for line in lines
    )
    assert ratio > 1.5


def test_a_log_line_counts_the_rows_of_its_step(by_trees: Path, talks_file: Path) -> None:
    steps = read_steps(talks_file, settings(**LONG), 1)

    lines = read_metrics(by_trees)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line, places in zip(lines, steps.plan, strict=True):
        rows = steps.read(places)
        assert line["num_supervised_tokens"] == sum(len(completion) for _, completion in rows)
        assert line["num_row_tokens"] == sum(map(len, itertools.chain.from_iterable(rows)))
        assert line["num_tokens"] == sum(len(pack.ids) for pack in steps.pack(rows))


SCRIPT = """
import atexit, os, sys
from pathlib import Path

def tell_threads():
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    Path(sys.argv[3], f"threads-{os.environ['RANK']}").write_text(" ".join(names))

atexit.register(tell_threads)  # the first one registered is the last one called
from trainers import settings
from pipeline.train.stage import train
base, rows, out, values = sys.argv[1:]
train(settings(**eval(values)), Path(base), Path(rows), Path(out))
"""


@pytest.mark.slow
@pytest.mark.parametrize("values", [{}, {"checkpointing": "full", "micro_tokens": 120}], ids=str)
def test_two_processes_learn_what_one_does(
    by_trees: Path, tiny_base: Path, talks_file: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    places = [str(tiny_base), str(talks_file), str(tmp_path / "out"), repr(LONG | values)]
    path = os.pathsep.join(
        str(folder) for folder in (Path(__file__).parents[1], Path(__file__).parent)
    )
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *places],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    keys = ["step", "learning_rate", "num_supervised_tokens", "num_row_tokens"]
    assert_same_training(tmp_path / "out", by_trees, keys)
    for rank in ("0", "1"):
        threads = (tmp_path / "out" / f"threads-{rank}").read_text()
        assert "gloo" not in threads, "one that needs Python while it ends aborts the process"
