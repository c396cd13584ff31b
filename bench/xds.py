"""The xDS server in numbers: bytes, memory and time, alone, with a thousand clients, and in a real Envoy.

    python -m bench.xds [--json] [--streams N --endpoints N --routes N] [--quick] [--only bytes|fleet|envoy|changes]

Every number stands beside its limit, and beside what the same takes at least or elsewhere in the same run: encoding and
parsing beside the generated classes', a push to many streams beside a server that only moves the same bytes. Clients,
servers and proxies share the machine's cores. Linux only: sizes are /proc's.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
import uvloop

if not __package__:  # run as a file: its folder is on the path then, where this file would be the package xds
    sys.path[0] = str(Path(__file__).parents[1])

from bench.adsacks import Acks
from bench.adsbytes import bench_endpoints, bench_requests, bench_routes
from bench.adsdialogue import value_of
from bench.adsenvoy import bench_changes, bench_in_force, said_by_envoy
from bench.adsfleet import bench_fleet
from bench.report import JsonOption, Report, quiet_logs
from meshctl.openfiles import allow_many_connections


class Part(StrEnum):
    BYTES = "bytes"
    FLEET = "fleet"
    ENVOY = "envoy"
    CHANGES = "changes"


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of each."""

    streams: int
    endpoints: int
    routes: int
    encodings: int
    parses: int
    pushes: int
    decisions: int
    changes: int
    settled_s: float


FULL = Scale(1000, 10_000, 1000, encodings=50, parses=2000, pushes=40, decisions=200, changes=1000, settled_s=4.0)
QUICK = Scale(20, 500, 20, encodings=3, parses=20, pushes=3, decisions=4, changes=50, settled_s=0.1)
_NODE = 2
"""The field of a DiscoveryRequest that says who asks."""


def main(
    as_json: JsonOption = False,
    streams: Annotated[int | None, typer.Option(help="Clients of one server.")] = None,
    endpoints: Annotated[int | None, typer.Option(help="Of the one large load assignment.")] = None,
    routes: Annotated[int | None, typer.Option(help="Of the large plan.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Little of each: does it work?")] = False,
    only: Annotated[list[Part] | None, typer.Option("--only", help="Parts to run; all by default.")] = None,
) -> None:
    """Measure the xDS server and print it."""
    allow_many_connections()
    quiet_logs()
    base = QUICK if quick else FULL
    scale = replace(
        base, streams=streams or base.streams, endpoints=endpoints or base.endpoints, routes=routes or base.routes
    )
    report = Report("xds")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_bench(report, scale, only or list(Part)))
    report.show(as_json=as_json)


async def _bench(report: Report, scale: Scale, parts: list[Part]) -> None:
    if Part.BYTES in parts or Part.FLEET in parts:
        first, ack = await said_by_envoy()
    if Part.BYTES in parts:
        bench_endpoints(report, scale.endpoints, scale.encodings)
        bench_routes(report, scale.routes, scale.encodings)
        bench_requests(report, first, ack, scale.routes, scale.parses)
    if Part.FLEET in parts:
        with TemporaryDirectory(prefix="meshctl-bench-") as directory:
            node = Path(directory) / "node"
            node.write_bytes(value_of(first, _NODE))
            await bench_fleet(report, node, scale.streams, scale.pushes, scale.settled_s)
    if Part.ENVOY in parts:
        await bench_in_force(report, Acks.installed(), scale.routes, scale.decisions)
    if Part.CHANGES in parts:
        await bench_changes(report, scale.changes)


if __name__ == "__main__":
    typer.run(main)
