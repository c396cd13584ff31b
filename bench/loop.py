"""From a decision, and from a signal, to weights in force in a real Envoy; and what changing them costs.

    python bench/loop.py [--json] [--quick] [--prometheus] [--only apply|signal|changes]

Three parts. `apply`: a plan that sends everything to the other of two servers; in force when Envoy has acknowledged it,
proven by the next request. `signal`: a real `meshctl run` under load, another tenant takes most of one GPU at a random
moment of the tick; in force when Envoy's own dump has the smaller weight. `changes`: a hundred changes in a row under
load; requests that fail. Times include what the measuring itself takes on the same cores.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import aiohttp
import numpy as np
import orjson
import typer
import uvloop

if not __package__:  # run as a file: the project's root is not on the path then
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.report import Figure, JsonOption, Report, at_most, progress, quantiles, quiet_logs
from meshctl.errors import MeshctlError
from meshctl.openfiles import allow_many_connections
from meshctl.sim.envoy import EnvoyProcess, gateway
from meshctl.sim.faults import Faults
from meshctl.sim.fleet import FleetProcess, ServerInfo
from meshctl.sim.load import Load, LoadConfig
from meshctl.sim.reference import MIX, MODEL, SIZES, capacity_rps, fleet_config
from meshctl.sim.versus import MESHCTL, LocalStand, endpoint_of, stand
from tests.harness.envoy import Backends, plan, request, route_plan, xds_server
from xds.server import XdsServer

APPLY_MS, SIGNAL_S = 10.0, 2.5
APPLIES, SIGNALS, CHANGES = 300, 20, 100
SIGNAL_LOAD, CHANGE_LOAD = 0.4, 0.5
FOREIGN = Faults(foreign_ratio=0.7)
"""Another tenant takes this much of the GPU."""
REACTED = 0.9
"""The loop has reacted when the weight is below this part of what it was. The load is steady and the weights settled
before, so that noise moves it by less."""
SYNC_S, REACT_S, RECOVER_S = 30.0, 30.0, 60.0
_LOOK_S = 0.02
_DUMP = "/config_dump?include_eds&resource=dynamic_endpoint_configs"


class Part(StrEnum):
    APPLY = "apply"
    SIGNAL = "signal"
    CHANGES = "changes"


# ------------------------------------------------------------------------------------------- a decision -> in force


async def bench_apply(report: Report, repeats: int) -> None:
    """All traffic from one server to the other and back."""
    async with Backends(2) as backends, xds_server() as server:
        a, b = backends.addresses
        tables = [route_plan("bench/r", {a: first, b: 1000 - first}, sizes=SIZES) for first in (1000, 0)]
        server.apply(plan(tables[0]))
        with TemporaryDirectory(prefix="meshctl-bench-") as directory:
            async with (
                EnvoyProcess(Path(directory), gateway(server.address, "bench")) as envoy,
                aiohttp.ClientSession() as session,
            ):
                await server.wait_synced(SYNC_S)
                acknowledged, proven, stale = [], [], 0
                for step in range(1, repeats + 1):
                    start_s = time.perf_counter()
                    server.apply(plan(tables[step % 2]))
                    await server.wait_synced(SYNC_S)
                    acknowledged.append(1e3 * (time.perf_counter() - start_s))
                    while (await request(session, envoy.url))[1] != backends.addresses[step % 2]:
                        stale += 1
                    proven.append(1e3 * (time.perf_counter() - start_s))
                    await asyncio.sleep(_LOOK_S)  # a pace, so that each change begins at rest
    limits = {0.99: at_most(APPLY_MS)}
    report.add(
        *quantiles("decision -> acknowledged by Envoy", acknowledged, "ms", limits),
        *quantiles("decision -> first request answered by it", proven, "ms", limits, "the request included"),
        Figure("requests on the old weights after the acknowledgement", stale, "requests"),
    )


# --------------------------------------------------------------------------------------------- a signal -> in force


async def bench_signal(report: Report, repeats: int, *, with_prometheus: bool) -> None:
    """A foreign tenant on one GPU after the other, at random moments; from the command to Envoy's dump."""
    made: LocalStand
    rate_rps = SIGNAL_LOAD * capacity_rps()
    async with stand(rate_rps, with_prometheus=with_prometheus, peers=(), say=progress) as made:
        times = await _reactions(made, repeats)
    source = "Prometheus" if with_prometheus else "scrape"
    note = f"{SIGNAL_LOAD:.0%} load, a tenant takes {FOREIGN.foreign_ratio:.0%}; {source} every 1 s"
    limit = {0.99: at_most(SIGNAL_S), 1.0: at_most(SIGNAL_S)}
    report.add(*quantiles(f"signal -> weights in force ({source})", times, "s", limit, note))


async def _reactions(made: LocalStand, repeats: int) -> list[float]:
    random = np.random.default_rng(1)
    times: list[float] = []
    async with made.loaded(MESHCTL, 1):
        await made.settled()
        for turn in range(repeats):
            server = _taking_part(made, await _weights(made.envoy))[turn % 3]
            await asyncio.sleep(float(random.uniform(0, 1)))  # the phase of the tick is what is drawn
            before = (await _weights(made.envoy))[endpoint_of(server)]
            start_s = time.perf_counter()
            await made.set_faults(server, FOREIGN)
            await _until_below(made.envoy, server, REACTED * before)
            times.append(time.perf_counter() - start_s)
            progress(f"{server.name}: {times[-1]:.2f} s")
            await made.set_faults(server, Faults())
            await made.settled(RECOVER_S)
    return times


