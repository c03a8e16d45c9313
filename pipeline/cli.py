"""The command line: one short function a command, the only file that prints."""

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.errors import Interrupted, PipelineError, RecipeError, RunError
from pipeline.recipe import Recipe, load_recipe, parse_recipe
from pipeline.run import Run, read_json, write_json, write_text
from pipeline.stages import Context, find_stage, stale_before

if TYPE_CHECKING:
    from pipeline.plan.job import Job
    from pipeline.plan.machine import Machine

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help starts in two thirds of the time
    help="Make Qwen3 your own: data, training, merge, export, proof, server.",
)
Target = Annotated[Path, typer.Argument(help="A recipe file or a run folder.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Override a recipe key: train.steps=2.")
]
bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench", help="Measure what the README's tables say.")
say = typer.echo
ALONE_S = 15.0  # how long a process waits for the first one to tell of a failure that is common
PAGE_ROWS = 12  # how many rows data.html shows
# Which extra of pyproject.toml brings a missing package; all others are in "train".
EXTRAS = dict.fromkeys(("aiohttp", "orjson", "rich", "starlette", "uvicorn", "xllamacpp"), "serve")
EXTRAS["openai"] = "dev"


@app.callback()
def one_process(context: typer.Context) -> None:
    """Refuse to do anything but training as often as a launcher starts us."""
    from pipeline.environment import count_processes

    if count_processes() > 1 and context.invoked_subcommand != "train":
        what = context.invoked_subcommand
        raise RunError(f"only train runs in several processes: run `pipeline {what}` by itself")


@app.command()
def check(target: Target, overrides: Sets = None) -> None:
    """Validate a recipe, its data files and its base; nothing is loaded."""
    from pipeline.base.names import check_base, local_folder
    from pipeline.base.yarn import read_config, room_of
    from pipeline.sources import has_files

    recipe = _recipe(target, overrides)
    sources = [source.path for source in recipe.data.sources]
    named = [path for path in (*sources, recipe.data.eval.path) if path]
    missing = [path for path in named if not has_files(path)]
    asked = (recipe.evaluate.questions, recipe.train.grpo.questions)
    missing += [path for path in asked if path and not Path(path).is_file()]
    if missing:
        replay = str(Run.named(recipe.name).replay)
        hint = "; run `pipeline replay` first" if replay in missing else ""
        raise RecipeError(f"{target}: no such file from {Path.cwd()}: {', '.join(missing)}{hint}")
    check_base(recipe.base)
    folder = local_folder(recipe.base)
    room = room_of(read_config(folder)) if folder is not None and folder.is_dir() else None
    if recipe.yarn == "none" and room is not None and recipe.data.max_tokens > room:
        say(f"rows of more than {room:,} tokens, the base's own context, would need yarn: auto")
    say(f"{target}: fine, {recipe.train.method} of {recipe.base}, run folder runs/{recipe.name}")


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    say(json.dumps(Recipe.model_json_schema(), indent=2))


@app.command()
def base(
    kind: Annotated[Literal["demo", "tiny", "random"], typer.Argument()],
    like: Annotated[str, typer.Option(help="Shape of `random`.")] = "qwen3-8b",
    out: Annotated[Path | None, typer.Option(help="Default: bases/KIND.")] = None,
) -> None:
    """Write a base checkpoint: a small real model, a tiny one for tests, or a true shape."""
    from pipeline.base.make import make_base

    folder = out or Path("bases") / kind
    made = make_base(kind, like, folder)
    say(str(folder) if made else f"{folder}: already there, unchanged")


@app.command()
def data(
    target: Target,
    overrides: Sets = None,
    show: Annotated[int, typer.Option(help="Print so many rows, as the model sees them.")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="A warning is a failure.")] = False,
    dump: Annotated[Path | None, typer.Option(help="Write every row as JSON lines.")] = None,
) -> None:
    """Conversations to rows, exactly as inference renders them; checked and reported."""
    context = _plain_context(target, overrides, "config")  # first: it says which extra is missing

    from rich.console import Console

    from pipeline.chat import Chat
    from pipeline.data.dump import dump_rows
    from pipeline.data.show import report_tables, row_text
    from pipeline.data.store import read_spread
    from pipeline.data.warn import refuse_warnings

    run, console = context.run, Console()
    _pin_hub_sources(context)
    _stage("data", context, _prepare)
    report = read_json(run.data_report)
    for table in report_tables(report):
        console.print(table)
    if show:
        tokenizer = Chat(context.base)
        for path in (run.train_rows, run.train_pairs):
            for row in read_spread(path, show):
                console.print(row_text(row, tokenizer))
    if dump:
        dump_rows({path.stem: path for path in run.row_files}, dump)
        say(str(dump))
    say(str(run.data_page))
    if strict:
        refuse_warnings(report)


