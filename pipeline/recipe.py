"""What a recipe may say: YAML and `--set` in, one frozen Recipe out."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.errors import RecipeError


class Section(BaseModel):
    """A part of a recipe: frozen, and every key it does not know is an error.

    Numbers may be strings, for PyYAML reads 2e-4 as one; but they are finite.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any) -> Any:
        if isinstance(value, bool):  # which pydantic would take for the number 1 or 0
            raise ValueError("no key takes true or false; quote a word that is meant as one")
        return value


Format = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "preference", "text"]


class Source(Section):
    """Some files of conversations, or a data set on the hub."""

    path: str | None = Field(default=None, min_length=1)
    """A file, a folder or a glob, relative to the current directory: .jsonl, .json, .csv or
    .parquet, each also with .gz or .zst after it."""
    hub: str | None = None
    """Or the id of a data set on the hub; the commit it means is written into the manifest."""
    subset: str | None = None
    """Which configuration of a hub data set; its default one otherwise."""
    split: str = "train"
    """Which split of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    format: Literal[Format, "auto"] = "auto"
    """How a conversation is written; auto goes by the keys of the first one."""
    weight: float = Field(default=1.0, gt=0, le=100)
    """How often each conversation is trained in an epoch: 2 is twice, 0.5 a half of them, chosen by
    the seed."""
    share: float | None = Field(default=None, gt=0, lt=1)
    """Instead of weight: this source's share of all conversations, replay at 0.2 for example."""
    cap: PositiveInt | None = None
    """Use at most this many conversations, from the top."""

    @model_validator(mode="after")
    def _consistent(self) -> "Source":
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub")
        if self.path is not None and (self.subset, self.split, self.revision) != (
            None,
            "train",
            None,
        ):
            raise ValueError("subset, split and revision are for a hub data set")
        if self.share is not None and self.weight != 1:
            raise ValueError("give either weight or share")
        return self

    @property
    def name(self) -> str:
        """The path, or the hub data set with its subset, split and revision."""
        if self.path is not None:
            return self.path
        subset = f"/{self.subset}" if self.subset else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.hub}{subset}:{self.split}{revision}"


class Held(Section):
    """Rows kept out of training: for certificates."""

    path: str | None = Field(default=None, min_length=1)
    """A file, folder or glob of its own."""
    share: float | None = Field(default=None, gt=0, lt=1)
    """Or this share of the conversations, chosen by the seed."""

    @model_validator(mode="after")
    def _one_of(self) -> "Held":
        if (self.path is None) == (self.share is None):
            raise ValueError("give either path or share")
        return self


class Data(Section):
    """Which conversations are learnt from, and how they become rows."""

    sources: tuple[Source, ...] = Field(min_length=1)
    eval: Held = Held(share=0.1)
    turns: Literal["all", "last"] = "all"
    """Which assistant turns are trained: every one, or only a conversation's last."""
    thinking: Literal["per_row", "never", "always"] = "per_row"
    """per_row: a turn with reasoning is trained in thinking mode, one without in direct mode.
    never: reasoning is left out. always: only turns with reasoning are trained."""
    overlong: Literal["drop", "refuse", "split_history"] = "drop"
    """A row longer than max_tokens is dropped and counted, or stops the run; split_history leaves
    the oldest turns out of its prompt until it fits. The trained turn itself is never cut."""
    invalid: Literal["refuse", "drop"] = "refuse"
    """A conversation that cannot become rows stops the run, or is dropped and counted."""
    max_tokens: PositiveInt = 4096
    """The longest row, prompt and completion together, in tokens."""
    soft_switches: float = Field(default=0.0, ge=0, le=1)
    """The probability that a question gets Qwen's switch for how it is answered: /think, or
    /no_think before an answer without reasoning, which then begins with its empty block."""

    @model_validator(mode="after")
    def _shares_leave_something(self) -> "Data":
        shares = [source.share for source in self.sources if source.share]
        if sum(shares) >= 1 or (shares and len(shares) == len(self.sources)):
            raise ValueError("the sources' shares must leave something for a source without one")
        return self


