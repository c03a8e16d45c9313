"""The train stage: rows and a base to an adapter, by TRL's loop."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoTokenizer, PrinterCallback
from trl import SFTConfig

from pipeline.errors import RunError
from pipeline.recipe import Train
from pipeline.run import whole_folder
from pipeline.train.log import StepLog
from pipeline.train.model import keep_adapter_in_float32, load_base, with_adapter
from pipeline.train.steps import Steps, group_conversations, plan_steps
from pipeline.train.trainer import PackTrainer


def train(settings: Train, base: Path, rows: Path, out: Path) -> dict[str, float]:
    """Fit an adapter on a file of rows and save it in `out`, with `metrics.jsonl` beside it.

    Returns what was measured: steps, seconds, peak bytes.
    """
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = with_adapter(load_base(base, settings), settings)
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out, prefix="trainer-") as scratch:
        arguments = to_arguments(settings, Path(scratch))
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
        trainer.add_callback(StepLog(out / "metrics.jsonl", trainer))
        keep_adapter_in_float32(model)
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
    if trainer.is_world_process_zero():
        _save(model, out / "adapter")
    return {
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 2),
        "peak_bytes": _peak_bytes(),
    }


def read_steps(path: Path, settings: Train, num_processes: int) -> Steps:
    """All steps of a training on a file of rows; raises RunError if it holds none."""
    rows = Dataset.from_file(str(path))
    if not len(rows):
        raise RunError(f"{path} holds no rows: preference pairs alone are not trained on yet")
    places = list(zip(rows["source"], rows["turn"], strict=True))
    plan = plan_steps(group_conversations(places), settings)
    return Steps(
        rows.select_columns(["prompt_ids", "completion_ids"]),
        plan,
        settings.packing,
        settings.micro_tokens,
        num_processes,
    )


def to_arguments(settings: Train, scratch: Path) -> SFTConfig:
    """Our words to TRL's and transformers'."""
    return SFTConfig(
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
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,  # a pack goes through all of the adapter
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


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
