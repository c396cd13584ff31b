"""The outside world of the loop, in memory, for its tests: manifests, metrics, proxies and time that a test sets.

Nothing of our own code is replaced: these implement the ports that adapters implement.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from meshctl.address import Address
from meshctl.controller.loop import Loop
from meshctl.model import (
    DataPlaneStatus,
    DesiredRoute,
    Endpoint,
    EndpointId,
    Plan,
    Problem,
    ProxyStatus,
    RouteId,
    RouteSpec,
    ServiceProfile,
    SizeClass,
)
from meshctl.ports import Desired, Observed

ANY_PORT = Address("127.0.0.1", 0)
DEADLINE_S = 30.0
"""Generous: a test that reaches it has failed, on any machine."""


def desired_route(name: str = "demo/resnet", endpoints: int = 2, **spec: Any) -> DesiredRoute:
    """A route over `endpoints` servers, two GPU products in turn."""
    products = ("V100", "T4")
    return DesiredRoute(
        spec=RouteSpec(
            id=RouteId(name),
            hosts=(f"{name.replace('/', '.')}.example",),
            model="resnet50",
            slo_s=1.0,
            percentile=0.99,
            headers=("x-batch-size",),
            sizes=(SizeClass("small", 1, 4, 1.0, 0.8), SizeClass("large", 5, 128, 64.0, 0.2)),
            **spec,
        ),
        endpoints=tuple(
            Endpoint(
                EndpointId(f"127.0.0.1:{9001 + i}"), "127.0.0.1", 9001 + i, products[i % 2], f"127.0.0.1:{9001 + i}"
            )
            for i in range(endpoints)
        ),
        profiles={"V100": ServiceProfile.affine(0.005, 0.0008), "T4": ServiceProfile.affine(0.01, 0.0018)},
    )


def routes(*found: DesiredRoute) -> dict[RouteId, DesiredRoute]:
    return {route.spec.id: route for route in found}


@dataclass
class MemorySource:
    """Manifests that a test writes with `put`."""

    current: Desired
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: bool = False

    def put(self, routes: Mapping[RouteId, DesiredRoute], *problems: Problem) -> None:
        self.current = Desired(routes, problems)
        self._changed.set()

    async def start(self) -> None: ...

    def desired(self) -> Desired:
        return self.current

    async def wait_changed(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    async def stop(self) -> None:
        self.stopped = True


@dataclass
class MemorySignals:
    """A metrics server that answers `current`, fails with `error`, or (`answers` cleared) hangs."""

    current: Observed = field(default_factory=lambda: Observed({}))
    error: Exception | None = None
    answers: asyncio.Event = field(default_factory=asyncio.Event)
    polls: int = 0
    stopped: bool = False

    def __post_init__(self) -> None:
        self.answers.set()

    async def poll(
        self, routes: Mapping[RouteId, DesiredRoute], proxies: tuple[str, ...], deadline_s: float
    ) -> Observed:
        self.polls += 1
        await self.answers.wait()  # a hang ignores the deadline: the worst an adapter can do
        if self.error is not None:
            raise self.error
        return self.current

    async def stop(self) -> None:
        self.stopped = True


@dataclass
class MemoryProxies:
    """Proxies that take what they are given. `writes` counts resources: one per route that is not as before."""

    current: DataPlaneStatus = field(default_factory=DataPlaneStatus)
    plans: list[Plan] = field(default_factory=list)
    writes: int = 0
    error: Exception | None = None
    stopped: bool = False
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def connect(self, count: int) -> None:
        proxies = tuple(ProxyStatus(f"proxy-{i}", "", synced=True) for i in range(count))
        self.current = DataPlaneStatus(proxies, version="1")
        self._changed.set()

    async def wait_changed(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def apply(self, plan: Plan) -> int:
        if self.error is not None:
            raise self.error
        before = self.plans[-1].routes if self.plans else {}
        changed = sum(before.get(r) is not p for r, p in plan.routes.items()) + len(before.keys() - plan.routes.keys())
        self.plans.append(plan)
        self.writes += changed
        return changed

    def status(self) -> DataPlaneStatus:
        return self.current

    async def stop(self) -> None:
        self.stopped = True


@dataclass
class ManualClock:
    """Moves when a test says so."""

    time_s: float = 1000.0

    def now_s(self) -> float:
        return self.time_s


@asynccontextmanager
async def started(loop: Loop) -> AsyncIterator[Loop]:
    """`loop`, after its first reconcile."""
    await loop.start()
    try:
        await loop.wait_for(lambda state: state.reconciles > 0, DEADLINE_S)
        yield loop
    finally:
        await loop.stop()


async def rounds(loop: Loop, count: int) -> None:
    """Wait for `count` more reconciles."""
    goal = loop.state().reconciles + count
    await loop.wait_for(lambda state: state.reconciles >= goal, DEADLINE_S)


class RunProcess:
    """A `meshctl run` child in its own process group, with what its log says it serves."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self.log = log
        self.xds = ""
        self.admin = ""

    def lines(self) -> list[dict[str, str]]:
        """The log: whole lines only."""
        return [orjson.loads(line) for line in self.log.read_bytes().split(b"\n")[:-1] if line.startswith(b"{")]

    async def end(self, number: signal.Signals) -> int:
        """Send `number` and wait for the exit status."""
        self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), DEADLINE_S)

    async def serving(self) -> None:
        """Return when the log says so."""
        while True:
            for line in self.lines():
                if line["event"] == "serving":
                    self.xds, self.admin = line["xds"], f"http://{line['admin']}"
                    return
            if self.process.returncode is not None:
                raise AssertionError(f"meshctl run ended with {self.process.returncode}:\n{self.log.read_text()}")
            await asyncio.sleep(0.05)  # the log is a file: there is nothing to wait on but its growth


def run_process(
    manifests: Path, state: Path, log: Path, *options: str
) -> contextlib.AbstractAsyncContextManager[RunProcess]:
    """`meshctl run` over a directory."""
    return run_with(log, "--manifests", str(manifests), "--state", str(state), *options)


@asynccontextmanager
async def run_with(
    log: Path, *options: str, program: Sequence[str | Path] = ("-m", "meshctl")
) -> AsyncIterator[RunProcess]:
    """`meshctl run` on free ports unless `options` say otherwise; killed in the end if it still runs. `program` stands
    for another version of meshctl."""
    command = [sys.executable, *program, "run", "--xds", "127.0.0.1:0", "--admin", "127.0.0.1:0", *options]
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(*command, stderr=stderr, start_new_session=True)
    child = RunProcess(process, log)
    try:
        async with asyncio.timeout(DEADLINE_S):
            await child.serving()
        yield child
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def api(controller: RunProcess, path: str, holds: Callable[[Any], bool] = bool) -> Any:
    """What GET /api/v1/`path` answers as soon as it is there and `holds`."""
    answer: Any = None
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_S)) as session:
        try:
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    async with session.get(f"{controller.admin}/api/v1/{path}") as response:
                        answer = await response.json()
                        if response.status == 200 and holds(answer):
                            return answer
                    await asyncio.sleep(0.05)  # another process: its API is all there is to wait on
        except TimeoutError as error:
            raise AssertionError(f"{path} stays {answer}; log:\n{controller.log.read_text()}") from error
