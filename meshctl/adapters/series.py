"""Which series make which Signal: the one table behind every source of signals.

A `Formula` says how one number is made of series; `promql` writes it for Prometheus, `evaluate` computes it from
scraped pages, and `assemble` joins the results to routes and endpoints. Invariants: a Signal is finite and believable,
or it is one of no-traffic (0/0), absent (no such series) or the Signal before it (the source could not be asked, or
said nonsense). What a source failed to say is never read as 0.

One size class has several names: that of our own cluster, and those that Istio gives its clusters and services.
`NAMINGS` reads them all, the same way in both sources; what is counted under several (of a route that both data planes
serve, or that changes its mechanism) is added up.

Rejected: fetching raw samples from Prometheus and computing rates here for both sources (with many proxies a poll would
move megabytes that Prometheus sums for us); formulas written out twice, in PromQL and in Python (they drift apart).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, fields

from istio.names import DOMAIN, size_host, sizes_host, subsets_host
from meshctl.model import (
    DEFAULT_CLASS,
    DesiredRoute,
    Endpoint,
    EndpointId,
    EndpointSignals,
    Problem,
    RouteId,
    RouteSignals,
    RouteSpec,
    Signal,
    cluster_name,
)

Subject = tuple[str, ...]
"""Values of a family's labels, in its order: what one number is about."""

SIZE, ROUTE = "size", "route"
"""No labels of any exporter: a size class, and a route with its size classes summed, as `NAMINGS` reads them."""

_ISTIO = "(?:outbound[|][0-9]+[|][^|]*[|])?"
_SIZES, _SUBSETS = (f"[^/|;]+[.]{kind}[.]{DOMAIN.replace('.', '[.]')}" for kind in ("sizes", "subsets"))
NAMINGS: Mapping[str, str] = {
    # Of a cluster's or service's whole name, the groups one after the other are the subject. Ours are NS/ROUTE/SIZE;
    # Istio's are outbound|PORT|SUBSET|HOST or HOST, with a ";" behind it in what Envoy counts per endpoint. The same
    # text is read by RE2, in PromQL (so no backslashes), and by re.
    SIZE: f"([^/]+/[^/]+/[^/]+)|{_ISTIO}({_SIZES}|{_SUBSETS});?",
    ROUTE: f"([^/]+/[^/]+)/[^/]+|{_ISTIO}(?:[^./|;]+[.]({_SIZES})|({_SUBSETS}));?",
}
_NAMING = {label: re.compile(text) for label, text in NAMINGS.items()}


def subject_of(label: str, name: str) -> str:
    """What a cluster's or service's name says of `label`, one of `NAMINGS`; "" when it is none of ours."""
    match = _NAMING[label].fullmatch(name)
    return "".join(group or "" for group in match.groups()) if match else ""


# eq=False: both are keys that are looked up for every endpoint; identity hashes at once, nested strings do not.
@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """Series of one exporter that are joined by the same labels."""

    by: tuple[str, ...]
    stamp: str
    """The series whose sample time is the time of the whole family."""
    named_by: tuple[str, ...] = ()
    """Labels that may hold the name which `NAMINGS` reads; the first of `by` is then one of those."""
    matcher: str = ""
    """PromQL matcher that leaves out what is counted elsewhere too."""
    keep_max: bool = False
    """Of several series with one subject, the largest counts (a GPU seen by two exporters); otherwise their sum."""


TRITON = Family(("instance", "model"), "nv_inference_request_success")
TRITON_GPU = Family(("instance",), "nv_gpu_utilization", keep_max=True)
VLLM = Family(("instance", "model_name"), "vllm:num_requests_running")
DCGM_PROFILING = Family(("UUID",), "DCGM_FI_PROF_GR_ENGINE_ACTIVE", keep_max=True)
DCGM_DEVICE = Family(("UUID",), "DCGM_FI_DEV_GPU_UTIL", keep_max=True)
# Envoy's own tag, and the one that Istio's bootstrap puts in its place; per endpoint it is always Envoy's own.
CLUSTER = Family((SIZE,), "envoy_cluster_upstream_rq_total", ("envoy_cluster_name", "cluster_name"))
BALANCED = Family((SIZE,), "envoy_cluster_endpoint_rq_total", ("envoy_cluster_name",))
MESH = Family((SIZE,), "istio_requests_total", ("destination_service",), 'reporter="source"')
PROXIED = Family((ROUTE, "envoy_endpoint_address"), "envoy_cluster_endpoint_rq_active", ("envoy_cluster_name",))


