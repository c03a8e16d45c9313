"""`pipeline provider check`: asks a server what a router would, and says what came back."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from pipeline.serve.probes import (
    access,
    form,
    limits,
    load,
    logprobs,
    sampling,
    streaming,
    thinking,
    tools,
    whole,
)
from pipeline.serve.probes.client import connect
from pipeline.serve.probes.declared import find_declared
from pipeline.serve.probes.seen import Fault, Seen, Verdict
from pipeline.serve.probes.subject import Subject

Run = Callable[[Subject], Awaitable[Seen]]


@dataclass(frozen=True)
class Finding:
    """A line of the table."""

    check: str
    verdict: Verdict
    seen: str


@dataclass(frozen=True)
class _Check:
    name: str
    run: Run
    parameter: str = ""
    """What must be declared for it."""


def _of(parameter: str, run: Run, more: str = "") -> _Check:
    return _Check(f"{parameter}: {more}" if more else parameter, run, parameter)


_CHECKS = (
    _Check("no key", access.no_key),
    _Check("wrong key", access.wrong_key),
    _Check("unknown model", access.unknown_model),
    _Check("body that is no JSON", access.no_json),
    _Check("field of a wrong type", access.wrong_type),
    _Check("reply", whole.reply),
    _Check("usage", whole.usage),
    _Check("model", whole.model),
    _Check("stream: content type", streaming.content_type),
    _Check("stream: frames", streaming.frames),
    _Check("stream: finish_reason", streaming.finish_reason),
    _Check("stream: usage", streaming.usage),
    _Check("stream: model", streaming.model),
    _Check("stream: keep-alive comments", streaming.comments),
    _Check("stream: cancellation", streaming.cancellation),
    _Check("many at once", load.at_once),
    _of("max_tokens", limits.max_tokens),
    _of("max_completion_tokens", limits.max_completion_tokens),
    _of("stop", limits.stop),
    _of("n", limits.n),
    _of("temperature", sampling.temperature),
    _of("seed", sampling.seed),
    _of("top_p", sampling.top_p),
    _of("top_k", sampling.top_k),
    _of("min_p", sampling.min_p),
    _of("frequency_penalty", sampling.frequency_penalty),
    _of("presence_penalty", sampling.presence_penalty),
    _of("repetition_penalty", sampling.repetition_penalty),
    _of("logit_bias", sampling.logit_bias),
    _of("logprobs", logprobs.logprobs),
    _of("logprobs", logprobs.in_stream, "streamed"),
    _of("top_logprobs", logprobs.top_logprobs),
    _of("response_format", form.json_object, "json_object"),
    _of("structured_outputs", form.json_schema, "json_schema"),
    _of("structured_outputs", form.json_schema_in_stream, "streamed"),
    _of("tools", tools.tools),
    _of("tool_choice", tools.required, "required"),
    _of("tool_choice", tools.in_stream, "streamed"),
    _of("tool_choice", tools.named, "one function"),
    _of("tool_choice", tools.none, "none"),
    _of("parallel_tool_calls", tools.not_parallel),
    _of("reasoning", thinking.reasoning),
    _of("reasoning_effort", thinking.reasoning_effort),
    _of("include_reasoning", thinking.include_reasoning),
)


async def probe(url: str, key: str, model: str = "") -> AsyncIterator[Finding]:
    """What each check has found, as it is found; Fault if no model can be asked at all.

    `url` ends in /v1, as for any client; without `model` the first is asked that is listed.
    """
    async with connect(url, key) as client:
        declared = await find_declared(client, model)
        document = declared.document
        yield Finding("models document", document.verdict, f"{declared.model}: {document.what}")
        subject = Subject(client, declared)
        for check in _CHECKS:
            yield await _find(check, subject)
    for name in sorted(set(declared.parameters) - {check.parameter for check in _CHECKS}):
        yield Finding(name, "not shown", "declared; no check here shows that it acts")


async def _find(check: _Check, subject: Subject) -> Finding:
    if check.parameter and not subject.has(check.parameter):
        return Finding(check.name, "not declared", "")
    try:
        seen = await check.run(subject)
    except Fault as fault:
        return Finding(check.name, "failed", str(fault))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        # Whoever does not speak this API may answer anything.
        return Finding(check.name, "failed", f"an answer of another shape: {error!r}")
    return Finding(check.name, seen.verdict, seen.what)
