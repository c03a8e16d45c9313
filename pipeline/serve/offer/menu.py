"""What a serve file may say: models, what each is made from, and on what terms it is offered."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    field_validator,
    model_validator,
)

from pipeline.errors import RecipeError
from pipeline.serve.asking.presets import check_preset
from pipeline.serve.offer.choice import Choice
from pipeline.serve.offer.price import Price, parse_usd
from pipeline.serve.offer.provider import UNLISTED, Listing
from pipeline.serve.skins.skin import UsageChunk
from pipeline.strict_yaml import Section, read_mapping, validate

KIND = "serve file"
_EXAMPLE = "models: [{slug: acme/support, run: runs/support}]"
_OF_RECIPES = frozenset(["base", "data"])


def _slug(word: str) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", word):
        raise ValueError(f"{word!r} is no AUTHOR/NAME")
    return word


def _url(word: str) -> str:
    if not re.fullmatch(r"https?://[^/\s?#,]+(/[^\s?#,]*)?", word):
        raise ValueError(f"{word!r} is no address such as https://example.org/api/v1")
    if "@" in word:
        raise ValueError("an address holds no name or password: a key comes from a variable")
    return word.rstrip("/")


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Slug = Annotated[str, AfterValidator(_slug)]
Url = Annotated[str, AfterValidator(_url)]
# YAML makes a number of 0.00000005, and the shortest text of it is what was written.
Usd = Annotated[int, BeforeValidator(lambda value: parse_usd(str(value)))]
Alias = Annotated[str, StringConstraints(pattern=r"^[\w.-]+(/[\w.-]+)?$")]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
PresetName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]+$")]
Quantization = Literal["int4", "int8", "fp4", "fp6", "fp8", "fp16", "bf16", "fp32"]


class Usds(Section):
    """US dollars a token; what is not said costs nothing."""

    prompt: Usd = 0
    completion: Usd = 0
    """Reasoning included."""
    cached: Usd | None = None
    """Of the prompt's tokens that the engine had in its cache; by default as any other of them."""
    request: Usd = 0
    """For each request, whatever its length."""

    @property
    def price(self) -> Price:
        """The same for the books."""
        return Price(self.prompt, self.completion, self.cached, self.request)


class UpstreamSection(Section):
    """A server that speaks this API, asked when the engine here is down or full."""

    url: Url
    """Its base, such as https://openrouter.ai/api/v1."""
    key_env: Variable
    """The environment variable that holds its API key."""
    model: str = Field(min_length=1)
    """What it calls the model."""
    provider: str = Field(min_length=1)
    """Whose it is: clients are told who has answered."""
    price: Usds | None = None
    """By default a reply costs what that server says it has cost."""


class Terms(Section):
    """How a model is offered."""

    title: str = ""
    """What people call it; by default its name."""
    about: str = ""
    """A sentence or more for the list of models."""
    price: Usds = Usds()
    context: PositiveInt | None = None
    """Prompt and reply together; an engine of ours makes no more room than this."""
    max_tokens: PositiveInt | None = None
    """A reply is never longer, reasoning included."""
    compression: Literal["on_request", "short_context"] = "on_request"
    """Whether a prompt is made to fit a short context also where a request does not ask for it."""
    aliases: tuple[Alias, ...] = ()
    """Other ids that it may be asked for by."""
    quantization: Quantization | None = None
    """What its weights are, for whoever asks by that."""
    hugging_face_id: str | None = None
    upstreams: tuple[UpstreamSection, ...] = ()
    """In the order in which they are asked. Without them no request leaves this machine."""
    listing: Listing | None = None
    """What a router is told that lists the model; by default the file's own."""


class Source(Section):
    """What a model is made from, and by which engine."""

    run: str | None = None
    """A run's folder or recipe; what of it is served goes by its certificate."""
    checkpoint: str | None = None
    """Or a folder with config.json and weights in safetensors."""
    gguf: str | None = None
    """Or a .gguf file, with tokenizer.json and chat_template.jinja beside it."""
    urls: Annotated[tuple[Url, ...], BeforeValidator(_listed)] = ()
    """Or engines that somebody else runs, all with the same model; PIPELINE_ENGINE_KEY has the key
    to them."""
    tokenizer: str | None = None
    """With urls: a folder with the model's tokenizer.json and chat_template.jinja."""
    artefact: Choice = "auto"
    """Which of a run's files."""
    engine: Literal["auto", "llamacpp", "vllm"] = "auto"
    """auto is vllm where there are CUDA and vLLM."""
    slots: PositiveInt | None = None
    """Replies made at once: by default 4 by llamacpp, 256 by vllm."""
    queue: NonNegativeInt | None = None
    """Requests that may wait for a slot, by default 8 for each; who comes after them is told at
    once to come back."""
    gpu_memory: float | None = Field(default=None, gt=0, le=1)
    """The share of the GPU's memory that vllm takes, weights included: by default 0.9."""

    @model_validator(mode="after")
    def _is_one_thing(self) -> "Source":
        given = [self.run, self.checkpoint, self.gguf, self.urls]
        if sum(map(bool, given)) != 1:
            raise ValueError("give one of run, checkpoint, gguf and urls; upstreams only stand in")
        if bool(self.urls) != bool(self.tokenizer):
            raise ValueError("urls and tokenizer belong together")
        if self.urls and (self.engine, self.artefact, self.gpu_memory) != ("auto", "auto", None):
            raise ValueError("engine, artefact and gpu_memory are not for urls")
        if self.urls and self.queue is not None and self.slots is None:
            raise ValueError("for a queue before urls say in slots how many replies they make")
        if self.engine == "llamacpp" and self.gpu_memory:
            raise ValueError("gpu_memory is for vllm")
        return self

    @property
    def path(self) -> Path:
        """Where its tokenizer lies, and its weights unless they are elsewhere."""
        return Path(self.run or self.checkpoint or self.gguf or self.tokenizer or "")