class Train(Section):
    """How the adapter is fitted."""

    method: Literal["lora", "qlora"] = "lora"
    """qlora holds the base in 4 bit (nf4, double quantisation) while training."""
    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """all-linear is every linear layer but the output head."""
    epochs: PositiveFloat | None = None
    """Passes over the rows; 1 when neither epochs nor steps is given."""
    steps: PositiveInt | None = None
    """Optimizer steps, instead of epochs."""
    seed: NonNegativeInt = 42
    batch_rows: PositiveInt = 16
    """Rows an optimizer step learns from."""
    packing: Literal["tree", "none"] = "tree"
    """tree: a beginning that rows of a step share, such as the history of a conversation, is
    computed once. none: every row by itself. The loss and the gradients are the same; under dropout
    they are so in expectation only."""
    micro_tokens: PositiveInt = 4096
    """Tokens in memory at once; a longer row is by itself."""
    learning_rate: PositiveFloat = 2e-4
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_steps: NonNegativeInt = 10
    weight_decay: NonNegativeFloat = 0.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the frozen base is held and computed in; the adapter itself is always float32."""
    checkpointing: Literal["none", "full"] = "full"
    """full: activations are computed again in the backward pass, for memory."""
    save_steps: PositiveInt | None = None
    """A checkpoint after every so many steps, beside those by time."""
    save_minutes: PositiveFloat = 10.0
    """A checkpoint after so many minutes without one."""
    resume: Literal["auto", "never"] = "auto"
    """auto: a training that was stopped goes on from its last checkpoint, as if it never was.
    never: it begins again."""

    def learning(self) -> dict[str, Any]:
        """The keys that decide what is learnt, as plain values: not when it is saved."""
        return self.model_dump(exclude={"save_steps", "save_minutes", "resume"})

    @model_validator(mode="after")
    def _consistent(self) -> "Train":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give either epochs or steps, not both")
        if self.method == "qlora" and self.dtype == "float32":
            raise ValueError("qlora computes in bfloat16; remove dtype: float32 or use lora")
        wanted = self.target_modules if isinstance(self.target_modules, tuple) else ()
        if {name.rpartition(".")[2] for name in wanted} & {"lm_head", "embed_tokens"}:
            raise ValueError("adapters on lm_head or embed_tokens cannot be trained and served")
        return self


GgufFormat = Literal["bf16", "q8_0"]


class Export(Section):
    """Which files for llama.cpp the merged checkpoint is written as."""

    gguf: tuple[GgufFormat, ...] = Field(default=("bf16", "q8_0"), min_length=1)


class Limits(Section):
    """One number for each artefact."""

    merged: PositiveFloat = 0.01
    bf16: PositiveFloat = 0.01
    q8_0: PositiveFloat = 0.02


class Certify(Section):
    """How close each artefact must stay to the model as trained."""

    max_mean_kl: Limits = Limits()
    """Largest mean Kullback-Leibler divergence per token, in nats, from the model as trained."""
    merged_positions: PositiveInt = 2000
    """Held-out completion tokens the merged checkpoint is compared on, or all if fewer."""
    gguf_positions: PositiveInt = 200
    """The same for a GGUF file, which is asked token by token."""


class Evaluate(Section):
    """Questions with checkable answers, asked before and after."""

    questions: str | None = None
    """A JSONL file of `messages` and `answer`; see data/README.md. None: nothing to score."""
    direct: NonNegativeInt = 80
    """How many are asked in direct mode."""
    thinking: NonNegativeInt = 40
    """How many are asked in thinking mode."""
    direct_max_tokens: PositiveInt = 96
    thinking_max_tokens: PositiveInt = 192


class Replay(Section):
    """General prompts answered by the base itself, so that its own ways are not forgotten."""

    prompts: str = "data/general/prompts.jsonl"
    """A JSONL file of `messages` that end with a user turn."""
    max_tokens: PositiveInt = 2048
    """The longest reply, reasoning included; a longer one is not kept."""
    gguf: GgufFormat = "q8_0"
    """What the base is written as for llama.cpp."""
    parallel: PositiveInt = 1
    """Prompts answered at once. 1 gives the same replies every time; more is faster, but a batch
    of another composition rounds differently."""


def _name_may_be_left_out(schema: dict[str, Any]) -> None:
    """Editors check files, and a file without `name` is named after itself."""
    schema["required"].remove("name")


class Recipe(Section):
    """Everything one run is made from."""

    model_config = ConfigDict(json_schema_extra=_name_may_be_left_out)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run folder is runs/NAME; by default the recipe file's stem."""
    base: str
    """A checkpoint folder, a hub id such as Qwen/Qwen3-8B, or random:SHAPE."""
    revision: str | None = None
    """Branch, tag or commit of a hub base; the commit it means is written into the manifest."""
    data: Data
    train: Train = Train()
    export: Export = Export()
    certify: Certify = Certify()
    evaluate: Evaluate = Evaluate()
    replay: Replay = Replay()


