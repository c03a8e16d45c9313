"""The models on offer, and which of them a word means."""

import asyncio

import pytest
from scripted import ScriptedEngine

from pipeline.chat import Chat
from pipeline.errors import EngineDown, RequestError
from pipeline.serve.catalog import Catalog, Served


def test_a_model_is_found_by_slug_by_name_or_by_default(chat: Chat) -> None:
    served = Served("tiny", chat, ScriptedEngine(), 0)
    catalog = Catalog([served])

    assert [catalog.find(word) for word in ("local/tiny", "tiny", None)] == [served] * 3
    with pytest.raises(RequestError, match="other/tiny is not a valid model ID"):
        catalog.find("other/tiny")


def test_one_that_has_another_author_is_found_by_its_slug_and_name(chat: Chat) -> None:
    served = Served("tiny", chat, ScriptedEngine(), 0, author="me")

    assert [Catalog([served]).find(word).slug for word in ("me/tiny", "tiny")] == ["me/tiny"] * 2


def test_while_the_server_stops_nothing_is_found_and_it_is_not_ready(chat: Chat) -> None:
    engine = ScriptedEngine()
    catalog = Catalog([Served("tiny", chat, engine, 0)])
    assert asyncio.run(catalog.is_ready())

    catalog.is_draining = True

    with pytest.raises(EngineDown, match="about to stop"):
        catalog.find("tiny")
    assert not asyncio.run(catalog.is_ready())
    catalog.is_draining = False
    asyncio.run(engine.close())
    assert not asyncio.run(catalog.is_ready()), "an engine is not well"