@app.command()
def replay(target: Target, overrides: Sets = None) -> None:
    """Let the base answer general prompts, thinking; sound replies are a source to mix in."""
    from rich.console import Console

    from pipeline.chat import Chat
    from pipeline.replay.stage import Answerer
    from pipeline.replay.stage import replay as ask

    context = _plain_context(target, overrides)
    run, recipe = context.run, context.recipe
    answerer = Answerer(Chat(context.base), context.base_hash(), lambda: _base_gguf(context))
    with run.locked():
        tally, is_new = ask(recipe.replay, recipe.train.seed, answerer, run, Console(stderr=True))
        write_json(run.recipe, recipe.model_dump(mode="json"))
    if not is_new:
        say(f"replay: nothing to do, {run.replay} was made from the same inputs")
    say(f"replay: {tally}")
    say(f"a source for data.sources: {{path: {run.replay}, share: 0.2}}")


@app.command()
def plan(
    target: Target,
    overrides: Sets = None,
    gpu: Annotated[str | None, typer.Option(help="Instead of the recipe's plan.gpu.")] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="How many of them.")] = None,
) -> None:
    """Predict memory, time and cost of a run, without a GPU and without weights."""
    from rich.console import Console

    from pipeline.plan import predict
    from pipeline.plan.machine import known_gpus, planned_machine
    from pipeline.plan.show import gpu_table, plan_tables

    context = _context(target, overrides, "config")
    run, asked = context.run, context.recipe.plan
    run.made("data")
    given = {"gpu": gpu or asked.gpu, "devices": devices or asked.devices}
    asked = asked.model_copy(update=given)
    predicted = predict(_job(context, planned_machine(asked)), known_gpus(asked))
    write_json(run.plan, _keep_measured(run, predicted))
    console = Console()
    console.print(gpu_table(known_gpus(asked)))
    for table in plan_tables(predicted):
        console.print(table)
    say(str(run.plan))


@app.command()
def train(target: Target, overrides: Sets = None) -> None:
    """Fit the adapter; under `accelerate launch` on several devices, one a process."""
    from pipeline.environment import is_first_process

    if not is_first_process():
        _train_with_the_first()
        return
    told = []

    def work(context: Context) -> None:
        from pipeline.train.trackers import prepare_trackers

        prepare_trackers(context.recipe.train.log_to, context.run.folder)  # before trl comes in

        from pipeline.environment import describe
        from pipeline.plan import predict, settle
        from pipeline.plan.machine import known_gpus
        from pipeline.plan.score import compare, measure, tell
        from pipeline.train.checkpoint import describe_torch
        from pipeline.train.curve import draw_curve
        from pipeline.train.memory import memory_told
        from pipeline.train.stage import Watch
        from pipeline.train.stage import train as fit

        run, recipe = context.run, context.recipe
        run.describe(**describe(), **describe_torch(), seed=recipe.train.seed)
        job = _job(context, _training_machine(recipe))
        predicted = predict(job, known_gpus(recipe.plan))
        if not predicted["fits"]:
            say(f"the plan says that it does not fit; see `pipeline plan`: {run.plan}")
        write_json(run.plan, {"predicted": predicted})
        inputs = find_stage("train").inputs(context)
        rows, held_out = _training_rows(context)
        watch = Watch(held_out, predicted["peak_tokens_per_s"])
        task = (settle(job), context.base, rows, run.folder, inputs, watch)
        told.append(_tell_others(task))
        with memory_told(predicted):
            measured = measure(fit(*task), run.metrics)
        draw_curve(run.metrics, run.loss_curve, recipe.train.objective)
        ratios = compare(predicted, measured)
        write_json(run.plan, {"predicted": predicted, "measured": measured, "ratios": ratios})
        say(f"measured: {tell(predicted, measured)}")

    try:
        _stage("train", _context(target, overrides), work)
    finally:
        if not told:
            _tell_others(None)


