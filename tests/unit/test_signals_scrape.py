"""ScrapeSignals against pages on real sockets, good and bad."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest

from meshctl.adapters.scrape import FAILURES, MAX_PAGE_BYTES, MAX_SOCKETS, ScrapeSignals, explain
from meshctl.errors import InputError
from meshctl.model import DesiredRoute, EndpointSignals, Signal
from meshctl.ports import Observed
from tests.harness.controller import ManualClock
from tests.harness.pages import Bad, Drip, Pages, Reply, http, route, server

LONG_S = 60.0


def triton(requests: float, *, pending: float = 0.0, model: str = "resnet50", version: int = 1, batch: int = 4) -> str:
    """Triton's page after `requests` requests: 10 ms in the queue, 1 + 5 for each of their items + 1 ms of compute."""
    labels = f'{{model="{model}",version="{version}"}}'
    values = {
        "nv_inference_request_success": requests,
        "nv_inference_request_failure": 0.0,
        "nv_inference_count": batch * requests,
        "nv_inference_exec_count": requests,
        "nv_inference_queue_duration_us": 10_000 * requests,
        "nv_inference_compute_input_duration_us": 1_000 * requests,
        "nv_inference_compute_infer_duration_us": 5_000 * batch * requests,
        "nv_inference_compute_output_duration_us": 1_000 * requests,
        "nv_inference_pending_request_count": pending,
    }
    return "".join(f"# HELP {n} text\n# TYPE {n} counter\n{n}{labels} {v}\n" for n, v in values.items())


def envoy(small: float, errors: float = 0.0, active: float = 0.0, address: str = "127.0.0.1:8000") -> str:
    """A proxy's page: two size classes to one endpoint, `small` requests in one and none in the other."""
    lines = []
    for size, total in (("small", small), ("large", 0.0)):
        cluster = f'envoy_cluster_name="demo/resnet/{size}"'
        at = f'{{{cluster},envoy_endpoint_address="{address}"}}'
        lines += [
            f"envoy_cluster_upstream_rq_total{{{cluster}}} {total}",
            f"envoy_cluster_endpoint_rq_success{at} {total}",
            f"envoy_cluster_endpoint_rq_error{at} {errors}",
            f"envoy_cluster_endpoint_rq_active{at} {active}",
        ]
    return "\n".join(lines) + "\n"


class Fleet:
    """One route over a page per endpoint, scraped with a clock that the test moves."""

    def __init__(self, *pages: Pages, proxies: tuple[Pages, ...] = (), window_s: float = 5.0) -> None:
        self.clock = ManualClock(1000.0)
        self.signals = ScrapeSignals(self.clock, window_s, timeout_s=0.3)
        self.proxies = tuple(p.address for p in proxies)
        self.route: DesiredRoute = route(*(server(p.address, f"127.0.0.1:{8000 + i}") for i, p in enumerate(pages)))

    async def poll(self, after_s: float = 0.0) -> Observed:
        self.clock.time_s += after_s
        return await self.signals.poll({self.route.spec.id: self.route}, self.proxies, LONG_S)

    def of(self, observed: Observed, index: int = 0) -> EndpointSignals:
        return observed.routes[self.route.spec.id].endpoints[self.route.endpoints[index].id]

    def arrivals(self, observed: Observed) -> dict[str, Signal]:
        return dict(observed.routes[self.route.spec.id].arrivals_rps)


@pytest.fixture
async def page() -> AsyncIterator[Pages]:
    async with Pages(lambda path: http(triton(0))) as pages:
        yield pages


@pytest.fixture
async def fleet(page: Pages) -> AsyncIterator[Fleet]:
    fleet = Fleet(page)
    yield fleet
    await fleet.signals.stop()


def serve(page: Pages, reply: Reply | str) -> None:
    """From now on, `page` answers this."""
    answer = http(reply) if isinstance(reply, str) else reply
    page.reply = lambda path: answer


async def test_rates_come_with_the_second_page(fleet: Fleet, page: Pages) -> None:
    """Gauges are there at once; rates need two pages and are then exact."""
    serve(page, triton(100, pending=3))
    first = fleet.of(await fleet.poll())
    assert first == EndpointSignals(pending=Signal(3.0, 1000.0))
    serve(page, triton(140, pending=5))
    second = fleet.of(await fleet.poll(after_s=2.0))
    assert second.completed_rps == Signal(20.0, 1002.0)
    assert second.failed_rps == Signal(0.0, 1002.0)
    assert second.batch == Signal(4.0, 1002.0)
    assert second.queue_s.value == pytest.approx(0.010)
    assert second.service_s.value == pytest.approx(0.022)
    assert second.busy_ratio.value == pytest.approx(20 * 0.020)
    assert second.pending == Signal(5.0, 1002.0)
    assert second.gpu_utilization_ratio is Signal.ABSENT


