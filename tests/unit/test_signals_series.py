"""Which series make which Signal, without any source."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from istio.names import size_host, sizes_host, subsets_host
from meshctl.adapters import series
from meshctl.adapters.series import ARRIVALS, ENDPOINT_FORMULAS, FORMULAS, Formula, Measured, Reading, Subject
from meshctl.model import DEFAULT_CLASS, DesiredRoute, EndpointId, EndpointSignals, RouteId, RouteSignals, Signal
from tests.harness.pages import route, server

NOW_S = 100.0
DOCS = Path(__file__).parents[2] / "docs" / "reference" / "signals.md"


def formula(signal: str, rank: int = 0) -> Formula:
    return ENDPOINT_FORMULAS[signal][rank]


def computed(of: Formula, **values: float) -> Measured:
    """`of` for the subject ("s",) from values by series name."""
    measured = Measured()

    def read(name: str) -> Mapping[Subject, Reading]:
        return {("s",): Reading(values[name], NOW_S)} if name in values else {}

    series.evaluate(of, read, measured)
    return measured


def measured_of(values: Mapping[Formula, Mapping[Subject, Signal | None]]) -> Measured:
    """Every formula was asked; those not in `values` have no series."""
    measured = Measured()
    for known in FORMULAS:
        measured.values[known] = dict(values.get(known, {}))
    return measured


def one(measured: Measured, last: EndpointSignals | None = None, **endpoint: Any) -> EndpointSignals:
    """What an endpoint at 127.0.0.1:8000 with metrics at m:8002 gets."""
    of = route(server("m:8002", **endpoint))
    before = {} if last is None else {of.spec.id: RouteSignals({}, {EndpointId("127.0.0.1:8000"): last})}
    return series.assemble({of.spec.id: of}, measured, before)[of.spec.id].endpoints[EndpointId("127.0.0.1:8000")]


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (
            formula("queue_s"),
            (
                "1e-06 * sum by (instance, model) (rate(nv_inference_queue_duration_us[2500ms]))"
                " / sum by (instance, model) (rate(nv_inference_request_success[2500ms]))"
            ),
        ),
        (formula("pending"), "sum by (instance, model) (nv_inference_pending_request_count)"),
        (formula("gpu_utilization_ratio", 1), "0.01 * max by (UUID) (DCGM_FI_DEV_GPU_UTIL)"),
        (
            ARRIVALS[1],
            (
                'sum by (size) (label_replace(rate(envoy_cluster_endpoint_rq_total{envoy_cluster_name=~"SIZE"}'
                '[2500ms]), "size", "$1$2", "envoy_cluster_name", "SIZE"))'
            ),
        ),
        (
            ARRIVALS[2],
            (
                'sum by (size) (label_replace(rate(istio_requests_total{destination_service=~"SIZE", reporter="source"}'
                '[2500ms]), "size", "$1$2", "destination_service", "SIZE"))'
            ),
        ),
        (
            formula("proxy_active"),
            (
                "sum by (route, envoy_endpoint_address) (label_replace(envoy_cluster_endpoint_rq_active"
                '{envoy_cluster_name=~"ROUTE"}, "route", "$1$2$3", "envoy_cluster_name", "ROUTE"))'
            ),
        ),
        (
            formula("pending", 1),
            (
                "(sum by (instance, model_name) (vllm:num_requests_waiting)"
                " + sum by (instance, model_name) (vllm:num_requests_running))"
            ),
        ),
    ],
)
def test_one_query_is_for_the_whole_fleet(of: Formula, expected: str) -> None:
    """A formula is one PromQL query that names no endpoint."""
    for label, text in series.NAMINGS.items():
        expected = expected.replace(f'"{label.upper()}"', f'"{text}"')
    assert series.promql(of, 2.5) == expected


def test_a_counter_that_is_tagged_in_two_ways_is_summed() -> None:
    """Envoy's own tag and Istio's: what has either is ours, and nothing is asked twice."""
    ours, _, istios = series.promql(ARRIVALS[0], 2.5).removeprefix("sum by (size) ").partition(" or ")
    assert '"envoy_cluster_name"' in ours
    assert istios == ours.removeprefix("(").replace("envoy_cluster_name", "cluster_name") + ")"
    assert "\\" not in ours, "a backslash would need another one in PromQL"


def test_every_signal_has_a_source() -> None:
    """The table has a row for each field of EndpointSignals, and no other."""
    assert set(ENDPOINT_FORMULAS) == {f.name for f in fields(EndpointSignals)}


def test_every_series_is_documented() -> None:
    """docs/reference/signals.md names every series that is read, and every signal."""
    text = DOCS.read_text()
    wanted = {name for of in FORMULAS for name in of.terms} | set(ENDPOINT_FORMULAS) | {"arrivals_rps"}
    assert sorted(name for name in wanted if f"`{name}`" not in text) == []


def test_busy_divides_by_requests_per_execution() -> None:
    """Ten requests in five executions, each credited its execution's 0.1 s: busy 0.5 s per second, not 1."""
    measured = computed(
        formula("busy_ratio"),
        nv_inference_compute_infer_duration_us=1e6,
        nv_inference_exec_count=5.0,
        nv_inference_request_success=10.0,
    )
    assert measured.values[formula("busy_ratio")] == {("s",): Signal(0.5, NOW_S)}


