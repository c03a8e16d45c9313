"""Secrets and personal data in text: what kinds it holds, never the things themselves."""

import re
from collections.abc import Callable
from dataclasses import dataclass

_PLACEHOLDER = re.compile(
    r"\.\.\.|x{4}|\*{3}|your|example|placeholder|redacted|dummy|123456|abcdef"
    r"|[<>{}$]",
    re.IGNORECASE,
)
_RUN = re.compile(r"[A-Za-z0-9]{16}")
_UNUSED_DOMAIN = re.compile(
    r"(?:.*\.)?(?:example(?:\.(?:com|org|net|edu))?|test|invalid|localhost|localdomain|local"
    r"|png|jpe?g|gif|svg|webp)",  # what follows the @ in names of images for fine screens
    re.IGNORECASE,
)
_NAMES = ("pass", "passwd", "password", "pwd", "secret", "token", "changeme")
_ISSUERS = re.compile(r"4|5[1-5]|2[2-7]|6[05]|3[47]")


def _is_real(found: str) -> bool:
    """Whether it is not what documentation writes where a secret goes."""
    num_different = len({character for character in found if character.isalnum()})
    return num_different > 5 and not _PLACEHOLDER.search(found)


def _is_random(found: str) -> bool:
    """Whether it looks drawn: words joined by hyphens are identifiers."""
    has_digit = any(character.isdigit() for character in found)
    return has_digit and bool(_RUN.search(found)) and _is_real(found)


def _is_password(found: str) -> bool:
    return found.lower() not in _NAMES and not _PLACEHOLDER.search(found)


def _is_address(domain: str) -> bool:
    return not _UNUSED_DOMAIN.fullmatch(domain)


def _is_card(number: str) -> bool:
    """Whether an issuer could have given it; those of two digits over and over are for tests."""
    if not _ISSUERS.match(number):
        return False
    digits = [int(character) for character in number if character.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0 and len(set(digits)) > 2


@dataclass(frozen=True)
class _Look:
    """How one kind of secret looks.

    Patterns begin with a fixed text or a bounded one, so that none runs away on a long text.
    """

    kind: str
    hints: tuple[str, ...]
    """Without one of these in the text the pattern is not tried; empty: always tried."""
    pattern: re.Pattern[str]
    """Its first group is what `is_real` judges."""
    is_real: Callable[[str], bool]


def _look(kind: str, hints: str, pattern: str, is_real: Callable[[str], bool] = _is_real) -> _Look:
    return _Look(kind, tuple(hints.split("|")), re.compile(pattern, re.ASCII), is_real)


# What is found is taken out before the next is looked for: a key after "Bearer" counts once.
_LOOKS = (
    _look(
        "private key",
        "PRIVATE KEY",
        r"-----BEGIN ([A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?)-----",
        lambda _: True,
    ),
    _look("AWS access key", "AKIA|ASIA", r"\b((?:AKIA|ASIA)[A-Z2-7]{16})\b"),
    _look(
        "GitHub token",
        "ghp_|gho_|ghu_|ghs_|ghr_|github_pat_",
        r"\b(?:gh[pousr]_|github_pat_)([A-Za-z0-9_]{36,255})\b",
        _is_random,
    ),
    _look("Slack token", "xox", r"\bxox[abeoprs]-([A-Za-z0-9-]{20,250})", _is_random),
    _look("Google API key", "AIza", r"\bAIza([\w-]{35})(?![\w-])"),
    _look("Hugging Face token", "hf_", r"\bhf_([A-Za-z0-9]{30,60})\b"),
    _look("Stripe key", "k_live_|whsec_", r"\b(?:[rs]k_live|whsec)_([A-Za-z0-9]{16,250})\b"),
    _look("OpenAI-style key", "sk-", r"sk-(?<![\w-]sk-)([\w-]{20,250})", _is_random),
    _look(
        "JSON Web Token",
        "eyJ",
        r"(?<![\w-])(eyJ[\w-]{8,2000}\.eyJ[\w-]{8,8000}\.[\w-]{16,2000})",
    ),
    _look("password in a URL", "://", r"://[^\s:/?#@]{0,64}:([^\s/@]{3,200})@", _is_password),
    _look(
        "bearer token",
        "earer ",
        r"\b[Bb]earer {1,4}([\w.~+/-]{20,2000})",
        _is_random,
    ),
    _look(
        "e-mail address",
        "@",
        r"@(?<=[\w.+%-]@)(?<!\bgit@)((?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24})\b",
        _is_address,
    ),
    _look(
        "card number",
        "",
        r"([2-6]\d{3}(?<![\w.]\d{4})([ -]?)(?:\d{4}\2\d{4}\2\d{4}|\d{6}\2\d{5}))(?!\w)",
        _is_card,
    ),
)


def find_secrets(text: str) -> list[str]:
    """The kinds of secrets in a text, one entry for each occurrence.

    Placeholders such as `sk-...`, `<token>` and addresses at example.com are none.
    """
    kinds: list[str] = []
    for look in _LOOKS:
        for hint in look.hints:
            if hint in text:
                text = _take(look, text, kinds)
                break
    return kinds


def _take(look: _Look, text: str, kinds: list[str]) -> str:
    """Note what looks like one kind of secret, and return the text without it."""

    def note(match: re.Match[str]) -> str:
        if look.is_real(match[1]):
            kinds.append(look.kind)
        return " "

    return look.pattern.sub(note, text)
