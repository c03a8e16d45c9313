"""What measures the figures of the README's tables."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import echo as say

from pipeline.cli.target import make_if_random

commands = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@commands.command("data")
def bench_data(
    conversations: Annotated[int, typer.Option(min=1)] = 100_000,
    keep: Annotated[
        Path | None, typer.Option(help="An empty folder for what is made; else nothing stays.")
    ] = None,
) -> None:
    """The data stage beside TRL's own preparation of the same conversations."""
    from tempfile import TemporaryDirectory

    from pipeline.bench.data import bench_data as measure
    from pipeline.bench.data import table

    with TemporaryDirectory(prefix="bench-data-") as folder:
        say(table(measure(conversations, keep or Path(folder))))


@commands.command("train")
def bench_train(
    base: Annotated[str, typer.Option(help="A checkpoint folder, or random:SHAPE.")] = "bases/demo",
    support: Annotated[Path, typer.Option(help="The support set.")] = Path("data/support"),
    keep: Annotated[
        Path | None, typer.Option(help="An empty folder for what is made; else nothing stays.")
    ] = None,
) -> None:
    """Training beside stock TRL on the same rows: prefix trees, or on a GPU LoRA and QLoRA."""
    from tempfile import TemporaryDirectory

    from pipeline.base.names import check_base, local_folder
    from pipeline.bench.train import bench_train as measure
    from pipeline.bench.train import table

    check_base(base)
    make_if_random(base)
    found = local_folder(base) or Path(base)
    with TemporaryDirectory(prefix="bench-train-") as folder:
        say(table(measure(found, support, keep or Path(folder))))


@commands.command("merge")
def bench_merge(
    base: Annotated[
        str, typer.Option(help="A checkpoint folder, or random:SHAPE.")
    ] = "random:qwen3-8b",
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter on every linear layer.")] = 16,
    keep: Annotated[
        Path | None, typer.Option(help="A folder to write in, on the disk that is to be measured.")
    ] = None,
) -> None:
    """Merging beside a copy of the same files and PEFT's own merge: seconds, memory, disk."""
    from tempfile import TemporaryDirectory

    from pipeline.base.names import check_base, local_folder
    from pipeline.bench.merge import bench_merge as measure
    from pipeline.bench.merge import table

    check_base(base)
    make_if_random(base)
    found = local_folder(base) or Path(base)
    with TemporaryDirectory(prefix="bench-merge-", dir=found.parent) as folder:
        say(table(measure(found, rank, keep or Path(folder))))


@commands.command("engine")
def bench_engine(
    base: Annotated[
        Path, typer.Option(help="What is served: anything `pipeline serve` takes.")
    ] = Path("bases/demo"),
    engine: Annotated[Literal["llamacpp", "vllm"], typer.Option()] = "llamacpp",
    streams: Annotated[str, typer.Option(help="Numbers of streams at once.")] = "1,8,32",
    tokens: Annotated[int, typer.Option(min=2, help="Of each stream.")] = 32,
    keep: Annotated[
        Path | None, typer.Option(help="An empty folder for what is made; else nothing stays.")
    ] = None,
) -> None:
    """Tokens a second through our server beside the engine alone; what a second phase costs."""
    from tempfile import TemporaryDirectory

    from pipeline.bench.engine import bench_engine as measure
    from pipeline.bench.engine import table

    numbers = [int(number) for number in streams.split(",")]
    with TemporaryDirectory(prefix="bench-engine-") as folder:
        say(table(measure(base, engine, numbers, tokens, keep or Path(folder))))


@commands.command("gateway")
def bench_gateway(
    base: Annotated[Path, typer.Option(help="A checkpoint; only its tokenizer is used.")] = Path(
        "bases/demo"
    ),
    litellm: Annotated[
        Path, typer.Option(help="LiteLLM's program, which is left out if it is not there.")
    ] = Path(".venv-litellm/bin/litellm"),
    streams: Annotated[str, typer.Option(help="Numbers of streams at once.")] = "1,32,128",
    rounds: Annotated[int, typer.Option(min=1, help="Medians are told.")] = 5,
    keep: Annotated[
        Path | None, typer.Option(help="An empty folder for what is made; else nothing stays.")
    ] = None,
) -> None:
    """What our server adds to a scripted engine: time to the first event, events a second."""
    from tempfile import TemporaryDirectory

    from pipeline.bench.gateway import bench_gateway as measure
    from pipeline.bench.gateway import table

    numbers = [int(number) for number in streams.split(",")]
    with TemporaryDirectory(prefix="bench-gateway-") as folder:
        say(table(measure(base, litellm, numbers, rounds, keep or Path(folder))))


@commands.command("soak")
def bench_soak(
    base: Annotated[
        Path, typer.Option(help="A checkpoint; the smaller, the harder the server works.")
    ] = Path("bases/tiny"),
    seconds: Annotated[float, typer.Option(min=1, help="Of faults at random.")] = 90.0,
    seed: Annotated[
        int | None, typer.Option(help="Of the faults.", show_default="a new one each time")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="An empty folder for what is made; else nothing stays.")
    ] = None,
) -> None:
    """What a server promises under load, faults and kill -9; exit code 1 for what it breaks."""
    import secrets
    from tempfile import TemporaryDirectory

    from pipeline.bench.soak import Plan, soak, table
    from pipeline.bench.soak_faults import Faults

    faults = Faults(secrets.randbelow(10**6) if seed is None else seed, seconds)
    say(f"faults by --seed {faults.seed}")
    with TemporaryDirectory(prefix="bench-soak-") as folder:
        result = soak(base, Plan(faults), keep or Path(folder))
        say(table(result))
        result.check()
