"""PrometheusSignals against servers on real sockets that behave in every bad way."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable

import pytest
import requests

from meshctl.adapters.prometheus import FAILURES, PrometheusSignals, explain
from meshctl.controller.clock import MonotonicClock
from meshctl.errors import InputError
from meshctl.model import EndpointId, EndpointSignals, Problem, Signal
from meshctl.ports import Observed
from tests.harness.controller import ManualClock
from tests.harness.pages import (
    EMPTY,
    Bad,
    Drip,
    Pages,
    Reply,
    http,
    json_answer,
    one_value,
    query_of,
    route,
    server,
    vector,
)

LABELS = {
    "instance": "m:8002",
    "model": "resnet50",
    "UUID": "GPU-1",
    "size": "demo/resnet/small",
    "route": "demo/resnet",
    "envoy_endpoint_address": "127.0.0.1:8000",
}
ROUTE = route(server("m:8002", gpu_uuid="GPU-1"))
GOOD = one_value(LABELS)
LONG_S = 60.0
"""Deadline of polls that are meant to finish before it."""
SHORT_S = 1.0
"""Deadline of polls that are meant to reach it."""


@pytest.fixture
async def prometheus() -> AsyncIterator[Pages]:
    """A server that answers every query well, until a test says otherwise."""
    async with Pages(GOOD) as pages:
        yield pages


@pytest.fixture
async def signals(prometheus: Pages) -> AsyncIterator[PrometheusSignals]:
    source = PrometheusSignals(prometheus.url, MonotonicClock())
    yield source
    await source.stop()


async def poll(source: PrometheusSignals, deadline_s: float = LONG_S) -> Observed:
    return await source.poll({ROUTE.spec.id: ROUTE}, (), deadline_s)


def endpoint(observed: Observed) -> EndpointSignals:
    return observed.routes[ROUTE.spec.id].endpoints[EndpointId("127.0.0.1:8000")]


def failing_for(part: str, otherwise: Reply) -> Callable[[str], Reply]:
    """GOOD, but `otherwise` for queries with `part` in them."""
    return lambda path: otherwise if part in query_of(path) else GOOD(path)


async def test_every_signal_comes_from_one_poll(signals: PrometheusSignals, prometheus: Pages) -> None:
    """All series there: all signals fresh, in a bounded number of queries, none of which names an endpoint."""
    observed = await poll(signals)
    assert observed.problems == ()
    assert {s.value for s in _all(endpoint(observed))} == {0.5}
    assert observed.routes[ROUTE.spec.id].arrivals_rps["small"].value == 0.5
    assert len(prometheus.asked) <= 31
    assert not any("127.0.0.1" in query_of(path) or "m:8002" in query_of(path) for path in prometheus.asked)


async def test_a_sample_has_the_time_of_its_scrape() -> None:
    """An age on Prometheus' clock becomes the same age on the loop's, wherever that one stands."""
    async with Pages(one_value(LABELS, age_s=20.0)) as pages:
        source = PrometheusSignals(pages.url, ManualClock(5000.0))
        signal = endpoint(await poll(source)).pending
        await source.stop()
    assert signal.at_s == pytest.approx(4980.0, abs=5.0)


async def test_a_sample_from_the_future_has_no_negative_age() -> None:
    """A sample ahead of its own Prometheus is as new as the answer, not newer."""
    async with Pages(one_value(LABELS, age_s=-500.0)) as pages:
        source = PrometheusSignals(pages.url, ManualClock(5000.0))
        signal = endpoint(await poll(source)).pending
        await source.stop()
    assert signal.at_s == 5000.0


async def test_an_answer_without_series_is_absent(signals: PrometheusSignals, prometheus: Pages) -> None:
    """Series that are gone end their signals, without a Problem."""
    await poll(signals)
    prometheus.reply = lambda path: EMPTY
    observed = await poll(signals)
    assert endpoint(observed) == EndpointSignals()
    assert observed.problems == ()


BAD_ANSWERS: dict[str, tuple[Reply, str]] = {
    "html": (http("<html>login</html>", content_type="text/html"), "not JSON"),
    "json of another shape": (json_answer({"hello": 1}), "not a query result"),
    "json list": (json_answer([1]), "not a query result"),
    "rows of another shape": (json_answer({"status": "success", "data": {"result": [{"metric": {}}]}}), "not a query"),
    "rows that are numbers": (json_answer({"status": "success", "data": {"result": [3]}}), "not a query result"),
    "a scalar": (json_answer({"status": "success", "data": {"resultType": "scalar", "result": [1, "2"]}}), "not a q"),
    "a value that is no number": (vector(LABELS, "many"), "cannot be read"),
    "bad query": (
        json_answer({"status": "error", "error": "parse error"}, 400),
        "parse error",
    ),
    "too heavy": (json_answer({"status": "error", "errorType": "timeout", "error": "query timed out"}, 503), "503"),
    "internal error": (http("oops", 500), "refused the query"),
    "no access": (http("", 401), "401"),
    "redirect": (http("", 302, Location="/elsewhere"), "redirect"),
    "closed": (Bad.CLOSE, "could not be reached"),
    "not http": (b"SSH-2.0-OpenSSH_9.2\r\n", "could not be reached"),
    "cut short": (http("{}")[:-1], "broke off"),
    "hangs": (Bad.HANG, "in time"),
    "empty": (http(""), "not JSON"),
    "garbage": (http(b"\x00\xff\xfe"), "not JSON"),
}


@pytest.mark.parametrize("case", BAD_ANSWERS)
async def test_bad_answers_leave_the_last_signals(signals: PrometheusSignals, prometheus: Pages, case: str) -> None:
    """Whatever is answered: a Problem that says so, the last signals as they were, and all well again afterwards."""
    before = await poll(signals)
    reply, words = BAD_ANSWERS[case]
    prometheus.reply = lambda path: reply
    bad = await poll(signals, SHORT_S)
    assert bad.routes == before.routes
    assert any(words in problem.message for problem in bad.problems), bad.problems
    assert {problem.where for problem in bad.problems} == {prometheus.url}
    assert len(bad.problems) <= 2, "the same failure of many queries is one Problem"
    prometheus.reply = GOOD
    after = await poll(signals)
    assert after.problems == ()
    assert _newer(endpoint(after).pending, endpoint(before).pending)


@pytest.mark.parametrize("reply", [http("oops", 500), http("<html>"), Drip(http("x" * 100_000)), Bad.HANG])
async def test_a_query_that_fails_leaves_the_others(
    signals: PrometheusSignals, prometheus: Pages, reply: Reply
) -> None:
    """One failing query: its signal stays and ages, those asked before it are new."""
    before = await poll(signals)
    prometheus.reply = failing_for("envoy_cluster_endpoint_rq_success", reply)
    after = await poll(signals, 2 * SHORT_S)
    assert len(after.problems) == 1
    assert endpoint(after).proxy_rps == endpoint(before).proxy_rps
    assert _newer(endpoint(after).pending, endpoint(before).pending)


async def test_no_server_is_one_problem() -> None:
    """A refused connection is one Problem, and is not tried query by query."""
    async with Pages(GOOD) as pages:
        url = pages.url
    source = PrometheusSignals(url, MonotonicClock())
    observed = await poll(source)
    await source.stop()
    (problem,) = observed.problems
    assert "could not be reached" in problem.message
    assert endpoint(observed) == EndpointSignals()


@pytest.mark.parametrize(
    "reply", [Bad.HANG, Drip(http("x" * 100_000)), Drip(b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 60_000)]
)
async def test_a_hanging_server_costs_one_thread_and_no_socket(prometheus: Pages, reply: Reply) -> None:
    """Polls return by their deadline; threads and connections do not pile up; recovery is at once."""
    source = PrometheusSignals(prometheus.url, MonotonicClock())
    prometheus.reply = lambda path: reply
    for _ in range(4):
        observed = await poll(source, 0.3)
        assert len(observed.problems) == 1
        assert _poll_threads() <= 1
    prometheus.reply = GOOD
    async with asyncio.timeout(LONG_S):
        while (await poll(source)).problems:  # the interrupted thread may still be landing
            pass
    await source.stop()
    assert _poll_threads() == 0


async def test_a_poll_blocks_nothing_else(prometheus: Pages, signals: PrometheusSignals) -> None:
    """The event loop turns while Prometheus hangs."""
    prometheus.reply = lambda path: Bad.HANG
    polling = asyncio.create_task(poll(signals, SHORT_S))
    turns = 0
    while not polling.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns > 100


async def test_warnings_are_problems(signals: PrometheusSignals, prometheus: Pages) -> None:
    """A result with a warning counts, and the warning is told once."""
    warned = vector(LABELS, 0.5, warnings=["a remote store did not answer"])
    prometheus.reply = lambda path: warned if "rate(" in query_of(path) else GOOD(path)
    observed = await poll(signals)
    (problem,) = observed.problems
    assert "a remote store did not answer" in problem.message
    assert endpoint(observed).service_s.value == 0.5


async def test_a_target_that_is_down_leaves_its_signals(signals: PrometheusSignals, prometheus: Pages) -> None:
    """`up == 0`: the endpoint's signals stay, what the proxies say of it is new."""
    before = await poll(signals)
    prometheus.reply = failing_for("up == 0", vector(LABELS, 0))
    after = await poll(signals)
    assert endpoint(after).pending == endpoint(before).pending
    assert _newer(endpoint(after).proxy_active, endpoint(before).proxy_active)


