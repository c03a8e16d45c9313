"""A reply that is streamed."""

import asyncio
import contextlib

import aiohttp

from pipeline.serve.probes.reply import FINISHES, check_usage
from pipeline.serve.probes.seen import Fault, Seen, not_shown, passed
from pipeline.serve.probes.stream import DONE, lines, read_frame
from pipeline.serve.probes.subject import Subject

_ENDLESS = [{"role": "user", "content": "Count from one to five hundred, in words."}]
_MAX_TOKENS = 512
_PATIENCE_S = 10
"""For the first token of a stream that is to be left; then it is left without."""


async def content_type(subject: Subject) -> Seen:
    """That of server-sent events."""
    said = (await subject.ask_stream()).content_type
    if said.partition(";")[0].strip().lower() != "text/event-stream":
        raise Fault(f"Content-Type is {said!r}")
    return passed(said)


async def frames(subject: Subject) -> Seen:
    """Objects of one id, each for a choice that it numbers, and the last word."""
    stream = await subject.ask_stream()
    if not stream.is_done:
        raise Fault(f"it ends without {DONE}")
    if len(ids := {str(frame.get("id")) for frame in stream.frames}) > 1:
        raise Fault(f"its chunks have several ids: {', '.join(sorted(ids)[:3])}")
    if any(
        "index" not in bit or not isinstance(bit.get("delta"), dict) for bit in stream.choices()
    ):
        raise Fault("a chunk has a choice without index or delta")
    return passed(f"{len(stream.frames)} chunks, {DONE}")


async def finish_reason(subject: Subject) -> Seen:
    """A key of every chunk: null, and once a word."""
    choices = (await subject.ask_stream()).choices()
    lacking = sum("finish_reason" not in bit for bit in choices)
    if lacking:
        raise Fault(f"{lacking} of {len(choices)} chunks lack the key finish_reason")
    finishes = [bit["finish_reason"] for bit in choices if bit["finish_reason"] is not None]
    if not finishes or set(finishes) - set(FINISHES) or len(set(finishes)) > 1:
        raise Fault(f"the chunks end with {finishes}")
    return passed(f"{finishes[0]}, null in the chunks before")


async def usage(subject: Subject) -> Seen:
    """Once, in the last chunk."""
    stream = await subject.ask_stream(stream_options={"include_usage": True})
    places = [i for i, frame in enumerate(stream.frames) if frame.get("usage") is not None]
    if not places:
        raise Fault("no chunk has usage")
    if places != [len(stream.frames) - 1]:
        raise Fault(f"chunks {places} of {len(stream.frames)} have usage, not the last alone")
    return passed(check_usage(stream.frames[-1]["usage"]))


async def model(subject: Subject) -> Seen:
    """The one that was asked, in every chunk."""
    frames = (await subject.ask_stream()).frames
    if others := {str(f.get("model")) for f in frames} - {subject.declared.model}:
        raise Fault(f"{subject.declared.model} was asked, and {', '.join(sorted(others))} answers")
    return passed(subject.declared.model)


async def comments(subject: Subject) -> Seen:
    """What keeps a connection open while there is nothing to say."""
    fields = {"reasoning": {"enabled": True}} if subject.has("reasoning") else {}
    stream = await subject.ask_stream(**fields)
    if not stream.num_comments:
        return not_shown("none came in this stream")
    return passed(f"{stream.num_comments}")


async def cancellation(subject: Subject) -> Seen:
    """A stream that is left is no longer generated, as far as a server tells of it."""
    body = subject.body(stream=True, messages=_ENDLESS, max_tokens=_MAX_TOKENS)
    async with subject.client.open(body) as response:
        generation = response.headers.get("X-Generation-Id")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_S):
                if await _is_over(response):
                    return not_shown("the reply was over before it could be left")
    await subject.ask(max_tokens=1)
    if generation is None:
        return not_shown("it answers on; nothing tells whether the reply has stopped")
    answer = await subject.client.get(f"{subject.client.url}/generation?id={generation}")
    if answer.status != 200:
        return not_shown(f"it answers on; /generation has status {answer.status}")
    told = answer.json().get("data") or {}
    if told.get("cancelled") is not True:
        raise Fault("a stream was left, and /generation says that it was not cancelled")
    return passed(f"cancelled after {told.get('tokens_completion')} tokens")


async def _is_over(response: aiohttp.ClientResponse) -> bool:
    """Whether the first chunk of a stream is its last."""
    async for line in lines(response):
        if line == f"data: {DONE}":
            return True
        if not line.startswith(":"):
            bits = read_frame(line).get("choices") or []
            return any(bit.get("finish_reason") for bit in bits)
    return True
