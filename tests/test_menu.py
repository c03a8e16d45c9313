"""Serve files: what may be said, what it comes to, and the one sentence for what may not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted import ScriptedEngine

from pipeline.chat import Chat
from pipeline.errors import PipelineError, RecipeError
from pipeline.serve.offer.catalog import Catalog
from pipeline.serve.offer.door import Door
from pipeline.serve.offer.engines import LLAMACPP_SLOTS, Room
from pipeline.serve.offer.entries import QUEUE_OF_A_SLOT, read_entries
from pipeline.serve.offer.menu import Menu, is_menu, read_menu
from pipeline.serve.settings import Settings, read_target

FOLDER = Path(__file__).parents[1] / "recipes"
SERVE_FILES = sorted(FOLDER.glob("serve/*.yaml"))


@pytest.fixture
def weights(tmp_path: Path, chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with `a/a.gguf`, `b/b.gguf`, their dialogue, and `lora.gguf`."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for file in (*chat_folder.iterdir(),):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        (tmp_path / name / f"{name}.gguf").write_text(name)
    (tmp_path / "lora.gguf").write_text("lora")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(text: str) -> Path:
    path = Path("serve.yaml")
    path.write_text(text, encoding="utf-8")
    return path


def catalog_of(menu: Menu, chat: Chat) -> Catalog:
    """What a server would offer."""
    models = []
    for entry in read_entries(menu):
        engine = ScriptedEngine()
        engine.context_tokens = 9000
        models += entry.serve(entry.set_up(), chat, engine, Door())
    return Catalog(models, menu.presets)


@pytest.mark.parametrize("path", SERVE_FILES, ids=lambda path: path.stem)
def test_every_serve_file_of_ours_is_valid(path: Path) -> None:
    assert is_menu(path)
    assert read_menu(path).models
    assert f"pipeline serve recipes/serve/{path.name}" in path.read_text(encoding="utf-8")


def test_a_serve_file_and_a_recipe_are_told_apart_by_what_they_say(weights: Path) -> None:
    assert not is_menu(FOLDER / "demo.yaml")
    assert not is_menu(weights / "a")
    assert is_menu(written("models: [{gguf: a/a.gguf}]"))
    with pytest.raises(RecipeError, match=r"neither a serve file, .* nor a recipe"):
        is_menu(written("model: a"))
    with pytest.raises(RecipeError, match="it must be a mapping such as `models:"):
        is_menu(written("- a"))


EVERYTHING = """
default: acme/tuned
models:
  - slug: acme/a
    gguf: a/a.gguf
    engine: llamacpp
    title: "Acme: A"
    about: The first.
    price: {prompt: 0.00000005, completion: "0.0000002", cached: "0.00000001", request: 0.001}
    context: 4096
    max_tokens: 1000
    slots: 2
    queue: 3
    aliases: [acme/a-20260101, old-a]
    compression: short_context
    quantization: int8
    hugging_face_id: Acme/A
    listing: {zdr: true}
    adapters:
      acme/plain: lora.gguf
      acme/tuned: {adapter: lora.gguf, title: Tuned, variants: {free: {}}}
    variants:
      free: {max_tokens: 100, context: 2048}
      extended: {gguf: b/b.gguf, engine: llamacpp, price: {prompt: "0.000001"}}
    upstreams:
      - {url: "https://openrouter.ai/api/v1/", key_env: THE_KEY, model: a/b, provider: OpenRouter}
      - url: http://10.0.0.1:8000/api/v1
        key_env: THE_KEY
        model: c/d
        provider: Cousin
        price: {completion: "0.000001"}
