"""The scheduler extender on a large cluster: what a Filter takes, and what the process weighs.

    python bench/extender.py [--json] [--quick] [--only names|nodes]

The whole `meshctl extender`, as users start it, over real sockets from another process. The API server is a stand-in
(bench/apistub.py): a real one with 65,000 objects needs more than this machine has. Each Filter is for another pod, and
each pod is then bound where the Filter said, so that every decision finds the cluster changed, as the scheduler's do.
With whole Node objects the limit is measured in the same run, in turns: a server that receives and parses the same
requests and does nothing else. Linux only: sizes are /proc's.
"""

from __future__ import annotations

import asyncio
import http.client
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import orjson
import typer

if not __package__:  # run as a file: the project's root is not on the path then
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.apistub import GPUS, Size, node, node_name, pending_pod
from bench.memory import cpu_s, memory_mb
from bench.report import Figure, JsonOption, Report, at_most, progress, quantiles, quiet_logs
from tests.harness.tools import DEADLINE_S, ToolProcess, holds_by, page

P50_MS, P99_MS, MEMORY_MB, OVER_LIMIT = 2.0, 5.0, 400.0, 1.10
FULL, QUICK = Size(5000, 20_000, 2500), Size(200, 800, 60)
WARM_UP = 20
"""Requests before those that count: the caches of a process that has run for a while."""
WHOLE, QUICK_WHOLE = 30, 4
"""Filters with whole Node objects: half a second each."""


class Part(StrEnum):
    NAMES = "names"
    NODES = "nodes"


@dataclass(frozen=True, slots=True)
class Scale:
    size: Size
    whole: int

    def __str__(self) -> str:
        size = self.size
        return f"{size.nodes} nodes x {GPUS} GPUs, {size.pods} pods"


class _Python(ToolProcess):
    """A server of this interpreter's."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def pid(self) -> int:
        assert self.process is not None  # noqa: S101 (asked for while it runs)
        return self.process.pid


class ApiProcess(_Python):
    name = "apistub"

    def __init__(self, directory: Path, size: Size) -> None:
        super().__init__(directory)
        self._size = size

    @property
    def ready_url(self) -> str:
        return f"{self.url}/api/v1/services"

    def command(self) -> Sequence[str | Path]:
        return (sys.executable, "-m", "bench.apistub", str(self.ports[0]), *map(str, self._size))

    def kubeconfig(self) -> Path:
        path = self.directory / "kubeconfig"
        names = {"name": "stub", "context": {"cluster": "stub", "user": "stub"}}
        cluster, user = {"name": "stub", "cluster": {"server": self.url}}, {"name": "stub", "user": {"token": "t"}}
        config = {"clusters": [cluster], "users": [user], "contexts": [names], "current-context": "stub"}
        path.write_bytes(orjson.dumps({"apiVersion": "v1", "kind": "Config", **config}))  # JSON is YAML
        return path


class ReceivingProcess(_Python):
    name = "receiving"

    @property
    def ready_url(self) -> str:
        return self.url

    def command(self) -> Sequence[str | Path]:
        return (sys.executable, "-m", "bench.receiving", str(self.ports[0]))


class ExtenderProcess(_Python):
    name = "extender"
    deadline_s = 300.0
    """Beside others: 165 MB are made, listed and read."""

    def __init__(self, directory: Path, kubeconfig: Path) -> None:
        super().__init__(directory)
        self._kubeconfig = kubeconfig

    @property
    def ready_url(self) -> str:
        return f"{self.url}/readyz"

    def command(self) -> Sequence[str | Path]:
        listen = f"--listen=127.0.0.1:{self.ports[0]}"
        return (Path(sys.executable).with_name("meshctl"), "extender", f"--kubeconfig={self._kubeconfig}", listen)

    def reservations(self) -> float:
        """Pods that it bound and has not seen bound yet."""
        lines = (page(f"{self.url}/metrics") or "").splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("meshctl_extender_reservations")))


class Scheduler:
    """The other end: one connection that stays open, one request at a time."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)

    def ask(self, verb: str, body: bytes) -> tuple[bytes, float]:
        """The answer, and how long it took, in ms."""
        began_s = time.perf_counter()
        self._connection.request("POST", f"/{verb}", body=body)
        answer = self._connection.getresponse().read()
        return answer, 1e3 * (time.perf_counter() - began_s)

    def bind(self, pod: dict[str, Any], where: str) -> float:
        """In ms."""
        names = pod["metadata"]
        asked = {"PodName": names["name"], "PodNamespace": names["namespace"], "PodUID": names["uid"], "Node": where}
        answer, took_ms = self.ask("bind", orjson.dumps(asked))
        if error := orjson.loads(answer)["Error"]:
            raise RuntimeError(f"bind {names['name']} to {where}: {error}")
        return took_ms

    def close(self) -> None:
        self._connection.close()


# ------------------------------------------------------------------------------------------------------- names alone


