"""The server, and ways to talk to it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import echo as say

from pipeline.cli.keys import Books
from pipeline.serve.offer.choice import Choice

commands = typer.Typer()
Artefact = Annotated[
    Choice,
    typer.Option(help="Which of a run's files; auto goes by its certificate."),
]


@commands.command()
def serve(  # noqa: PLR0913 - each is an option
    target: Annotated[
        Path,
        typer.Argument(
            help="A run folder, its recipe, a checkpoint's folder, a .gguf file, or a serve file "
            "that lists models."
        ),
    ],
    port: Annotated[
        int | None, typer.Option(help="0 takes any free port.", show_default="8000")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Where it listens; 0.0.0.0 is everywhere, once there is a key.")
    ] = "127.0.0.1",
    is_open: Annotated[
        bool, typer.Option("--open", help="Everybody is answered, without a key.")
    ] = False,
    engine: Annotated[
        str,
        typer.Option(
            help="auto, llamacpp, vllm, or URLs with commas between; PIPELINE_ENGINE_KEY has "
            "their API key. auto is vllm where there are CUDA and vLLM."
        ),
    ] = "auto",
    artefact: Artefact = "auto",
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER puts an adapter on it, as model local/NAME; repeatable."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="AUTHOR/SLUG it is called; by default local/FOLDERNAME.")
    ] = "",
    slots: Annotated[
        int | None,
        typer.Option(min=1, help="Replies made at once.", show_default="llamacpp 4, vllm 256"),
    ] = None,
    context_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Room of each, prompt and reply together.",
            show_default="llamacpp 8192, vllm the model's own",
        ),
    ] = None,
    queue: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Requests that may wait for a slot; the next is told to come back (429).",
            show_default="8 for each slot",
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(min=1, help="Processes that answer, over the same engines and limits."),
    ] = 1,
    provider: Annotated[
        bool,
        typer.Option(
            "--provider",
            help="For a router that lists it: says what is missing for that, and sends "
            "reasoning_content too.",
        ),
    ] = False,
    books: Books = None,
) -> None:
    """Serve it behind OpenRouter's API until Ctrl-C."""
    from pipeline.serve.offer.artefact import name_adapters
    from pipeline.serve.offer.catalog import Served
    from pipeline.serve.offer.engines import Room
    from pipeline.serve.offer.missing import what_is_missing
    from pipeline.serve.server import serve as run_server
    from pipeline.serve.settings import Settings

    settings = Settings(
        host=host,
        is_open=is_open,
        port=port,
        engine=engine,
        artefact=artefact,
        adapters=name_adapters(adapter or []),
        model=model,
        room=Room(slots, context_tokens),
        queue=queue,
        workers=workers,
        is_provider=provider,
        books=books,
    )

    def ready(url: str, key: str | None, models: Sequence[Served]) -> None:
        if key:
            say(f"key {key} is the first; it is shown this once, and clients send it as Bearer")
        for served in models if provider else ():
            for missing in what_is_missing(served, served.listing):
                say(f"{served.slug} is not ready to be listed: {missing}")
        if provider:
            say(f"a router reads {url.removesuffix('/api/v1')}/provider/v1/models")
        say(f"serving at {url}")

    run_server(target, settings, ready)


@commands.command(hidden=True)
def worker(line: int) -> None:
    """What --workers starts, with the number of a socket that it inherits."""
    import socket

    from pipeline.serve.worker import work

    with socket.socket(fileno=line) as to_parent:
        work(to_parent)


@commands.command()
def reload(
    port: Annotated[
        int | None, typer.Option(help="The server's.", show_default="the only one there is")
    ] = None,
) -> None:
    """Let a running server read again what it serves; no reply under way is cut."""
    from pipeline.serve.control import ask_to_reload

    say(ask_to_reload(port))


@commands.command()
def chat(
    target: Annotated[
        Path,
        typer.Argument(help="What is served: a run folder, its recipe, a .gguf or a serve file."),
    ],
    url: Annotated[
        str, typer.Option(help="The server's base URL.")
    ] = "http://127.0.0.1:8000/api/v1",
    model: Annotated[
        str, typer.Option(help="What the server calls it, if it was told another name.")
    ] = "",
    mode: Annotated[Literal["thinking", "direct"], typer.Option()] = "thinking",
) -> None:
    """Talk to a running server in the terminal; OPENROUTER_API_KEY has the key."""
    import os

    from rich.console import Console

    from pipeline.serve.offer.artefact import find_artefact
    from pipeline.serve.offer.menu import is_menu, read_menu
    from pipeline.serve.terminal import talk

    key = os.environ.get("OPENROUTER_API_KEY", "")
    if not model and is_menu(target):
        menu = read_menu(target)
        model, target = menu.default or menu.models[0].slug or "", menu.models[0].path
    talk(url, key, model or find_artefact(target).slug, mode, Console())


@commands.command()
def ask(
    target: Annotated[Path, typer.Argument(help="A run folder, its recipe or a .gguf file.")],
    question: str,
    system: Annotated[str, typer.Option(help="A system message to go before it.")] = "",
    artefact: Artefact = "auto",
) -> None:
    """Serve a run, ask one question in both modes with the official openai client, stop."""
    from pipeline.serve.ask import ask_both_modes

    for mode, reasoning, answer in ask_both_modes(target, question, system, artefact):
        say(f"\n{mode}: {question}")
        if reasoning:
            say(f"  (thinking) {reasoning}")
        say(f"  {answer}")