@dataclass(frozen=True, slots=True, eq=False)
class Formula:
    """``scale * sum(plus) * times / over``, of rates per second (counters) or of values (gauges)."""

    family: Family
    plus: tuple[str, ...]
    times: str | None = None
    over: str | None = None
    scale: float = 1.0
    rate: bool = True
    most: float = 1e8
    """A larger result is not believed; more requests per second than any fleet's."""
    per_server: bool = False
    """Divided by the endpoint's concurrency, and 1 at most: time is credited when a request ends, so that a short
    window may hold more of it than has passed."""

    @property
    def terms(self) -> tuple[str, ...]:
        return (*self.plus, *(name for name in (self.times, self.over) if name))


_DAY_S = 86_400.0
_TRITON_COMPUTE = (
    "nv_inference_compute_input_duration_us",
    "nv_inference_compute_infer_duration_us",
    "nv_inference_compute_output_duration_us",
)
_SUCCESS = "nv_inference_request_success"
_RQ_SUCCESS, _RQ_ERROR = "envoy_cluster_endpoint_rq_success", "envoy_cluster_endpoint_rq_error"

ARRIVALS: tuple[Formula, ...] = (
    # Istio's proxies keep the first to themselves unless told otherwise, and have the second with an EnvoyFilter; both
    # count what begins, again when it is tried again. Istio's standard metric is always there, and counts what ends.
    Formula(CLUSTER, ("envoy_cluster_upstream_rq_total",)),
    Formula(BALANCED, ("envoy_cluster_endpoint_rq_total",)),
    Formula(MESH, ("istio_requests_total",)),
)

ENDPOINT_FORMULAS: Mapping[str, tuple[Formula, ...]] = {
    # By field of EndpointSignals; the first formula whose series exist wins. DCGM's sentinels (2**31 - 16 and the like)
    # mean "not supported" and fall to the next. Triton's own utilisation stands in where there is no DCGM.
    "gpu_utilization_ratio": (
        Formula(DCGM_PROFILING, ("DCGM_FI_PROF_GR_ENGINE_ACTIVE",), rate=False, most=1.0),
        Formula(DCGM_DEVICE, ("DCGM_FI_DEV_GPU_UTIL",), rate=False, scale=0.01, most=1.0),
        Formula(TRITON_GPU, ("nv_gpu_utilization",), rate=False, most=1.0),
    ),
    # Each request of a dynamic batch is credited the whole batch's time: divided by requests per execution.
    "busy_ratio": (
        Formula(TRITON, (_TRITON_COMPUTE[1],), "nv_inference_exec_count", _SUCCESS, scale=1e-6, per_server=True),
    ),
    "service_s": (
        Formula(TRITON, _TRITON_COMPUTE, over=_SUCCESS, scale=1e-6, most=_DAY_S),
        Formula(
            VLLM,
            ("vllm:request_inference_time_seconds_sum",),
            over="vllm:request_inference_time_seconds_count",
            most=_DAY_S,
        ),
    ),
    "batch": (Formula(TRITON, ("nv_inference_count",), over=_SUCCESS, most=1e6),),
    "queue_s": (
        Formula(TRITON, ("nv_inference_queue_duration_us",), over=_SUCCESS, scale=1e-6, most=_DAY_S),
        Formula(
            VLLM, ("vllm:request_queue_time_seconds_sum",), over="vllm:request_queue_time_seconds_count", most=_DAY_S
        ),
    ),
    "pending": (
        Formula(TRITON, ("nv_inference_pending_request_count",), rate=False),
        Formula(VLLM, ("vllm:num_requests_waiting", "vllm:num_requests_running"), rate=False),
    ),
    "completed_rps": (Formula(TRITON, (_SUCCESS,)), Formula(VLLM, ("vllm:request_success_total",))),
    "failed_rps": (Formula(TRITON, ("nv_inference_request_failure",)),),
    # Envoy's rq_total leaves out connections refused, so the ends are counted, not the starts.
    "proxy_rps": (Formula(PROXIED, (_RQ_SUCCESS, _RQ_ERROR)),),
    "proxy_failed_rps": (Formula(PROXIED, (_RQ_ERROR,)),),
    "proxy_active": (Formula(PROXIED, ("envoy_cluster_endpoint_rq_active",), rate=False),),
}
FORMULAS: tuple[Formula, ...] = (*ARRIVALS, *(f for formulas in ENDPOINT_FORMULAS.values() for f in formulas))
FAMILIES: tuple[Family, ...] = tuple(dict.fromkeys(f.family for f in FORMULAS))
PROXY_SERIES: frozenset[str] = frozenset(
    n for f in FORMULAS if f.family in (CLUSTER, BALANCED, PROXIED) for n in f.terms
)
SERVER_SERIES: frozenset[str] = frozenset(n for f in FORMULAS if not f.family.named_by for n in f.terms)
COUNTERS: frozenset[str] = frozenset(n for f in FORMULAS if f.rate for n in f.terms)

