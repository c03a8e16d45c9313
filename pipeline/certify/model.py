"""The models a certificate compares, one at a time in memory, all computed in float32."""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.base.checkpoint import adapter_file, shard_names
from pipeline.base.compressed import load_compressed
from pipeline.base.nf4 import load_as_trained
from pipeline.errors import RunError
from pipeline.run import read_json

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=torch.nn.Module)


@dataclass(frozen=True)
class Trained:
    """The model as trained: an adapter on the base it was trained on, or a whole checkpoint."""

    base: Path
    learnt: Path
    """The adapter; of method full the checkpoint."""
    method: Literal["lora", "qlora", "full"]


def load_adapted(trained: Trained, onto: Literal["trained", "original"] = "trained") -> PeftModel:
    """An adapter beside its base: of qlora the one in 4 bit, or for `original` the other.

    Raises RunError for an adapter that was made for other weights, and, unopened, for a pickle.
    """
    adapter_file(trained.learnt)
    shard_names(trained.base)
    method = trained.method if onto == "trained" else "lora"
    base = load_as_trained(trained.base, method, trained.learnt)
    try:
        model = PeftModel.from_pretrained(base, str(trained.learnt), autocast_adapter_dtype=True)
    except (RuntimeError, ValueError) as error:
        what = f"{trained.learnt} was not made for {trained.base}: {_shorten(error)}"
        raise RunError(what) from error
    return place(model)


def load_checkpoint(folder: Path) -> PreTrainedModel:
    """A checkpoint in float32; one of fewer bits as an engine computes with it.

    Raises RunError for a folder that holds none, BaseError for one of pickles, unopened.
    """
    shard_names(folder)
    try:
        if "quantization_config" in read_json(folder / "config.json"):
            return place(load_compressed(folder))
        return place(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    except (OSError, RuntimeError, ValueError) as error:
        raise RunError(f"{folder} cannot be loaded: {_shorten(error)}") from error


def _shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def place(model: Model) -> Model:
    """Put a model where it is run."""
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return model.eval().to(choose_device(num_bytes, _free_accelerator_bytes()))


def choose_device(num_bytes: int, free: int | None) -> str:
    """Where a model of a size is run: on the CPU unless `free` holds it and its activations."""
    if free is None:
        return "cpu"
    needed = num_bytes * 1.25
    if free > needed:
        return "cuda"
    log.info(
        "comparing on the CPU: it takes %.1f GB in float32 and the GPU has %.1f GB free",
        needed / 1e9,
        free / 1e9,
    )
    return "cpu"


def _free_accelerator_bytes() -> int | None:
    """Free memory of the GPU, that of the model before given back; None without a GPU."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])
    return None


@contextmanager
def rounded_to_bf16(model: torch.nn.Module) -> Iterator[None]:
    """Every parameter as vLLM holds it, until the block ends; sums stay in float32."""
    kept = []
    for parameter in model.parameters():
        rounded = parameter.data.bfloat16().float()
        if not torch.equal(rounded, parameter.data):
            kept.append((parameter, parameter.data))
            parameter.data = rounded
    try:
        yield
    finally:
        for parameter, values in kept:
            parameter.data = values
