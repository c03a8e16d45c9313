"""What a recipe may say: YAML and `--set` in, one frozen Recipe out."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from pipeline.errors import RecipeError
from pipeline.strict_yaml import Section, parse_yaml, read_mapping, validate

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


class Preference(Section):
    """Learning from pairs of a chosen and a rejected reply."""

    beta: PositiveFloat = 0.1
    """How strongly the model is held to the base's own likelihoods."""


class Grpo(Section):
    """Learning from the model's own replies to questions whose answers can be checked."""

    questions: str | None = Field(default=None, min_length=1)
    """A JSONL file of `messages` and `answer`, as for `evaluate`; see data/README.md."""
    replies: int = Field(default=8, ge=2)
    """Replies to each question, compared with one another."""
    mode: Literal["thinking", "direct"] = "thinking"
    max_tokens: PositiveInt = 1024
    """The longest reply, reasoning included; a longer one is cut and earns nothing."""
    temperature: PositiveFloat = 1.0
    beta: NonNegativeFloat = 0.0
    """Weight of the divergence from the base; 0 leaves it out."""


# What the original papers and TRL's own examples begin with, for an adapter or all weights.
LEARNING_RATES = {"lora": 2e-4, "qlora": 2e-4, "full": 1e-5, "dpo": 5e-6, "kto": 5e-6, "grpo": 1e-5}


MAX_VLLM_RANK = 512


