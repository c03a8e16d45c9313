"""OpenTelemetry's spans of a request: models, counts and times; never a word of it, never a key."""

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING

from pipeline.errors import PipelineError, RequestError
from pipeline.serve.books.ledger import Generation

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, SpanKind

FLUSH_S = 5.0
"""How long spans that are not sent yet may hold up a server that ends."""
_HUNG_UP = 499
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_SPOKEN = "http/protobuf"
Step = contextlib.AbstractContextManager[object]
_onward: ContextVar[Mapping[str, str] | None] = ContextVar("onward", default=None)


def attempt(trace: "Trace | None", provider: str) -> Step:
    """At an endpoint."""
    return trace.step(f"ask {provider}", is_asking=True) if trace else contextlib.nullcontext()


def step(trace: "Trace | None", name: str) -> Step:
    """A part of an attempt."""
    return trace.step(name) if trace else contextlib.nullcontext()


def onward_headers() -> Mapping[str, str]:
    """What tells a server elsewhere which trace its work belongs to."""
    return _onward.get() or {}


@contextlib.contextmanager
def open_traces() -> Iterator["Traces | None"]:
    """By OpenTelemetry's environment variables; None, and nothing imported, without an endpoint.

    PipelineError for an endpoint that cannot be told.
    """
    if not _is_wanted():
        yield None
        return
    provider = _provider()
    try:
        yield Traces(provider)
    finally:
        # Its own way waits for half a minute, and at the end of the process once more.
        flushing = threading.Thread(target=provider.shutdown, daemon=True)
        flushing.start()
        flushing.join(FLUSH_S)


def _is_wanted() -> bool:
    said = {name: text.strip().lower() for name, text in os.environ.items() if "OTEL_" in name}
    if said.get("OTEL_SDK_DISABLED") == "true" or said.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    endpoints = {name: said[name] for name in _ENDPOINTS if said.get(name)}
    for name, url in endpoints.items():
        if not url.startswith(("http://", "https://")):
            raise PipelineError(f"{name} must begin with http:// or https://")
    for name in _PROTOCOLS:
        if said.get(name, _SPOKEN) not in ("", _SPOKEN):
            raise PipelineError(f"{name}={said[name]} is not spoken here; set it to {_SPOKEN}")
    return bool(endpoints)


def _provider() -> "TracerProvider":
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise PipelineError(
            f"{' or '.join(_ENDPOINTS)} is set, but {error.name} is not installed: "
            "pip install '.[traces]', or OTEL_SDK_DISABLED=true"
        ) from error
    named = {"service.name": "pipeline", **OTELResourceDetector().detect().attributes}
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class Traces:
    """Where spans go; they are sent by a thread, and what cannot be sent is dropped."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("pipeline")
        self._wire = TraceContextTextMapPropagator()
        self._kinds = trace.SpanKind
        self._bad = trace.StatusCode.ERROR

    @contextlib.contextmanager
    def request(self, path: str, headers: Mapping[str, str]) -> Iterator["Trace"]:
        """A request's own span, in the client's trace if its headers name one."""
        told = {"http.request.method": "POST", "http.route": path}
        with self._tracer.start_as_current_span(
            f"POST {path}",
            self._wire.extract(headers),
            self._kinds.SERVER,
            told,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            trace = Trace(self, span)
            try:
                yield trace
            except RequestError as failure:
                trace.fail(failure.status, failure.error_type)
                raise
            except BaseException:  # the client has gone
                trace.fail(_HUNG_UP, "cancelled")
                raise

    @contextlib.contextmanager
    def step(self, name: str, is_asking: bool) -> Iterator["Span"]:
        """Below whatever is under way."""
        kind: SpanKind = self._kinds.CLIENT if is_asking else self._kinds.INTERNAL
        with self._tracer.start_as_current_span(
            name, kind=kind, record_exception=False, set_status_on_exception=False
        ) as span:
            headers = dict(onward_headers())
            if is_asking:
                self._wire.inject(headers)
            token = _onward.set(headers)
            try:
                yield span
            except BaseException as error:
                self.mark(span, getattr(error, "error_type", type(error).__name__))
                raise
            finally:
                _onward.reset(token)

    def mark(self, span: "Span", error_type: str) -> None:
        """It has failed. Why stands in no span: a message may quote the request."""
        span.set_attribute("error.type", error_type)
        span.set_status(self._bad)


class Trace:
    """Of one request."""

    def __init__(self, traces: Traces, span: "Span") -> None:
        self._traces = traces
        self._span = span

    def asked(self, operation: str, model: str, generation_id: str) -> None:
        """Once it is known what for: the catalogue's word for it, not the client's."""
        self._span.update_name(f"{operation} {model}")
        self._span.set_attributes(
            {
                "gen_ai.operation.name": operation,
                "gen_ai.request.model": model,
                "gen_ai.response.id": generation_id,
            }
        )

    def step(self, name: str, *, is_asking: bool = False) -> Step:
        """A part of what is under way; what is asked of others meanwhile belongs to it."""
        return self._traces.step(name, is_asking)

    def tell(self, generation: Generation, status: int) -> None:
        """That the reply has ended, and how."""
        self._span.set_attributes(
            {
                "gen_ai.provider.name": generation.provider,
                "gen_ai.response.model": generation.model,
                "gen_ai.request.stream": generation.streamed,
                "gen_ai.usage.input_tokens": generation.prompt_tokens,
                "gen_ai.usage.output_tokens": generation.completion_tokens,
                "gen_ai.usage.cache_read.input_tokens": generation.cached_tokens,
                "gen_ai.usage.reasoning.output_tokens": generation.reasoning_tokens,
                "http.response.status_code": status,
            }
        )
        if generation.finish_reason:
            self._span.set_attribute("gen_ai.response.finish_reasons", [generation.finish_reason])
        if generation.first_token_ms is not None:
            first_s = generation.first_token_ms / 1000
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", first_s)
        if generation.error_type or generation.cancelled:
            self.fail(status, generation.error_type or "cancelled")

    def fail(self, status: int, error_type: str) -> None:
        """The request has."""
        self._span.set_attribute("http.response.status_code", status)
        self._traces.mark(self._span, error_type)