def bench_names(report: Report, extender: ExtenderProcess, scale: Scale) -> None:
    """A Filter by names, then a Bind, for each pending pod."""
    names = [node_name(number) for number in range(scale.size.nodes)]
    scheduler, filters, binds, none = Scheduler(extender.ports[0]), [], [], 0
    used_s = -cpu_s(extender.pid)
    for number in range(scale.size.pending):
        pod = pending_pod(number)
        answer, took_ms = scheduler.ask("filter", orjson.dumps({"Pod": pod, "Nodes": None, "NodeNames": names}))
        found = orjson.loads(answer)
        filters.append(took_ms)
        if found["NodeNames"]:
            binds.append(scheduler.bind(pod, found["NodeNames"][0]))
        else:
            none += 1
    scheduler.close()
    used_s += cpu_s(extender.pid)
    note = f"{scale}; nodeCacheCapable; another pod each time, bound before the next"
    limits = {0.5: at_most(P50_MS), 0.99: at_most(P99_MS)}
    report.add(*quantiles("Filter by names", filters[WARM_UP:], "ms", limits, note))
    report.add(*quantiles("Bind", binds[WARM_UP:], "ms", {0.99: None}, f"{scale}; the API server's part included"))
    of_both_ms = 1e3 * used_s / scale.size.pending
    report.add(
        Figure("Filter and Bind, CPU of the extender", of_both_ms, "ms", note="less at the mercy of a busy machine")
    )
    report.add(Figure("pods that found no node", none, "pods", note=f"of {scale.size.pending}"))
    holds_by(lambda: extender.reservations() == 0, "every binding was seen")


# --------------------------------------------------------------------------------------------------- whole Node objects


def bench_nodes(report: Report, extender: ExtenderProcess, limit: ReceivingProcess, scale: Scale) -> None:
    """The same requests to both, in turns."""
    nodes = [node(number) for number in range(scale.size.nodes)]
    body = orjson.dumps({"Pod": pending_pod(0), "Nodes": {"metadata": {}, "items": nodes}, "NodeNames": None})
    servers = Scheduler(extender.ports[0]), Scheduler(limit.ports[0])
    times = [[server.ask("filter", body)[1] for server in servers] for _ in range(scale.whole)]
    ours, least = ([pair[which] for pair in times[1:]] for which in (0, 1))
    note = f"{scale}; requests of {len(body) / 1e6:.0f} MB"
    ratio = float(np.median(ours) / np.median(least))
    report.add(*quantiles("Filter with whole nodes", ours, "ms", {0.99: None}, note))
    report.add(*quantiles("receive and parse the same", least, "ms", {0.99: None}, note))
    report.add(Figure("whole nodes: Filter / receive and parse", ratio, "", at_most(OVER_LIMIT), "of the medians"))
    for server in servers:
        server.close()


# --------------------------------------------------------------------------------------------------------------- main


def main(
    as_json: JsonOption = False,
    quick: Annotated[bool, typer.Option("--quick", help="A small cluster: does it work?")] = False,
    only: Annotated[list[Part] | None, typer.Option("--only", help="Parts to run; all by default.")] = None,
) -> None:
    """Measure `meshctl extender` and print it."""
    quiet_logs()
    report = Report("extender")
    scale = Scale(QUICK, QUICK_WHOLE) if quick else Scale(FULL, WHOLE)
    with tempfile.TemporaryDirectory(prefix="meshctl-") as directory:
        asyncio.run(_bench(report, Path(directory), only or list(Part), scale))
    report.show(as_json=as_json)


async def _bench(report: Report, directory: Path, parts: Sequence[Part], scale: Scale) -> None:
    async with ApiProcess(directory / "api", scale.size) as api:
        began_s = time.monotonic()
        async with ExtenderProcess(directory / "extender", api.kubeconfig()) as extender:
            started_s = time.monotonic() - began_s
            report.add(Figure("start to ready", started_s, "s", note=f"{scale}; all listed, and the Lease taken"))
            at_first_mb, _ = memory_mb(extender.pid)
            if Part.NAMES in parts:
                progress("Filter by names ...")
                await asyncio.to_thread(bench_names, report, extender, scale)
            _memory(report, extender, at_first_mb, scale)
            if Part.NODES in parts:
                progress("Filter with whole nodes ...")
                async with ReceivingProcess(directory / "receiving") as limit:
                    await asyncio.to_thread(bench_nodes, report, extender, limit, scale)


def _memory(report: Report, extender: ExtenderProcess, at_first_mb: float, scale: Scale) -> None:
    now_mb, highest_mb = memory_mb(extender.pid)
    report.add(
        Figure("resident when ready", at_first_mb, "MB", at_most(MEMORY_MB), str(scale)),
        Figure("resident after the bindings", now_mb, "MB", at_most(MEMORY_MB), str(scale)),
        Figure("highest resident", highest_mb, "MB", note="listing included; without whole Node objects"),
    )


if __name__ == "__main__":
    typer.run(main)
