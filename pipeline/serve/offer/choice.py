"""Which of a run's artefacts is served, by its certificate, and why. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.base.names import local_folder
from pipeline.certify.verdict import refuse_if_missed
from pipeline.engine.choose import Kind
from pipeline.errors import PipelineError, RunError
from pipeline.recipe import GgufFormat, load_recipe
from pipeline.run import BASE_GGUF, LORA_ENDING, UNMERGED, Run, hash_contents, read_json

Choice = Literal["auto", "merged", "adapter", GgufFormat]
"""auto: the adapter unmerged where the certificate recommends it, else merged: the first file of
the usual order that passed. Or a format by name."""
# A q8_0 file answers like the bf16 one and is half as large, which is certified, not believed; then
# those that lose nothing; then the more bits the better.
_ORDER = ("q8_0", "bf16", "f16", "q6_k", "q5_k_m", "q4_k_m")
_ADAPTER = "adapter_gguf"
_ADVICE = "the certificate recommends the adapter unmerged: merged, it loses too much in rounding"


@dataclass(frozen=True)
class Chosen:
    """What an engine loads: a GGUF file or a checkpoint; neither if it is elsewhere."""

    gguf: Path | None
    adapter: Path | None = None
    """Put on the other, which is its base then: a GGUF file, or a folder in PEFT's layout."""
    why: str = ""
    """What a user should know of the choice, in one sentence; empty if it is the usual one."""
    checkpoint: Path | None = None
    """What vLLM loads; a GGUF file is made of it for llama.cpp if there is none."""

    @property
    def kind(self) -> str:
        """What the certificate calls it; `merged` for what it has no word for."""
        if self.adapter is not None:
            return _ADAPTER if self.gguf else "adapter"
        return next((kind for kind in _ORDER if self.gguf and _is(self.gguf, kind)), "merged")


def run_of(folder: Path) -> Run | None:
    """The run whose exports, exported adapter or merged checkpoint a folder is, or None."""
    part = folder.resolve()
    if part.name == UNMERGED and part.parent.name == Run(part).exports.name:
        part = part.parent
    run = Run(part.parent)
    return run if part in (run.exports, run.merged) else None


def choose(folder: Path, choice: Choice, kind: Kind = "llamacpp") -> Chosen:
    """What an engine of some kind loads of a folder with GGUF files, or of the folder's run.

    PipelineError where it is not there or not certified.
    """
    if kind == "elsewhere":
        return Chosen(None)
    if kind == "vllm":
        return _choose_for_vllm(folder, choice)
    chosen, run = _choose_gguf(folder, choice), run_of(folder)
    if chosen.gguf is None and run is not None and is_checkpoint(run.merged):
        return Chosen(None, why=chosen.why, checkpoint=run.merged)
    return chosen


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has a model's config and weights in safetensors."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _choose_gguf(folder: Path, choice: Choice) -> Chosen:
    certificate = _certificate(folder)
    if choice == "auto" and _pair(folder) is not None:
        choice = "adapter"
    if choice in ("auto", "merged"):
        merged = _choose_merged(folder, certificate)
        return merged if choice == "merged" else _choose_unmerged(folder, certificate, merged)
    chosen = _unmerged(folder) if choice == "adapter" else _file(folder, choice)
    wanted = "export.adapter: gguf" if choice == "adapter" else f"{choice} in export.gguf"
    if chosen is None:
        raise PipelineError(f"{folder} has no {choice} to serve: set {wanted}, and export again")
    if certificate and chosen.kind not in certificate["artefacts"]:
        raise PipelineError(f"{chosen.gguf} is not certified: run `pipeline certify` again")
    return chosen


def refuse_uncertified(folder: Path, chosen: Chosen) -> None:
    """Raise GateMissed if the run's certificate says that a file missed its limit.

    A file the certificate has no word for, or that is elsewhere, is held to the merged checkpoint.
    What has no certificate, such as a file from elsewhere, is not held to one. Raises RunError for
    a certificate of other exports.
    """
    run, certificate = run_of(folder), _certificate(folder)
    if run is None or certificate is None:
        return
    _refuse_stale(run, chosen)
    measured = certificate["artefacts"]
    kind = chosen.kind if chosen.kind in measured else "merged"
    if kind in measured:
        refuse_if_missed({**certificate, "artefacts": {kind: measured[kind]}})


def refuse_uncertified_adapter(run: Run, kind: Kind) -> None:
    """The same for a run's adapter that is put on a base by hand."""
    if not run.certificate.is_file():
        return
    measured = dict(read_json(run.certificate))["artefacts"]
    name = _ADAPTER if kind == "llamacpp" and _ADAPTER in measured else "adapter"
    if name in measured:
        refuse_if_missed({"artefacts": {name: measured[name]}})


