"""The train stage: rows and a base to an adapter, by TRL's loop."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoTokenizer, PrinterCallback
from trl import SFTConfig

from pipeline.errors import Interrupted, RunError
from pipeline.recipe import Train
from pipeline.run import hash_value, whole_folder
from pipeline.train.checkpoint import Checkpoints, Saver, read_note
from pipeline.train.finite import StopUnlessFinite
from pipeline.train.log import StepLog
from pipeline.train.model import keep_adapter_in_float32, load_base, with_adapter
from pipeline.train.steps import Steps, group_conversations, plan_steps
from pipeline.train.trainer import PackTrainer


def train(
    settings: Train,
    base: Path,
    rows: Path,
    out: Path,
    inputs: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Fit an adapter on a file of rows and save it in `out`, with `metrics.jsonl` beside it.

    It goes on from the newest checkpoint in `out` that was made with the same settings and
    `inputs`, the hashes of what else it is made from. Returns what was measured: steps, seconds,
    peak bytes. Raises Interrupted after Ctrl-C, and RunError if the loss is no number any more.
    """
    out.mkdir(parents=True, exist_ok=True)
    scratch = out / "trainer.partial"
    made_from = {**(inputs or {}), "settings": hash_value(settings.learning())}
    checkpoints = Checkpoints(out / "checkpoints", made_from)
    try:
        trainer = build_trainer(settings, base, rows, scratch)
        seconds = _fit(trainer, settings, checkpoints, out / "metrics.jsonl")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if trainer.is_world_process_zero():
        _save(trainer.model, out / "adapter")
        checkpoints.clear()
    return {
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 2),
        "peak_bytes": _peak_bytes(),
    }


def build_trainer(settings: Train, base: Path, rows: Path, scratch: Path) -> PackTrainer:
    """The trainer, with an adapter that has learnt nothing yet; it writes under `scratch`."""
    arguments = to_arguments(settings, scratch)
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = with_adapter(load_base(base, settings), settings)
    steps = read_steps(rows, settings, arguments.world_size)
    trainer = PackTrainer(
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


def _fit(trainer: PackTrainer, settings: Train, checkpoints: Checkpoints, metrics: Path) -> float:
    """Train to the end, from the newest checkpoint if there is one; returns the seconds it took."""
    accelerator = trainer.accelerator
    if trainer.is_world_process_zero():
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
        checkpoints.tidy(settings.resume)
    accelerator.wait_for_everyone()
    newest = checkpoints.newest()
    note = read_note(newest) if newest else None
    saver = Saver(settings, accelerator, checkpoints, metrics)
    trainer.add_callback(StopUnlessFinite(trainer.data_collator, checkpoints))
    trainer.add_callback(StepLog(metrics, trainer, note.metrics_bytes if note else 0))
    trainer.add_callback(saver)
    with saver.listening():
        if newest and note:
            saver.go_on_from(newest, note)
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    if saver.is_stopped:
        step = trainer.state.global_step
        raise Interrupted(f"interrupted; the run goes on from step {step} when started again")
    return saver.seconds


def read_steps(path: Path, settings: Train, num_processes: int) -> Steps:
    """All steps of a training on a file of rows; raises RunError if it holds none."""
    rows = Dataset.from_file(str(path))
    if not len(rows):
        raise RunError(f"{path} holds no rows: preference pairs alone are not trained on yet")
    places = list(zip(rows["source"], rows["turn"], strict=True))
    plan = plan_steps(group_conversations(places), settings)
    return Steps(
        rows.select_columns(["prompt_ids", "completion_ids", "source"]),
        plan,
        settings.packing,
        settings.micro_tokens,
        num_processes,
    )


def to_arguments(settings: Train, scratch: Path) -> SFTConfig:
    """Our words to TRL's and transformers'; RunError if one process sees several GPUs.

    Torch would copy the model to each of them at every step, and the packs are not made for that.
    """
    arguments = SFTConfig(
        output_dir=str(scratch),
        num_train_epochs=1,  # the plan of the steps has all epochs
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        bf16=settings.dtype == "bfloat16",
        activation_checkpointing=settings.checkpointing == "full",
        activation_checkpointing_kwargs={"use_reentrant": False},
        max_length=None,  # the data stage has decided; TRL would cut answers at 1024
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",  # the plan has shuffled
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        save_strategy="no",  # Saver says when
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,  # a pack goes through all of the adapter
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:
        raise RunError(
            f"there are {arguments.n_gpu} GPUs, and training uses one: set CUDA_VISIBLE_DEVICES=0, "
            "or to the number of another"
        )
    return arguments


def _save(model: PeftModel, adapter: Path) -> None:
    with whole_folder(adapter) as temporary:
        try:
            model.save_pretrained(temporary, save_embedding_layers=False)
        except SafetensorError as error:  # how the library reports a disk that is full
            raise RunError(f"{adapter} cannot be written: {error}") from error


def _peak_bytes() -> int:
    """The most memory held: of the accelerator if there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) * 1024
