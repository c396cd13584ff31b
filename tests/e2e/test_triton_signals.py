"""Both sources of signals on a real Triton under real requests.

One Triton serves all tests, which look at one model each and at what comes to its counters while they run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
import pytest

from meshctl.adapters.prometheus import PrometheusSignals
from meshctl.adapters.scrape import ScrapeSignals
from meshctl.controller.clock import MonotonicClock
from meshctl.model import DesiredRoute, Endpoint, EndpointId, EndpointSignals, Signal
from meshctl.ports import Observed, SignalSource
from tests.harness.pages import route
from tests.harness.prometheus import PrometheusProcess
from tests.harness.tools import completed, page, until
from tests.harness.triton import TritonModel, TritonProcess

pytestmark = [pytest.mark.triton, pytest.mark.alone]

BASE_S, PER_ITEM_S = 0.010, 0.001
MODEL = TritonModel(base_s=BASE_S, per_item_s=PER_ITEM_S)
STEADY = TritonModel("steady", base_s=BASE_S, per_item_s=PER_ITEM_S)
SLOW = TritonModel("slow", base_s=1.0, per_item_s=0.0)
TOGETHER = TritonModel("together", base_s=0.1, per_item_s=0.0, dynamic_batching=True)
PAIR = TritonModel("pair", base_s=0.05, per_item_s=0.0, instances=2)
POLL_DEADLINE_S = 20.0


def endpoint(triton: TritonProcess) -> Endpoint:
    host, _, port = triton.address.rpartition(":")
    return Endpoint(EndpointId(triton.address), host, int(port), "cpu", triton.metrics)


def scrape(window_s: float = 60.0) -> ScrapeSignals:
    """A window that holds the whole test, and no hurry on a busy machine."""
    return ScrapeSignals(MonotonicClock(), window_s, timeout_s=POLL_DEADLINE_S)


async def observe(source: SignalSource, of: DesiredRoute, proxies: tuple[str, ...] = ()) -> Observed:
    observed = await source.poll({of.spec.id: of}, proxies, POLL_DEADLINE_S)
    assert observed.problems == ()
    return observed


async def seen(source: SignalSource, of: DesiredRoute) -> EndpointSignals:
    (found,) = (await observe(source, of)).routes[of.spec.id].endpoints.values()
    return found


@dataclass
class Sent:
    """What was sent in one after the other: how long, and how much of it."""

    batches: Sequence[int]
    seconds: float = 0.0
    statuses: list[int] = field(default_factory=list)

    @property
    def rate_rps(self) -> float:
        return len(self.statuses) / self.seconds


async def send(
    triton: TritonProcess, batches: Sequence[int], model: TritonModel = MODEL, *, fail: bool = False
) -> Sent:
    """One request after the other, each of the next batch."""
    sent = Sent(batches)
    began_s = time.monotonic()
    async with aiohttp.ClientSession() as session:
        for batch in batches:
            sent.statuses.append(await triton.infer(session, batch, model.name, fail=fail))
    sent.seconds = time.monotonic() - began_s
    return sent


async def count(triton: TritonProcess, counter: str = "nv_inference_exec_count") -> float:
    """What Triton has counted of `MODEL` so far."""
    text = await completed(page, f"http://{triton.metrics}/metrics") or ""
    of_model = (line for line in text.splitlines() if line.startswith(counter + "{") and f'"{MODEL.name}"' in line)
    return sum(float(line.split()[-1]) for line in of_model)


async def counted(triton: TritonProcess, total: float, counter: str = "nv_inference_exec_count") -> None:
    """Returns when Triton, which answers first and counts then, has counted `total`."""

    async def all_of_them() -> bool:
        return await count(triton, counter) >= total

    await until(all_of_them, f"{counter} is {total:g}")


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonProcess]:
    started = TritonProcess(tmp_path_factory.mktemp("triton"), MODEL, STEADY, SLOW, TOGETHER, PAIR).start()
    yield started
    started.stop()


@pytest.mark.parametrize("batch", [1, 8, 64])
async def test_service_time_and_batch_are_those_of_the_requests(triton: TritonProcess, batch: int) -> None:
    """One request at a time of a known size: the service time is the model's, nothing queues, all of it is counted."""
    source, of = scrape(), route(endpoint(triton))
    first = await seen(source, of)
    assert first.completed_rps is Signal.ABSENT
    assert first.pending.value == 0.0
    before = await count(triton)
    sent = await send(triton, [batch] * 20)
    await counted(triton, before + 20)
    found = await seen(source, of)
    await source.stop()
    service_s = BASE_S + PER_ITEM_S * batch
    assert set(sent.statuses) == {200}
    assert found.batch.value == pytest.approx(batch)
    # The model sleeps for the service time; a busy machine adds to it and cannot take away.
    assert found.service_s.value is not None
    assert service_s <= found.service_s.value <= sent.seconds / 20
    assert found.queue_s.value is not None
    assert 0 <= found.queue_s.value < found.service_s.value
    assert found.completed_rps.value == pytest.approx(sent.rate_rps, rel=0.3)
    assert found.failed_rps.value == 0.0
    assert found.busy_ratio.value == pytest.approx((found.completed_rps.value or 0) * found.service_s.value, rel=0.1)
    assert found.gpu_utilization_ratio is Signal.ABSENT, "there is no GPU"


