"""Secrets: every kind is seen, what only looks like one is not, and none is ever repeated.

The fakes are put together at run time: no text here may alarm those who scan repositories.
"""

import random
import string
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.secrets import find_secrets

LETTERS = string.ascii_letters + string.digits
UPPER = string.ascii_uppercase + "234567"


def draw(length: int, alphabet: str = LETTERS, seed: int = 1) -> str:
    """Characters as a key has them, a digit among the first of them."""
    return "7" + "".join(random.Random(seed).choices(alphabet, k=length - 1))


def card(number: str) -> str:
    """A number with its check digit."""
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in number[::-2])
    return number + str(-(doubled + sum(map(int, number[-2::-2]))) % 10)


VISA, AMEX, MASTER = card("453957629310482"), card("37182946305172"), card("510293847561029")
TOKEN = ".".join(("ey" + "J" + draw(20), "ey" + "J" + draw(60), draw(43)))
FAKES = [
    ("private key", "-----BEGIN " + "RSA PRIVATE" + " KEY-----"),
    ("private key", "-----BEGIN " + "PRIVATE" + " KEY-----"),
    ("private key", "-----BEGIN " + "PGP PRIVATE" + " KEY BLOCK-----"),
    ("AWS access key", "AK" + "IA" + draw(16, UPPER)),
    ("AWS access key", "AS" + "IA" + draw(16, UPPER)),
    ("GitHub token", "gh" + "p_" + draw(36)),
    ("GitHub token", "github" + "_pat_" + draw(22) + "_" + draw(59)),
    ("Slack token", "xo" + "xb-" + "2" * 12 + "-" + "3" * 12 + "-" + draw(24)),
    ("Google API key", "AI" + "za" + draw(35)),
    ("Hugging Face token", "h" + "f_" + draw(34)),
    ("Stripe key", "sk_" + "live_" + draw(24)),
    ("Stripe key", "wh" + "sec_" + draw(32)),
    ("OpenAI-style key", "sk" + "-" + draw(48)),
    ("OpenAI-style key", "sk" + "-proj-" + draw(80) + "_" + draw(40)),
    ("OpenAI-style key", "sk" + "-or-v1-" + draw(64, "0123456789abcdef")),
    ("OpenAI-style key", "sk" + "-ant-api03-" + draw(90)),
    ("JSON Web Token", TOKEN),
    ("password in a URL", "postgres://admin:" + "Summer!24" + "@db.internal:5432/x"),
    ("password in a URL", "https://:" + draw(12) + "@host/path"),
    ("bearer token", "Authorization: Bearer " + draw(40)),
    ("e-mail address", "jo.doe+news" + "@" + "mail.firm.co.uk"),
    ("e-mail address", "mailto:jo" + "@" + "firm.de."),
    ("card number", VISA),
    ("card number", " ".join(MASTER[i : i + 4] for i in range(0, 16, 4))),
    ("card number", "-".join(VISA[i : i + 4] for i in range(0, 16, 4))),
    ("card number", AMEX),
    ("card number", f"{AMEX[:4]} {AMEX[4:10]} {AMEX[10:]}"),
]
HARMLESS = [
    "",
    "-----BEGIN " + "PUBLIC KEY-----",
    "-----BEGIN " + "CERTIFICATE-----",
    "a PRIVATE KEY is kept at home",
    "AK" + "IA" + "IOSFODNN7" + "EXAMPLE",
    "AK" + "IA" + draw(15, UPPER),
    "AK" + "IA" + draw(17, UPPER),
    "X" + "AK" + "IA" + draw(16, UPPER),
    "gh" + "p_" + draw(30),
    "gh" + "p_" + "x" * 36,
    "gh" + "p_" + "abcdefghij" * 3 + "123456",
    "xo" + "xb-your-token",
    "xo" + "xb-" + "1" * 40,
    "AI" + "za" + draw(34),
    "AI" + "za" + draw(36),
    "h" + "f_" + "transformers_are_nice_and_so_are_you",
    "h" + "f_" + "x" * 34,
    "sk_" + "test_" + draw(24),
    "sk_" + "live_...",
    "sk-or-v1-...",
    "API keys start with `sk-or-v1-`.",
    "sk-or-v1-" + "x" * 64,
    "sk-or-v1-" + "0" * 64,
    "sk-your-key-here-please-put-it-here-1",
    "sk-learn-like-pipelines-with-2-steps",
    "sk-internationalization-of-things",
    "sk-1a2b3c4d" + "x" * 24,
    "sk-1234567890qwertyuiop",
    "ri" + "sk-" + draw(48),
    "ta" + "sk-" + draw(48),
    ".".join(("ey" + "J" + draw(20), draw(60))),
    "eyJ.eyJ.",
    "https://host:8080/path@2",
    "http://host/a:b@c",
    "https://user:pass@host",
    "https://user:<password>@host",
    "https://user:${PASSWORD}@host",
    "https://user:***@host",
    "https://user:...@host",
    "https://user:yourpass@host",
    "Bearer $OPENROUTER_API_KEY_OF_MINE_1",
    "Bearer <your-token-goes-right-here-1>",
    "Bearer YOUR_OPENROUTER_API_KEY_0000",
    "bearer of good news from far away in 2024",
    "jo@example.com",
    "jo@mail.example.org",
    "jo@service.example",
    "jo@localhost",
    "jo@test.invalid",
    "git@github.com:firm/code.git",
    "logo@2x.png",
    "package@1.2.3",
    "@decorator.name",
    "a @ b.com",
    VISA[:-1] + str((int(VISA[-1]) + 1) % 10),
    VISA + "1",
    "1" + VISA,
    "0." + VISA,
    "4242 4242 4242 4242",
    "4111111111111111",
    card("973957629310482"),
    card("503957629310482"),
    card("353957629310482"),
    "3.14159265358979323846",
]


