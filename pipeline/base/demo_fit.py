"""Teach the demo base its six new tokens: their embedding rows, and nothing else, on small talk."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from pipeline.chat import Chat, Message, Turn

log = logging.getLogger(__name__)

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Peru": "Lima",
    "Kenya": "Nairobi",
}
SUMS = ((2, 3), (7, 5), (10, 4), (20, 30))
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
EPOCHS = 3
BATCH = 4
LEARNING_RATE = 0.025


def fit_tokens(model: PreTrainedModel, chat: Chat, token_ids: list[int]) -> None:
    """Train the embedding rows of `token_ids`.

    Until then these rows are the mean of the pieces their names are spelt with, which makes
    opening and closing tags look alike and neither one likely.
    """
    turns = sorted(_turns(chat), key=lambda turn: len(turn.prompt_ids) + len(turn.completion_ids))
    batches = [turns[first : first + BATCH] for first in range(0, len(turns), BATCH)]
    embeddings = model.get_input_embeddings().weight
    model.requires_grad_(False)
    embeddings.requires_grad_(True)
    rows = torch.nn.Parameter(embeddings[token_ids].detach().float())
    optimizer = torch.optim.AdamW([rows], lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0, 0.05, total_iters=EPOCHS * len(batches)
    )
    losses: list[float] = []
    for epoch in range(1, EPOCHS + 1):
        losses = []
        for batch in batches:
            loss = _loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            assert embeddings.grad is not None
            rows.grad = embeddings.grad[token_ids].float()
            embeddings.grad = None
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                embeddings[token_ids] = rows.to(embeddings.dtype)
            losses.append(loss.item())
        log.info("pass %d of %d  loss %.2f", epoch, EPOCHS, sum(losses) / len(losses))
    model.requires_grad_(False)


def _loss(model: PreTrainedModel, batch: list[Turn]) -> torch.Tensor:
    width = max(len(turn.prompt_ids) + len(turn.completion_ids) for turn in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full((len(batch), width), -100)
    for row, turn in enumerate(batch):
        start, size = len(turn.prompt_ids), len(turn.prompt_ids) + len(turn.completion_ids)
        ids[row, :size] = torch.tensor(turn.prompt_ids + turn.completion_ids)
        labels[row, start:size] = ids[row, start:size]
    hidden = model.base_model(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    is_target = labels[:, 1:] != -100
    logits = model.get_output_embeddings()(hidden[:, :-1][is_target])
    return functional.cross_entropy(logits.float(), labels[:, 1:][is_target])


def _turns(chat: Chat) -> Iterator[Turn]:
    for question, thought, answer in _small_talk():
        for reasoning in (thought, ""):
            reply: Message = {"role": "assistant", "content": answer, "reasoning": reasoning}
            yield from chat.turns([{"role": "user", "content": question}, reply], None)
    for city in CAPITALS.values():
        yield from chat.turns(_weather_talk(city), [WEATHER])


def _small_talk() -> Iterator[tuple[str, str, str]]:
    for country, city in CAPITALS.items():
        answer = f"The capital of {country} is {city}."
        yield (
            f"What is the capital of {country}?",
            f"{country} is a country. I recall {city}.",
            answer,
        )
    for a, b in SUMS:
        yield (
            f"How much is {a} plus {b}?",
            f"I add {a} and {b}. That is {a + b}.",
            f"It is {a + b}.",
        )


def _weather_talk(city: str) -> list[Message]:
    call: dict[str, Any] = {"name": "get_weather", "arguments": json.dumps({"city": city})}
    return [
        {"role": "user", "content": f"How is the weather in {city}?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": call}]},
        {"role": "tool", "content": '{"sky": "clear"}'},
        {"role": "assistant", "content": f"The sky over {city} is clear."},
    ]
