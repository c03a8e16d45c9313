"""Learning from one's own replies: what they are worth, and that what pays becomes likelier."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pipeline
from trainers import settings

from pipeline.chat import Chat, Mode
from pipeline.errors import RecipeError
from pipeline.questions import Question
from pipeline.train import grpo, stage
from pipeline.train.grpo import ReplyTrainer, build_grpo
from pipeline.train.reward import FORM, Reward

QUESTIONS = [
    Question([{"role": "user", "content": "How many stops at most?"}], "4"),
    Question([{"role": "user", "content": "What does <|im_end|> end?"}], "turn"),
    Question(
        [
            {"role": "system", "content": "You help in a shop."},
            {"role": "user", "content": "Which route gives the models?"},
        ],
        "/models",
    ),
]
GRPO: dict[str, Any] = {
    "objective": "grpo",
    "batch_rows": 2,
    "micro_tokens": 400,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def questions_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = [{"messages": q.messages, "answer": q.answer} for q in QUESTIONS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def build(tiny_base: Path, questions_file: Path, tmp_path: Path) -> Callable[..., ReplyTrainer]:
    """A trainer as the stage builds it; values of `grpo` may be given, too."""

    def run(own: dict[str, Any] | None = None, **values: Any) -> ReplyTrainer:
        usual = {"questions": str(questions_file), "replies": 4, "mode": "direct", "max_tokens": 6}
        chosen = settings(**GRPO | {"grpo": usual | (own or {})} | values)
        return build_grpo(chosen, tiny_base, questions_file, tmp_path / "scratch")

    return run


def reply_ids(chat: Chat, question: Question, answer: str, reasoning: str = "") -> list[int]:
    """What the official template has the model emit."""
    message = {"role": "assistant", "content": answer, "reasoning_content": reasoning}
    (turn,) = chat.turns([*question.messages, message], None)
    return turn.completion_ids


def grades(chat: Chat, mode: Mode, replies: list[list[int]]) -> tuple[list[float], dict[str, Any]]:
    told: dict[str, float] = {}
    reward = Reward(chat, QUESTIONS, mode)
    return reward.grade(replies, [0] * len(replies), told.__setitem__), told


@pytest.mark.parametrize(("mode", "reasoning"), [("direct", ""), ("thinking", "Is it 8?")])
def test_a_reply_is_worth_its_answer_in_its_form(chat: Chat, mode: Mode, reasoning: str) -> None:
    def said(answer: str) -> list[int]:
        return reply_ids(chat, QUESTIONS[0], answer, reasoning)

    right, wrong, both = said("At most 4."), said("It is the turn."), said("4 or /models")
    cut, text_end = right[:-1], [*right[:-1], chat.token_id("<|endoftext|>")]
    two_turns = [*right[:-1], chat.token_id("<|im_start|>"), *right[-2:]]
    as_text = said("At most 4 <|im_start|>.")
    worth, told = grades(chat, mode, [right, wrong, both, cut, text_end, two_turns, as_text])
    assert worth == [1.0, FORM, FORM, 0.0, 0.0, 0.0, 1.0]
    assert told == pytest.approx({"correct": 5 / 7, "well_formed": 4 / 7})


def test_a_think_block_must_be_closed_and_belongs_to_thinking_mode(chat: Chat) -> None:
    thought = reply_ids(chat, QUESTIONS[0], "4", "Is it 8?")
    end = thought.index(chat.token_id("</think>"))
    never_ended = [*thought[:end], *thought[-2:]]
    plain = reply_ids(chat, QUESTIONS[0], "4")
    assert grades(chat, "thinking", [thought, never_ended, plain])[0] == [1.0, 0.0, 0.0]
    assert grades(chat, "direct", [thought, plain])[0] == [0.0, 1.0]


@pytest.mark.parametrize("mode", ["direct", "thinking"])
def test_the_model_is_asked_what_the_chat_room_renders(
    build: Any, chat: Chat, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build({"mode": mode, "max_tokens": 2}, batch_rows=1, steps=3)
    asked: list[list[int]] = []
    generate = type(trainer.model).generate

    def spy(self: Any, **inputs: Any) -> Any:
        pairs = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
        asked.extend(ids[mask].tolist() for ids, mask in pairs)
        return generate(self, **inputs)

    monkeypatch.setattr(type(trainer.model), "generate", spy)
    trainer.train()
    wanted = [chat.prompt_ids(q.messages, None, mode) for q in QUESTIONS]
    planned = [index for step in trainer.data_collator.plan for index in step]
    assert sorted(planned) == [0, 1, 2]
    assert asked == [wanted[index] for index in planned for _ in range(4)]


def test_a_reply_ends_with_its_turn_whatever_ends_the_bases_texts(
    tiny_base: Path, questions_file: Path, chat: Chat, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    for name in ("tokenizer_config.json", "generation_config.json"):
        values = json.loads((base / name).read_text())
        values |= {"eos_token": "<|endoftext|>"} if "tokenizer" in name else {"eos_token_id": 256}
        (base / name).write_text(json.dumps(values))
    chosen = settings(**GRPO | {"grpo": {"questions": str(questions_file)}})
    trainer = build_grpo(chosen, base, questions_file, tmp_path / "scratch")
    assert set(trainer.generation_config.eos_token_id) == {chat.end_of_turn_id, 256}


def rig(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies that begin with a low byte pay: half of a random model's."""

    def grade(self: Reward, completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(ids[0] < 128) for ids in completion_ids]

    monkeypatch.setattr(Reward, "grade", grade)