@pytest.mark.parametrize(
    ("queue_us", "requests", "expected"),
    [
        (4e6, 2.0, Signal(2.0, NOW_S)),
        (0.0, 2.0, Signal(0.0, NOW_S)),
        (0.0, 0.0, Signal.no_traffic(NOW_S)),
        (4e6, 0.0, None),
        (math.inf, 2.0, None),
        (0.0, math.inf, None),
        (-1.0, 2.0, None),
        (math.nan, 2.0, None),
        (1e18, 1.0, None),
    ],
)
def test_a_ratio_is_a_value_no_traffic_or_not_believed(
    queue_us: float, requests: float, expected: Signal | None
) -> None:
    """0/0 is no traffic; x/0, infinite, negative, NaN and absurd results are dropped."""
    of = formula("queue_s")
    measured = computed(of, nv_inference_queue_duration_us=queue_us, nv_inference_request_success=requests)
    assert measured.values[of] == {("s",): expected}
    assert (of in measured.unbelievable) == (expected is None)


def test_a_formula_needs_all_its_series() -> None:
    """A series that is missing is not read as 0."""
    measured = computed(formula("queue_s"), nv_inference_queue_duration_us=1.0)
    assert measured.values[formula("queue_s")] == {}
    assert measured.problems("here") == ()


def test_dropped_values_are_one_problem_per_formula() -> None:
    """A thousand bad values make one Problem, which names the first by order and counts the rest."""
    measured = Measured()
    for i in reversed(range(1000)):
        measured.add(formula("pending"), (f"m{i:03d}", "resnet50"), -1.0, NOW_S)
    (problem,) = measured.problems("http://prometheus")
    assert problem.where == "http://prometheus"
    assert "1000 value(s)" in problem.message
    assert 'instance="m000", model="resnet50"' in problem.message


@pytest.mark.parametrize(
    ("profiling", "device", "triton", "expected"),
    [
        (0.4, 50.0, 0.6, 0.4),
        (140737488355328.0, 50.0, 0.6, 0.5),  # DCGM's blank of a real number
        (None, 2147483632.0, 0.6, 0.6),  # DCGM's blank of an integer
        (None, None, 0.6, 0.6),
        (None, None, None, None),
    ],
)
def test_gpu_utilization_takes_the_best_source_that_speaks(
    profiling: float | None, device: float | None, triton: float | None, expected: float | None
) -> None:
    """DCGM's profiling counter, else its device gauge, else Triton's own; sentinels count as silence."""
    measured = measured_of({})
    for of, subject, value in zip(
        ENDPOINT_FORMULAS["gpu_utilization_ratio"],
        [("GPU-1",), ("GPU-1",), ("m:8002",)],
        (profiling, device, triton),
        strict=True,
    ):
        if value is not None:
            measured.add(of, subject, of.scale * value, NOW_S)
    signal = one(measured, gpu_uuid="GPU-1").gpu_utilization_ratio
    assert signal == (Signal.ABSENT if expected is None else Signal(expected, NOW_S))


def test_an_endpoint_without_a_uuid_joins_no_gpu() -> None:
    """An unknown UUID is not the UUID ""."""
    of = formula("gpu_utilization_ratio")
    assert one(measured_of({of: {("",): Signal(0.9, NOW_S)}})).gpu_utilization_ratio is Signal.ABSENT


@pytest.mark.parametrize(("busy", "concurrency", "expected"), [(0.8, 1, 0.8), (0.8, 2, 0.4), (3.0, 2, 1.0)])
def test_busy_is_per_server_and_at_most_one(busy: float, concurrency: int, expected: float) -> None:
    """Two instances behind one address are busy half as much; time credited late does not make a share above 1."""
    measured = measured_of({formula("busy_ratio"): {("m:8002", "resnet50"): Signal(busy, NOW_S)}})
    assert one(measured, concurrency=concurrency).busy_ratio == Signal(expected, NOW_S)