presets: {brief: {temperature: 0, models: [acme/a], reasoning: {enabled: false}}}
listing: {country_code: DE}
"""


@pytest.fixture
def everything(weights: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    monkeypatch.setenv("THE_KEY", "secret")
    return catalog_of(read_menu(written(EVERYTHING)), chat)


def test_everything_that_is_said_of_a_model_is_offered(everything: Catalog) -> None:
    served = everything.resolve("acme/a")

    assert (served.title, served.about, served.quantization) == ("Acme: A", "The first.", "int8")
    price = served.price
    assert (price.prompt, price.completion, price.cached) == (50_000, 200_000, 10_000)
    assert price.request == 10**9
    assert (served.context_tokens, served.max_completion_tokens) == (4096, 1000)
    assert (served.hugging_face_id, served.engine_name) == ("Acme/A", "llamacpp")
    assert served.compress_short
    assert not everything.resolve("acme/tuned").compress_short
    assert (served.listing.zdr, served.listing.country_code) == (True, None)
    assert everything.resolve("acme/tuned").listing.country_code == "DE"
    assert everything.presets["brief"]["reasoning"] == {"enabled": False}


def test_upstreams_have_the_key_of_their_variable_and_do_not_show_it(everything: Catalog) -> None:
    first, second = everything.resolve("acme/a").upstreams

    assert (first.url, first.key, first.model) == ("https://openrouter.ai/api/v1", "secret", "a/b")
    assert first.price is None
    assert second.price is not None
    assert second.price.completion == 1_000_000
    assert "secret" not in repr(everything)
    others = [served for served in everything.models if served.slug != "acme/a"]
    assert [served.upstreams for served in others] == [()] * 5


def test_variants_adapters_and_aliases_are_found_by_their_names(everything: Catalog) -> None:
    words = {
        "acme/a-20260101": "acme/a",
        "OLD-A": "acme/a",
        "a:free": "acme/a:free",
        "old-a:free": "acme/a:free",
        "acme/A:FREE": "acme/a:free",
        "a:free:nitro": "acme/a:free",
        "acme/a:extended": "acme/a:extended",
        "acme/a:thinking": "acme/a",
        "~acme/a-latest:free": "acme/a:free",
        "tuned:free": "acme/tuned:free",
        "plain": "acme/plain",
    }

    assert {word: everything.resolve(word).slug for word in words} == words
    for word in ("plain:free", "a:free:free"):
        with pytest.raises(PipelineError, match=f"No endpoints found for {word}"):
            everything.resolve(word)


def test_the_newest_of_a_family_is_a_model_and_no_variant(everything: Catalog) -> None:
    kin = [replace(served, name=f"fam-{served.name}") for served in everything.models]
    catalog = Catalog(sorted(kin, key=lambda served: served.variant != "free"))

    assert catalog.models[0].slug == "acme/fam-a:free"
    assert not catalog.resolve("~acme/fam-latest").variant


def test_a_free_variant_is_the_same_at_no_price(everything: Catalog) -> None:
    served, free = everything.resolve("a"), everything.resolve("a:free")

    assert free.engine is served.engine
    assert free.door is served.door
    assert free.price.is_free
    assert (free.context_tokens, free.max_completion_tokens) == (2048, 100)
    assert (free.title, free.about, free.adapter) == ("Acme: A (free)", "The first.", None)
    assert everything.resolve("tuned:free").adapter == "acme/tuned"


def test_an_extended_variant_has_its_own_engine_and_price(everything: Catalog) -> None:
    served, extended = everything.resolve("a"), everything.resolve("a:extended")

    assert extended.engine is not served.engine
    assert extended.price.prompt == 1_000_000
    assert (extended.context_tokens, extended.title) == (9000, "Acme: A (extended)")


def test_a_run_whose_adapter_is_served_unmerged_keeps_it_apart_from_the_others(
    weights: Path, chat: Chat
) -> None:
    (weights / "mine").mkdir()
    exports = (weights / "a").rename(weights / "mine" / "exports")
    (exports / "adapter").mkdir()
    for name in ("base-bf16.gguf", "mine-lora.gguf"):
        (exports / "adapter" / name).write_text(name)
    said = "slug: me/x, run: mine, artefact: adapter, engine: llamacpp, adapters"

    menu = read_menu(written(f"models: [{{{said}: {{me/y: lora.gguf}}}}]"))
    own, other = catalog_of(menu, chat).models
    assert (own.adapter, other.adapter) == ("local/mine", "me/y")
    with pytest.raises(PipelineError, match="local/mine is the run's own adapter"):
        read_entries(read_menu(written(f"models: [{{{said}: {{local/mine: lora.gguf}}}}]")))


def test_of_an_engine_there_is_the_room_that_was_asked_for(weights: Path) -> None:
    said = "{gguf: a/a.gguf, engine: llamacpp, slots: 2, context: 512, queue: 3}"
    first, second = read_entries(read_menu(written(f"models: [{said}, {{gguf: b/b.gguf}}]")))

    setup = first.set_up()
    assert setup.room == Room(2, 512)
    assert first.max_inside(setup) == 5
    assert second.max_inside(second.set_up()) == LLAMACPP_SLOTS * (1 + QUEUE_OF_A_SLOT)


FAULTS: list[tuple[Any, str]] = [
    ("models: []", "models: "),
    ("models: [{}]", "models.0: give one of run, checkpoint, gguf and urls"),
    ("models: [{run: a, gguf: b}]", "models.0: give one of run, checkpoint, gguf and urls"),
    ("models: [{run: a, slug: a}]", "models.0.slug: 'a' is no AUTHOR/NAME"),
    ("models: [{run: a, pirce: {}}]", "models.0.pirce: unknown key; did you mean price?"),
    ("models: [{run: a, price: {prompt: -1}}]", "models.0.price.prompt: '-1' is no whole number"),
    ("models: [{run: a, price: {prompt: cheap}}]", "'cheap' is no amount of dollars"),
    ("models: [{run: a, price: {prompt: true}}]", "no key takes true or false"),
    ("models: [{run: a, engine: steam}]", "models.0.engine: Input should be 'auto', "),
    ("models: [{run: a, engine: llamacpp, gpu_memory: 0.5}]", "gpu_memory is for vllm"),
    ("models: [{urls: http://a}]", "models.0: urls and tokenizer belong together"),
    ("models: [{run: a, tokenizer: b}]", "models.0: urls and tokenizer belong together"),
    ("models: [{urls: [a], tokenizer: b}]", "models.0.urls.0: 'a' is no address"),
    ("models: [{urls: 'http://me:pw@a', tokenizer: b}]", "holds no name or password"),
    ("models: [{urls: http://a, tokenizer: b, engine: vllm}]", "engine, artefact and gpu_memory"),
    ("models: [{urls: http://a, tokenizer: b, queue: 1}]", "say in slots how many"),
    ("models: [{urls: http://a, tokenizer: b, adapters: {a/b: c}}]", "adapters are not for urls"),
    ("models: [{run: a, adapters: {b: c}}]", "models.0.adapters.b.[key]: 'b' is no AUTHOR/NAME"),
    ("models: [{run: a, adapters: {a/b: {}}}]", "models.0.adapters.a/b: give a path, or one of"),
    ("models: [{run: a, variants: {pro: {}}}]", "unknown key; known here: free, extended"),
    ("models: [{run: a, variants: {free: {price: {}}}}]", "models.0.variants.free.price: unknown"),
    ("models: [{run: a, upstreams: [{url: 'ftp://a'}]}]", "'ftp://a' is no address"),
    ("models: [{run: a, upstreams: [{key_env: A-B}]}]", "models.0.upstreams.0.key_env: "),
    ("models: [{run: a, listing: {zrd: true}}]", "listing.zrd: unknown key; did you mean zdr?"),
    ("{models: [{run: a}], presets: {Big: {}}}", "presets.Big.[key]: "),
    ("{models: [{run: a}], presets: {a: {x: 2026-01-01}}}", "presets.a.x: input was not a valid"),
    ("{models: [{run: a}], port: 70000}", "port: Input should be less than or equal to 65535"),
    ("{models: [{run: a}], models: []}", "the key 'models' stands here twice"),
]


@pytest.mark.parametrize(("text", "said"), FAULTS, ids=[said for _, said in FAULTS])
def test_a_fault_is_told_with_its_place(weights: Path, text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_menu(written(text))

    assert str(caught.value).startswith("serve.yaml ")
    assert said in str(caught.value)


A, B = "gguf: a/a.gguf", "gguf: b/b.gguf"
UPSTREAM = "{url: 'https://x.org', key_env: NO_SUCH_KEY, model: m, provider: p}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: [{gguf: none.gguf}]", "none.gguf does not exist: give a run folder"),
        (f"models: [{{{A}}}, {{{A}}}]", "two models would be called local/a"),
        (f"models: [{{{A}}}, {{{B}, aliases: [local/a]}}]", "two models would be called local/a"),
        (f"models: [{{{A}, adapters: {{local/a: lora.gguf}}}}]", "would be called local/a"),
        (f"{{models: [{{{A}}}], default: b}}", "default: b is not among local/a"),
        (f"models: [{{{A}, upstreams: [{UPSTREAM}]}}]", "should be in NO_SUCH_KEY, which is not"),
        ("models: [{gguf: a/a.gguf, engine: vllm}]", "vLLM does not load GGUF files"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(weights: Path, text: str, said: str) -> None:
    with pytest.raises(PipelineError, match=said):
        read_entries(read_menu(written(text)))


def test_what_a_serve_file_says_is_not_said_on_the_command_line(weights: Path) -> None:
    path = written("models: [{gguf: a/a.gguf}]")
    options: list[dict[str, Any]] = [
        {"engine": "llamacpp"},
        {"artefact": "merged"},
        {"adapters": {"a/b": weights}},
        {"model": "a/b"},
        {"room": Room(slots=1)},
    ]
    for option in options:
        with pytest.raises(PipelineError, match=r"is not for serve\.yaml, which says so of each"):
            read_target(path, Settings(**option))
    assert read_target(path, Settings(port=1, books="x")).models[0].gguf == "a/a.gguf"


def test_anything_else_is_a_menu_of_one_model(weights: Path, chat: Chat) -> None:
    adapters = {"me/b": Path("lora.gguf")}
    settings = Settings(engine="llamacpp", model="me/a", adapters=adapters, room=Room(3, 77))
    menu = read_target(Path("a"), settings)

    assert [served.slug for served in catalog_of(menu, chat).models] == ["me/a", "me/b"]
    assert read_entries(menu)[0].room == Room(3, 77)