class Train(Section):
    """How the model is fitted."""

    objective: Literal["sft", "dpo", "kto", "grpo"] = "sft"
    """sft: the conversations' own answers. dpo, kto: preference pairs. grpo: the model's own
    replies, rewarded for a correct answer in a well-formed reply."""
    method: Literal["lora", "qlora", "full"] = "lora"
    """lora fits an adapter beside the frozen base. qlora holds that base in 4 bit (nf4, double
    quantisation) meanwhile. full fits all weights, held in float32: 16 bytes a weight with their
    gradients and the optimizer's moments."""
    variant: Literal["none", "rslora", "dora", "pissa", "olora", "eva"] = "none"
    """rslora scales by the root of the rank; dora learns each row's length apart; pissa, olora
    begin with the base's own principal or orthogonal directions, eva with those of its activations
    on the rows."""
    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """all-linear is every linear layer but the output head."""
    lora_plus_ratio: float | None = Field(default=None, gt=1)
    """LoRA+: how much larger the learning rate of B is than that of A; its authors take 16."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit holds the moments in 8 bit, which saves 6 bytes a trained weight."""
    preference: Preference = Preference()
    grpo: Grpo = Grpo()
    epochs: PositiveFloat | None = None
    """Passes over the rows; 1 when neither epochs nor steps is given."""
    steps: PositiveInt | None = None
    """Optimizer steps, instead of epochs."""
    seed: NonNegativeInt = 42
    batch_rows: PositiveInt = 16
    """Rows (pairs, for dpo and kto; questions, for grpo) an optimizer step learns from."""
    packing: Literal["tree", "none"] = "tree"
    """tree: a beginning that rows of a step share, such as the history of a conversation, is
    computed once. none: every row by itself. The loss and the gradients are the same; under dropout
    they are so in expectation only."""
    micro_tokens: PositiveInt | Literal["auto"] = "auto"
    """Tokens in memory at once; a longer row is by itself. auto: as many as the plan says fit the
    GPU; without one 4096, or twice the longest row."""
    learning_rate: PositiveFloat = LEARNING_RATES["lora"]
    """By default 2e-4 for an adapter, 1e-5 for all weights and grpo, 5e-6 for preferences."""
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_steps: NonNegativeInt = 10
    weight_decay: NonNegativeFloat = 0.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the frozen base is held and computed in; an adapter itself is always float32."""
    checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """full: activations are computed again in the backward pass, for memory; selective: those of
    every second layer. auto: the least of it with which the plan says enough tokens fit."""
    compile: Literal["none", "layers"] = "none"
    """layers: torch compiles each kind of layer once, which takes a minute and pays on a GPU."""
    eval_steps: PositiveInt | None = None
    """The loss on the held-out rows after every so many steps, and at the end; the weights with the
    least are kept."""
    patience: PositiveInt | None = None
    """Stop when so many of these in a row were no better."""
    save_steps: PositiveInt | None = None
    """A checkpoint after every so many steps, beside those by time."""
    save_minutes: PositiveFloat = 10.0
    """A checkpoint after so many minutes without one."""
    resume: Literal["auto", "never"] = "auto"
    """auto: a training that was stopped goes on from its last checkpoint, as if it never was.
    never: it begins again."""
    log_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Experiment trackers told of every step, beside metrics.jsonl."""

    def learning(self) -> dict[str, Any]:
        """The keys that decide what is learnt, as plain values.

        Not when it is saved or told, nor how it is laid out in memory: a run may go on where there
        is more of it or less.
        """
        told = {"save_steps", "save_minutes", "resume", "log_to"}
        return self.model_dump(exclude=told | {"micro_tokens", "checkpointing"})

    @property
    def stored_rank(self) -> int:
        """Of the adapter as it is saved: pissa and olora keep what they began with beside it."""
        return self.rank * (2 if self.variant in ("pissa", "olora") else 1)

    @property
    def tokens_at_once(self) -> int:
        """micro_tokens, once the plan has made a number of it."""
        if self.micro_tokens == "auto":
            raise ValueError("micro_tokens is auto: settle it by the plan first")
        return self.micro_tokens

    @model_validator(mode="before")
    @classmethod
    def _usual_learning_rate(cls, values: Any) -> Any:
        if isinstance(values, dict) and "learning_rate" not in values:
            for key in ("objective", "method"):
                if (rate := LEARNING_RATES.get(str(values.get(key)))) is not None:
                    return values | {"learning_rate": rate}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> "Train":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give either epochs or steps, not both")
        if self.method == "qlora" and self.dtype == "float32":
            raise ValueError("qlora computes in bfloat16; remove dtype: float32 or use lora")
        if self.patience is not None and self.eval_steps is None:
            raise ValueError("patience counts evaluations; set eval_steps, too")
        wanted = self.target_modules if isinstance(self.target_modules, tuple) else ()
        if {name.rpartition(".")[2] for name in wanted} & {"lm_head", "embed_tokens"}:
            raise ValueError("adapters on lm_head or embed_tokens cannot be trained and served")
        return self

    @model_validator(mode="after")
    def _fits_the_method(self) -> "Train":
        if self.method == "full":
            given = self.variant != "none" or self.target_modules != "all-linear" or self.dropout
            if given or self.lora_plus_ratio is not None:
                raise ValueError(
                    "variant, target_modules, dropout and lora_plus_ratio are an adapter's; "
                    "remove them or use lora"
                )
            if self.objective != "sft":
                raise ValueError(
                    f"{self.objective} compares with the base under an adapter; use lora or qlora"
                )
        if self.method == "qlora" and self.variant in ("pissa", "olora"):
            raise ValueError(f"{self.variant} changes the base, and qlora's is in 4 bit; use lora")
        if self.lora_plus_ratio is not None and self.optimizer != "adamw":
            raise ValueError("lora_plus_ratio needs optimizer: adamw")
        return self

    @model_validator(mode="after")
    def _fits_the_objective(self) -> "Train":
        if self.objective != "sft" and self.variant in ("pissa", "olora"):
            raise ValueError(f"{self.variant} changes the base that {self.objective} compares with")
        if self.objective != "sft" and self.variant == "eva":
            raise ValueError(f"eva begins with rows, and {self.objective} has none; use none")
        if self.objective == "kto" and self.batch_rows < 2:
            raise ValueError("kto compares replies with those of other rows; batch_rows must be 2")
        return self

    @model_validator(mode="after")
    def _fits_grpo(self) -> "Train":
        if self.objective != "grpo":
            return self
        if self.grpo.questions is None:
            raise ValueError("grpo needs grpo.questions: a file of messages with their answers")
        if self.eval_steps is not None:
            raise ValueError("grpo has no held-out loss; remove eval_steps")
        if self.dropout:
            raise ValueError("grpo learns from what the adapter itself replies; dropout must be 0")
        if self.checkpointing == "selective":
            raise ValueError("TRL's trainer for grpo checkpoints all layers or none; set full")
        return self


