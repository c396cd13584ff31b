"""A thousand clients of one xDS server: what a change takes until all have acknowledged it, what it takes when they
come back at once, and what an idle one weighs.

The server is a process of its own and so are the clients, each with a connection of its own; all of them share the
machine's cores. The same is done with a server that only moves the same bytes (bench.adsserver --bare): the limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.lines import Child
from bench.memory import memory_mb
from bench.report import Figure, Report, at_most, progress

P50_MS, P99_MS, RECONNECT_S, IDLE_KB = 100.0, 500.0, 5.0, 60.0
ROUTES, ENDPOINTS = 10, 100
"""Of a route every weight changes: 4 load assignments, 11 kB."""
CLIENT_PROCESSES = 1
"""The server has a core and they have one: with more of them they take the server's, and it is they that are timed."""
REST_S = 0.1
"""Each change begins at rest."""
SYNC_S = 120.0


@dataclass(slots=True)
class Found:
    """Of one kind of server."""

    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    """Of the streams, for each change."""
    cpu_us: float = float("nan")
    """The server's, for each stream and change."""
    idle_kb: float = float("nan")
    used_kb: float = float("nan")
    """The same after the changes."""
    again_s: float = float("nan")
    """Until all were in sync after they came back with what they had."""
    new_s: float = float("nan")
    """Until all were in sync after they came back with nothing."""
    missing: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    """Streams that ended when they should not have, by status."""


@dataclass(slots=True)
class Fleet:
    """A server and its clients."""

    server: Child
    clients: list[Child]
    streams: int

    async def all(self, what: str) -> list[Mapping[str, Any]]:
        return await asyncio.gather(*(child.ask(what) for child in self.clients))

    async def come(self, found: Found) -> float:
        """All at once; in s until all are in sync."""
        waiting = asyncio.create_task(self.server.ask("synced", streams=self.streams, timeout_s=SYNC_S))
        await self.all("open")
        answer = await waiting
        if not answer["all"]:
            found.missing += max(1, self.streams - answer["connected"])
        for tally in await self.all("tally"):
            for status, count in tally["ends"].items():
                found.refused[status] = found.refused.get(status, 0) + count
        return float(answer["s"])

    async def leave(self) -> None:
        await self.all("close")
        await self.server.ask("gone")


@asynccontextmanager
async def _fleet(node: Path, streams: int, options: list[str], delta: list[str]) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(
            Child("bench.adsserver", "0", str(ROUTES), str(ENDPOINTS), *options, *delta)
        )
        share = -(-streams // CLIENT_PROCESSES)
        clients = [
            await stack.enter_async_context(
                Child(
                    "bench.adsclients",
                    server.hello["address"],
                    str(first),
                    str(min(share, streams - first)),
                    str(node),
                    *delta,
                )
            )
            for first in range(0, streams, share)
        ]
        yield Fleet(server, clients, streams)


async def bench_fleet(report: Report, node: Path, streams: int, changes: int, settled_s: float) -> None:
    """State of the world, delta, and the limit. Memory is looked at `settled_s` after a burst: a server gives back what
    that took."""
    bare = await _measured(node, streams, changes, settled_s, bare=True, delta=False)
    ours = await _measured(node, streams, changes, settled_s, bare=False, delta=False)
    delta = await _measured(node, streams, changes, settled_s, bare=False, delta=True)
    note = f"{streams} streams, {changes} changes of {4 * ENDPOINTS} weights"
    for name, found in (("state of the world", ours), ("delta", delta)):
        _report(report, name, found, note)
    report.add(
        Figure("the same bytes by a bare server, p50", float(np.median(bare.p50_ms)), "ms", note=note),
        Figure("the same bytes by a bare server, p99", float(np.median(bare.p99_ms)), "ms", note=note),
        Figure("a bare server's CPU per stream and change", bare.cpu_us, "us"),
        Figure(
            "a bare server's memory per idle stream", bare.idle_kb, "kB", note=f"{bare.used_kb:.0f} after the changes"
        ),
        Figure("a bare server: all reconnected", bare.new_s, "s", note="and have asked; nothing is sent"),
        Figure("change, p99: ours / bare", float(np.median(ours.p99_ms) / np.median(bare.p99_ms)), "x"),
        Figure("change, CPU: ours / bare", ours.cpu_us / bare.cpu_us, "x"),
    )


def _report(report: Report, name: str, found: Found, note: str) -> None:
    refused = ", ".join(f"{count} {status}" for status, count in sorted(found.refused.items())) or "none"
    # Of the changes the median one: what another program did during one of them is not the server's.
    report.add(
        Figure(
            f"one change, all ACKed, p50 ({name})",
            float(np.median(found.p50_ms)),
            "ms",
            at_most(P50_MS),
            f"{note}; of the changes the median, worst {max(found.p50_ms):.0f} ms",
        ),
        Figure(
            f"one change, all ACKed, p99 ({name})",
            float(np.median(found.p99_ms)),
            "ms",
            at_most(P99_MS),
            f"{note}; of the changes the median, worst {max(found.p99_ms):.0f} ms",
        ),
        Figure(f"CPU of the server per stream and change ({name})", found.cpu_us, "us"),
        Figure(f"memory per idle stream ({name})", found.idle_kb, "kB", at_most(IDLE_KB), "all in sync"),
        Figure(f"memory per idle stream after the changes ({name})", found.used_kb, "kB"),
        Figure(
            f"all clients reconnect, with what they had ({name})",
            found.again_s,
            "s",
            at_most(RECONNECT_S),
            f"at once, until all are in sync; streams refused: {refused}",
        ),
        Figure(
            f"all clients reconnect, as new processes ({name})",
            found.new_s,
            "s",
            at_most(RECONNECT_S),
            "at once, each with a real Envoy's node; until all are in sync",
        ),
        Figure(f"clients refused for good ({name})", found.missing, "clients", at_most(0)),
    )


async def _measured(node: Path, streams: int, changes: int, settled_s: float, *, bare: bool, delta: bool) -> Found:
    progress(f"{streams} streams, {'delta' if delta else 'state of the world'}{', bare' if bare else ''} ...")
    found = Found()
    async with _fleet(node, streams, ["--bare"] * bare, ["--delta"] * delta) as fleet:
        before_mb, _ = memory_mb(fleet.server.pid)
        await fleet.come(found)
        await asyncio.sleep(settled_s)
        found.idle_kb = 1e3 * (memory_mb(fleet.server.pid)[0] - before_mb) / streams
        used_s = -(await fleet.server.ask("cpu"))["s"]
        for step in range(1, changes + 1):
            answer = await fleet.server.ask("change", step=step)
            found.p50_ms.append(float(np.quantile(answer["ms"], 0.5)))
            found.p99_ms.append(float(np.quantile(answer["ms"], 0.99)))
            await asyncio.sleep(REST_S)
        used_s += (await fleet.server.ask("cpu"))["s"]
        found.cpu_us = 1e6 * used_s / streams / changes
        await asyncio.sleep(settled_s)
        found.used_kb = 1e3 * (memory_mb(fleet.server.pid)[0] - before_mb) / streams
        await fleet.leave()
        found.again_s = await fleet.come(found)
        await fleet.leave()
        await fleet.all("forget")
        found.new_s = await fleet.come(found)
    return found