# Beside its own, PyYAML lets these through: a date that is none, an unhashable key, a deep nesting.
_NOT_YAML = (yaml.YAMLError, ValueError, TypeError, RecursionError)


class _StrictLoader(yaml.SafeLoader):
    """PyYAML lets the second of two equal keys win silently; this loader refuses it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: the key {key!r} stands here twice")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `a.b=c` overrides, validate.

    Raises RecipeError with every fault of the file in one message.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as a recipe: {_reason(error)}") from error
    try:
        values = yaml.load(text, Loader=_StrictLoader)
    except _NOT_YAML as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(
            f"{path} is not a recipe: it must be a mapping such as `base: bases/demo`"
        )
    values.setdefault("name", path.stem)
    for override in overrides:
        _override(values, override)
    return parse_recipe(values, str(path))


def parse_recipe(values: dict[str, Any], where: str) -> Recipe:
    """Validate plain values as a Recipe; `where` names them in the error."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        faults = "\n".join(f"  {line}" for line in _explain(error))
        raise RecipeError(f"{where} is not a valid recipe:\n{faults}") from error


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _override(values: dict[str, Any], override: str) -> None:
    """Apply one `a.b=c`: the value is read as YAML, so `train.steps=2` is a number."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise RecipeError(f"--set {override!r} must look like train.steps=2")
    *parents, last = dotted.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise RecipeError(f"--set {override!r}: {parent!r} holds no keys of its own")
    try:
        values[last] = yaml.load(text, Loader=_StrictLoader)
    except _NOT_YAML as error:
        raise RecipeError(f"--set {override!r}: the value is not YAML") from error
    # steps and epochs exclude each other: naming one on the command line replaces the other
    if dotted in ("train.steps", "train.epochs"):
        values.pop("epochs" if last == "steps" else "steps", None)


def _explain(error: ValidationError) -> Iterator[str]:
    faults = error.errors()
    for fault in faults:
        place = ".".join(str(part) for part in fault["loc"])
        size = len(fault["loc"])
        if fault["type"] == "too_short" and any(
            len(other["loc"]) > size and other["loc"][:size] == fault["loc"] for other in faults
        ):
            continue  # pydantic counts only the items that are fine, and the others are told
        if fault["type"] == "extra_forbidden":
            known = _fields_at(fault["loc"][:-1])
            close = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
            yield f"{place}: unknown key; {hint}"
        else:
            yield f"{place or 'recipe'}: {fault['msg'].removeprefix('Value error, ')}"


def _fields_at(location: Iterable[int | str]) -> list[str]:
    """The keys a recipe may have at a place, found by walking the sections' annotations."""
    section: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, str) and part in section.model_fields:
            section = next(_sections(section.model_fields[part].annotation), section)
    return list(section.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)
