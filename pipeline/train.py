"""Rows to an adapter: our words to TRL's, PEFT's and bitsandbytes'; the loop is theirs."""

import json
import logging
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from pipeline.errors import BaseError, RecipeError, RunError
from pipeline.recipe import Train
from pipeline.run import whole_folder

log = logging.getLogger(__name__)

IGNORED = -100  # the label that torch's cross entropy leaves out


def train(settings: Train, base: Path, rows: Path, out: Path) -> dict[str, float]:
    """Fit an adapter on a file of rows and save it in `out`, with `metrics.jsonl` beside it.

    Returns what was measured: steps, seconds, peak bytes.
    """
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = with_adapter(load_base(base, settings), settings)
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out, prefix="trainer-") as scratch:
        trainer = SupervisedTrainer(
            model=model,
            args=_arguments(settings, Path(scratch)),
            train_dataset=labelled(rows, Path(scratch)),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(StepLog(out / "metrics.jsonl", trainer))
        keep_adapter_in_float32(model)
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
    _save(model, out / "adapter")
    return {
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 2),
        "peak_bytes": _peak_bytes(),
    }


def _save(model: PeftModel, adapter: Path) -> None:
    with whole_folder(adapter) as temporary:
        try:
            model.save_pretrained(temporary, save_embedding_layers=False)
        except SafetensorError as error:  # how the library reports a disk that is full
            raise RunError(f"{adapter} cannot be written: {error}") from error


def labelled(path: Path, scratch: Path) -> Dataset:
    """Rows as TRL takes them without preparation: input_ids, and labels on the completion only."""

    def label(row: dict[str, Any]) -> dict[str, Any]:
        prompt, completion = row["prompt_ids"], row["completion_ids"]
        return {
            "input_ids": prompt + completion,
            "labels": [IGNORED] * len(prompt) + completion,
            "length": len(prompt) + len(completion),
        }

    rows = Dataset.from_file(str(path))
    if not len(rows):
        raise RunError(f"{path} holds no rows: preference pairs alone are not trained on yet")
    cache = str(scratch / "labelled.arrow")
    return rows.map(label, remove_columns=rows.column_names, cache_file_name=cache)


def load_base(base: Path, settings: Train) -> PreTrainedModel:
    """The frozen base in the recipe's dtype (TRL would load float32), or in 4 bit for qlora."""
    quantization = None
    if settings.method == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=getattr(torch, settings.dtype), quantization_config=quantization
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BaseError(f"{base} cannot be loaded: {error}") from error
    model.config.use_cache = False
    return model


def with_adapter(model: PreTrainedModel, settings: Train) -> PeftModel:
    """The base with a fresh adapter, its weights in float32."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules
        if isinstance(settings.target_modules, str)
        else list(settings.target_modules),
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:  # PEFT names the modules it did not find
        raise RecipeError(f"train.target_modules: {error}") from error


def keep_adapter_in_float32(model: PeftModel) -> None:
    """Undo TRL's cast of adapters on a quantised base to bf16, which loses small updates."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _arguments(settings: Train, scratch: Path) -> SFTConfig:
    return SFTConfig(
        output_dir=str(scratch),
        max_steps=settings.steps or -1,
        num_train_epochs=settings.epochs or 1,
        per_device_train_batch_size=settings.micro_rows,
        gradient_accumulation_steps=settings.batch_rows // settings.micro_rows,
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
        # Rows of like length together: less padding, and the order still comes from the seed.
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        pad_to_multiple_of=None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


class SupervisedTrainer(SFTTrainer):
    """TRL's trainer, counting what it learns from; and a loss that is cheap without a GPU."""

    num_supervised_tokens = 0
    num_tokens = 0

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Count, then TRL's fused loss; on a CPU the same loss over the labelled positions alone.

        TRL's fused head leaves out unlabelled positions only where Triton runs. On a CPU it scores
        every position against the whole vocabulary in float32, measured here at 2.6 times the time
        of a whole step of the demo and three times its memory.
        """
        labels = inputs["labels"]
        self.num_supervised_tokens += int((labels != IGNORED).sum())
        self.num_tokens += int(inputs["attention_mask"].sum())
        if labels.is_cuda or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        language_model = self.accelerator.unwrap_model(model).get_base_model()
        targets = labels[:, 1:]
        with self.accelerator.autocast():  # it wraps the whole model's forward, which is not called
            hidden = language_model.base_model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                use_cache=False,
            ).last_hidden_state
            logits = language_model.lm_head(hidden[:, :-1][targets != IGNORED]).float()
        loss = functional.cross_entropy(logits, targets[targets != IGNORED], reduction="sum")
        return loss / (num_items_in_batch if num_items_in_batch is not None else len(logits))


class StepLog(TrainerCallback):
    """Writes metrics.jsonl, and a progress line every few seconds."""

    def __init__(self, path: Path, trainer: SupervisedTrainer) -> None:
        self._path = path
        self._trainer = trainer
        self._started = self._last = self._spoken = 0.0
        self._tokens = self._supervised = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start with an empty file, and the clock at zero."""
        self._path.write_text("", encoding="utf-8")
        self._started = self._last = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """One object a step: step, loss, learning rate, tokens, seconds."""
        if not logs or "loss" not in logs:
            return
        now = time.monotonic()
        line = {
            "step": state.global_step,
            "loss": float(logs["loss"]),
            "grad_norm": float(logs["grad_norm"]),
            "learning_rate": float(logs["learning_rate"]),
            "num_supervised_tokens": self._trainer.num_supervised_tokens - self._supervised,
            "num_tokens": self._trainer.num_tokens - self._tokens,
            "seconds": round(now - self._last, 4),
        }
        self._tokens = self._trainer.num_tokens
        self._supervised = self._trainer.num_supervised_tokens
        self._last = now
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if now - self._spoken > 5 or state.global_step in (1, state.max_steps):
            self._spoken = now
            self._say(state, line["loss"], now - self._started)

    def _say(self, state: TrainerState, loss: float, seconds: float) -> None:
        log.info(
            "step %d of %d  loss %.3f  %.0f tokens/s (%.0f supervised)  %.0f s left",
            state.global_step,
            state.max_steps,
            loss,
            self._tokens / seconds,
            self._supervised / seconds,
            seconds / state.global_step * (state.max_steps - state.global_step),
        )


def _peak_bytes() -> int:
    """The most memory held: of the accelerator if there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) * 1024