@app.command()
def merge(target: Target, overrides: Sets = None) -> None:
    """Base and what was learnt to one checkpoint."""

    def work(context: Context) -> None:
        from pipeline.merge import merge as write

        run, method = context.run, context.recipe.train.method
        write(context.base, run.learnt(method), run.merged, method)

    _stage("merge", _context(target, overrides), work)


@app.command()
def export(
    target: Annotated[
        Path | None, typer.Argument(help="A recipe file or a run folder.", show_default=False)
    ] = None,
    overrides: Sets = None,
    formats: Annotated[
        Literal["list"] | None, typer.Option("--format", help="Say which can be written here.")
    ] = None,
) -> None:
    """The merged checkpoint to what other programs serve: GGUF files, an Ollama Modelfile."""
    if formats == "list":
        from pipeline.export import list_formats

        for name, reason in list_formats():
            say(f"{name:8}{reason or 'works'}")
        return
    if target is None:
        raise RecipeError("export needs a recipe file or a run folder, or --format list")

    def work(context: Context) -> None:
        from pipeline.export import export as write
        from pipeline.export import export_gguf

        run, recipe = context.run, context.recipe
        write(run.merged, run.exports, recipe.name, recipe.export, run.adapter, context.base)
        if recipe.evaluate.questions is not None:
            export_gguf(context.base, run.before, "base", recipe.export.gguf[-1:])

    _stage("export", _context(target, overrides), work)


@app.command()
def certify(target: Target, overrides: Sets = None) -> None:
    """Prove that each artefact is the model as trained, within the recipe's limits."""
    context = _context(target, overrides)

    def work(context: Context) -> None:
        from pipeline.certify.stage import Trained
        from pipeline.certify.stage import certify as measure
        from pipeline.data.store import read_rows

        run, recipe = context.run, context.recipe
        ggufs: dict[str, Path] = {
            f: run.exports / f"{recipe.name}-{f}.gguf" for f in recipe.export.gguf
        }
        certificate = measure(
            Trained(context.base, run.learnt(recipe.train.method), recipe.train.method),
            run.merged,
            ggufs,
            [
                (row.prompt_ids, row.completion_ids, row.mode)
                for path in (run.eval_rows, run.eval_pairs)
                for row in read_rows(path)
            ],
            recipe.certify,
            run.folder / "engine.log",
        )
        write_json(run.certificate, certificate)

    _stage("certify", context, work)
    from pipeline.certify.verdict import refuse_if_missed

    certificate = read_json(context.run.certificate)
    say(json.dumps(certificate["artefacts"], indent=2))
    refuse_if_missed(certificate)


@app.command()
def evaluate(target: Target, overrides: Sets = None) -> None:
    """Ask held-out questions before and after, in both modes."""
    context = _context(target, overrides)
    if context.recipe.evaluate.questions is None:
        say("evaluate: nothing to score, the recipe names no evaluate.questions")
        return

    def work(context: Context) -> None:
        from pipeline.chat import Chat
        from pipeline.evaluate.stage import evaluate as score
        from pipeline.questions import read_questions

        run, recipe = context.run, context.recipe
        questions = read_questions(Path(str(recipe.evaluate.questions)))
        chat, log = Chat(context.base), run.folder / "engine.log"
        gguf_format = recipe.export.gguf[-1]
        files = {
            "before": run.before / f"base-{gguf_format}.gguf",
            "after": run.exports / f"{recipe.name}-{gguf_format}.gguf",
        }
        scores = {
            when: score(f, chat, questions, recipe.evaluate, log) for when, f in files.items()
        }
        write_json(run.evaluation, scores)

    _stage("evaluate", context, work)
    _say_scores(read_json(context.run.evaluation))