def _choose_for_vllm(folder: Path, choice: Choice) -> Chosen:
    """The merged checkpoint, or where that is recommended the adapter on its base."""
    run, certificate = run_of(folder), _certificate(folder)
    if run is None or choice not in ("auto", "merged", "adapter"):
        what = folder if run is None else choice
        raise PipelineError(f"vLLM does not load GGUF files, and {what} is nothing else")
    is_recommended = certificate is not None and certificate.get("recommended") == "adapter"
    if choice == "adapter" or (choice == "auto" and is_recommended):
        adapter = run.exports / UNMERGED
        if (adapter / "adapter_config.json").is_file():
            why = f"serving {adapter}, for {_ADVICE}" if choice == "auto" else ""
            return Chosen(None, adapter, why, _base_of(run))
        if choice == "adapter":
            raise PipelineError(
                f"{run.exports} has no adapter for vLLM: set export.adapter: peft, and export again"
            )
    if not is_checkpoint(run.merged):
        raise PipelineError(f"{run.folder} has no merged checkpoint: run `pipeline merge` first")
    without = f"{_ADVICE}, but it is not among the exports; set export.adapter: peft"
    is_told = choice == "auto" and is_recommended
    return Chosen(None, None, without if is_told else "", run.merged)


def _base_of(run: Run) -> Path:
    """The checkpoint with the weights a run's adapter was trained on, under the run's config."""
    recipe = load_recipe(run.recipe)
    base = local_folder(recipe.base)
    if recipe.train.method == "qlora":
        name = base.resolve().name if base else recipe.base.rpartition("/")[2]
        base = Path("bases", f"{name}-nf4")
    elif run.base.is_dir():
        base = run.base
    if base is None or not is_checkpoint(base):
        raise PipelineError(
            f"the base of {run.folder} is not here as {base or recipe.base}: serve the merged "
            f"checkpoint with --artefact merged, or BASE --adapter NAME={run.adapter}"
        )
    return base


def _choose_unmerged(folder: Path, certificate: Mapping[str, Any] | None, merged: Chosen) -> Chosen:
    if certificate is None or certificate.get("recommended") != "adapter":
        return merged
    chosen = _unmerged(folder)
    if chosen is not None and certificate["artefacts"].get(_ADAPTER, {}).get("passed"):
        return Chosen(chosen.gguf, chosen.adapter, f"serving {chosen.adapter}, for {_ADVICE}")
    without = "but it is not among the exports; set export.adapter: gguf"
    if chosen is not None:
        without = "but as GGUF it is not certified"
    return Chosen(merged.gguf, None, f"{_ADVICE}, {without}")


def _choose_merged(folder: Path, certificate: Mapping[str, Any] | None) -> Chosen:
    """The first file that passed; or the first one, of which is then said why it is not served."""
    found = [chosen for kind in _ORDER if (chosen := _file(folder, kind)) is not None]
    found = found or [Chosen(file) for file in sorted(folder.glob("*.gguf"))] or [Chosen(None)]
    if certificate is None:
        return found[0]
    measured = certificate["artefacts"]
    passed = (c for c in found if measured.get(c.kind, {}).get("passed"))
    chosen = next(passed, found[0])
    if chosen is found[0]:
        return chosen
    return Chosen(chosen.gguf, None, f"serving {chosen.kind}, for {found[0].kind} did not pass")


def _file(folder: Path, kind: str) -> Chosen | None:
    files = (file for file in sorted(folder.glob("*.gguf")) if _is(file, kind))
    return next((Chosen(file) for file in files), None)


def _is(file: Path, kind: str) -> bool:
    stem = file.stem.lower()
    return stem == kind or stem.endswith((f"-{kind}", f".{kind}", f"_{kind}"))


def _unmerged(folder: Path) -> Chosen | None:
    return _pair(folder / UNMERGED) or _pair(folder)


def _pair(folder: Path) -> Chosen | None:
    """An adapter and its base."""
    base, adapters = folder / BASE_GGUF, sorted(folder.glob(f"*{LORA_ENDING}"))
    return Chosen(base, adapters[0]) if base.is_file() and adapters else None


def _certificate(folder: Path) -> Mapping[str, Any] | None:
    run = run_of(folder)
    return dict(read_json(run.certificate)) if run and run.certificate.is_file() else None


def _refuse_stale(run: Run, chosen: Chosen) -> None:
    """A certificate is of what there was then; a run that knows of no stage is not ours."""
    stage, name = ("merge", "merged") if chosen.checkpoint == run.merged else ("export", "exports")
    certified, made = run.stage("certify"), run.stage(stage)
    if certified is None and made is None:
        return
    of = certified["inputs"].get(name) if certified else None
    if made is None or of != hash_contents(made["files"]):
        raise RunError(
            f"{run.certificate} is not of the {name} as they are now: run `pipeline certify` again"
        )