def likelihood(trainer: ReplyTrainer, chat: Chat) -> float:
    """Of beginning a reply so, a mean over the questions."""
    prompts = [chat.prompt_ids(q.messages, None, "direct") for q in QUESTIONS]
    with torch.no_grad():
        logits = [trainer.model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
    return float(torch.stack(logits).softmax(-1)[:, :128].sum(-1).mean())


def test_what_pays_becomes_likelier(
    build: Any, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig(monkeypatch)
    trainer = build({"replies": 16, "max_tokens": 2}, steps=6)
    with torch.no_grad():  # a random head is so faint that no hidden state makes a difference
        trainer.model.get_output_embeddings().weight.mul_(20)
    before = likelihood(trainer, chat)
    trainer.train()
    after = likelihood(trainer, chat)
    assert before < 0.6
    assert after > before + 0.2


def test_how_many_replies_are_in_memory_does_not_matter(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig(monkeypatch)
    found = []
    for micro_tokens, at_once in ((10_000, 8), (250, 2), (1, 1)):
        trainer = build(micro_tokens=micro_tokens, steps=1)
        assert trainer.args.per_device_train_batch_size == at_once
        trainer.train()
        found.append({name: p.detach() for name, p in trainer.model.named_parameters()})
        first = trainer.state.log_history[0]
        found[-1] |= {key: torch.tensor(first[key]) for key in ("loss", "grad_norm")}
    assert found[0]["grad_norm"] > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-5)


def test_the_divergence_is_from_the_base(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig(monkeypatch)
    trainer = build({"beta": 0.1, "replies": 8}, steps=3)
    trainer.train()
    divergences = [line["kl"] for line in trainer.state.log_history if "kl" in line]
    assert divergences[0] == pytest.approx(0, abs=1e-6)
    assert min(divergences[1:]) > 1e-3
    assert list(trainer.model.peft_config) == ["default"], "no copy of the adapter"


def test_an_adapter_on_a_base_in_4_bit_stays_float32(build: Any) -> None:
    trainer = build(method="qlora", dtype="bfloat16", steps=1)
    trainer.train()
    kinds = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert kinds == {torch.float32}


@pytest.mark.parametrize(
    ("values", "steps"), [({"steps": 5}, 5), ({"epochs": 2}, 3), ({"epochs": 0.1}, 1)]
)
def test_every_step_asks_as_many_questions(values: dict[str, Any], steps: int) -> None:
    chosen = settings(**GRPO | {"grpo": {"questions": "q.jsonl"}} | {"steps": None} | values)
    plan = grpo.plan_questions([[1], [2], [3]], chosen, "q.jsonl").plan
    assert [len(step) for step in plan] == [2] * steps
    assert len({*plan[0]}) == 2


def test_replies_that_cannot_be_divided_among_processes_are_refused(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpo, "count_processes", lambda: 3)
    with pytest.raises(RecipeError, match=r"× train\.grpo\.replies is 8, .* among 3 processes"):
        build()


class PowerCut(Exception):
    """Stands for whatever ends a process."""


Fit = Callable[..., tuple[bytes, list[dict[str, float]]]]


@pytest.fixture(scope="module")
def fit(tiny_base: Path, questions_file: Path) -> Fit:
    """Trains in a folder by the stage; the adapter's bytes, and the metrics but for time."""

    def run(out: Path, **values: Any) -> Any:
        own = {"questions": str(questions_file), "replies": 4, "mode": "direct", "max_tokens": 6}
        chosen = settings(**GRPO | {"grpo": own, "steps": 3} | values)
        with pytest.MonkeyPatch.context() as patch:
            rig(patch)
            stage.train(chosen, tiny_base, questions_file, out)
        lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
        metrics = [json.loads(line) for line in lines]
        assert all(line.pop("seconds") > 0 for line in metrics)
        return (out / "adapter" / "adapter_model.safetensors").read_bytes(), metrics

    return run


@pytest.fixture(scope="module")
def whole(fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Any]:
    """What a training gives that nobody stops."""
    return fit(tmp_path_factory.mktemp("whole"))


def test_a_stopped_training_ends_as_one_that_never_was(
    fit: Fit, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = ReplyTrainer._generate_and_score_completions
    begun: list[int] = []

    def answer_or_stop(self: ReplyTrainer, inputs: Any) -> Any:
        begun.append(self.state.global_step + 1)
        if len(begun) == 3:
            raise PowerCut
        return answer(self, inputs)

    monkeypatch.setattr(ReplyTrainer, "_generate_and_score_completions", answer_or_stop)
    with pytest.raises(PowerCut):
        fit(tmp_path, save_steps=1)
    assert fit(tmp_path, save_steps=1) == whole
    assert begun == [1, 2, 3, 3], "it went on from the checkpoint of step 2"


def test_metrics_have_what_a_training_by_rewards_is_followed_by(whole: Any) -> None:
    _, metrics = whole
    assert [line["step"] for line in metrics] == [1, 2, 3]
    for line in metrics:
        assert {"loss", "grad_norm", "learning_rate", "reward", "reward_std"} <= line.keys()
        assert {"cut", "mean_reply_tokens", "entropy"} <= line.keys()
        assert line["num_supervised_tokens"] == round(line["mean_reply_tokens"] * 8)
        assert line["num_tokens"] == line["num_row_tokens"] > line["num_supervised_tokens"]


RECIPE = """
base: base
data: {sources: [{path: chats.jsonl}], eval: {path: held.jsonl}}
train: {objective: grpo, steps: 1, micro_tokens: 400, grpo: {questions: asked.jsonl}}
"""
ASKED = '{"messages": [{"role": "user", "content": "?"}], "answer": "4"}\n'


def test_a_line_that_is_no_question_is_one_sentence(workplace: Path, pipeline: Pipeline) -> None:
    (workplace / "mine.yaml").write_text(RECIPE, encoding="utf-8")
    said = pipeline("check", "mine.yaml")
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "no such file" in said.err
    assert "asked.jsonl" in said.err

    (workplace / "asked.jsonl").write_text(ASKED + '{"messages": []}\n', encoding="utf-8")
    assert pipeline("data", "mine.yaml").code == 0
    said = pipeline("train", "mine.yaml")
    assert said.code == 2
    assert said.err.endswith("error: asked.jsonl:2: a question needs `messages` and `answer`\n")
    assert not list((workplace / "runs" / "mine").glob("adapter*"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning")  # TRL's own calls
def test_checkpointing_comes_back_after_the_replies_and_changes_nothing(build: Any) -> None:
    """TRL turns it off while replies are made, and on again by its own call."""
    learnt = []
    for word in ("none", "full"):
        trainer = build({"max_tokens": 4}, batch_rows=2, steps=2, checkpointing=word)
        trainer.train()
        layers = trainer.model.base_model.model.model.layers
        assert [layer.gradient_checkpointing for layer in layers] == [word == "full"] * 2
        learnt.append([p.detach() for p in trainer.model.parameters() if p.requires_grad])
    torch.testing.assert_close(*learnt)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dropout": 0.1}, "dropout must be 0"),
        ({"checkpointing": "selective"}, "checkpoints all layers or none"),
        ({"eval_steps": 5}, "remove eval_steps"),
        ({"variant": "pissa", "grpo": {"questions": "q", "beta": 0.1}}, "pissa changes the base"),
        ({"grpo": {}}, "needs grpo.questions"),
    ],
)
def test_what_grpo_cannot_do_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings(**{"objective": "grpo", "grpo": {"questions": "q"}} | values)