@app.command()
def serve(
    target: Annotated[Path, typer.Argument(help="A run folder, its recipe or a .gguf file.")],
    port: Annotated[int, typer.Option(help="0 takes any free port.")] = 8000,
    engine: Annotated[
        str, typer.Option(help="llamacpp, or a llama.cpp server's URL.")
    ] = "llamacpp",
) -> None:
    """Serve a run behind OpenRouter's chat API until Ctrl-C."""
    from pipeline.serve.server import Settings
    from pipeline.serve.server import serve as run_server

    run_server(target, Settings(port=port, engine=engine), lambda url: say(f"serving at {url}"))


@app.command()
def chat(
    target: Annotated[
        Path, typer.Argument(help="What is served: a run folder, its recipe or a .gguf file.")
    ],
    url: Annotated[
        str, typer.Option(help="The server's base URL.")
    ] = "http://127.0.0.1:8000/api/v1",
    mode: Annotated[Literal["thinking", "direct"], typer.Option()] = "thinking",
) -> None:
    """Talk to a running server in the terminal."""
    from rich.console import Console

    from pipeline.serve.catalog import find_artefact
    from pipeline.serve.terminal import talk

    talk(url, find_artefact(target).slug, mode, Console())


@app.command()
def ask(
    target: Annotated[Path, typer.Argument(help="A run folder, its recipe or a .gguf file.")],
    question: str,
    system: Annotated[str, typer.Option(help="A system message to go before it.")] = "",
) -> None:
    """Serve a run, ask one question in both modes with the official openai client, stop."""
    from pipeline.serve.ask import ask_both_modes

    for mode, reasoning, answer in ask_both_modes(target, question, system):
        say(f"\n{mode}: {question}")
        if reasoning:
            say(f"  (thinking) {reasoning}")
        say(f"  {answer}")


@bench.command("data")
def bench_data(
    conversations: Annotated[int, typer.Option(min=1)] = 100_000,
    keep: Annotated[
        Path | None, typer.Option(help="An empty folder for what is made; else nothing stays.")
    ] = None,
) -> None:
    """The data stage beside TRL's own preparation of the same conversations."""
    from tempfile import TemporaryDirectory

    from pipeline.bench.data import bench_data as measure
    from pipeline.bench.data import table

    with TemporaryDirectory(prefix="bench-data-") as folder:
        say(table(measure(conversations, keep or Path(folder))))


@bench.command("train")
def bench_train(
    base: Annotated[str, typer.Option(help="A checkpoint folder, or random:SHAPE.")] = "bases/demo",
    support: Annotated[Path, typer.Option(help="The support set.")] = Path("data/support"),
    keep: Annotated[
        Path | None, typer.Option(help="An empty folder for what is made; else nothing stays.")
    ] = None,
) -> None:
    """Training beside stock TRL on the same rows: prefix trees, or on a GPU LoRA and QLoRA."""
    from tempfile import TemporaryDirectory

    from pipeline.base.names import check_base, local_folder
    from pipeline.bench.train import bench_train as measure
    from pipeline.bench.train import table

    check_base(base)
    _make_if_random(base)
    found = local_folder(base) or Path(base)
    with TemporaryDirectory(prefix="bench-train-") as folder:
        say(table(measure(found, support, keep or Path(folder))))


def _recipe(target: Path, overrides: list[str] | None) -> Recipe:
    if target.is_dir():
        if overrides:
            raise RecipeError("--set changes a recipe, not a finished run: name the recipe file")
        return parse_recipe(read_json(Run(target).recipe), str(target))
    return load_recipe(target, overrides or ())


def _context(
    target: Path,
    overrides: list[str] | None,
    what: Literal["everything", "config"] = "everything",
) -> Context:
    """The same as `_plain_context`, with the base as it is trained: with room for every row."""
    from pipeline.base.yarn import with_room

    context = _plain_context(target, overrides, what)
    run, recipe = context.run, context.recipe
    folder = context.base
    if run.data_report.is_file():
        folder = with_room(folder, recipe, read_json(run.data_report), run.base)
    elif recipe.yarn != "none" and run.base.is_dir():  # the rows may have been deleted since
        folder = run.base
    return replace(context, base=folder)