class Merge(Section):
    """How what was learnt becomes a checkpoint."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What changed weights are stored in."""
    onto: Literal["trained", "original"] = "trained"
    """Which base a qlora adapter is added to: the one in 4 bit it was trained on, or, with the
    error that brings, the original one."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """To bfloat16: stochastic keeps small changes on average, and adds noise to each value."""


GgufFormat = Literal["f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]


CompressedFormat = Literal["fp8", "int4"]


class Export(Section):
    """Which files the merged checkpoint and the adapter are written as, for other programs."""

    gguf: tuple[GgufFormat, ...] = Field(default=("bf16", "q8_0"), min_length=1)
    """The last one is what is evaluated, and what Ollama's Modelfile names."""
    compressed: tuple[CompressedFormat, ...] = ()
    """Checkpoints of fewer bits for vLLM, by llm-compressor: see `make compressor`."""
    adapter: Literal["none", "peft", "gguf"] = "none"
    """The adapter, to be served unmerged: peft for vLLM, gguf for llama.cpp with its base beside
    it. The base of a qlora run is the one in 4 bit it was trained on, written in bf16."""


class MaxMeanKl(Section):
    """Nats, for each artefact.

    On 300 held-out tokens of the demo's model, which suffers more than a large one, llama.cpp was
    off by 0.0042 in q6_k, 0.0328 in q5_k_m and 0.0257 in q4_k_m: a few tokens decide the mean.
    Of a checkpoint a true merge was off by 0.00001, one without a layer of the thirty by 0.0015.
    """

    merged: PositiveFloat = 0.001
    adapter: PositiveFloat = 0.001
    adapter_gguf: PositiveFloat = 0.01
    f16: PositiveFloat = 0.01
    bf16: PositiveFloat = 0.01
    q8_0: PositiveFloat = 0.02
    q6_k: PositiveFloat = 0.03
    q5_k_m: PositiveFloat = 0.1
    q4_k_m: PositiveFloat = 0.1
    fp8: PositiveFloat = 0.05
    int4: PositiveFloat = 0.1


Share = Annotated[float, Field(ge=0, le=1)]


class MinEffect(Section):
    """A share, for each artefact.

    On 400 held-out tokens of the demo's model, which training had moved by 1.9 nats a token, a true
    merge kept 0.99999; half the scale kept 0.917, twice the scale 0.819, 4 bit once more 0.951. So
    much was learnt there that little faults are told by the divergence and the favourites, too.
    """

    merged: Share = 0.95
    adapter: Share = 0.95
    adapter_gguf: Share = 0.95
    f16: Share = 0.95
    bf16: Share = 0.95
    q8_0: Share = 0.90
    q6_k: Share = 0.90
    q5_k_m: Share = 0.70
    q4_k_m: Share = 0.70
    fp8: Share = 0.90
    int4: Share = 0.70


class MinTop1(Section):
    """A share, for each artefact.

    On those tokens 1.0 for a true merge, 0.975 for 0.8 times the scale, 0.935 for 4 bit once more,
    and 0.9875 without a layer in the middle.
    """

    merged: Share = 0.99
    adapter: Share = 0.99
    adapter_gguf: Share = 0.99
    f16: Share = 0.99
    bf16: Share = 0.99
    q8_0: Share = 0.98
    q6_k: Share = 0.98
    q5_k_m: Share = 0.93
    q4_k_m: Share = 0.93
    fp8: Share = 0.98
    int4: Share = 0.93