@pytest.mark.parametrize(("kind", "fake"), FAKES)
@pytest.mark.parametrize("around", ["{}", "It is {}, I think.", '{{"key": "{}"}}', "钥匙{}。"])
def test_each_kind_is_seen_once_wherever_it_stands(kind, fake, around):
    assert find_secrets(around.format(fake)) == [kind]


@pytest.mark.parametrize("text", HARMLESS)
def test_placeholders_and_what_only_looks_alike_are_no_secrets(text):
    assert find_secrets(text) == []
    assert find_secrets(f"It is {text} here.") == []


def test_a_key_in_a_header_or_an_address_in_a_url_counts_once():
    for fake in (TOKEN, "sk" + "-" + draw(48), "gh" + "p_" + draw(36)):
        assert len(find_secrets(f"Bearer {fake}")) == 1
    assert find_secrets("ftp://jo:" + draw(9) + "@" + "firm.de") == ["password in a URL"]


def test_every_second_digit_of_a_card_number_counts():
    for index in range(len(VISA)):
        for digit in set(string.digits) - {VISA[index]}:
            assert find_secrets(VISA[:index] + digit + VISA[index + 1 :]) == []


@given(st.lists(st.sampled_from([text for _, text in FAKES] + HARMLESS + ["and", "\n"])))
def test_counts_add_up_when_texts_are_joined(texts):
    apart = Counter(kind for text in texts for kind in find_secrets(text))
    assert Counter(find_secrets(" and ".join(texts))) == apart


@given(st.lists(st.sampled_from([text for _, text in FAKES])))
def test_secrets_side_by_side_are_all_counted(fakes):
    apart = Counter(kind for kind, fake in FAKES for text in fakes if text == fake)
    assert Counter(find_secrets(" ".join(fakes))) == apart


@given(st.text(st.characters(exclude_characters=LETTERS)))
def test_text_without_latin_letters_and_digits_holds_none(text):
    assert find_secrets(text) == []


@given(st.text(), st.sampled_from([text for _, text in FAKES]))
def test_kinds_are_words_and_never_the_secret(text, fake):
    kinds = {kind for kind, _ in FAKES}
    assert set(find_secrets(f"{text} {fake}")) <= kinds


@pytest.mark.parametrize(
    "start", ["a@", "sk-", "-sk-", "-----BEGIN ", "-eyJ", "://a:", "Bearer ", "4111 ", "a.", "1"]
)
def test_a_long_text_of_beginnings_holds_none(start):
    assert find_secrets(start * (200_000 // len(start))) == []
