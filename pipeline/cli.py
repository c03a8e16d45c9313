"""The command line: one short function a command, the only file that prints."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pipeline.errors import Interrupted, PipelineError, RecipeError
from pipeline.recipe import Recipe, load_recipe, parse_recipe
from pipeline.run import Run, read_json, write_json, write_text
from pipeline.stages import Context, find_stage, stale_before

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
PAGE_ROWS = 12  # how many rows data.html shows
# Which extra of pyproject.toml brings a missing package; all others are in "train".
EXTRAS = dict.fromkeys(("aiohttp", "orjson", "rich", "starlette", "uvicorn", "xllamacpp"), "serve")
EXTRAS["openai"] = "dev"


@app.command()
def check(target: Target, overrides: Sets = None) -> None:
    """Validate a recipe, its data files and its base; nothing is loaded."""
    from pipeline.base.names import check_base
    from pipeline.sources import has_files

    recipe = _recipe(target, overrides)
    sources = [source.path for source in recipe.data.sources]
    named = [path for path in (*sources, recipe.data.eval.path) if path]
    missing = [path for path in named if not has_files(path)]
    questions = recipe.evaluate.questions
    if questions and not Path(questions).is_file():
        missing.append(questions)
    if missing:
        replay = str(Run.named(recipe.name).replay)
        hint = "; run `pipeline replay` first" if replay in missing else ""
        raise RecipeError(f"{target}: no such file from {Path.cwd()}: {', '.join(missing)}{hint}")
    check_base(recipe.base)
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
    context = _context(target, overrides, "config")  # first: it says if the train extra is missing

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
        for row in read_spread(run.train_rows, show):
            console.print(row_text(row, tokenizer))
    if dump:
        dump_rows({"train": run.train_rows, "eval": run.eval_rows}, dump)
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

    context = _context(target, overrides)
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
def plan(target: Target, overrides: Sets = None) -> None:
    """Predict memory, tokens and operations of a run, without a GPU and without weights."""
    from pipeline.plan import predict

    context = _context(target, overrides, "config")
    run = context.run
    run.made("data")
    counts = read_json(run.data_report)["train"]
    predicted = predict(context.recipe.train, context.base, counts)
    write_json(run.plan, {"predicted": predicted})
    say(json.dumps(predicted, indent=2))
    say(str(context.run.plan))


@app.command()
def train(target: Target, overrides: Sets = None) -> None:
    """Fit the adapter."""

    def work(context: Context) -> None:
        from pipeline.environment import describe
        from pipeline.plan import predict
        from pipeline.train.checkpoint import describe_torch
        from pipeline.train.stage import train as fit

        run, recipe = context.run, context.recipe
        run.describe(**describe(), **describe_torch(), seed=recipe.train.seed)
        counts = read_json(run.data_report)["train"]
        predicted = predict(recipe.train, context.base, counts)
        inputs = find_stage("train").inputs(context)
        measured = fit(recipe.train, context.base, run.train_rows, run.folder, inputs)
        write_json(run.plan, {"predicted": predicted, "measured": measured})

    _stage("train", _context(target, overrides), work)


@app.command()
def merge(target: Target, overrides: Sets = None) -> None:
    """Base plus adapter to one checkpoint."""

    def work(context: Context) -> None:
        from pipeline.merge import merge as write

        run = context.run
        write(context.base, run.adapter, run.merged, context.recipe.train.method)

    _stage("merge", _context(target, overrides), work)


@app.command()
def export(target: Target, overrides: Sets = None) -> None:
    """The merged checkpoint to GGUF files."""

    def work(context: Context) -> None:
        from pipeline.export import export_gguf

        run, recipe = context.run, context.recipe
        export_gguf(run.merged, run.exports, recipe.name, recipe.export.gguf)
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
            Trained(context.base, run.adapter, recipe.train.method),
            run.merged,
            ggufs,
            [(row.prompt_ids, row.completion_ids, row.mode) for row in read_rows(run.eval_rows)],
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
        from pipeline.evaluate.stage import read_questions

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
    base: Annotated[Path, typer.Option(help="A checkpoint folder.")] = Path("bases/demo"),
    support: Annotated[Path, typer.Option(help="The support set.")] = Path("data/support"),
    keep: Annotated[
        Path | None, typer.Option(help="An empty folder for what is made; else nothing stays.")
    ] = None,
) -> None:
    """Training on prefix trees beside stock TRL on the same rows."""
    from tempfile import TemporaryDirectory

    from pipeline.bench.train import bench_train as measure
    from pipeline.bench.train import table

    with TemporaryDirectory(prefix="bench-train-") as folder:
        say(table(measure(base, support, keep or Path(folder))))


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
    """The recipe, its run folder and its base; `config` leaves a hub base's weights there."""
    from pipeline.base.find import find_base
    from pipeline.base.names import random_folder

    recipe = _recipe(target, overrides)
    run = Run(target) if target.is_dir() else Run.named(recipe.name)
    if recipe.base.startswith("random:") and not random_folder(recipe.base).is_dir():
        base("random", recipe.base.removeprefix("random:"), random_folder(recipe.base))
    named = {"base": recipe.base, "revision": recipe.revision}
    facts = run.facts()
    # A branch may move between two stages; a run stays with the commit it began with.
    pinned = facts.get("base_commit") if facts.get("base_named") == named else None
    found = find_base(recipe.base, pinned or recipe.revision, what)
    if found.commit and found.commit != pinned:
        run.describe(base_named=named, base_commit=found.commit)
    return Context(recipe, run, found.folder)


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
    shown = [(row, segments(row, tokenizer)) for row in read_spread(run.train_rows, PAGE_ROWS)]
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
        say(f"{name}: nothing to do, {products[0]} was made from the same inputs")
        return
    if changed:
        say(f"{name}: {', '.join(changed)} changed since it ran; running it again")
    with run.locked():
        run.forget(name)
        write_json(run.recipe, context.recipe.model_dump(mode="json"))
        work(context)
        run.record(name, inputs, products)
    say(str(products[0]))


def _say_scores(scores: dict[str, Any]) -> None:
    say(f"{'':10}{'correct':>22}{'well-formed':>22}")
    for mode in ("direct", "thinking"):
        before, after = scores["before"][mode], scores["after"][mode]
        for key, width in (("correct", f"{mode:10}"), ("well_formed", "")):
            say(f"{width}{before[key]:>12.1%} ->{after[key]:>7.1%}", nl=key != "correct")


def _printable(text: str) -> str:
    """A sentence that quotes a file, without what would move the cursor or change the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def main() -> None:
    """Run a command; a user's mistake is one sentence and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # Libraries announce their own future; a user of ours can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning)
    for noisy in ("httpx2", "uvicorn", "transformers", "bitsandbytes", "accelerate", "datasets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    try:
        app()
    except Interrupted as stop:
        say(_printable(str(stop)), err=True)
        sys.exit(stop.exit_code)
    except PipelineError as error:
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