async def test_no_requests_is_no_traffic(fleet: Fleet, page: Pages) -> None:
    """0/0 is no traffic for the means; the rates are a fresh 0."""
    await fleet.poll()
    still = fleet.of(await fleet.poll(after_s=1.0))
    assert still.service_s == still.queue_s == still.batch == still.busy_ratio == Signal.no_traffic(1001.0)
    assert still.completed_rps == Signal(0.0, 1001.0)


async def test_a_change_shows_within_the_window(fleet: Fleet, page: Pages) -> None:
    """Load that starts is half seen after half a window and wholly after one; what came before is forgotten."""
    for _ in range(6):
        serve(page, triton(0))
        await fleet.poll(after_s=1.0)
    seen = []
    for second in range(1, 8):
        serve(page, triton(100 * second))
        seen.append(fleet.of(await fleet.poll(after_s=1.0)).completed_rps.value)
    assert seen == pytest.approx([20, 40, 60, 80, 100, 100, 100])


@pytest.mark.parametrize("restarted_at", [0, 5])
async def test_a_restart_is_no_negative_rate(fleet: Fleet, page: Pages, restarted_at: float) -> None:
    """A counter that goes back counts on from where it restarted."""
    serve(page, triton(1000))
    await fleet.poll()
    serve(page, triton(1010))
    await fleet.poll(after_s=1.0)
    serve(page, triton(restarted_at))
    after = fleet.of(await fleet.poll(after_s=1.0))
    assert after.completed_rps.value == pytest.approx((10 + restarted_at) / 2)
    serve(page, triton(restarted_at + 20))
    assert fleet.of(await fleet.poll(after_s=2.0)).completed_rps.value == pytest.approx((10 + restarted_at + 20) / 4)


@pytest.mark.parametrize(
    ("before", "since"),
    [
        pytest.param((10, 1), (8, 4), id="the compute time is past its last value again"),
        pytest.param((10, 4), (12, 1), id="the number of requests is past its last value again"),
        pytest.param((10, 4), (10, 1), id="the number of requests is at its last value again"),
    ],
)
async def test_counters_of_one_model_restart_together(
    fleet: Fleet, page: Pages, before: tuple[int, int], since: tuple[int, int]
) -> None:
    """One that is lower shows the restart of all: the means are of what was done since (its requests, their batch)."""
    for requests in (0, before[0]):
        serve(page, triton(requests, batch=before[1]) + triton(1000, model="bert") + triton(1000, version=2))
        await fleet.poll(after_s=1.0)
    serve(page, triton(since[0], batch=since[1]) + triton(1000, model="bert") + triton(1000, version=2))
    after = fleet.of(await fleet.poll(after_s=1.0))
    ended, items = before[0] + since[0], before[0] * before[1] + since[0] * since[1]
    assert after.completed_rps.value == pytest.approx(ended / 2), "what did not restart counts no second time"
    assert after.batch.value == pytest.approx(items / ended)
    assert after.service_s.value == pytest.approx(0.002 + 0.005 * items / ended)
    assert after.queue_s.value == pytest.approx(0.010)
    assert after.busy_ratio.value == pytest.approx(0.005 * items / 2)


async def test_a_series_that_comes_and_goes_is_no_jump(fleet: Fleet, page: Pages) -> None:
    """A second model version appears with a history and goes again: neither is a rate."""
    for requests, more in ((0, ""), (10, ""), (20, triton(5000, version=2)), (30, ""), (40, triton(7, version=2))):
        serve(page, triton(requests) + more)
        observed = fleet.of(await fleet.poll(after_s=1.0))
    assert observed.completed_rps.value is not None
    assert 10 <= observed.completed_rps.value <= 14, "the second version's 7 are new, its 5000 were not"
    assert observed.batch.value == pytest.approx(4.0)


async def test_another_model_on_the_same_server_is_not_ours(fleet: Fleet, page: Pages) -> None:
    """Only the route's model counts."""
    serve(page, triton(0) + triton(0, model="bert"))
    await fleet.poll()
    serve(page, triton(10) + triton(999, model="bert"))
    assert fleet.of(await fleet.poll(after_s=1.0)).completed_rps.value == 10.0