def test_what_could_not_be_asked_stays_and_ages() -> None:
    """A failed query, an instance that the source cannot reach and a nonsense value all leave the last Signal."""
    last = EndpointSignals(pending=Signal(7.0, 50.0), proxy_rps=Signal(3.0, 50.0), service_s=Signal(0.1, 50.0))
    failed = measured_of({})
    del failed.values[formula("pending")], failed.values[formula("pending", 1)]
    dark = measured_of({})
    dark.dark = frozenset({"m:8002"})
    nonsense = measured_of({formula("pending"): {("m:8002", "resnet50"): None}})
    for measured in (failed, dark, nonsense):
        assert one(measured, last).pending == Signal(7.0, 50.0)
    assert one(failed, last).service_s is Signal.ABSENT, "the query for it was answered: without its series"
    assert one(dark, last).service_s == Signal(0.1, 50.0)
    assert one(dark, last).proxy_rps is Signal.ABSENT, "the proxies are not that instance"


def test_a_series_that_is_gone_is_absent() -> None:
    """A source that answers without the series ends the last Signal."""
    last = EndpointSignals(pending=Signal(7.0, 50.0))
    assert one(measured_of({}), last) == EndpointSignals()


def test_arrivals_are_by_size_with_the_default_class() -> None:
    """Every size class has a Signal, the default one too; another route's cluster is not ours."""
    of = route(name="demo/resnet.v2")
    rates: dict[Subject, Signal | None] = {
        ("demo/resnet_v2/small",): Signal(5.0, NOW_S),
        ("demo/resnet/large",): Signal(9.0, NOW_S),
    }
    found = series.assemble({of.spec.id: of}, measured_of({ARRIVALS[0]: rates}), {})[of.spec.id]
    assert found.arrivals_rps == {"small": Signal(5.0, NOW_S), "large": Signal.ABSENT, DEFAULT_CLASS: Signal.ABSENT}


ROUTE_ID = RouteId("team/r.one")
NAMES = [
    # name as a proxy or Prometheus shows it, its size class, its route
    ("demo/resnet/small", "demo/resnet/small", "demo/resnet"),
    ("demo/resnet_v2/small", "demo/resnet_v2/small", "demo/resnet_v2"),
    ("outbound|80||small.r.one.team.sizes.meshctl.internal", size_host(ROUTE_ID, "small"), sizes_host(ROUTE_ID)[2:]),
    ("outbound|80||small.r.one.team.sizes.meshctl.internal;", size_host(ROUTE_ID, "small"), sizes_host(ROUTE_ID)[2:]),
    ("small.r.one.team.sizes.meshctl.internal", size_host(ROUTE_ID, "small"), sizes_host(ROUTE_ID)[2:]),
    ("outbound|80|v100|r.one.team.subsets.meshctl.internal", subsets_host(ROUTE_ID), subsets_host(ROUTE_ID)),
    ("outbound|80|v100|r.one.team.subsets.meshctl.internal;", subsets_host(ROUTE_ID), subsets_host(ROUTE_ID)),
    ("r.one.team.subsets.meshctl.internal", subsets_host(ROUTE_ID), subsets_host(ROUTE_ID)),
    ("outbound|443||kubernetes.default.svc.cluster.local", "", ""),
    ("inbound|8000||", "", ""),
    ("outbound|80||small", "", ""),  # as stock Envoy cuts it at the first dot
    ("xds-grpc", "", ""),
    ("", "", ""),
]


@pytest.mark.parametrize(("name", "size", "route_name"), NAMES)
def test_every_name_of_a_size_class_is_read(name: str, size: str, route_name: str) -> None:
    """Ours and Istio's, per cluster, per endpoint and per service; what is not ours is nobody's."""
    assert (series.subject_of(series.SIZE, name), series.subject_of(series.ROUTE, name)) == (size, route_name)


def meshed(name: str = "team/r.one") -> DesiredRoute:
    of = route(server("m:8002"), name=name)
    return dataclasses.replace(of, spec=dataclasses.replace(of.spec, gateways=("istio-system/gateway",)))


def arrivals(of: DesiredRoute, rates: Mapping[Formula, Mapping[str, float]]) -> dict[str, float | None]:
    asked = {by: {(name,): Signal(rps, NOW_S) for name, rps in found.items()} for by, found in rates.items()}
    found = series.assemble({of.spec.id: of}, measured_of(asked), {})[of.spec.id]  # type: ignore[arg-type]  # invariance
    return {size: signal.value for size, signal in found.arrivals_rps.items()}