def _taking_part(made: LocalStand, weights: Counter[str]) -> list[ServerInfo]:
    """The servers, those with the largest weights first: one that gets next to nothing has nothing to lose."""
    return sorted(made.fleet.info.servers, key=lambda server: (-weights[endpoint_of(server)], server.name))


async def _until_below(envoy: EnvoyProcess, server: ServerInfo, most: float) -> None:
    """Returns when Envoy's weight of `server` is at most `most`. Raises MeshctlError after `REACT_S`."""
    weight: int | None = None
    try:
        async with asyncio.timeout(REACT_S):
            while True:
                weight = (await _weights(envoy))[endpoint_of(server)]
                if weight <= most:
                    return
                await asyncio.sleep(_LOOK_S)  # Envoy's admin interface is all there is to wait on
    except TimeoutError as late:
        raise MeshctlError(f"{server.name}: weight {weight}, not below {most:g} after {REACT_S:g} s") from late


async def _weights(envoy: EnvoyProcess) -> Counter[str]:
    """Endpoint -> the sum of its weights in all clusters, as Envoy balances by them; absent is 0."""
    found: Counter[str] = Counter()
    for config in orjson.loads(await envoy.get(_DUMP))["configs"]:
        for locality in config["endpoint_config"].get("endpoints", []):
            for member in locality["lb_endpoints"]:
                address = member["endpoint"]["address"]["socket_address"]
                name = f"{address['address']}:{address['port_value']}"
                found[name] += _weight(member)
    return found


def _weight(member: Mapping[str, Any]) -> int:
    """Drained endpoints stay in the assignment, marked, so that their connections end in peace."""
    return 0 if member.get("health_status") in {"DRAINING", "UNHEALTHY"} else int(member["load_balancing_weight"])


# ------------------------------------------------------------------------------------------------ changes under load


async def bench_changes(report: Report, changes: int) -> None:
    """Random weights, some zero, endpoints that come and go, one change after the other's acknowledgement."""
    with TemporaryDirectory(prefix="meshctl-bench-") as directory:
        async with FleetProcess(fleet_config()) as fleet, xds_server() as server:
            addresses = [endpoint_of(s) for s in fleet.info.servers]
            random = np.random.default_rng(1)
            server.apply(plan(route_plan("bench/r", random_weights(random, addresses), sizes=SIZES)))
            async with EnvoyProcess(Path(directory), gateway(server.address, "bench")) as envoy:
                config = LoadConfig((envoy.url,), CHANGE_LOAD * capacity_rps(), MIX, float("inf"), model=MODEL)
                load = Load(config)
                sending = asyncio.create_task(load.run())
                await _change(server, addresses, random, changes)
                load.stop()
                result = await sending
    note = f"{result.requests} requests at {result.rate_rps:.0f}/s during {changes} changes in {result.seconds:.0f} s"
    report.add(Figure(f"failed requests during {changes} changes", result.failed, "requests", at_most(0), note))
    report.details["changes"] = {"failures": dict(result.failures), "p99_ms": result.p99_ms}


async def _change(server: XdsServer, addresses: list[str], random: np.random.Generator, changes: int) -> None:
    for step in range(changes):
        some = addresses if step % 5 else addresses[: len(addresses) - 1 - int(random.integers(4))]
        server.apply(plan(route_plan("bench/r", random_weights(random, some), sizes=SIZES)))
        await server.wait_synced(SYNC_S)
        await asyncio.sleep(0.1)  # a pace: requests are to be under way at each change


def random_weights(random: np.random.Generator, addresses: list[str]) -> dict[str, int]:
    """A third of them zero, at least one not."""
    weights = random.integers(1, 200, len(addresses)) * (random.random(len(addresses)) > 1 / 3)
    weights[0] += 1
    return dict(zip(addresses, weights.tolist(), strict=True))


# --------------------------------------------------------------------------------------------------------------- main


def main(
    as_json: JsonOption = False,
    quick: Annotated[bool, typer.Option("--quick", help="Few repeats: does it work?")] = False,
    prometheus: Annotated[bool, typer.Option("--prometheus", help="Signals through a Prometheus, too.")] = False,
    only: Annotated[list[Part] | None, typer.Option("--only", help="Parts to run; all by default.")] = None,
) -> None:
    """Measure the loop and print it."""
    allow_many_connections()
    quiet_logs()
    report = Report("loop")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_bench(report, only or list(Part), quick=quick, prometheus=prometheus))
    report.show(as_json=as_json)


async def _bench(report: Report, parts: list[Part], *, quick: bool, prometheus: bool) -> None:
    if Part.APPLY in parts:
        await bench_apply(report, 20 if quick else APPLIES)
    if Part.CHANGES in parts:
        await bench_changes(report, 10 if quick else CHANGES)
    if Part.SIGNAL in parts:
        for with_prometheus in (False, True) if prometheus else (False,):
            await bench_signal(report, 1 if quick else SIGNALS, with_prometheus=with_prometheus)


if __name__ == "__main__":
    typer.run(main)
