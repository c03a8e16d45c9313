"""The child process that hosts llama.cpp's HTTP server on a Unix socket, as long as we live."""

import argparse
import ctypes
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import xllamacpp

# llama.cpp keeps the prompts of finished requests in memory, by default up to 8 GiB of them.
PROMPT_CACHE_MIB = 1024
# A hang-up takes effect between two batches; its default of 2048 tokens is long on a CPU.
BATCH_TOKENS = 256


def main() -> None:
    """Serve until standard input ends, which it also does when the parent is killed."""
    arguments = _parse_arguments()
    threading.Thread(target=_end_with_parent, args=(arguments.socket,), daemon=True).start()
    # Loading holds the interpreter's lock for minutes, so that thread would not run until it ends.
    _kill_with_parent(signal.SIGKILL)
    server = xllamacpp.Server(_parameters(arguments))
    _kill_with_parent(0)
    threading.Event().wait()
    del server


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--context-tokens", type=int, required=True)
    parser.add_argument("--adapter", type=Path, action="append", default=[])
    return parser.parse_args()


def _parameters(arguments: argparse.Namespace) -> Any:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(arguments.gguf)
    # Each request says which of them it wants.
    parameters.lora_adapters = [
        xllamacpp.CommonAdapterLoraInfo(str(adapter), 0.0) for adapter in arguments.adapter
    ]
    parameters.hostnames = [str(arguments.socket)]
    parameters.n_parallel = arguments.slots
    # Each slot has a cache of its own, so one long conversation cannot take another's room.
    parameters.kv_unified = False
    parameters.n_ctx = arguments.slots * arguments.context_tokens
    parameters.n_batch = BATCH_TOKENS
    parameters.n_ubatch = BATCH_TOKENS
    # A request holds a thread for as long as it waits or runs, and a queue must not starve /health.
    parameters.n_threads_http = 64 + arguments.slots
    # That memory does not know with which adapter a prompt was computed.
    parameters.cache_ram_mib = 0 if arguments.adapter else PROMPT_CACHE_MIB
    parameters.ctx_shift = False
    parameters.ui = False
    parameters.endpoint_metrics = True
    return parameters


def _kill_with_parent(number: int) -> None:
    """Have the kernel send us this signal when the parent ends; 0 is none. Linux only."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)


def _end_with_parent(socket: Path) -> None:
    """End this process when its standard input ends, however the parent went."""
    while sys.stdin.buffer.read(1024):
        pass
    shutil.rmtree(socket.parent, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main()