async def test_nonsense_values_are_dropped(signals: PrometheusSignals, prometheus: Pages) -> None:
    """NaN of a gauge, infinity and a negative rate: dropped with a Problem each; NaN of a ratio is no traffic."""
    before = await poll(signals)
    bad = {"pending": "NaN", "rq_error{": "+Inf", "nv_inference_count": "NaN", "request_failure": "-3"}

    def reply(path: str) -> Reply:
        found = [value for part, value in bad.items() if part in query_of(path) and "timestamp(" not in query_of(path)]
        return vector(LABELS, found[0]) if found else GOOD(path)

    prometheus.reply = reply
    after = await poll(signals)
    assert endpoint(after).pending == endpoint(before).pending
    assert endpoint(after).failed_rps == endpoint(before).failed_rps
    assert endpoint(after).batch.value is None
    assert endpoint(after).batch.at_s is not None
    assert len([p for p in after.problems if "dropped" in p.message]) >= 3


async def test_a_window_without_two_scrapes_is_explained(signals: PrometheusSignals, prometheus: Pages) -> None:
    """Samples but no rates: the Problem names the window."""
    prometheus.reply = lambda path: EMPTY if "rate(" in query_of(path) else GOOD(path)
    observed = await poll(signals)
    assert any("window must hold two scrapes" in problem.message for problem in observed.problems)
    assert endpoint(observed).pending.value == 0.5


