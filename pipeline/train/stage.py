"""The train stage: rows and a base to an adapter, by TRL's loop."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoTokenizer, PrinterCallback
from trl import SFTConfig

from pipeline.errors import Interrupted, RunError
from pipeline.recipe import Train
from pipeline.run import Run, hash_value
from pipeline.train.arguments import make_arguments
from pipeline.train.checkpoint import Checkpoints, Saver, read_note
from pipeline.train.compiled import compile_layers
from pipeline.train.devices import first_says, gather_trained
from pipeline.train.explosion import StopOnExplosion
from pipeline.train.grpo import build_grpo
from pipeline.train.held_out import HeldOut
from pipeline.train.log import StepLog
from pipeline.train.memory import peak_bytes
from pipeline.train.model import keep_adapter_in_float32, make_model
from pipeline.train.pairs import PairSteps, read_pair_steps
from pipeline.train.preference import PreferenceTrainer
from pipeline.train.progress import show_progress
from pipeline.train.save import save
from pipeline.train.steps import Steps, group_conversations, plan_steps
from pipeline.train.trackers import make_trackers
from pipeline.train.trainer import PackTrainer, StepTrainer
from pipeline.train.variants import begin_again, choose_packs


@dataclass(frozen=True)
class Watch:
    """What a training is looked at by while it runs."""

    held_out: Path | None = None
    """Rows, or pairs, as those trained on: `eval_steps` measures their loss."""
    peak_tokens_per_s: float | None = None
    """What all devices would train at their full rate, by the plan's operations a token; MFU is the
    part of it that is reached. None where no rate is known."""


def train(
    settings: Train,
    base: Path,
    rows: Path,
    out: Path,
    inputs: Mapping[str, str] | None = None,
    watch: Watch | None = None,
) -> dict[str, float]:
    """Fit an adapter on a file of rows and save it in `out`, with `metrics.jsonl` beside it.

    It goes on from the newest checkpoint in `out` that was made with the same settings and
    `inputs`, the hashes of what else it is made from. Returns what was measured: steps, seconds,
    peak bytes. Raises Interrupted after Ctrl-C, and RunError if the loss explodes or is no number
    any more.
    """
    out.mkdir(parents=True, exist_ok=True)
    scratch = out / "trainer.partial"
    made_from = {**(inputs or {}), "settings": hash_value(settings.learning())}
    checkpoints = Checkpoints(out / "checkpoints", made_from)
    try:
        build = build_grpo if settings.objective == "grpo" else build_trainer
        trainer = build(settings, base, rows, scratch)
        trainer.lora_plus_ratio = settings.lora_plus_ratio
        seconds = _fit(trainer, settings, checkpoints, out, watch or Watch())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    weights = gather_trained(trainer.accelerator, trainer.model)
    if trainer.is_world_process_zero():
        save(trainer.model, base, Run(out), weights)
        checkpoints.clear()
    return {
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 2),
        "peak_bytes": peak_bytes(),
    }


def build_trainer(settings: Train, base: Path, rows: Path, scratch: Path) -> PackTrainer:
    """The trainer, with an adapter that has learnt nothing yet; it writes under `scratch`."""
    arguments = to_arguments(settings, scratch)
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    steps = read_steps(rows, settings, arguments.world_size)
    model = make_model(settings, base, choose_packs(steps, settings))
    if settings.compile == "layers":
        compile_layers(model)
    make = partial(PreferenceTrainer, settings) if isinstance(steps, PairSteps) else PackTrainer
    trainer = make(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(
            {"share": list(range(len(steps.plan) * steps.num_processes))}
        ),
        data_collator=steps,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    keep_adapter_in_float32(model)
    return trainer


def _fit(
    trainer: StepTrainer, settings: Train, checkpoints: Checkpoints, out: Path, watch: Watch
) -> float:
    """Train to the end, from the newest checkpoint if there is one; returns the seconds it took."""
    accelerator = trainer.accelerator
    if trainer.is_world_process_zero():
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
        checkpoints.tidy(settings.resume)
    accelerator.wait_for_everyone()
    newest = first_says(checkpoints.newest())
    note = read_note(newest) if newest else None
    metrics = out / "metrics.jsonl"
    saver = Saver(settings, accelerator, checkpoints, metrics)
    held_out = HeldOut(trainer, settings, watch.held_out) if settings.eval_steps else None
    console = Console(stderr=True) if trainer.is_world_process_zero() else None
    with show_progress(console) as tell, saver.listening():
        told = StepLog(metrics, trainer, tell, watch.peak_tokens_per_s)
        if newest and note:
            saver.go_on_from(newest, note)
            told.go_on_from(note)
            begin_again(trainer.model, newest)
            if held_out is not None:
                held_out.go_on_from(newest)
        stop = StopOnExplosion(trainer.data_collator, checkpoints, settings.objective)
        trackers = make_trackers(settings.log_to, out, trainer.args)
        for callback in (stop, told, held_out, *trackers, saver):
            if callback is not None:
                trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    if saver.is_stopped:
        step = trainer.state.global_step
        raise Interrupted(f"interrupted; the run goes on from step {step} when started again")
    if held_out is not None:
        held_out.restore()
    return saver.seconds


def read_steps(path: Path, settings: Train, num_processes: int) -> Steps:
    """All steps of a training on a file of rows, or of pairs; raises RunError if it holds none."""
    if settings.objective in ("dpo", "kto"):
        return read_pair_steps(path, settings, num_processes)
    rows = Dataset.from_file(str(path))
    if not len(rows):
        raise RunError(
            f"{path} holds no rows: to learn from preference pairs set train.objective=dpo or kto"
        )
    places = list(zip(rows["source"], rows["turn"], strict=True))
    plan = plan_steps(group_conversations(places), settings)
    return Steps(
        rows.select_columns(["prompt_ids", "completion_ids", "source"]),
        plan,
        settings.packing,
        settings.tokens_at_once,
        num_processes,
    )


def to_arguments(settings: Train, scratch: Path) -> SFTConfig:
    """What TRL's trainer is told, given whole steps; RunError if one process sees several GPUs."""
    return make_arguments(
        SFTConfig,
        settings,
        scratch,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_length=None,  # the data stage has decided; TRL would cut answers at 1024
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",  # the plan has shuffled
    )