async def test_a_mix_has_the_mean_batch(triton: TritonProcess) -> None:
    """Sizes 1, 3 and 8 in turn: the batch is 4, the service time that of a batch of 4, as it is affine."""
    source, of = scrape(), route(endpoint(triton))
    await seen(source, of)
    before = await count(triton)
    sent = await send(triton, [1, 3, 8] * 8)
    await counted(triton, before + 24)
    found = await seen(source, of)
    await source.stop()
    assert found.batch.value == pytest.approx(4.0)
    assert found.service_s.value is not None
    assert BASE_S + PER_ITEM_S * 4 <= found.service_s.value <= sent.seconds / 24


async def test_failures_are_not_completions(triton: TritonProcess) -> None:
    """Requests that the model refuses are failed_rps, and leave the means of the others alone."""
    source, of = scrape(), route(endpoint(triton))
    await seen(source, of)
    before = await count(triton)
    assert set((await send(triton, [2] * 10)).statuses) == {200}
    assert 200 not in (await send(triton, [2] * 5, fail=True)).statuses
    await counted(triton, before + 10)
    await counted(triton, 5, "nv_inference_request_failure")
    found = await seen(source, of)
    await source.stop()
    assert found.failed_rps.value is not None
    assert found.completed_rps.value == pytest.approx(2 * found.failed_rps.value)


@asynccontextmanager
async def in_flight(triton: TritonProcess, model: TritonModel, count: int) -> AsyncIterator[None]:
    """`count` requests at once, awaited in the end."""
    async with aiohttp.ClientSession() as session:
        tasks = [asyncio.create_task(triton.infer(session, 1, model.name)) for _ in range(count)]
        yield
        assert await asyncio.gather(*tasks) == [200] * count


async def test_pending_leads_what_completions_tell_later(triton: TritonProcess) -> None:
    """Requests that wait show in `pending` while nothing has completed; their waiting shows once they have."""
    source, of = scrape(), route(endpoint(triton), model=SLOW.name)
    await seen(source, of)
    async with in_flight(triton, SLOW, 5):

        async def all_there() -> bool:
            found = await seen(source, of)
            return found.pending.value == 4.0

        await until(all_there, "four requests wait behind the one that runs")
    found = await seen(source, of)
    await source.stop()
    assert found.pending.value == 0.0
    assert found.queue_s.value is not None
    assert found.queue_s.value > 1.0, "they waited 0, 1, 2, 3 and 4 s"
    assert found.service_s.value is not None
    assert 1.0 <= found.service_s.value < found.queue_s.value


async def test_busy_counts_a_dynamic_batch_once(triton: TritonProcess) -> None:
    """Requests that Triton runs together are each credited the whole time: busy is the time of the executions."""
    # Said to be eight servers, so that the limit of 1 is far from both what is right and what would be wrong.
    source, of = scrape(), route(replace(endpoint(triton), concurrency=8), model=TOGETHER.name)
    await seen(source, of)
    for _ in range(5):
        async with in_flight(triton, TOGETHER, 8):
            pass
    found = await seen(source, of)
    await source.stop()
    assert found.completed_rps.value is not None
    credited = found.completed_rps.value * 0.1
    assert credited > 1.5, "more work is credited than one server has time for"
    assert found.busy_ratio.value is not None
    assert 0 < 8 * found.busy_ratio.value < 1.1 < credited


async def test_instances_share_the_load(triton: TritonProcess) -> None:
    """Two instances serve two requests at once; busy is per instance."""
    source, of = scrape(), route(replace(endpoint(triton), concurrency=2), model=PAIR.name)
    await seen(source, of)
    await send(triton, [1] * 20, PAIR)
    two = await seen(source, of)
    one = await seen(source, route(endpoint(triton), model=PAIR.name))
    await source.stop()
    assert two.busy_ratio.value is not None
    assert one.busy_ratio.value == pytest.approx(2 * two.busy_ratio.value, rel=0.2)


@pytest.mark.prometheus
async def test_prometheus_tells_the_same_of_triton(triton: TritonProcess, tmp_path: Path) -> None:
    """While requests of one size go on, a real Prometheus and the direct scrape agree with what is sent."""
    of = route(endpoint(triton), model=STEADY.name)
    success = f'nv_inference_request_success{{model="{STEADY.name}"}}[3s]'
    async with PrometheusProcess(tmp_path / "prometheus", {"triton": [triton.metrics]}, 0.25) as prometheus:
        direct, through = scrape(3.0), PrometheusSignals(prometheus.url, MonotonicClock(), 3.0)
        sending = asyncio.create_task(_send_until_cancelled(triton, 4))
        try:
            await prometheus.until(f"min_over_time({success}) > 20")
            await prometheus.until(f"count_over_time({success}) > 9")
            await seen(direct, of)
            began_s = time.monotonic()

            async def two_seconds() -> bool:
                return time.monotonic() - began_s > 2.0

            await until(two_seconds, "two seconds of requests")
            one, other = await seen(through, of), await seen(direct, of)
        finally:
            sending.cancel()
        await direct.stop()
        await through.stop()
    for found in (one, other):
        assert found.batch.value == pytest.approx(4.0)
        assert found.service_s.value is not None
        assert found.service_s.value >= BASE_S + 4 * PER_ITEM_S
        assert found.completed_rps.value is not None
        assert found.busy_ratio.value == pytest.approx(found.completed_rps.value * found.service_s.value, rel=0.1)
    assert one.service_s.value == pytest.approx(other.service_s.value, rel=0.5)
    assert one.completed_rps.value == pytest.approx(other.completed_rps.value, rel=0.5)
    assert one.failed_rps.value == 0.0


async def _send_until_cancelled(triton: TritonProcess, batch: int) -> None:
    while True:
        await send(triton, [batch] * 10, STEADY)
