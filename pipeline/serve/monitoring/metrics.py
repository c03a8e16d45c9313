"""What /metrics tells, for Prometheus: the one place that names a metric of ours."""

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from pipeline.engine.protocol import Engine
from pipeline.engine.supervisor import Supervisor
from pipeline.errors import EngineError
from pipeline.serve.books.keys import Key
from pipeline.serve.books.ledger import Generation, Ledger
from pipeline.serve.monitoring.spread import BOUNDS_S, Spread
from pipeline.serve.offer.catalog import Catalog, Served

CONTENT_TYPE = CONTENT_TYPE_LATEST
_NOBODY = ""
"""The model of a request that was refused before one was found."""
_TOKENS = {
    "prompt": "prompt_tokens",
    "completion": "completion_tokens",
    "reasoning": "reasoning_tokens",
    "cached": "cached_tokens",
}
_LABELS = ("engine", "model")
Spreads = defaultdict[tuple[str, str], Spread]
"""By model and class of key."""


class Metrics:
    """What has been counted since the server began; no label holds a key or a client's word."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "pipeline_requests",
            "Requests for a reply, by the status that describes how they ended",
            ("model", "status", "key_class"),
            registry=self._registry,
        )
        self._tokens = Counter(
            "pipeline_tokens",
            "Tokens; reasoning is part of completion, cached part of prompt",
            ("model", "key_class", "kind"),
            registry=self._registry,
        )
        self._first_token: Spreads = defaultdict(Spread)
        self._between: Spreads = defaultdict(Spread)
        ProcessCollector(registry=self._registry)

    def refused(self, status: int, key: Key | None) -> None:
        """A request for which no reply was begun."""
        self._requests.labels(_NOBODY, status, _class_of(key)).inc()

    def replied(self, generation: Generation, status: int, gaps: Spread, key: Key | None) -> None:
        """A reply that has ended; `gaps` are between what it told."""
        model, key_class = generation.model, _class_of(key)
        self._requests.labels(model, status, key_class).inc()
        for kind, field in _TOKENS.items():
            self._tokens.labels(model, key_class, kind).inc(getattr(generation, field))
        if generation.first_token_ms is not None:
            self._first_token[model, key_class].add(generation.first_token_ms / 1000)
        self._between[model, key_class].merge(gaps)

    async def page(self, catalog: Catalog, ledger: Ledger | None) -> bytes:
        """All of it in Prometheus's text format, and how engines and ledger are at this moment."""
        served = {id(model.engine): model for model in reversed(catalog.models)}.values()
        theirs = await asyncio.gather(*(_ask(model) for model in served))
        return generate_latest(
            _Page(
                [
                    *self._registry.collect(),
                    _histogram(
                        "pipeline_time_to_first_token_seconds",
                        "From a request to the first word of its reply",
                        self._first_token,
                    ),
                    _histogram(
                        "pipeline_inter_token_seconds",
                        "Between two events of a reply, each of a token or of a few",
                        self._between,
                    ),
                    *_of_engines(
                        [(model, is_up) for model, (is_up, _) in zip(served, theirs, strict=True)]
                    ),
                    *(_of_ledger(ledger) if ledger else ()),
                    *_merged(
                        family
                        for model, (_, text) in zip(served, theirs, strict=True)
                        for family in _relabelled(text, model=model.slug)
                    ),
                ]
            )
        )


def of_processes(pages: Mapping[str, str]) -> bytes:
    """One page of several; the label `process` says whose each sample is."""
    return generate_latest(
        _Page(
            list(
                _merged(
                    family
                    for process, text in pages.items()
                    for family in _relabelled(text, process=process)
                )
            )
        )
    )


def _class_of(key: Key | None) -> str:
    """The priority of a request's key; who it is never stands in a metric."""
    return "none" if key is None else key.priority or "normal"


@dataclass(frozen=True)
class _Page(Collector):
    families: Sequence[Metric]

    def collect(self) -> Iterable[Metric]:
        return self.families


def _histogram(name: str, what: str, spreads: Spreads) -> Metric:
    family = HistogramMetricFamily(name, what, labels=("model", "key_class"))
    bounds = [*map(str, BOUNDS_S), "+Inf"]
    for labels, spread in spreads.items():
        counts = itertools.accumulate(spread.counts)
        family.add_metric(labels, list(zip(bounds, counts, strict=True)), spread.sum_s)
    return family


def _of_engines(models: Sequence[tuple[Served, bool]]) -> Iterator[Metric]:
    """Of each, under the name of the first model that it makes."""
    up = GaugeMetricFamily("pipeline_engine_up", "Whether it answers", labels=_LABELS)
    restarts = CounterMetricFamily(
        "pipeline_engine_restarts", "How often it died and was started again", labels=_LABELS
    )
    replies = GaugeMetricFamily(
        "pipeline_open_replies", "Being made at this moment", labels=_LABELS
    )
    queue = GaugeMetricFamily(
        "pipeline_queued_replies", "Waiting for the engine to have room", labels=_LABELS
    )
    for model, is_up in models:
        labels, door = (model.engine_name, model.slug), model.door
        up.add_metric(labels, is_up)
        restarts.add_metric(labels, getattr(model.engine, "num_restarts", 0))
        replies.add_metric(labels, door.num_inside - door.num_waiting)
        queue.add_metric(labels, door.num_waiting)
    yield from (up, restarts, replies, queue)


def _of_ledger(ledger: Ledger) -> Iterator[Metric]:
    state = ledger.state
    for name, what, value in (
        ("waiting", "Rows that are not committed yet", state.num_waiting),
        ("spooled", "Rows kept in a file, as the books cannot be written", state.num_spooled),
        ("spooled_oldest_seconds", "How long the oldest of those is kept", state.spooled_s),
        ("commit_seconds", "How long the last commit took", state.commit_s),
        ("last_commit_timestamp_seconds", "When it was; 0 for none yet", state.committed_s),
        ("ready", "Whether rows can be kept safely", state.is_ready),
    ):
        yield GaugeMetricFamily(f"pipeline_ledger_{name}", what, value=value)


async def _ask(model: Served) -> tuple[bool, str]:
    """Whether its engine answers, and what one of ours says of itself."""
    return await model.engine.is_healthy(), await _own_metrics(model.engine)


async def _own_metrics(engine: Engine) -> str:
    """Engines elsewhere have a page of their own that somebody reads."""
    if not isinstance(engine, Supervisor):
        return ""
    try:
        return await engine.metrics()
    except EngineError:
        return ""


def _relabelled(text: str, **labels: str) -> Iterator[Metric]:
    for family in text_string_to_metric_families(text):
        family.samples = [
            sample._replace(labels={**sample.labels, **labels}) for sample in family.samples
        ]
        yield family


def _merged(families: Iterable[Metric]) -> Iterable[Metric]:
    """A name may stand on the page once, with the samples of every engine."""
    by_name: dict[str, Metric] = {}
    for family in families:
        if known := by_name.get(family.name):
            known.samples += family.samples
        else:
            by_name[family.name] = family
    return by_name.values()
