"""Before training: recipes, bases, rows, replies of the base."""

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import echo as say
from typer.core import TyperGroup

from pipeline.cli.keys import Books
from pipeline.cli.stage import run_stage
from pipeline.cli.target import Sets, Target, plain_context, read_recipe
from pipeline.errors import RecipeError
from pipeline.recipe import Recipe
from pipeline.run import Run, read_json, write_json, write_text
from pipeline.stages import Context


class OrRecipe(TyperGroup):
    """Of `data`, what is no command's name is a recipe's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take `data X` for `data rows X`."""
        is_named = not args or args[0] == "--help" or args[0] in self.commands
        return super().parse_args(ctx, args if is_named else ["rows", *args])


commands = typer.Typer()
data_commands = typer.Typer(
    cls=OrRecipe, no_args_is_help=True, subcommand_metavar="RECIPE | COMMAND [ARGS]..."
)
commands.add_typer(
    data_commands, name="data", help="Conversations to rows; a server's log to conversations."
)

PAGE_ROWS = 12  # how many rows data.html shows


@commands.command()
def check(target: Target, overrides: Sets = None) -> None:
    """Validate a recipe, its data files and its base; nothing is loaded."""
    from pipeline.base.names import check_base, local_folder
    from pipeline.base.yarn import read_config, room_of
    from pipeline.sources import has_files

    recipe = read_recipe(target, overrides)
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


@commands.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    say(json.dumps(Recipe.model_json_schema(), indent=2))


@commands.command()
def base(
    kind: Annotated[Literal["demo", "tiny", "golden", "golden-lora", "random"], typer.Argument()],
    like: Annotated[str, typer.Option(help="Shape of `random`.")] = "qwen3-8b",
    out: Annotated[Path | None, typer.Option(help="Default: bases/KIND.")] = None,
) -> None:
    """Write a base: small and real, tiny and random, tiny with known answers, or a true shape."""
    from pipeline.base.make import make_base

    folder = out or Path("bases") / kind
    made = make_base(kind, like, folder)
    say(str(folder) if made else f"{folder}: already there, unchanged")


@data_commands.command()
def rows(
    target: Target,
    overrides: Sets = None,
    show: Annotated[int, typer.Option(help="Print so many rows, as the model sees them.")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="A warning is a failure.")] = False,
    dump: Annotated[Path | None, typer.Option(help="Write every row as JSON lines.")] = None,
) -> None:
    """Conversations to rows, exactly as inference renders them; `rows` may be left out."""
    context = plain_context(target, overrides, "config")  # first: it says which extra is missing

    from rich.console import Console

    from pipeline.chat import Chat
    from pipeline.data.dump import dump_rows
    from pipeline.data.show import report_tables, row_text
    from pipeline.data.store import read_spread
    from pipeline.data.warn import refuse_warnings

    run, console = context.run, Console()
    _pin_hub_sources(context)
    run_stage("data", context, _prepare)
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


@data_commands.command("from-log")
def from_log(
    out: Annotated[Path, typer.Option(help="A new .jsonl file, for data.sources.")],
    folder: Annotated[
        Path | None, typer.Argument(help="The log's folder.", show_default="beside the books")
    ] = None,
    model: Annotated[str, typer.Option(metavar="SLUG", help="Only what it answered.")] = "",
    key: Annotated[
        str, typer.Option(metavar="HASH", help="Only of the key whose hash begins so.")
    ] = "",
    since: Annotated[
        datetime | None,
        typer.Option(metavar="DATE", formats=["%Y-%m-%d"], help="Not what is older, by UTC."),
    ] = None,
    books: Books = None,
) -> None:
    """What a server has answered keys with --log-content: sound answers, each of them once."""
    from pipeline.serve.books.database import books_url
    from pipeline.serve.content.files import content_folder
    from pipeline.serve.content.learn import Wanted, learn_from_log

    wanted = Wanted(model, key, since.date() if since else None)
    for line in learn_from_log(folder or content_folder(books_url(books)), out, wanted):
        say(line)


@commands.command()
def replay(target: Target, overrides: Sets = None) -> None:
    """Let the base answer general prompts, thinking; sound replies are a source to mix in."""
    from rich.console import Console

    from pipeline.chat import Chat
    from pipeline.replay.stage import Answerer
    from pipeline.replay.stage import replay as ask

    context = plain_context(target, overrides)
    run, recipe = context.run, context.recipe
    answerer = Answerer(Chat(context.base), context.base_hash(), lambda: _base_gguf(context))
    with run.locked():
        tally, is_new = ask(recipe.replay, recipe.train.seed, answerer, run, Console(stderr=True))
        write_json(run.recipe, recipe.model_dump(mode="json"))
    if not is_new:
        say(f"replay: nothing to do, {run.replay} was made from the same inputs")
    say(f"replay: {tally}")
    say(f"a source for data.sources: {{path: {run.replay}, share: 0.2}}")


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