assert set(ENDPOINT_FORMULAS) == {f.name for f in fields(EndpointSignals)}  # noqa: S101 (a field without a source)


# -------------------------------------------------------------------------------------------------------- as PromQL


def _selected(family: Family, name: str, of: Callable[[str], str]) -> str:
    """`of` the series `name` by the family's labels, those of them that are ours."""
    vector = of(name)
    if family.named_by:
        label = family.by[0]
        text, whole = NAMINGS[label], "".join(f"${i + 1}" for i in range(_NAMING[label].groups))
        extra = f", {family.matcher}" if family.matcher else ""
        selected = ((named, of(f'{name}{{{named}=~"{text}"{extra}}}')) for named in family.named_by)
        vector = " or ".join(f'label_replace({v}, "{label}", "{whole}", "{named}", "{text}")' for named, v in selected)
    return f"by ({', '.join(family.by)}) ({vector})"


def promql(formula: Formula, window_s: float) -> str:
    """One query for the whole fleet; rates over the last `window_s`."""

    def value(series: str) -> str:
        return f"rate({series}[{round(window_s * 1000)}ms])" if formula.rate else series

    def term(name: str) -> str:
        return f"{'max' if formula.family.keep_max else 'sum'} {_selected(formula.family, name, value)}"

    query = " + ".join(map(term, formula.plus))
    if len(formula.plus) > 1:
        query = f"({query})"
    if formula.times:
        query = f"{query} * {term(formula.times)}"
    if formula.over:
        query = f"{query} / {term(formula.over)}"
    return query if formula.scale == 1.0 else f"{formula.scale!r} * {query}"


def promql_stamp(family: Family) -> str:
    """The query for the time (Unix seconds) of each subject's oldest newest sample."""
    return f"min {_selected(family, family.stamp, 'timestamp({})'.format)}"


# ---------------------------------------------------------------------------------------------------- from readings


@dataclass(frozen=True, slots=True)
class Reading:
    """The sum of one series' samples about one subject: a rate or a value, true at `at_s`."""

    value: float
    at_s: float


