"""A fault is told by the client's own names, without a word of how it was found."""

from typing import Any

import pytest

from pipeline.errors import RequestError
from pipeline.serve.asking.request import check_request
from pipeline.serve.skins.messages import Messages
from pipeline.serve.skins.responses import Responses

USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"messages": [1]}, "messages.0: Input should be an object"),
        (
            {"messages": [{**USER, "content": [1]}]},
            "messages.0.content.0: Input should be an object",
        ),
        (
            {"messages": [{**USER, "content": 1}]},
            "messages.0.content: Input should be a valid string",
        ),
        ({"messages": [USER, {"content": "x"}]}, "messages.1.role: Field required"),
        ({"reasoning": 1}, "reasoning: Input should be an object"),
        ({"tool_choice": {"type": "x"}}, "tool_choice.type: Input should be 'function'"),
        ({"tool_choice": "x"}, "tool_choice: Input should be 'auto', 'none' or 'required'"),
        ({"provider": {"sort": {"by": "x"}}}, "provider.sort.by: Input should be 'price'"),
        (
            {"provider": {"max_price": {"prompt": -1}}},
            "provider.max_price.prompt: Input should be gr",
        ),
        ({"metadata": {"[": "x"}}, "metadata.[: String should match pattern"),
        ({"top_p": 2, "top_k": "x"}, "top_p: Input should be less than or equal to 1"),
    ],
)
def test_a_fault_is_at_a_place_of_the_body(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_request({"messages": [USER], **fields})

    assert str(caught.value).startswith(told)


@pytest.mark.parametrize(
    ("skin", "body", "told"),
    [
        (
            Responses(),
            {"input": [{**USER, "content": [1]}]},
            "input.0.content.0: Input should be an",
        ),
        (Responses(), {"input": "x", "text": 1}, "text: Input should be an object"),
        (Messages(), {"messages": [USER], "thinking": 1}, "thinking: Input should be an object"),
        (Messages(), {"messages": [USER], "tools": [1]}, "tools.0: Input should be an object"),
        (
            Messages(),
            {"messages": [{**USER, "content": [{"type": "text"}]}]},
            "messages.0.content.0.text: Field required",
        ),
    ],
)
def test_it_is_so_in_every_dialect(skin: Any, body: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError) as caught:
        skin.read(body)

    assert str(caught.value).startswith(told)


def test_null_is_no_price_at_all() -> None:
    request = check_request({"messages": [USER], "provider": {"max_price": {"prompt": None}}})

    assert request.provider is not None
    assert request.provider.max_price is not None
    assert request.provider.max_price.prompt is None
