"""After merging: what is exported from the checkpoint, the proof and the scores."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import echo as say

from pipeline.cli.stage import run_stage
from pipeline.cli.target import Sets, Target, plain_context, trained_context
from pipeline.errors import RecipeError
from pipeline.run import read_json, write_json
from pipeline.stages import Context

if TYPE_CHECKING:
    from pipeline.export.card import Artefact
    from pipeline.export.push import Visibility

commands = typer.Typer()
CALIBRATION_ROWS = 256
"""Of each file of training rows, what int4 is calibrated on."""


@commands.command()
def export(
    target: Annotated[
        Path | None, typer.Argument(help="A recipe file or a run folder.", show_default=False)
    ] = None,
    overrides: Sets = None,
    formats: Annotated[
        Literal["list"] | None, typer.Option("--format", help="Say which can be written here.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Send one to the hub; needs HF_TOKEN.")
    ] = None,
    artefact: Annotated[
        Literal["merged", "adapter", "gguf", "fp8", "int4"] | None,
        typer.Option(help="Which one to push; merged by default."),
    ] = None,
    visibility: Annotated[
        Literal["private", "public"] | None, typer.Option(help="There; private by default.")
    ] = None,
) -> None:
    """The merged checkpoint to what other programs serve: GGUF files, an Ollama Modelfile."""
    if formats == "list":
        from pipeline.export import list_formats

        for name, reason in list_formats():
            say(f"{name:14}{reason or 'works'}")
        return
    if target is None:
        raise RecipeError("export needs a recipe file or a run folder, or --format list")
    if push is not None:
        _push(push, artefact or "merged", visibility or "private", target, overrides)
        return
    if artefact or visibility:
        raise RecipeError("--artefact and --visibility are for --push ORG/NAME")

    def work(context: Context) -> None:
        from pipeline.export import export as write
        from pipeline.export import export_gguf, find_unmerged

        run, recipe = context.run, context.recipe
        unmerged = find_unmerged(context, plain_context(target, overrides))
        rows = _calibration_rows(context)
        write(run.merged, run.exports, recipe.name, recipe.export, unmerged, rows)
        if recipe.evaluate.questions is not None:
            export_gguf(context.base, run.before, "base", recipe.export.gguf[-1:])

    run_stage("export", trained_context(target, overrides), work)


def _calibration_rows(context: Context) -> list[list[int]]:
    """Token ids of training rows, spread over all of them; none where int4 is not wanted."""
    from pipeline.data.store import read_spread

    if "int4" not in context.recipe.export.compressed:
        return []
    files = (context.run.train_rows, context.run.train_pairs)
    rows = [row for file in files for row in read_spread(file, CALIBRATION_ROWS)]
    return [row.prompt_ids + row.completion_ids for row in rows]


@commands.command()
def evaluate(target: Target, overrides: Sets = None) -> None:
    """Ask held-out questions before and after, in both modes."""
    context = trained_context(target, overrides)
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

    run_stage("evaluate", context, work)
    _say_scores(read_json(context.run.evaluation))


def _push(
    repository: str,
    artefact: "Artefact",
    visibility: "Visibility",
    target: Path,
    overrides: list[str] | None,
) -> None:
    """One artefact of a run to the hub, over plain HTTP."""
    # Before huggingface_hub, which reads it once: what is tried without the hub itself is this way.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    from pipeline.export.push import Order
    from pipeline.export.push import push as send

    context = trained_context(target, overrides)
    with context.run.locked():
        say(send(context, Order(repository, artefact, visibility)))


def _say_scores(scores: dict[str, Any]) -> None:
    say(f"{'':10}{'correct':>22}{'well-formed':>22}")
    for mode in ("direct", "thinking"):
        before, after = scores["before"][mode], scores["after"][mode]
        for key, width in (("correct", f"{mode:10}"), ("well_formed", "")):
            say(f"{width}{before[key]:>12.1%} ->{after[key]:>7.1%}", nl=key != "correct")