@dataclass(slots=True)
class Measured:
    """What one poll found, formula by formula."""

    values: dict[Formula, dict[Subject, Signal | None]] = field(default_factory=dict)
    """A formula that could not be asked is missing; None stands for a value that is not believed."""
    dark: frozenset[str] = frozenset()
    """Instances that the source could not reach itself."""
    unbelievable: dict[Formula, list[tuple[Subject, float]]] = field(default_factory=dict)

    def add(self, formula: Formula, subject: Subject, value: float, at_s: float) -> None:
        """Take one result in. NaN is no traffic where the formula is a ratio (0/0), and nonsense anywhere else."""
        signal: Signal | None = None
        if math.isnan(value) and formula.over:
            signal = Signal.no_traffic(at_s)
        elif 0.0 <= value <= formula.most:
            signal = Signal(value, at_s)
        else:
            self.unbelievable.setdefault(formula, []).append((subject, value))
        self.values.setdefault(formula, {})[subject] = signal

    def telling(self, formulas: Iterable[Formula]) -> tuple[Formula, ...]:
        """Those that may say something of some subject: an exporter that nobody runs is not looked for 10,000 times."""
        return tuple(f for f in formulas if self.dark or f not in self.values or self.values[f])

    def problems(self, where: str) -> tuple[Problem, ...]:
        """One Problem per formula, however many values were dropped."""
        return tuple(
            Problem(where, _unbelievable(formula, dropped))
            for formula in FORMULAS
            if (dropped := self.unbelievable.get(formula))
        )


def _unbelievable(formula: Formula, dropped: list[tuple[Subject, float]]) -> str:
    subject, value = min(dropped, key=lambda pair: pair[0])
    labels = ", ".join(f'{name}="{v}"' for name, v in zip(formula.family.by, subject, strict=True))
    return (
        f"dropped {len(dropped)} value(s) made of {' and '.join(formula.terms)}: {value:g} for {labels} is not in "
        f"0..{formula.most:g}; look at that exporter"
    )


def evaluate(formula: Formula, read: Callable[[str], Mapping[Subject, Reading]], into: Measured) -> None:
    """Compute `formula` for every subject that has all its series; `read` gives a series' Readings by subject."""
    plus = [read(name) for name in formula.plus]
    times = read(formula.times) if formula.times else None
    over = read(formula.over) if formula.over else None
    into.values[formula] = {}
    for subject in plus[0]:
        parts = [readings.get(subject) for readings in (*plus, *(r for r in (times, over) if r is not None))]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            continue
        value = formula.scale * sum(part.value for part in known[: len(plus)])
        value *= times[subject].value if times is not None else 1.0
        if over is not None:
            value = _ratio(value, over[subject].value)
        if not all(math.isfinite(part.value) for part in known):
            value = math.inf  # nonsense in, however it would come out (x / infinity is 0)
        into.add(formula, subject, value, min(part.at_s for part in known))


def _ratio(above: float, below: float) -> float:
    """As Prometheus divides: 0/0 is NaN, x/0 is infinite."""
    if below:
        return above / below
    return math.nan if above == 0 else math.copysign(math.inf, above)


# -------------------------------------------------------------------------------------------------------- to routes


def assemble(
    routes: Mapping[RouteId, DesiredRoute], measured: Measured, last: Mapping[RouteId, RouteSignals]
) -> dict[RouteId, RouteSignals]:
    """The Signals of every route: what was measured, else what was known before, else absent.

    Where nothing else is known than before, they are the SAME object: a decision on it is not made again.
    """
    none = RouteSignals()
    proxied = {subject[0] for f in FORMULAS if f.family is PROXIED for subject in measured.values.get(f, ())}
    asked = {name: measured.telling(formulas) for name, formulas in ENDPOINT_FORMULAS.items()}
    return {
        route_id: _of_route(route, _names(route.spec, proxied), measured, asked, last.get(route_id, none))
        for route_id, route in routes.items()
    }


def _of_route(
    route: DesiredRoute,
    names: tuple[str, ...],
    measured: Measured,
    asked: Mapping[str, tuple[Formula, ...]],
    last: RouteSignals,
) -> RouteSignals:
    none = EndpointSignals()
    endpoints: dict[EndpointId, EndpointSignals] = {
        e.id: _of_endpoint(route, e, names, measured, asked, last.endpoints.get(e.id, none)) for e in route.endpoints
    }
    found = RouteSignals(_arrivals(route.spec, measured, last.arrivals_rps), endpoints)
    return last if found == last else found


