"""One process a device, as accelerate starts them: who decides, what goes together, what is whole.

The first process decides what is done, tells the others, and alone writes into the run folder,
which all of them must see: on several machines it lies on a shared file system, as the base does.
"""

import atexit
import gc
import os
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from pipeline.environment import count_processes
from pipeline.errors import RunError
from pipeline.recipe import Train

T = TypeVar("T")
PATIENCE = timedelta(hours=2)
"""How long the others wait for the first process, which may have a base to fetch."""
LAUNCH = "accelerate launch --config_file recipes/accelerate/ddp.yaml -m pipeline train RECIPE"


def first_says(value: T) -> T:
    """What the first process says, in every process; what the others pass is not looked at."""
    if count_processes() == 1:
        return value
    PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    atexit.unregister(_leave)
    atexit.register(_leave)
    told: list[T] = broadcast_object_list([value])
    return told[0]


def _leave() -> None:
    """End the process group and its threads while Python still runs.

    One of them that drops a tensor once Python is ending aborts the process, and the launcher then
    stops all the others, the first one perhaps while it saves. What a training leaves goes first:
    the last to let go of the group waits for its threads, and only Python's own hold on it does so
    without the lock that these may need.
    """
    gc.collect()
    torch.distributed.destroy_process_group()


def refuse_unfit(settings: Train, num_gpus: int) -> None:
    """RunError where the launcher's configuration cannot train what the recipe asks for.

    `num_gpus` is how many this process sees without a launcher; torch would copy the model to each
    of them at every step, and packs are not made for that.
    """
    if num_gpus > 1:
        raise RunError(
            f"there are {num_gpus} GPUs: set CUDA_VISIBLE_DEVICES=0 for one of them, or train on "
            f"all with `{LAUNCH}`"
        )
    sharded = [name for name in ("FSDP", "DEEPSPEED") if _is_set(f"ACCELERATE_USE_{name}")]
    if not sharded:
        return
    if sharded == ["FSDP"] and os.environ.get("FSDP_VERSION") != "2":
        raise RunError("fsdp_version must be 2; take recipes/accelerate/fsdp2.yaml")
    for is_asked, what in (
        (settings.method == "qlora", "a base in 4 bit is not sharded"),
        (settings.objective == "grpo", "replies are written by a whole model"),
        (settings.optimizer == "adamw_8bit", "moments in 8 bit are not sharded"),
    ):
        if is_asked:
            raise RunError(f"{what}; take recipes/accelerate/ddp.yaml: each GPU holds all of it")


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def gather_trained(accelerator: Accelerator, model: Any) -> dict[str, Any] | None:
    """The trained weights of a sharded model, whole, on the CPU of the first process.

    All processes take part. None where every process has all of them.
    """
    if accelerator.is_fsdp2:
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        return dict(get_model_state_dict(model, options=options))
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from deepspeed.utils import safe_get_full_fp32_param  # no need of other installations

        return {
            name: safe_get_full_fp32_param(parameter).cpu()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
    return None