def _plain_context(
    target: Path,
    overrides: list[str] | None,
    what: Literal["everything", "config"] = "everything",
) -> Context:
    """The recipe, its run folder and its base; `config` leaves a hub base's weights there."""
    from pipeline.base.find import find_base

    recipe = _recipe(target, overrides)
    run = Run(target) if target.is_dir() else Run.named(recipe.name)
    _make_if_random(recipe.base)
    named = {"base": recipe.base, "revision": recipe.revision}
    facts = run.facts()
    # A branch may move between two stages; a run stays with the commit it began with.
    pinned = facts.get("base_commit") if facts.get("base_named") == named else None
    found = find_base(recipe.base, pinned or recipe.revision, what)
    if found.commit and found.commit != pinned:
        run.describe(base_named=named, base_commit=found.commit)
    return Context(recipe, run, found.folder)


def _job(context: Context, machine: "Machine") -> "Job":
    """What the plan is made of."""
    from pipeline.plan import read_job

    settings, questions = context.recipe.train, 0
    if settings.objective == "grpo":
        from pipeline.questions import read_questions

        questions = len(read_questions(Path(str(settings.grpo.questions))))
    path = context.run.data_report
    # grpo learns from its questions; rows only tell how long a prompt may be.
    report = {"train": {}} if questions and not path.is_file() else read_json(path)
    return read_job(settings, context.base, report, machine, questions)


def _training_machine(recipe: Recipe) -> "Machine":
    """What training finds here, shared by the processes a launcher has started."""
    from pipeline.environment import count_processes
    from pipeline.plan.machine import found_machine, this_machine
    from pipeline.train.memory import find_gpu

    gpu, devices = find_gpu(), count_processes()
    return found_machine(*gpu, devices, recipe.plan) if gpu else this_machine(devices)


def _keep_measured(run: Run, predicted: dict[str, Any]) -> dict[str, Any]:
    """A plan made after the run stands beside what was measured, and the prediction it had."""
    before = read_json(run.plan) if run.plan.is_file() else {}
    return {**before, "planned": predicted} if "measured" in before else {"predicted": predicted}


def _make_if_random(name: str) -> None:
    """Write the base random:SHAPE if it is wanted and not there."""
    from pipeline.base.names import random_folder

    if name.startswith("random:") and not random_folder(name).is_dir():
        base("random", name.removeprefix("random:"), random_folder(name))


def _training_rows(context: Context) -> tuple[Path, Path]:
    """What the objective learns from, and the held-out part of it."""
    run, settings = context.run, context.recipe.train
    if settings.objective in ("dpo", "kto"):
        return run.train_pairs, run.eval_pairs
    if settings.objective == "grpo":
        return Path(str(settings.grpo.questions)), run.eval_rows
    return run.train_rows, run.eval_rows


def _tell_others(task: Any) -> Any:
    """Tell the other processes of a launcher, if there are any, what to train; None is nothing."""
    from pipeline.environment import count_processes

    if count_processes() > 1:
        from pipeline.train.devices import first_says

        first_says(task)
    return task


def _train_with_the_first() -> None:
    """Take part in what the first process has decided to train, and write nothing down."""
    from pipeline.train.devices import first_says
    from pipeline.train.stage import train as fit

    task = first_says(None)
    if task is not None:
        fit(*task)


def _base_gguf(context: Context) -> Path:
    """The base for llama.cpp, written again only if it has changed."""
    from pipeline.export import export_gguf

    run, gguf_format = context.run, context.recipe.replay.gguf
    inputs = {"base": context.base_hash(), "gguf": gguf_format}
    if run.changed("replay-base", inputs) != [] or not run.is_intact("replay-base"):
        run.forget("replay-base")
        export_gguf(context.base, run.replay_base, "base", [gguf_format])
        run.record("replay-base", inputs, [run.replay_base])
    return run.replay_base / f"base-{gguf_format}.gguf"


def _pin_hub_sources(context: Context) -> None:
    """Write down which commit a hub data set means; a run stays with the one it began with."""
    pins = context.run.facts().get("hub_datasets", {})
    hub = {source.name: source for source in context.recipe.data.sources if source.hub}
    new = hub.keys() - pins.keys()
    if new:
        from pipeline.data.hub import pin  # brings in datasets, which takes a second

        found = {name: pin(hub[name]) for name in new}
        context.run.describe(hub_datasets=pins | found)