class Free(Section):
    """The same model by the same engine at no price."""

    context: PositiveInt | None = None
    """By default as of the model, as of the next."""
    max_tokens: PositiveInt | None = None


class Extended(Source, Terms):
    """A model with a longer context, such as one under YaRN, in the name of another."""


class AdapterVariants(Section):
    """What may follow a colon in the slug."""

    free: Free | None = None


class Variants(AdapterVariants):
    """What may follow a colon in the slug."""

    extended: Extended | None = None


class Adapter(Terms):
    """A model that an adapter makes of another one's weights, by the same engine."""

    run: str | None = None
    """A run that has trained it on these weights."""
    adapter: str | None = None
    """Or a folder in PEFT's layout, or for llamacpp a .gguf file."""
    variants: AdapterVariants = AdapterVariants()

    @model_validator(mode="before")
    @classmethod
    def _read_path(cls, value: Any) -> Any:
        return {"adapter": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _is_one_thing(self) -> "Adapter":
        if bool(self.run) == bool(self.adapter):
            raise ValueError("give a path, or one of run and adapter")
        return self

    @property
    def path(self) -> Path:
        """Where it lies."""
        return Path(self.run or self.adapter or "")


class Model(Source, Terms):
    """One model, and what else is made of the same weights."""

    slug: Slug | None = None
    """AUTHOR/NAME, by which clients ask for it; by default local/ and the folder's name."""
    adapters: dict[Slug, Adapter] = Field(default_factory=dict)
    """More models, by their slugs: each an adapter's path, or that and its terms."""
    variants: Variants = Variants()

    @model_validator(mode="after")
    def _holds_its_weights(self) -> "Model":
        if self.urls and self.adapters:
            raise ValueError("adapters are not for urls, which have their models")
        return self


class ContentLogging(Section):
    """How long requests and replies are kept of the keys that want it, and who redacts them."""

    keep_days: PositiveInt = 30
    max_bytes: int = Field(default=10**9, ge=2**20)
    """In all; the oldest go first."""
    redact: Annotated[str, StringConstraints(pattern=r"^[\w.]+:\w+$")] | None = None
    """MODULE:FUNCTION, called with each of them as a dict before it is written: what it returns is
    kept, and nothing if that is None."""


class Menu(Section):
    """Everything that one server offers. Paths start at the current directory."""

    models: tuple[Model, ...] = Field(min_length=1)
    default: str | None = None
    """Which model answers a request that names none: its slug; by default the first."""
    presets: dict[PresetName, dict[str, JsonValue]] = Field(default_factory=dict)
    """Fields of a request by the name of a preset, for those that ask for @preset/NAME."""
    listing: Listing = UNLISTED
    """What a router is told of every model that does not say otherwise."""
    port: int | None = Field(default=None, ge=0, le=65535)
    """By default 8000; 0 is any free one."""
    books: str | None = None
    """Of keys and generations: a file, a folder or a database URL."""
    keep_days: PositiveInt | None = None
    """After so many days a generation is forgotten, and what each key has used of each model a day
    is kept; by default nothing is."""
    content: ContentLogging = ContentLogging()
    """Of keys with --log-content; all others leave no word behind."""
    usage_chunk: UsageChunk = "empty"
    """How a stream of chat/completions tells its usage: without choices, as documented; or with
    the last choice's end once more, for clients that look into the first choice of every chunk."""

    @field_validator("presets")
    @classmethod
    def _can_be_asked(cls, presets: dict[str, Any]) -> dict[str, Any]:
        for name, fields in presets.items():
            try:
                check_preset(fields)
            except ValueError as error:
                raise ValueError(f"{name}.{error}") from error
        return presets


def is_menu(path: Path) -> bool:
    """Whether a path is a serve file, by what it says; RecipeError for YAML of neither kind."""
    if path.suffix not in (".yaml", ".yml") or path.is_dir():
        return False
    values = read_mapping(path, f"{KIND} or recipe", _EXAMPLE)
    if "models" not in values and not _OF_RECIPES & values.keys():
        raise RecipeError(
            f"{path} is neither a serve file, which begins with `models:`, "
            "nor a recipe, which has `base:` and `data:`"
        )
    return "models" in values


def read_menu(path: Path) -> Menu:
    """What a serve file says; RecipeError with every fault of it in one message."""
    return validate(Menu, read_mapping(path, KIND, _EXAMPLE), str(path), KIND)