def test_arrivals_of_a_meshed_route_come_from_whichever_statistics_there_are() -> None:
    """The proxies' clusters, else their endpoints, else Istio's standard metric; and our own proxies' besides."""
    small, large = size_host(ROUTE_ID, "small"), size_host(ROUTE_ID, "large")
    standard = {ARRIVALS[2]: {small: 3.0, large: 1.0}}
    assert arrivals(meshed(), standard) == {"small": 3.0, "large": 1.0, DEFAULT_CLASS: None}
    endpoints = {**standard, ARRIVALS[1]: {small: 4.0}}
    assert arrivals(meshed(), endpoints) == {"small": 4.0, "large": 1.0, DEFAULT_CLASS: None}
    clusters = {**endpoints, ARRIVALS[0]: {small: 5.0, "team/r_one/small": 10.0}}
    assert arrivals(meshed(), clusters) == {"small": 15.0, "large": 1.0, DEFAULT_CLASS: None}
    assert arrivals(route(name="team/r.one"), clusters)["small"] == 10.0, "a route that is not meshed is not Istio's"


def test_arrivals_behind_subsets_are_split_as_the_sizes_are_declared() -> None:
    """Clusters of GPU classes know no sizes: 0.8 small and 0.2 large; what is left of the other mechanism adds up."""
    subsets = {ARRIVALS[2]: {subsets_host(ROUTE_ID): 10.0}}
    assert arrivals(meshed(), subsets) == {"small": 8.0, "large": 2.0, DEFAULT_CLASS: 0.0}
    both = {ARRIVALS[2]: {subsets_host(ROUTE_ID): 10.0, size_host(ROUTE_ID, "large"): 5.0}}
    assert arrivals(meshed(), both) == {"small": 8.0, "large": 7.0, DEFAULT_CLASS: 0.0}


def test_arrivals_that_could_not_be_asked_stay() -> None:
    """Half of a sum is no sum."""
    of, asked = meshed(), measured_of({})
    last = {of.spec.id: RouteSignals({"small": Signal(7.0, 50.0)}, {})}
    del asked.values[ARRIVALS[2]]
    asked.values[ARRIVALS[0]] = {("team/r_one/small",): Signal(1.0, NOW_S)}
    found = series.assemble({of.spec.id: of}, asked, last)[of.spec.id].arrivals_rps
    assert found == {"small": Signal(7.0, 50.0), "large": Signal.ABSENT, DEFAULT_CLASS: Signal.ABSENT}


def test_an_endpoint_behind_istio_and_our_proxies_has_the_sum() -> None:
    """Of all three names of its route, at the time of the oldest."""
    of, address = meshed(), "127.0.0.1:8000"
    subjects = ["team/r_one", sizes_host(ROUTE_ID)[2:], subsets_host(ROUTE_ID)]
    rates: dict[Subject, Signal | None] = {
        (name, address): Signal(2.0**i, NOW_S - i) for i, name in enumerate(subjects)
    }
    measured = measured_of({formula("proxy_active"): rates})
    found = series.assemble({of.spec.id: of}, measured, {})[of.spec.id].endpoints[EndpointId(address)]
    assert found.proxy_active == Signal(7.0, NOW_S - 2)


def test_proxies_name_an_ipv6_endpoint_in_brackets() -> None:
    """Envoy writes [::1]:8000; the join must too."""
    of = route(server("m:8002", "::1:8000"))
    measured = measured_of({formula("proxy_active"): {("demo/resnet", "[::1]:8000"): Signal(2.0, NOW_S)}})
    found = series.assemble({of.spec.id: of}, measured, {})[of.spec.id].endpoints
    assert found[EndpointId("::1:8000")].proxy_active == Signal(2.0, NOW_S)


def test_what_says_the_same_is_the_same_object() -> None:
    """A thousand routes of which nothing was measured since are not decided again; one that was is, alone."""
    both = {RouteId(name): route(server(f"{name}:8002", f"{name}:8000")) for name in ("a", "b")}
    before = series.assemble(both, measured_of({}), {})
    assert all(before[name] is same for name, same in series.assemble(both, measured_of({}), before).items())
    news = measured_of({formula("pending"): {("a:8002", "resnet50"): Signal(2.0, NOW_S)}})
    after = series.assemble(both, news, before)
    assert after[RouteId("b")] is before[RouteId("b")]
    assert after[RouteId("a")].endpoints[EndpointId("a:8000")].pending == Signal(2.0, NOW_S)