def _arrivals(spec: RouteSpec, measured: Measured, last: Mapping[str, Signal]) -> dict[str, Signal]:
    """By size class. With mechanism Subsets the proxies know no sizes: the sum is split as the sizes are declared."""
    every = _pick(ARRIVALS, {SIZE: subsets_host(spec.id)}, 1, measured) if spec.meshed else Signal.ABSENT
    found = {}
    for size, share in (*((c.name, c.share) for c in spec.sizes), (DEFAULT_CLASS, 0.0)):
        names = [cluster_name(spec.id, size), *([size_host(spec.id, size)] if spec.meshed else [])]
        parts = [_pick(ARRIVALS, {SIZE: name}, 1, measured) for name in names]
        split = every if every is None or every.value is None else Signal(share * every.value, every.at_s)
        total = _total([*parts, split])
        found[size] = last.get(size, Signal.ABSENT) if total is None else total
    return found


def _names(spec: RouteSpec, proxied: Container[str]) -> tuple[str, ...]:
    """What `NAMINGS` calls a route: our own name, and those of Istio's that are among the `proxied`."""
    istios = (sizes_host(spec.id).removeprefix("*."), subsets_host(spec.id)) if spec.meshed else ()
    ours = subject_of(ROUTE, cluster_name(spec.id, DEFAULT_CLASS))
    return (ours, *(name for name in istios if name in proxied))


def _of_endpoint(
    route: DesiredRoute,
    endpoint: Endpoint,
    names: tuple[str, ...],
    measured: Measured,
    asked: Mapping[str, tuple[Formula, ...]],
    last: EndpointSignals,
) -> EndpointSignals:
    host = f"[{endpoint.address}]" if ":" in endpoint.address else endpoint.address
    labels = {
        "instance": endpoint.metrics,
        "model": route.spec.model,
        "model_name": route.spec.model,
        "UUID": endpoint.gpu_uuid,
        "envoy_endpoint_address": f"{host}:{endpoint.port}",
        ROUTE: names[0],
    }
    others = [{**labels, ROUTE: name} for name in names[1:]]
    found: dict[str, Signal] = {}
    for name, formulas in asked.items():
        if not formulas:
            continue
        signal = _pick(formulas, labels, endpoint.concurrency, measured)
        if others and formulas[0].family is PROXIED:
            signal = _total([signal, *(_pick(formulas, each, endpoint.concurrency, measured) for each in others)])
        found[name] = getattr(last, name) if signal is None else signal
    return EndpointSignals(**found)


def _pick(
    formulas: Iterable[Formula], labels: Mapping[str, str], concurrency: int, measured: Measured
) -> Signal | None:
    """The first formula that has an answer; None when one could not be asked or was not believed."""
    otherwise: Signal | None = Signal.ABSENT
    for formula in formulas:
        subject = tuple(labels[name] for name in formula.family.by)
        if not all(subject):
            continue  # a label this endpoint does not have (no GPU UUID, no metrics address)
        found = measured.values.get(formula)
        if found is None or ("instance" in formula.family.by and labels["instance"] in measured.dark):
            otherwise = None
            continue
        signal = found.get(subject, Signal.ABSENT)
        if signal is None:
            otherwise = None
        elif signal is not Signal.ABSENT:
            return _per_server(signal, concurrency) if formula.per_server else signal
    return otherwise


def _total(parts: Iterable[Signal | None]) -> Signal | None:
    """Of what is counted under several names: the sum of those that are there; None when one could not be had."""
    there = [part for part in parts if part is not Signal.ABSENT]
    if len(there) < 2:  # nearly always
        return there[0] if there else Signal.ABSENT
    known = [part for part in there if part is not None and part.value is not None and part.at_s is not None]
    if len(known) < len(there):
        return None
    return Signal(sum(part.value or 0.0 for part in known), min(part.at_s or 0.0 for part in known))


def _per_server(signal: Signal, concurrency: int) -> Signal:
    return signal if signal.value is None else Signal(min(1.0, signal.value / concurrency), signal.at_s)
