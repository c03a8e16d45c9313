"""The models on offer, and which of them a word means."""

import asyncio

import pytest
from scripted import ScriptedEngine

from pipeline.chat import Chat
from pipeline.errors import EngineDown, RequestError
from pipeline.serve.offer.catalog import Catalog, Served


def test_a_model_is_found_by_slug_by_name_or_by_default(chat: Chat) -> None:
    served = Served("tiny", chat, ScriptedEngine(), 0)
    catalog = Catalog([served])

    assert [catalog.find(word) for word in ("local/tiny", "tiny", None)] == [served] * 3
    with pytest.raises(RequestError, match="other/tiny is not a valid model ID"):
        catalog.find("other/tiny")


def test_one_that_has_another_author_is_found_by_its_slug_and_name(chat: Chat) -> None:
    served = Served("tiny", chat, ScriptedEngine(), 0, author="me")

    assert [Catalog([served]).find(word).slug for word in ("me/tiny", "tiny")] == ["me/tiny"] * 2


@pytest.fixture
def family(chat: Chat) -> Catalog:
    """Its newest is neither the first nor the last."""
    engine = ScriptedEngine()
    names = {"tiny": 2, "tiny-9b": 3, "tinytim-1": 5, "Tiny-4b": 1, "TINY": 0}
    return Catalog([Served(name, chat, engine, created) for name, created in names.items()])


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("LOCAL/TINY", "tiny"),
        ("local/TINY", "TINY"),
        ("TINY", "TINY"),
        ("Tiny-4b", "Tiny-4b"),
        ("tiny-4b", "Tiny-4b"),
        ("local/tiny:thinking", "tiny"),
        ("tiny:nitro", "tiny"),
        ("local/tiny:FLOOR", "tiny"),
        ("local/tiny-9b:exacto", "tiny-9b"),
        ("~local/tiny-latest", "tiny-9b"),
        ("~Local/Tiny-4b-latest", "Tiny-4b"),
        ("~local/tiny-latest:nitro", "tiny-9b"),
    ],
)
def test_an_id_may_have_a_variant_or_mean_the_newest_of_its_family(
    family: Catalog, word: str, name: str
) -> None:
    assert family.find(word).name == name


@pytest.mark.parametrize(
    ("word", "status", "code", "instead"),
    [
        ("local/tiny:free", 404, "free_variant_ended", ("local/tiny",)),
        ("tiny:extended", 404, "no_endpoints", ("local/tiny",)),
        ("local/none:free", 400, "model_not_found", ()),
        ("local/tiny:other", 400, "model_not_found", ()),
        ("local/tiny:", 400, "model_not_found", ()),
        ("local/tiny:nitro:nitro", 400, "model_not_found", ()),
        ("~local/tin-latest", 400, "model_not_found", ()),
        ("~tiny-latest", 400, "model_not_found", ()),
        ("~-latest", 400, "model_not_found", ()),
        ("", 400, "model_not_found", ()),
    ],
)
def test_an_id_that_means_no_model_says_what_is_wrong_with_it(
    family: Catalog, word: str, status: int, code: str, instead: tuple[str, ...]
) -> None:
    with pytest.raises(RequestError) as refused:
        family.find(word)

    availability = refused.value.availability
    assert refused.value.status == status
    assert availability is not None
    assert (availability.code, availability.fallback_models) == (code, instead)
    assert f"{word} is not a valid model ID" == str(refused.value) or status == 404


def test_there_is_no_web_search(family: Catalog) -> None:
    with pytest.raises(RequestError, match="no web search here; ask local/tiny") as refused:
        family.find("tiny:online")

    assert refused.value.status == 400


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