@pytest.mark.parametrize("url", ["", "prometheus:9090", "ftp://h", "http://", "/api"])
async def test_a_url_that_is_none_is_refused(url: str) -> None:
    """The caller learns at once, with what is expected."""
    with pytest.raises(InputError, match="expected http"):
        PrometheusSignals(url, MonotonicClock())


async def test_a_password_in_the_url_is_not_told() -> None:
    """Problems name the server without its credentials."""
    source = PrometheusSignals("http://me:secret@127.0.0.1:1", MonotonicClock())
    observed = await poll(source)
    await source.stop()
    assert "secret" not in str(observed.problems)


async def test_stopping_in_the_middle_of_a_poll_ends_it(prometheus: Pages) -> None:
    """stop() returns at once and leaves no thread."""
    source = PrometheusSignals(prometheus.url, MonotonicClock())
    prometheus.reply = lambda path: Bad.HANG
    polling = asyncio.create_task(poll(source))
    async with asyncio.timeout(LONG_S):
        while not prometheus.asked:  # noqa: ASYNC110 (the server's list has no event)
            await asyncio.sleep(0.01)
        await source.stop()
        assert isinstance((await polling).problems[0], Problem)
    assert _poll_threads() == 0


def test_every_failure_of_the_client_is_explained() -> None:
    """Each exception of requests fits a row of the table, the more special before the more general."""
    raised = [kind for kind in vars(requests.exceptions).values() if isinstance(kind, type)]
    kinds = [k for k in raised if issubclass(k, Exception) and not issubclass(k, Warning)]
    assert len(kinds) > 15
    for kind in kinds:
        assert explain(kind.__new__(kind))
    table = list(FAILURES)
    for i, kind in enumerate(table):
        assert not any(issubclass(kind, earlier) for earlier in table[:i]), f"{kind} is never reached"


def _all(signals: EndpointSignals) -> list[Signal]:
    return [getattr(signals, name) for name in EndpointSignals.__slots__]


def _newer(one: Signal, other: Signal) -> bool:
    return one.at_s is not None and other.at_s is not None and one.at_s > other.at_s


def _poll_threads() -> int:
    """Poll threads alive, once those that were interrupted have had time to end."""
    deadline_s = time.monotonic() + 10.0
    while time.monotonic() < deadline_s:
        alive = [t for t in threading.enumerate() if t.name == "prometheus-poll"]
        for thread in alive:
            thread.join(0.1)
        if not any(t.is_alive() for t in alive):
            return 0
    return len(alive)
