"""Learning from the model's own replies: TRL's GRPO with our prompts and our judgement."""

from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from pipeline.chat import Chat
from pipeline.environment import count_processes
from pipeline.errors import RecipeError
from pipeline.questions import read_questions
from pipeline.recipe import Train
from pipeline.train.arguments import make_arguments
from pipeline.train.model import keep_adapter_in_float32, make_model
from pipeline.train.reward import Reward
from pipeline.train.steps import plan_steps
from pipeline.train.trainer import StepTrainer

TOLD = {
    "reward": "reward",
    "reward_std": "reward_std",
    "correct": "correct",
    "well_formed": "well_formed",
    "completions/clipped_ratio": "cut",
    "completions/mean_length": "mean_reply_tokens",
    "entropy": "entropy",
    "kl": "kl",
}
"""Of TRL's and the reward's means over a step, those in metrics.jsonl, and their names there."""


class ReplyTrainer(StepTrainer, GRPOTrainer):
    """TRL's loop: replies are sampled, rewarded and learnt from in the same step."""

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[Any, None, dict[str, Any]]:
        """Prompts are ids already, for a text may hold control tokens that are to stay text."""
        return prompts, None, {}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A step's replies; its tokens are counted, of all processes."""
        replies: dict[str, Any] = super()._generate_and_score_completions(inputs)
        num_reply_tokens = int(replies["num_items_in_batch"])
        num_prompt_tokens = int(self.accelerator.gather(replies["prompt_mask"].sum()).sum())
        self.num_supervised_tokens += num_reply_tokens
        self.num_tokens += num_prompt_tokens + num_reply_tokens
        self.num_row_tokens += num_prompt_tokens + num_reply_tokens
        return replies

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL does, with fewer figures."""
        means = self._metrics["train"]
        told = {TOLD[name]: values for name, values in means.items() if name in TOLD}
        means.clear()
        means.update(told)
        super().log(logs, start_time)


@dataclass(frozen=True)
class Asked:
    """A data collator that leaves questions as they are, and knows which a step asks."""

    rows: Dataset
    """The ids of each question's `prompt`, its number, and its `source`."""
    plan: list[list[int]]

    def __call__(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The items."""
        return items


def build_grpo(settings: Train, base: Path, path: Path, scratch: Path) -> ReplyTrainer:
    """The trainer for a file of questions; its adapter has learnt nothing yet.

    Raises DataError at a line that is no question, and RecipeError where a step's replies cannot
    be divided among the processes.
    """
    chat = Chat(base)
    questions = read_questions(path)
    prompts = [chat.prompt_ids(q.messages, None, settings.grpo.mode) for q in questions]
    arguments = to_arguments(settings, scratch, max(map(len, prompts)))
    torch.manual_seed(settings.seed)
    model = make_model(settings, base)
    prepare_for_replies(model.get_base_model(), chat)
    asked = plan_questions(prompts, settings, str(path))
    trainer = ReplyTrainer(
        model=model,
        args=arguments,
        reward_funcs=Reward(chat, questions, settings.grpo.mode).grade,
        train_dataset=asked.rows.select([index for step in asked.plan for index in step]),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.data_collator = asked
    trainer.beta = settings.grpo.beta
    trainer.remove_callback(PrinterCallback)
    keep_adapter_in_float32(model)
    return trainer


def plan_questions(prompts: list[list[int]], settings: Train, source: str) -> Asked:
    """Which questions each step asks: always `batch_rows`, for TRL leaves out an incomplete one."""
    steps = settings.steps
    if steps is None:
        steps = max(1, ceil((settings.epochs or 1) * len(prompts) / settings.batch_rows))
    whole = settings.model_copy(update={"steps": steps, "epochs": None})
    columns = {
        "prompt": prompts,
        "question": list(range(len(prompts))),
        "source": [source] * len(prompts),
    }
    plan = plan_steps([[index] for index in range(len(prompts))], whole)
    return Asked(Dataset.from_dict(columns), plan)


def prepare_for_replies(model: PreTrainedModel, chat: Chat) -> None:
    """Replies end at <|im_end|>, or where the base's own texts do, which is no good form."""
    ends = model.generation_config.eos_token_id
    own = ends if isinstance(ends, list) else [] if ends is None else [ends]
    model.generation_config.eos_token_id = [
        chat.end_of_turn_id,
        *(token for token in own if token != chat.end_of_turn_id),
    ]
    # Padded rows and one token at a time; flex attention would be compiled for each length.
    model.set_attn_implementation("sdpa")


def to_arguments(settings: Train, scratch: Path, longest_prompt: int) -> GRPOConfig:
    """Our words to GRPO's: one generation and one optimizer step for `batch_rows` questions."""
    grpo = settings.grpo
    num_replies = settings.batch_rows * grpo.replies
    own, rest = divmod(num_replies, count_processes())
    if rest:
        raise RecipeError(
            f"train.batch_rows × train.grpo.replies is {num_replies}, which cannot be divided "
            f"among {count_processes()} processes; make it a multiple"
        )
    at_once = _divisor(own, settings.tokens_at_once // (longest_prompt + grpo.max_tokens))
    return make_arguments(
        GRPOConfig,
        settings,
        scratch,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=own // at_once,
        num_generations=grpo.replies,
        max_completion_length=grpo.max_tokens,
        temperature=grpo.temperature,
        beta=0,  # with another TRL would copy the adapter: the base without it is its reference
        loss_type="dapo",  # a mean over the step's reply tokens: no length is favoured
        shuffle_dataset=False,  # the plan has shuffled
        generation_kwargs={"use_cache": True},
    )


def _divisor(number: int, most: int) -> int:
    """The largest divisor that is at most so much; at least 1."""
    return max(size for size in range(1, max(1, min(most, number)) + 1) if number % size == 0)
