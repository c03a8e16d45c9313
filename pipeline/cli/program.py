"""The way in: commands, their failures in one sentence, and what is said of them."""

import logging
import os
import sys
import time
import warnings

import typer
from typer import echo as say

from pipeline.cli import (
    artefacts,
    benches,
    keys,
    merging,
    preparing,
    proof,
    provider,
    serving,
    training,
    usage,
)
from pipeline.cli.log import begin_log
from pipeline.cli.printable import printable
from pipeline.errors import Interrupted, PipelineError, RunError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help starts in two thirds of the time
    help="Make Qwen3 your own: data, training, merge, export, proof, server.",
)
for room in (preparing, training, merging, artefacts, proof, serving):  # the order of --help
    app.add_typer(room.commands)
app.add_typer(keys.commands, name="keys", help="Who may use the server.")
app.add_typer(usage.commands, name="usage", help="What they have used.")
app.add_typer(provider.commands, name="provider", help="Being listed by a router.")
app.add_typer(benches.commands, name="bench", help="Measure what the README's tables say.")

ALONE_S = 15.0  # how long a process waits for the first one to tell of a failure that is common
# Which extra of pyproject.toml brings a missing package; all others are in "train".
SERVE = (
    "aiohttp alembic orjson prometheus_client rich sqlalchemy starlette uvicorn uvloop xllamacpp"
)
EXTRAS = dict.fromkeys(SERVE.split(), "serve")
EXTRAS["openai"] = "dev"


@app.callback()
def one_process(context: typer.Context) -> None:
    """Refuse to do anything but training as often as a launcher starts us."""
    from pipeline.environment import count_processes

    if count_processes() > 1 and context.invoked_subcommand != "train":
        what = context.invoked_subcommand
        raise RunError(f"only train runs in several processes: run `pipeline {what}` by itself")


def _let_the_first_speak() -> None:
    """All processes of a launcher fail of the same thing, and the first one says so.

    The launcher then ends the others while they wait here; one that has failed alone is heard a
    moment later.
    """
    from pipeline.environment import count_processes, is_first_process

    if count_processes() > 1 and not is_first_process():
        time.sleep(ALONE_S)


def main() -> None:
    """Run a command; a user's mistake is one sentence and exit code 2."""
    from pipeline.environment import is_first_process

    level = logging.INFO if is_first_process() else logging.ERROR
    # Libraries announce their own future; a user of ours can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning)
    noisy = "httpx2 uvicorn alembic transformers bitsandbytes accelerate datasets gguf"
    for library in noisy.split():
        logging.getLogger(library).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if is_first_process() else "1")
    # Each length of a micro-batch makes kernels of its own, and a CPU would keep 1024 of them.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    try:
        begin_log(level)
        app()
    except Interrupted as stop:
        if is_first_process():
            say(printable(str(stop)), err=True)
        sys.exit(stop.exit_code)
    except PipelineError as error:
        _let_the_first_speak()
        say(f"error: {printable(str(error))}", err=True)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        extra = EXTRAS.get(package, "train")
        say(f"error: {package} is not installed: run pip install '.[{extra}]'", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        say("interrupted", err=True)
        sys.exit(130)