BAD_PAGES: dict[str, tuple[Reply, str]] = {
    "html": (http("<html>hello</html>"), "not metrics"),
    "broken line": (http('nv_inference_count{model="resnet50" 5\n'), "not metrics"),
    "no number": (http('nv_inference_count{model="resnet50"} five\n'), "not metrics"),
    "not text": (http(b"nv_inference_count\xff\xfe 5"), "not metrics"),
    "error": (http("oops", 500), "status 500"),
    "redirect": (http("", 302, Location="/other"), "status 302"),
    "closed": (Bad.CLOSE, "closed the connection"),
    "cut short": (http(triton(10))[:-20], "broke off"),
    "not http": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "not HTTP"),
    "hangs": (Bad.HANG, "has not answered"),
    "drips": (Drip(http(triton(10))), "has not answered"),
}


@pytest.mark.parametrize("case", BAD_PAGES)
async def test_bad_pages_leave_the_last_signals(page: Pages, case: str) -> None:
    """A Problem that names the page, the last signals as they were; the other endpoint's are new; then all is well."""
    async with Pages(lambda path: http(triton(0))) as other:
        fleet = Fleet(page, other)
        await fleet.poll()
        serve(page, triton(10))
        before = await fleet.poll(after_s=1.0)
        reply, words = BAD_PAGES[case]
        serve(page, reply)
        serve(other, triton(50))
        bad = await fleet.poll(after_s=1.0)
        (problem,) = bad.problems
        assert words in problem.message
        assert page.address in problem.where
        assert fleet.of(bad) == fleet.of(before)
        assert fleet.of(bad, 1).completed_rps == Signal(25.0, 1002.0)
        serve(page, triton(30))
        async with asyncio.timeout(LONG_S):
            while (after := await fleet.poll(after_s=1.0)).problems:  # it is asked in the background now
                pass
        assert fleet.of(after).pending.at_s != fleet.of(before).pending.at_s
        await fleet.signals.stop()