def _fetch(context: Context) -> dict[str, list[Path]]:
    """The files of the recipe's hub data sets, by the name of their source."""
    pins = context.run.facts().get("hub_datasets", {})
    hub = [source for source in context.recipe.data.sources if source.hub]
    if not hub:
        return {}
    from pipeline.data.hub import fetch

    return {source.name: fetch(source, pins[source.name]) for source in hub}


def _prepare(context: Context) -> None:
    """The data stage's work: rows, report and page."""
    from pipeline.chat import Chat
    from pipeline.data.page import render_page
    from pipeline.data.prepare import prepare
    from pipeline.data.show import segments
    from pipeline.data.store import read_spread

    recipe, run = context.recipe, context.run
    report = prepare(recipe.data, context.base, recipe.train.seed, run.data, _fetch(context))
    tokenizer = Chat(context.base)
    rows = read_spread(run.train_rows, PAGE_ROWS) + read_spread(run.train_pairs, PAGE_ROWS // 2)
    shown = [(row, segments(row, tokenizer)) for row in rows]
    write_text(run.data_page, render_page(recipe.name, report, shown))
    run.describe(rendered_ids={"train": report["train_sha256"], "eval": report["eval_sha256"]})


def _stage(name: str, context: Context, work: Callable[[Context], None]) -> None:
    """Run a stage, unless it is finished with the same inputs; say which, and what it made."""
    stage, run = find_stage(name), context.run
    for earlier, stale in stale_before(name, context).items():
        say(f"{earlier}: {', '.join(stale)} changed since it ran; run `pipeline {earlier}` again")
    inputs = stage.inputs(context)
    changed = run.changed(name, inputs)
    products = stage.products(run)
    if changed == [] and run.is_intact(name):
        say(f"{name}: nothing to do, {_first(products)} was made from the same inputs")
        return
    if changed:
        say(f"{name}: {', '.join(changed)} changed since it ran; running it again")
    with run.locked():
        run.forget(name)
        write_json(run.recipe, context.recipe.model_dump(mode="json"))
        work(context)
        run.record(name, inputs, products)
    say(str(_first(products)))


def _first(products: Sequence[Path]) -> Path:
    """The first product that is there: a training makes either an adapter or a checkpoint."""
    return next((path for path in products if path.exists()), products[0])


def _say_scores(scores: dict[str, Any]) -> None:
    say(f"{'':10}{'correct':>22}{'well-formed':>22}")
    for mode in ("direct", "thinking"):
        before, after = scores["before"][mode], scores["after"][mode]
        for key, width in (("correct", f"{mode:10}"), ("well_formed", "")):
            say(f"{width}{before[key]:>12.1%} ->{after[key]:>7.1%}", nl=key != "correct")


def _printable(text: str) -> str:
    """A sentence that quotes a file, without what would move the cursor or change the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _let_the_first_speak() -> None:
    """All processes of a launcher fail of the same thing, and the first one says so.

    The launcher then ends the others while they wait here; one that has failed alone is heard a
    moment later.
    """
    from pipeline.environment import count_processes, is_first_process

    if count_processes() > 1 and not is_first_process():
        time.sleep(ALONE_S)


def main() -> None:
    """Run a command; a user's mistake is one sentence and exit code 2."""
    from pipeline.environment import is_first_process

    level = logging.INFO if is_first_process() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    # Libraries announce their own future; a user of ours can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning)
    noisy = ("httpx2", "uvicorn", "transformers", "bitsandbytes", "accelerate", "datasets", "gguf")
    for library in noisy:
        logging.getLogger(library).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if is_first_process() else "1")
    # Each length of a micro-batch makes kernels of its own, and a CPU would keep 1024 of them.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    try:
        app()
    except Interrupted as stop:
        if is_first_process():
            say(_printable(str(stop)), err=True)
        sys.exit(stop.exit_code)
    except PipelineError as error:
        _let_the_first_speak()
        say(f"error: {_printable(str(error))}", err=True)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        extra = EXTRAS.get(package, "train")
        say(f"error: {package} is not installed: run pip install '.[{extra}]'", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        say("interrupted", err=True)
        sys.exit(130)
