"""The general prompts for replay: what their README promises, and that a base can be asked them."""

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from pipeline.chat import Chat, check_message

FOLDER = Path(__file__).parents[1] / "data" / "general"
Row = dict[str, Any]

SHINGLE_CHARACTERS = 8
LARGEST_JACCARD = 0.6
LONGEST_WORDS = 600
FEWEST_LETTERS = 8
SCRIPTS = {
    "ar": r"[\u0600-\u06ff]",
    "hi": r"[\u0900-\u097f]",
    "ja": r"[\u3040-\u30ff]",
    "ko": r"[\uac00-\ud7a3]",
    "ru": r"[\u0400-\u04ff]",
    "zh": r"[\u4e00-\u9fff]",
}
# The other languages share a script; their commonest small words tell them apart.
SMALL_WORDS = {
    "de": "der die das und ist ich ein eine zu mit den wie nicht im man auf sich es vom bis",
    "en": "why the and of is to what my it you how this that for i are with do in we give who",
    "es": "el la los las de que y en una por con se es un he lo qué hoy mi",
    "fr": "le la les de des et est une un que il pour en du au je sans sa qui ce tu",
    "id": "yang dan di saya untuk dengan apa tidak ke kalau setiap tolong lebih ini seperti",
    "it": "il la di che un una in per si è come o non mio ha due perché",
    "pt": "os as de que em uma um por com não para do da é eu se me ele qual",
    "tr": "bir ve bu ne için çok neden ile ama da daha şu hangi bana ilk kaç her tam",
}


def read() -> list[Row]:
    lines = (FOLDER / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


ROWS = read()


def readme_table(title: str) -> dict[str, int]:
    """The counts in the README's table of that title, by the name in backticks."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    _, _, table = text.partition(f"| {title} | prompts |\n")
    rows = re.findall(r"\|.*?`(\w+)`.*\| (\d+) \|\n", table.partition("\n\n")[0] + "\n")
    return {name: int(number) for name, number in rows}


def roles(row: Row) -> list[str]:
    return [message["role"] for message in row["messages"]]


def asked(row: Row) -> str:
    return "\n".join(m["content"] for m in row["messages"] if m["role"] == "user")


def last_turn(row: Row) -> str:
    """The last question without its code and what it quotes."""
    return re.sub(r"```.*?```|\".*?\"|«.*?»|„.*?“", "", row["messages"][-1]["content"], flags=re.S)


def shingles(text: str) -> set[str]:
    text = " ".join(text.casefold().split())
    return {
        text[start : start + SHINGLE_CHARACTERS]
        for start in range(max(1, len(text) - SHINGLE_CHARACTERS + 1))
    }


def jaccard(left: set[str], right: set[str]) -> float:
    return len(left & right) / len(left | right)


def test_there_are_at_least_200_prompts_and_as_many_as_the_readme_says():
    said = re.search(r"(\d+) questions", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert said
    assert len(ROWS) == int(said[1]) >= 200


def test_every_row_is_a_conversation_that_ends_with_a_question():
    for row in ROWS:
        assert row.keys() - {"tools"} == {"messages", "kind", "language"}
        for index, message in enumerate(row["messages"]):
            check_message(index, message)
            assert message.keys() == {"role", "content"}
            assert message["content"] == message["content"].strip() != ""
        assert re.fullmatch("(system )?(user assistant )*user", " ".join(roles(row)))


@pytest.mark.parametrize(
    ("title", "key", "fewest"), [("kind", "kind", 14), ("language", "language", 11)]
)
def test_kinds_and_languages_are_counted_in_the_readme(title: str, key: str, fewest: int):
    counts = Counter(row[key] for row in ROWS)

    assert len(counts) >= fewest
    assert counts == readme_table(title)


def test_the_readme_counts_system_messages_exchanges_and_tools():
    text = " ".join((FOLDER / "README.md").read_text(encoding="utf-8").split())
    with_system = sum("system" in roles(row) for row in ROWS)
    with_exchange = sum("assistant" in roles(row) for row in ROWS)
    with_tools = sum("tools" in row for row in ROWS)

    assert (
        f"{with_system} prompts have a system message, {with_exchange} have an earlier exchange, "
        f"{with_tools} offer tools"
    ) in text


def test_no_prompt_is_another_in_nearly_the_same_words():
    texts = [shingles(asked(row)) for row in ROWS]

    assert len({asked(row) for row in ROWS}) == len(ROWS)
    assert max(jaccard(*pair) for pair in combinations(texts, 2)) < LARGEST_JACCARD


def test_near_duplicates_would_be_noticed():
    text = asked(ROWS[0])
    assert jaccard(shingles(text), shingles(text.upper() + "  Please.")) > LARGEST_JACCARD


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["language"])
def test_the_last_turn_is_in_the_language_it_claims(row: Row):
    text, language = last_turn(row), row["language"]
    if language in SCRIPTS:
        assert len(re.findall(SCRIPTS[language], text)) >= FEWEST_LETTERS
        if language == "zh":
            assert not re.search(SCRIPTS["ja"], text)
        return
    for script in SCRIPTS.values():
        assert not re.search(script, text)
    words = re.findall(r"\w+", text.casefold())
    score = {name: sum(w in small.split() for w in words) for name, small in SMALL_WORDS.items()}
    assert score[language] == max(score.values()) > 0, score


def test_tools_are_function_schemas_that_agree_with_themselves():
    for row in ROWS:
        assert (row["kind"] == "tools") == ("tools" in row)
        tools = [tool["function"] for tool in row.get("tools", ())]
        assert len({tool["name"] for tool in tools}) == len(tools)
        for tool in tools:
            assert re.fullmatch(r"[a-z_]+", tool["name"])
            assert tool["description"]
            assert tool["parameters"]["type"] == "object"
            assert set(tool["parameters"]["required"]) <= tool["parameters"]["properties"].keys()


def test_no_address_no_late_year_no_control_token(chat: Chat):
    literals = [token.content for token in chat.tokenizer.get_added_tokens_decoder().values()]
    assert "<|im_end|>" in literals
    for row in ROWS:
        text = json.dumps(row, ensure_ascii=False)
        assert not re.search(r"[\w.]+@\w+\.\w+", text)
        assert not re.search(r"\b20(2[5-9]|[3-9]\d)\b", text)
        assert not [literal for literal in literals if literal in text]


def test_every_prompt_renders_in_thinking_mode_with_its_tools(chat: Chat):
    for row in ROWS:
        ids = chat.prompt_ids(row["messages"], row.get("tools"), "thinking")
        text = chat.decode(ids)

        assert text.endswith("<|im_start|>assistant\n")
        assert all(message["content"] in text for message in row["messages"])
        assert all(f'"{tool["function"]["name"]}"' in text for tool in row.get("tools", ()))


def test_lengths_vary_and_stay_short():
    lengths = sorted(len(asked(row).split()) for row in ROWS)

    assert lengths[-1] < LONGEST_WORDS
    assert lengths[0] < 12 < 100 < lengths[-1]
