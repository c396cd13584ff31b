"""The load generator against real servers: what it counts, and that nothing is lost or hidden."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import orjson
import pytest
from aiohttp import web

from meshctl.sim.faults import Faults
from meshctl.sim.listener import Listener
from meshctl.sim.load import Load, LoadConfig, arrivals, run_load
from tests.harness import fleet as harness
from tests.harness.tools import until

MIX = ((1, 0.8), (8, 0.2))


def config(*urls: str, **fields: float | str | tuple[str, ...]) -> LoadConfig:
    """A second of 100 requests/s."""
    settings: dict[str, object] = {"rate_rps": 100.0, "mix": MIX, "seconds": 1.0, "model": harness.MODEL, **fields}
    return LoadConfig(urls, **settings)  # type: ignore[arg-type]  # the settings of many types of one test


@asynccontextmanager
async def server(handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """URL of a server that answers with `handler`."""
    listener = Listener(handler, "127.0.0.1", 0)
    await listener.open()
    try:
        yield f"http://127.0.0.1:{listener.port}/infer"
    finally:
        await listener.close()


async def test_every_request_is_sent_once_with_its_size_and_counted() -> None:
    """What the server saw is what was drawn, and what the result says."""
    found = config("http://127.0.0.1:1", warmup_s=0.3)
    drawn = list(arrivals(found))
    async with harness.running(harness.config()) as (_, [client]):
        result = await run_load(config(client.base, warmup_s=0.3))
        seen = await client.metrics()

    assert seen["nv_inference_request_success"] == len(drawn)
    assert seen["nv_inference_count"] == sum(MIX[size][0] for _, size, _ in drawn)
    assert result.requests == sum(at >= 0.3 for at, _, _ in drawn)
    assert (result.failed, result.failures, result.seed) == (0, {}, 1)
    assert list(result.goodput_by_size) == ["1", "8"]
    assert result.rate_rps == pytest.approx(result.requests / result.seconds)
    assert result.p50_ms is not None
    assert result.p999_ms is not None
    assert 1.0 <= result.p50_ms <= result.p999_ms


async def test_a_queue_is_counted_from_the_time_a_request_was_due() -> None:
    """A server twice too slow has latencies up to the run's own length: sending does not wait for it."""
    slow = {"gpu": "K40", "service": {"base": "20ms", "perItem": "0s"}}
    async with harness.running(harness.config(slow)) as (_, [client]):
        result = await run_load(config(client.base))

    assert result.failed == 0
    assert result.p50_ms is not None
    # after half the time 50 have come and 25 are answered: 25 * 20 ms
    assert result.p50_ms > 250
    assert result.goodput is not None
    assert result.goodput < 0.6


async def test_what_the_headers_say_is_configurable() -> None:
    """Host, several headers at once, and the legacy form."""
    seen: list[tuple[str | None, str | None, str | None]] = []

    async def note(request: web.BaseRequest) -> web.Response:
        seen.append(
            (request.headers.get("batch_size"), request.headers.get("NV-InferRequest"), request.headers["Host"])
        )
        return web.Response()

    async with server(note) as url:
        await run_load(config(url, headers=("batch_size", "NV-InferRequest"), host="models.example"))

    assert set(seen) == {(str(b), f"batch_size: {b}", "models.example") for b, _ in MIX}


async def test_a_body_carries_the_size_to_servers_that_read_it_there() -> None:
    """The batch of the body counts at the server."""

    def body(batch: int) -> bytes:
        return orjson.dumps({"inputs": [{"name": "INPUT0", "shape": [batch, 1], "datatype": "FP32", "data": []}]})

    async with harness.running(harness.config()) as (_, [client]):
        found = LoadConfig((client.base,), 50.0, ((7, 1.0),), 0.5, headers=(), model=harness.MODEL, body=body)
        result = await run_load(found)

        assert (await client.metrics())["nv_inference_count"] == 7 * result.requests


async def test_failures_are_told_apart_and_are_no_latencies() -> None:
    """500s at once do not make the percentiles better; goodput counts them as bad."""
    async with harness.running(harness.config()) as (fleet, [client]):
        await fleet.set_faults("v100-0", Faults(error_ratio=1.0))
        result = await run_load(config(client.base))

    assert result.failures == {"http_500": result.requests}
    assert (result.failed, result.goodput, result.p50_ms) == (result.requests, 0.0, None)


async def test_nobody_there_is_refused() -> None:
    """A port without a server."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        result = await run_load(config(f"http://127.0.0.1:{held.getsockname()[1]}"))

    assert result.failures == {"refused": result.requests}


async def test_what_is_never_answered_fails_by_its_time_out() -> None:
    """The run ends by itself."""
    async with harness.running(harness.config()) as (fleet, [client]):
        await fleet.set_faults("v100-0", Faults(hang=True))
        result = await run_load(config(client.base, timeout_s=0.5))

    assert result.failures == {"timeout": result.requests}


async def test_a_server_that_dies_under_a_request_is_a_disconnect() -> None:
    """The connection ends without an answer."""
    async with harness.running(harness.config()) as (fleet, [client]):
        await fleet.set_faults("v100-0", Faults(hang=True))
        task = asyncio.create_task(run_load(config(client.base)))

        async def waiting() -> bool:
            return (await client.metrics())["nv_inference_pending_request_count"] >= 10

        await until(waiting, "ten requests at the server")
        await fleet.set_faults("v100-0", Faults(crash=True))
        result = await task

    assert result.failed == result.requests
    assert result.failures["disconnected"] + result.failures.get("reset", 0) >= 10


async def test_a_run_can_be_watched_and_stopped() -> None:
    """An endless run has statistics of its last seconds; stopped, it reports what it has sent."""
    async with harness.running(harness.config()) as (_, [client]):
        load = Load(config(client.base, seconds=math.inf))
        task = asyncio.create_task(load.run())

        async def enough() -> bool:
            return load.window(60.0).requests >= 20

        await until(enough, "twenty answers")
        assert load.window(0.0).requests == 0
        load.stop()
        result = await task

    assert result.requests >= 20
    assert result.failed == 0
    assert math.isfinite(result.rate_rps)


async def test_a_rate_beyond_the_generators_own_still_sends_and_ends() -> None:
    """Behind its schedule it sends without pause, answers are taken in meanwhile, and the lag shows."""

    async def answer(_: web.BaseRequest) -> web.Response:
        return web.Response()

    async with server(answer) as url:
        result = await run_load(config(url, rate_rps=200_000.0, seconds=0.002))

    assert result.requests == len(list(arrivals(config(url, rate_rps=200_000.0, seconds=0.002))))
    assert result.failed == 0
    assert result.send_lag_p99_ms is not None
    assert result.send_lag_p99_ms > 2