class Certify(Section):
    """How close each artefact must stay to the model as trained."""

    max_mean_kl: MaxMeanKl = MaxMeanKl()
    """Largest mean Kullback-Leibler divergence per token, in nats, from the model as trained."""
    min_effect: MinEffect = MinEffect()
    """Least share of the training's effect: 1 - KL(trained ‖ artefact) / KL(trained ‖ base)."""
    min_top1: MinTop1 = MinTop1()
    """Least share of positions with the same likeliest next token."""
    merged_positions: PositiveInt = 2000
    """Held-out completion tokens a checkpoint is compared on, or all if fewer."""
    gguf_positions: PositiveInt = 200
    """The same for a GGUF file."""
    greedy_prompts: NonNegativeInt = 8
    """Held-out prompts that are answered greedily, to compare the texts; 0 leaves that out."""
    greedy_tokens: PositiveInt = 32
    """How many tokens of each answer."""


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


class Gpu(Section):
    """What a plan needs to know of a GPU."""

    memory_gb: PositiveFloat
    """In 10⁹ bytes, as its maker counts."""
    bf16_tflops: PositiveFloat
    """Dense bf16 rate, without sparsity, in 10¹² operations a second."""
    bandwidth_gbs: PositiveFloat
    """Of its memory, in 10⁹ bytes a second."""
    usd_per_hour: PositiveFloat
    """What renting one costs."""


class Plan(Section):
    """Which machine a run is planned for."""

    gpu: str = "H100"
    """A name of the package's table (see `pipeline plan`) or of `gpus`; used where training does
    not find a GPU of its own."""
    devices: PositiveInt = 1
    """How many of them."""
    gpus: dict[str, Gpu] = Field(default_factory=dict)
    """More GPUs, or other prices, by name."""


class Recipe(Section):
    """Everything one run is made from."""

    model_config = ConfigDict(json_schema_extra=_name_may_be_left_out)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run folder is runs/NAME; by default the recipe file's stem."""
    base: str
    """A checkpoint folder, a hub id such as Qwen/Qwen3-8B, or random:SHAPE."""
    revision: str | None = None
    """Branch, tag or commit of a hub base; the commit it means is written into the manifest."""
    yarn: Literal["none", "auto"] | float = "none"
    """Longer contexts than the base was trained on, by static YaRN: a factor above 1, or auto, the
    least one that holds the longest row. It costs a little on short texts."""
    data: Data
    train: Train = Train()
    plan: Plan = Plan()
    merge: Merge = Merge()
    export: Export = Export()
    certify: Certify = Certify()
    evaluate: Evaluate = Evaluate()
    replay: Replay = Replay()

    @model_validator(mode="after")
    def _has_an_adapter_to_serve(self) -> "Recipe":
        wanted, train = self.export.adapter, self.train
        if wanted == "none":
            return self
        reason = ""
        if train.method == "full":
            reason = "a training of all weights has no adapter"
        elif train.variant == "dora":
            reason = "vLLM does not load dora" if wanted == "peft" else "llama.cpp knows no dora"
        elif wanted == "peft" and train.stored_rank > MAX_VLLM_RANK:
            reason = f"vLLM loads ranks up to {MAX_VLLM_RANK}, and it would be {train.stored_rank}"
        if reason:
            raise ValueError(f"{reason}; remove export.adapter: {wanted}")
        return self

    @field_validator("yarn", mode="wrap")
    @classmethod
    def _extends(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> str | float:
        try:
            yarn: str | float = handler(value)
        except ValidationError:
            yarn = 0.0
        if not isinstance(yarn, str) and not 1 < yarn < math.inf:
            raise ValueError("must be none, auto or a factor above 1, such as 4.0")
        return yarn


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `a.b=c` overrides, validate.

    Raises RecipeError with every fault of the file in one message.
    """
    values = read_mapping(path, "recipe", "base: bases/demo")
    values.setdefault("name", path.stem)
    for override in overrides:
        _override(values, override)
    return parse_recipe(values, str(path))


def parse_recipe(values: dict[str, Any], where: str) -> Recipe:
    """Validate plain values as a Recipe; `where` names them in the error."""
    return validate(Recipe, values, where, "recipe")


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
        values[last] = parse_yaml(text)
    except ValueError as error:
        raise RecipeError(f"--set {override!r}: the value is not YAML") from error
    # steps and epochs exclude each other: naming one on the command line replaces the other
    if dotted in ("train.steps", "train.epochs"):
        values.pop("epochs" if last == "steps" else "steps", None)
