"""Which stage is made from what, so that a finished one is known from a stale one. Torch-free."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import RunError
from pipeline.recipe import Recipe
from pipeline.run import Run, hash_file, hash_value, hash_weights

Inputs = Mapping[str, str]


@dataclass(frozen=True)
class Context:
    """What every stage is given: the recipe, the run's folder, and the base on disk."""

    recipe: Recipe
    run: Run
    base: Path

    def base_hash(self) -> str:
        """The sha256 of the base; its files' own go into the manifest."""
        manifest = self.run.facts()
        total, files = hash_weights(self.base, manifest.get("base_files", {}))
        if files != manifest.get("base_files"):
            self.run.describe(base_files=files)
        return total


def _data(context: Context) -> Inputs:
    recipe = context.recipe
    paths = [source.path for source in recipe.data.sources]
    if recipe.data.eval.path:
        paths.append(recipe.data.eval.path)
    files = {path: _hash_source(path) for path in paths}
    dialogue = [context.base / "tokenizer.json", context.base / "chat_template.jinja"]
    return files | {
        "data": hash_value([recipe.data.model_dump(), recipe.train.seed]),
        "dialogue": hash_value([hash_file(path) for path in dialogue if path.is_file()]),
    }


def _hash_source(path: str) -> str:
    """The sha256 of a source; a file that is gone is a change, and no reason to stop a later stage.

    A run folder may be moved to a machine that never had the conversations.
    """
    try:
        return hash_file(Path(path))
    except OSError:
        return "missing"


def _train(context: Context) -> Inputs:
    return {
        "rows": context.run.output("data", "train rows"),
        "base": context.base_hash(),
        "train": hash_value(context.recipe.train.model_dump()),
    }


def _merge(context: Context) -> Inputs:
    return {
        "adapter": context.run.output("train", "adapter"),
        "base": context.base_hash(),
        "method": hash_value(context.recipe.train.method),
    }


def _export(context: Context) -> Inputs:
    return {
        "merged": context.run.output("merge", "merged"),
        "export": hash_value(context.recipe.export.model_dump()),
        "before": hash_value(context.recipe.evaluate.questions is not None),
    }


def _certify(context: Context) -> Inputs:
    run = context.run
    return {
        "adapter": run.output("train", "adapter"),
        "merged": run.output("merge", "merged"),
        "exports": run.output("export", "exports"),
        "held-out rows": run.output("data", "held-out rows"),
        "certify": hash_value(context.recipe.certify.model_dump()),
    }


def _evaluate(context: Context) -> Inputs:
    questions = context.recipe.evaluate.questions
    if questions is None:
        raise RunError("there is nothing to evaluate: name evaluate.questions in the recipe")
    return {
        "exports": context.run.output("export", "exports"),
        "questions": _hash_source(questions),
        "evaluate": hash_value(context.recipe.evaluate.model_dump()),
    }


@dataclass(frozen=True)
class Stage:
    """A stage's name, what it is made from, and the file whose presence says it is finished."""

    name: str
    inputs: Callable[[Context], Inputs]
    product: Callable[[Run], Path]


STAGES = (
    Stage("data", _data, lambda run: run.data_report),
    Stage("train", _train, lambda run: run.adapter / "adapter_config.json"),
    Stage("merge", _merge, lambda run: run.merged / "config.json"),
    Stage("export", _export, lambda run: run.exports / "tokenizer.json"),
    Stage("certify", _certify, lambda run: run.certificate),
    Stage("evaluate", _evaluate, lambda run: run.evaluation),
)


def find_stage(name: str) -> Stage:
    """A stage by its name."""
    return next(stage for stage in STAGES if stage.name == name)


def stale_before(name: str, context: Context) -> dict[str, list[str]]:
    """Earlier finished stages whose inputs have changed since, each with what changed."""
    stale = {}
    for stage in STAGES:
        if stage.name == name:
            break
        if context.run.stage(stage.name) is None:
            continue
        changed = context.run.changed(stage.name, stage.inputs(context))
        if changed:
            stale[stage.name] = changed
    return stale
