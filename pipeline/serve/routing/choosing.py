"""Which endpoints a client lets answer, and in which order."""

import math
from collections.abc import Callable, Mapping, Sequence

from pipeline.errors import Availability, RequestError
from pipeline.serve.asking.preferences import MaxPrice, Preferences, Sort
from pipeline.serve.offer.price import PICODOLLARS
from pipeline.serve.routing.endpoint import Endpoint
from pipeline.serve.routing.speed import is_too_slow, latency, slowness

_MILLION = 10**6


def choose(
    endpoints: Sequence[Endpoint], wanted: Preferences, present: frozenset[str]
) -> list[Endpoint]:
    """Those that may answer, best first; `present` are the parameters that the request has.

    RequestError 404 if none may, with the first reason that left none.
    """
    left = list(endpoints)
    for may, refusal in _filters(wanted, present):
        kept = [endpoint for endpoint in left if may(endpoint)]
        if not kept:
            raise refusal(left)
        left = kept
    return _ordered(left, wanted)


Refusal = Callable[[Sequence[Endpoint]], RequestError]


def _filters(
    wanted: Preferences, present: frozenset[str]
) -> list[tuple[Callable[[Endpoint], bool], Refusal]]:
    """Each with what is said if it leaves nothing."""
    only, ignored, order = wanted.only, wanted.ignore or [], wanted.order or []
    found: list[tuple[Callable[[Endpoint], bool], Refusal]] = []
    if only is not None:
        found.append((lambda e: _is_one_of(e, only), lambda left: _not_allowed(left, only)))
    found.append((lambda e: not _is_one_of(e, ignored), _ignores_all))
    if order and wanted.allow_fallbacks is False:
        found.append((lambda e: _is_one_of(e, order), lambda left: _not_allowed(left, order)))
    if wanted.zdr:
        found.append((lambda e: e.keeps_nothing, _private("data_policy:zdr")))
    if wanted.data_collection == "deny":
        found.append((lambda e: e.keeps_nothing, _private("data_policy:training")))
    if wanted.quantizations:
        asked = frozenset(wanted.quantizations)
        found.append(
            (lambda e: (e.quantization or "unknown") in asked, _constrained("quantization"))
        )
    if (most := wanted.max_price) is not None:
        found.append((lambda e: _is_affordable(e, most), _constrained("max_price")))
    if wanted.require_parameters:
        found.append((lambda e: present <= e.parameters, _constrained("require_parameters")))
    return found


def _is_one_of(endpoint: Endpoint, words: Sequence[str]) -> bool:
    """By the whole tag, or by the provider's slug, which is the tag's beginning."""
    tag = endpoint.tag.lower()
    return any(word.lower() in (tag, tag.partition("/")[0]) for word in words)


def _is_affordable(endpoint: Endpoint, most: MaxPrice) -> bool:
    price = endpoint.price
    if price is None:  # nobody could promise it
        return all(bound is None for bound in (most.prompt, most.completion, most.request))
    bounds = (
        (price.prompt * _MILLION, most.prompt),
        (price.completion * _MILLION, most.completion),
        (price.request, most.request),
    )
    return all(bound is None or asked <= bound * PICODOLLARS for asked, bound in bounds)


def _ordered(endpoints: Sequence[Endpoint], wanted: Preferences) -> list[Endpoint]:
    """As the client orders them, else by price or speed; the rest stay as they are."""
    order = [word.lower() for word in wanted.order or ()]

    def place(endpoint: Endpoint) -> int:
        places = (i for i, word in enumerate(order) if _is_one_of(endpoint, [word]))
        return next(places, len(order))

    by = _SORTS.get(wanted.sorted_by or "exacto")

    def rank(endpoint: Endpoint) -> tuple[bool, float]:
        return is_too_slow(endpoint, wanted), by(endpoint) if by else 0

    # Of one endpoint nothing is read from the ledger.
    return sorted(endpoints, key=place if order or len(endpoints) == 1 else rank)


def _dollars(endpoint: Endpoint) -> float:
    price = endpoint.price
    return math.inf if price is None else price.prompt + price.completion


_SORTS: Mapping[Sort, Callable[[Endpoint], float]] = {
    "price": _dollars,
    "latency": latency,
    "throughput": slowness,
}


def _not_allowed(left: Sequence[Endpoint], only: Sequence[str]) -> RequestError:
    model, serving = left[0].served.slug, ", ".join(endpoint.tag for endpoint in left)
    return RequestError(
        "No allowed providers are available for the selected model. Providers serving "
        f"{model}: {serving}, but your request's provider preferences permit only: "
        f"{', '.join(only) or 'none'}.",
        404,
        "not_found",
        availability=Availability("no_endpoints", excluded_by=("allowed_providers",)),
    )


def _ignores_all(left: Sequence[Endpoint]) -> RequestError:
    return RequestError(
        f"All providers of {left[0].served.slug} are ignored by your request's provider.ignore.",
        404,
        "not_found",
        availability=Availability("no_endpoints", excluded_by=("allowed_providers",)),
    )


def _private(reason: str) -> Refusal:
    def refuse(left: Sequence[Endpoint]) -> RequestError:
        what = f"No endpoints found for {left[0].served.slug} that match your data policy."
        availability = Availability("privacy_restricted", excluded_by=(reason,))
        return RequestError(what, 404, "not_found", availability=availability)

    return refuse


def _constrained(reason: str) -> Refusal:
    def refuse(left: Sequence[Endpoint]) -> RequestError:
        what = f"No endpoints found for {left[0].served.slug} within provider.{reason}."
        if reason == "require_parameters":
            what = "No endpoints found that can handle the requested parameters."
        availability = Availability("constraint_filtered", excluded_by=(reason,))
        return RequestError(what, 404, "not_found", availability=availability)

    return refuse
