"""A process of its own for the server, which has no torch: GGUF files it lacks, into the cache."""

import argparse
import os
import signal
import sys
import threading
from pathlib import Path

from pipeline.base.cache import keep_once
from pipeline.errors import PipelineError
from pipeline.export.lora import write_lora
from pipeline.export.stage import export_gguf


def main() -> None:
    """Make what is asked for, or print in one sentence why not."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True, help="of the folder in the cache")
    parser.add_argument("--checkpoint", type=Path, required=True, help="or the adapter's base")
    parser.add_argument("--adapter", type=Path)
    arguments = parser.parse_args()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        keep_once(arguments.name, lambda work: _make(work, arguments.checkpoint, arguments.adapter))
    except PipelineError as error:
        sys.stdout.write(f"{error}\n")
        sys.exit(error.exit_code)


def _make(work: Path, checkpoint: Path, adapter: Path | None) -> Path:
    folder = work / "made"
    if adapter is None:
        export_gguf(checkpoint, folder, "model", ["bf16"])
    else:
        folder.mkdir()
        write_lora(adapter, checkpoint, folder / "adapter.gguf")
    return folder


def _end_with_parent() -> None:
    """Stop as by Ctrl-C, which leaves nothing half-made, when standard input ends."""
    while os.read(sys.stdin.fileno(), 1024):  # sys.stdin's lock would be held at our end
        pass
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


if __name__ == "__main__":
    main()
