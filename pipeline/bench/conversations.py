"""Conversations to measure with: as many as wanted, each another, the same every time."""

import json
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

# By how often they come: the share of a word falls with its place, as in any language.
_TEXT = (
    "the to is and a of you it in for on that with this are not your be or if as can will an we "
    "from by have was at which do but no when there all one so request key model answer then may "
    "server more time first only account order error same new use number page line each please "
    "again before after setting limit where value open team file without message change check "
    "today also send read small every name support found return user start version token because "
    "under between total price refund shipment customer address invoice password report device "
    "response header retry timeout cache region balance upload download payment delivery contract "
    "warranty calendar notification subscription authentication configuration documentation "
    "maintenance replacement temperature availability"
)
_WORDS = _TEXT.split()
_SHARES = tuple(accumulate(1 / (place + 4) for place in range(len(_WORDS))))
_SYLLABLES = (
    "ba",
    "cor",
    "den",
    "fi",
    "gal",
    "hu",
    "jen",
    "ko",
    "lur",
    "mi",
    "nor",
    "pa",
    "quen",
    "ris",
    "sol",
    "tu",
    "ven",
    "wo",
    "xi",
    "yar",
    "zel",
)
_QUESTION_WORDS, _ANSWER_WORDS = (20, 70), (50, 125)


def write_conversations(path: Path, first: int, num: int) -> None:
    """Write a JSONL file of conversations number `first` to `first + num`, exclusive."""
    with path.open("w", encoding="utf-8") as file:
        for conversation in make_conversations(first, num):
            file.write(json.dumps(conversation, ensure_ascii=False) + "\n")


def make_conversations(first: int, num: int) -> Iterator[dict[str, Any]]:
    """Questions with one answer each, about 200 of Qwen3's tokens together.

    A conversation depends on its number alone, and its question names it, so no two are alike.
    """
    for number in range(first, first + num):
        random = Random(number)
        question = f"Ticket {number}: {_text(random, *_QUESTION_WORDS)}"
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": _text(random, *_ANSWER_WORDS)},
        ]
        yield {"messages": messages}


def _text(random: Random, fewest: int, most: int) -> str:
    """Sentences, some of them a list's, of so many words in all."""
    left = random.randint(fewest, most)
    text = ""
    while left > 0:
        size = min(left, random.randint(5, 16))
        left -= size
        gap = random.choices(("\n- ", "\n\n", " "), (1, 1, 8))[0] if text else ""
        text += gap + _sentence(random, size)
    return text


def _sentence(random: Random, size: int) -> str:
    words = random.choices(_WORDS, cum_weights=_SHARES, k=size)
    chance = random.random()
    if chance < 0.3:
        words[-1] = "".join(random.choices(_SYLLABLES, k=3)).title()
    elif chance < 0.5:
        words[-1] = f"{random.randint(2, 9999)}"
    elif chance < 0.6:
        words[0] = f"`{words[0]}_{words[-1]}`"
    if size > 8:
        words[size // 2] += ","
    words[0] = words[0][:1].upper() + words[0][1:]
    return " ".join(words) + random.choice("...?")
