"""Decide whether an answer names the one expected value and no other."""

import re
from collections.abc import Iterable
from functools import lru_cache

# Typographic dashes and quotes, so that spelling never decides.
SAME_CHARACTER = str.maketrans(
    {"\u2212": "-", "\u2011": "-"}
    | dict.fromkeys("`\"'\u201c\u201d\u201e\u2018\u2019\u00ab\u00bb", " ")
)
ESCAPED = re.compile(r"\\([\\`*_\[\]-])")
STARS = re.compile(r"(\*{1,3})(?=\S)(.+?)(?<=\S)\1")
# Underscores inside a word are part of a field name, never emphasis.
UNDERSCORES = re.compile(r"(?<!\w)(_{1,3})(?=[^\s_])(.+?)(?<=[^\s_])\1(?!\w)")
THOUSANDS = re.compile(r"(?<![\w.,])\d{1,3}(?:,\d{3})+(?!\w|,\d)")
WHOLE_NUMBER = re.compile(r"(?<![\w.])(\d+)\.0+(?!\w|\.\d)")
# "402/403" and "0-2" are two values each; "-2" and "2026-10-21" are one.
TWO_NUMBERS = re.compile(r"(?<![\w-])(\d+)([/-])(?=\d+(?![\w-]))")

# A value counts only as a whole token: not `1` in `1.5`, not `2` in `-2`, not `/key` in `/keys`
# or `/auth/key`. The last part of a dotted path counts, its parents do not.
BEFORE = r"(?<![\w/-])(?<!\d\.)"
AFTER = r"(?!\w|[./-]\w|/[{<])"


# The same candidates come back with every answer.
@lru_cache(maxsize=4096)
def plain(text: str) -> str:
    """`text` without Markdown and quotes, in one case and one number format.

    Both answers and candidates go through it, so that only what is said is compared.
    """
    text = ESCAPED.sub(r"\1", text).translate(SAME_CHARACTER)
    text = STARS.sub(r"\2", text)
    text = UNDERSCORES.sub(r"\2", text)
    text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    text = WHOLE_NUMBER.sub(r"\1", text)
    text = TWO_NUMBERS.sub(r"\1 \2 ", text)
    return " ".join(text.casefold().split())


def names(text: str, candidates: Iterable[str]) -> set[str]:
    """Which of `candidates` the text names, each as a whole token.

    At every place the longest candidate wins, so that `GET /key` is not also `/key`.
    Candidates that differ only in case or format are named together.
    """
    spellings: dict[str, set[str]] = {}
    for candidate in candidates:
        spellings.setdefault(plain(candidate), set()).add(candidate)
    spellings.pop("", None)
    if not spellings:
        return set()
    longest_first = sorted(spellings, key=len, reverse=True)
    choices = "|".join(re.escape(spelling) for spelling in longest_first)
    found = re.findall(f"{BEFORE}(?:{choices}){AFTER}", plain(text))
    return {candidate for spelling in found for candidate in spellings[spelling]}


def is_correct(
    answer_text: str, question_text: str, expected: str, candidates: Iterable[str]
) -> bool:
    """Whether the answer names the expected value and no other candidate.

    What the question itself names does not count: an answer may repeat the question, and
    gains nothing by it. An answer that names two values is wrong, so listing is no way to pass.
    """
    options = {*candidates, expected}
    new = names(answer_text, options) - names(question_text, options)
    return {plain(value) for value in new} == {plain(expected)}
