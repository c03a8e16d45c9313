"""Odd requests without end: nearly right ones, nearly JSON, and what is neither."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from bodies import ANSWERED

from pipeline.serve.api.listing import ModelsQuery
from pipeline.serve.openapi.operations import OPERATIONS

BODIES = [(path, body) for path, bodies in ANSWERED.items() for body in bodies]
TEXTS = [
    "",
    "a",
    "ä€𐍈\u200f\u2028",
    "\x00\x1b[31m",
    "<|im_end|><think></tool_call>",
    "'; drop table keys; --",
    "{{ 7 * 7 }}{% raw %}",
    "../../../etc/passwd",
    "local/tiny:free",
    "~local/tiny-latest",
    "@preset/none",
    "x" * 3000,
    "9" * 400,
]
NUMBERS = [0, -1, 1, 2, 0.5, -0.0, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, 1e-320]
# Not what json.dumps would write: lone surrogates, numbers that are none, too much of anything.
RAW = [
    r'"\ud800"',
    r'"\udc00\ud800 a"',
    "NaN",
    "-Infinity",
    "1e999",
    "-",
    "01",
    "[" * 2000,
    "[" * 500 + "]" * 500,
    '{"a":' * 300 + "1" + "}" * 300,
    '{"a": 1, "a": [2], "messages": null}',
    "\ufeff{}",
    "// nothing",
]
PLACE_OF_RAW = "@raw@"
METHODS = ["GET"] * 8 + ["POST", "PUT", "DELETE", "PATCH", "HEAD", "get", "PROPFIND"]
ENDS = [""] * 20 + ["/", "//", "/..", "/%2e%2e", "/x", *TEXTS]
QUERY_WORDS = [*TEXTS, "1", "-1", "nan", "inf", "2026-02-30", "newest", "%", "a&b=c"]
HEADERS = [
    "Accept",
    "Content-Encoding",
    "Content-Type",
    "HTTP-Referer",
    "User-Agent",
    "X-OpenRouter-Cache",
    "X-OpenRouter-Cache-Clear",
    "X-OpenRouter-Cache-TTL",
    "X-OpenRouter-Metadata",
    "X-Session-Id",
    "X-Title",
    "anthropic-version",
]
HEADER_WORDS = ["", "enabled", "true", "ü" * 300, "text/xml; charset=utf-16", "gzip", "a\tb", "-1"]


@dataclass(frozen=True)
class Request:
    """As it goes out."""

    method: str
    path: str
    """Not yet quoted."""
    query: str
    headers: dict[str, str]
    body: bytes


class Fuzzer:
    """The same seed gives the same requests."""

    def __init__(self, key: str, seed: int) -> None:
        self._key = key
        self._random = random.Random(seed)
        self._pick = self._random.choice

    def request(self) -> Request:
        """Mostly one whose body is nearly right."""
        path, body = self._pick(BODIES)
        if self._is_chosen(0.2):
            return self._odd_request()
        prefix = self._pick(["/api/v1", "/v1"])
        return Request("POST", prefix + path, "", self._headers(), self._body(body))

    def _odd_request(self) -> Request:
        model = self._pick(["local/tiny", "a/b", "//", *TEXTS])
        form = self._pick(list(OPERATIONS)).rpartition(" ")[2]
        path = form.replace("{model}", model).replace("{hash}", model) + self._pick(ENDS)
        prefix = self._pick(["/api/v1", "/v1", "", "//", "/API/v1"])
        names = [*ModelsQuery.model_fields, "id", "date", "key"]
        pairs = [
            (
                self._pick(names),
                quote(self._pick(QUERY_WORDS)) if self._is_chosen(0.8) else "%zz%ff",
            )
            for _ in range(self._random.randrange(4))
        ]
        query = "&".join(f"{name}={word}" for name, word in pairs)
        return Request(self._pick(METHODS), prefix + path, query, self._headers(), self._junk())

    def _headers(self) -> dict[str, str]:
        right: dict[str, str] = {"Authorization": f"Bearer {self._key}"}
        wrong: list[dict[str, str]] = [
            {},
            {"x-api-key": self._key},
            {"Authorization": self._key},
            {"Authorization": f"Basic {self._key}"},
            {"Authorization": "Bearer " + "ü" * 50},
            {"Authorization": f"Bearer {self._key}x"},
        ]
        others = [(self._pick(HEADERS), self._pick(HEADER_WORDS)) for _ in range(2)]
        return {**(self._pick(wrong) if self._is_chosen(0.05) else right), **dict(others)}

    def _body(self, body: Any) -> bytes:
        if self._is_chosen(0.05):
            return self._junk()
        changed = json.loads(json.dumps(body))
        for _ in range(self._pick([0, 1, 1, 1, 1, 2, 2, 3, 8])):
            self._change(changed)
        text = json.dumps(changed, ensure_ascii=self._is_chosen(0.5))
        while PLACE_OF_RAW in text:
            text = text.replace(f'"{PLACE_OF_RAW}"', self._pick(RAW), 1)
        sent = text.encode("utf-8", "surrogatepass")
        if not self._is_chosen(0.03):
            return sent
        place = self._random.randrange(len(sent))
        return self._pick([sent[:place], sent[:place] + b"\xff" + sent[place:], sent + sent])

    def _junk(self) -> bytes:
        kinds: list[bytes] = [
            b"",
            b"null",
            self._random.randbytes(200),
            self._pick(RAW).encode(),
            json.dumps(self._value(4)).encode(),
            json.dumps({self._pick(TEXTS): self._value(3)}).encode("utf-16"),
        ]
        return self._pick(kinds)

    def _change(self, body: Any) -> None:
        """One place of it: dropped, doubled, put deeper, or another value."""
        places = list(_places(body))
        if not places:
            return
        holder, name = self._pick(places)
        change = self._pick([_drop, _double, self._put_deeper, self._add])
        if self._is_chosen(0.3):
            change(holder, name)
        else:
            new = self._alike(holder[name]) if self._is_chosen(0.6) else self._value(3)
            holder[name] = new

    def _put_deeper(self, holder: Any, name: Any) -> None:
        for _ in range(self._pick([1, 5, 200])):
            holder[name] = self._pick([[holder[name]], {"a": holder[name]}])

    def _add(self, holder: Any, name: Any) -> None:  # noqa: ARG002 - it stays
        if isinstance(holder, dict):
            holder[self._name()] = self._value(3)

    def _alike(self, value: Any) -> Any:
        """Another one of its kind, which may well be right."""
        if isinstance(value, bool):
            return not value
        if isinstance(value, int | float):
            return self._pick([value + 1, -value, *NUMBERS])
        if isinstance(value, str):
            places = _places(self._pick(BODIES)[1])
            said = [holder[name] for holder, name in places if isinstance(holder[name], str)]
            return self._pick([*said, *TEXTS])
        return value[:-1] if isinstance(value, list) else self._value(1)

    def _value(self, depth: int) -> Any:
        """Any JSON value."""
        size = self._random.randrange(4)
        kinds: list[Callable[[], Any]] = [
            lambda: self._pick([None, True, False]),
            lambda: self._pick(NUMBERS),
            lambda: self._pick(TEXTS),
            lambda: PLACE_OF_RAW,
        ]
        if depth:
            kinds += [
                lambda: [self._value(depth - 1) for _ in range(size)],
                lambda: {self._name(): self._value(depth - 1) for _ in range(size)},
            ]
        return self._pick(kinds)()

    def _name(self) -> str:
        """Of a field, so that some of them meet their own."""
        return self._pick([*self._pick(BODIES)[1], "type", "role", "content", "schema", *TEXTS])

    def _is_chosen(self, share: float) -> bool:
        return self._random.random() < share


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place that something stands at: what holds it, and its name or number there."""
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        if isinstance(holder, dict | list):
            names = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            yield from ((holder, name) for name in names)
            waiting += [holder[name] for name in names]


def _drop(holder: Any, name: Any) -> None:
    del holder[name]


def _double(holder: Any, name: Any) -> None:
    if isinstance(holder, list):
        holder *= 20
