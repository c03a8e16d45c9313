"""Trainers as the train stage builds them, and conversations for them, for tests."""

from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from pipeline.chat import Chat
from pipeline.data.rows import Row
from pipeline.recipe import Train
from pipeline.train import stage
from pipeline.train.trainer import PackTrainer

FAST: dict[str, Any] = {
    "rank": 4,
    "alpha": 8,
    "batch_rows": 4,
    "micro_tokens": 100,
    "learning_rate": 0.02,
    "warmup_steps": 0,
    "schedule": "constant_with_warmup",
    "checkpointing": "none",
}


def settings(**values: Any) -> Train:
    return Train.model_validate(FAST | {"steps": 2} | values)


def build_trainer(base: Path, rows_file: Path, **values: Any) -> PackTrainer:
    """A trainer as `train` builds it."""
    scratch = Path(mkdtemp(dir=rows_file.parent))
    return stage.build_trainer(settings(**values), base, rows_file, scratch)


def fill_adapter(model: torch.nn.Module) -> None:
    """Give B values: its zeros would hide the gradient of A."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.05, generator=generator)


def make_talks(chat: Chat) -> list[Row]:
    """Five conversations of one to four turns; three have a system message in common."""
    found = []
    for number, num_turns in enumerate((1, 2, 3, 4, 2)):
        messages = []
        if number < 3:
            messages.append({"role": "system", "content": "You help in a shop."})
        for turn in range(num_turns):
            messages.append({"role": "user", "content": f"And {number} times {turn}?"})
            answer = {"role": "assistant", "content": str(number * turn)}
            messages.append(answer | {"reasoning": "Short." if turn % 2 else ""})
        for turn in chat.turns(messages, None):
            ids = (turn.prompt_ids, turn.completion_ids)
            found.append(Row(*ids, f"talk:{number}", turn.index, turn.mode))
    return found