async def test_an_endless_page_is_given_up(page: Pages) -> None:
    """A page above the limit is refused, not kept in memory."""
    serve(page, http(b"#\n" * (MAX_PAGE_BYTES // 2 + 1)))
    signals = ScrapeSignals(ManualClock(), timeout_s=LONG_S)
    of = route(server(page.address))
    (problem,) = (await signals.poll({of.spec.id: of}, (), LONG_S)).problems
    assert "page of more than 64 MiB" in problem.message
    await signals.stop()


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-5"])
@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("nv_inference_count", "batch"),
        ("nv_inference_request_success", "batch"),
        ("nv_inference_pending_request_count", "pending"),
    ],
)
async def test_nonsense_numbers_are_dropped(fleet: Fleet, page: Pages, name: str, last: str, value: str) -> None:
    """The signal of a value that cannot be stays as it was, with a Problem; it recovers with the value."""
    for requests in (0, 10):
        serve(page, triton(requests, pending=2))
        before = await fleet.poll(after_s=1.0)
    lines = triton(20, pending=2).splitlines(keepends=True)
    serve(page, "".join(f"{line.rpartition(' ')[0]} {value}\n" if line.startswith(name) else line for line in lines))
    bad = await fleet.poll(after_s=1.0)
    assert getattr(fleet.of(bad), last) == getattr(fleet.of(before), last)
    assert fleet.of(bad).failed_rps == Signal(0.0, 1003.0)
    assert bad.problems
    assert all("dropped" in p.message for p in bad.problems)
    serve(page, triton(30, pending=2))
    after = await fleet.poll(after_s=1.0)
    assert after.problems == ()
    assert fleet.of(after).completed_rps.value == pytest.approx(10.0)


async def test_a_hanging_target_delays_one_poll_and_nobody_else(page: Pages) -> None:
    """After the first time-out the hanging page is asked in the background: the others' polls do not wait for it."""
    async with Pages(lambda path: http(triton(0))) as other:
        fleet = Fleet(page, other)
        serve(page, Bad.HANG)
        assert (await fleet.poll()).problems
        asked = len(other.asked)
        for _ in range(20):  # far more polls than fit into one time-out, if each waited
            await fleet.poll(after_s=1.0)
        assert len(other.asked) == asked + 20
        assert len(page.asked) < 20
        assert page.open_most <= 2, "one request at a time to a target that does not answer"
        await fleet.signals.stop()


async def test_proxies_are_summed(page: Pages) -> None:
    """Arrivals by size class and endpoint counters add up over the proxies; sizes add up per endpoint."""
    async with Pages(lambda path: http(envoy(0))) as one, Pages(lambda path: http(envoy(0))) as two:
        fleet = Fleet(page, proxies=(one, two))
        await fleet.poll()
        serve(one, envoy(10, errors=1, active=2))
        serve(two, envoy(30, active=3))
        observed = await fleet.poll(after_s=1.0)
        assert fleet.arrivals(observed) == {
            "small": Signal(40.0, 1001.0),
            "large": Signal(0.0, 1001.0),
            "default": Signal.ABSENT,
        }
        assert fleet.of(observed).proxy_rps == Signal(42.0, 1001.0)
        assert fleet.of(observed).proxy_failed_rps == Signal(2.0, 1001.0)
        assert fleet.of(observed).proxy_active == Signal(10.0, 1001.0)
        await fleet.signals.stop()


async def test_a_silent_proxy_keeps_its_part_of_the_sum(page: Pages) -> None:
    """One of two proxies stops answering: the sum does not halve, it ages. When it is gone, its part goes."""
    async with Pages(lambda path: http(envoy(0))) as one, Pages(lambda path: http(envoy(0))) as two:
        fleet = Fleet(page, proxies=(one, two))
        await fleet.poll()
        serve(one, envoy(10))
        serve(two, envoy(10))
        await fleet.poll(after_s=1.0)
        serve(one, envoy(20))
        serve(two, http("", 503))
        observed = await fleet.poll(after_s=1.0)
        assert fleet.arrivals(observed)["small"] == Signal(20.0, 1001.0)
        fleet.proxies = (one.address,)
        serve(one, envoy(30))
        gone = await fleet.poll(after_s=1.0)
        assert fleet.arrivals(gone)["small"] == Signal(10.0, 1003.0)
        assert gone.problems == ()
        await fleet.signals.stop()


async def test_a_page_is_asked_once_however_many_use_it(page: Pages) -> None:
    """Endpoints that share a metrics address share the request; one without an address has none."""
    signals = ScrapeSignals(ManualClock())
    shared = [server(page.address, f"127.0.0.1:{8000 + i}") for i in range(5)]
    of = route(*shared, server("", "127.0.0.1:9000"))
    observed = await signals.poll({of.spec.id: of}, (), LONG_S)
    assert page.asked == ["/metrics"]
    assert observed.problems == ()
    await signals.stop()


async def test_exporters_of_gpus_are_asked_too(page: Pages) -> None:
    """DCGM's page joins by UUID, whatever its address."""
    async with Pages(lambda path: http('DCGM_FI_DEV_GPU_UTIL{gpu="0",UUID="GPU-1"} 37\n')) as dcgm:
        signals = ScrapeSignals(ManualClock(), exporters=(dcgm.address,))
        of = route(server(page.address, gpu_uuid="GPU-1"))
        observed = await signals.poll({of.spec.id: of}, (), LONG_S)
        assert observed.routes[of.spec.id].endpoints[of.endpoints[0].id].gpu_utilization_ratio.value == 0.37
        await signals.stop()


async def test_many_targets_share_a_bounded_number_of_sockets() -> None:
    """Every target is asked; no more than MAX_SOCKETS connections are open at once."""
    async with Pages(lambda path: http(triton(1, pending=1)), sockets=300) as pages:
        signals = ScrapeSignals(ManualClock(), timeout_s=LONG_S)
        of = route(*(server(name, f"127.0.0.1:{8000 + i}") for i, name in enumerate(pages.addresses)))
        observed = await signals.poll({of.spec.id: of}, (), LONG_S)
        assert observed.problems == ()
        assert {e.pending.value for e in observed.routes[of.spec.id].endpoints.values()} == {1.0}
        assert len(pages.asked) == 300
        assert pages.open_most <= MAX_SOCKETS
        await signals.stop()


async def test_targets_that_are_gone_are_forgotten(fleet: Fleet, page: Pages) -> None:
    """A route that is deleted leaves nothing: no request, no Problem, no signal."""
    serve(page, Bad.HANG)
    await fleet.poll()
    observed = await fleet.signals.poll({}, (), LONG_S)
    assert observed == Observed({}, ())


@pytest.mark.parametrize(("window_s", "timeout_s"), [(0.0, 1.0), (-1.0, 1.0), (5.0, 0.0), (float("nan"), 1.0)])
def test_windows_and_timeouts_must_be_positive(window_s: float, timeout_s: float) -> None:
    """The caller learns at once."""
    with pytest.raises(InputError, match="above 0"):
        ScrapeSignals(ManualClock(), window_s, timeout_s=timeout_s)


def test_every_failure_of_the_client_is_explained() -> None:
    """Each exception of aiohttp's client fits a row of the table, the more special before the more general."""
    kinds = [k for k in vars(aiohttp).values() if isinstance(k, type) and issubclass(k, aiohttp.ClientError)]
    assert len(kinds) > 15
    for kind in kinds:
        assert any(issubclass(kind, row) for row in FAILURES), kind
    assert explain(TimeoutError()) == "did not answer in time (TimeoutError)"
    table = list(FAILURES)
    for i, row in enumerate(table):
        assert not any(issubclass(row, earlier) for earlier in table[:i]), f"{row} is never reached"
