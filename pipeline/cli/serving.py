"""The server, and ways to talk to it."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import echo as say

from pipeline.cli.keys import Books
from pipeline.serve.choice import Choice

commands = typer.Typer()
Artefact = Annotated[
    Choice,
    typer.Option(help="Which of a run's files; auto goes by its certificate."),
]


@commands.command()
def serve(  # noqa: PLR0913 - each is an option
    target: Annotated[
        Path,
        typer.Argument(help="A run folder, its recipe, a checkpoint's folder or a .gguf file."),
    ],
    port: Annotated[int, typer.Option(help="0 takes any free port.")] = 8000,
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
    books: Books = None,
) -> None:
    """Serve it behind OpenRouter's chat API until Ctrl-C."""
    from pipeline.serve.artefact import name_adapters
    from pipeline.serve.engines import Room
    from pipeline.serve.server import Settings
    from pipeline.serve.server import serve as run_server

    settings = Settings(
        port=port,
        engine=engine,
        artefact=artefact,
        adapters=name_adapters(adapter or []),
        model=model,
        room=Room(slots, context_tokens),
        books=books,
    )

    def ready(url: str, key: str | None) -> None:
        if key:
            say(f"key {key} is the first; it is shown this once, and clients send it as Bearer")
        say(f"serving at {url}")

    run_server(target, settings, ready)


@commands.command()
def chat(
    target: Annotated[
        Path, typer.Argument(help="What is served: a run folder, its recipe or a .gguf file.")
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

    from pipeline.serve.artefact import find_artefact
    from pipeline.serve.terminal import talk

    key = os.environ.get("OPENROUTER_API_KEY", "")
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
