"""A thousand ModelRoutes and ten thousand endpoints on a real API server, a real istiod and a real gateway.

    python bench/cluster.py [--json] [--routes N] [--keep DIRECTORY]

Every route is meshed, so that each has six objects of Istio's; its backend is a Service with an EndpointSlice, Pods and
Nodes that are written as objects (there is no kubelet, and nobody sends requests). Signals come from a real Prometheus
that has none: of servers that do not exist a scrape would measure time-outs. Measured: a cold start to the first
decision and until everything is in force; then a minute in which nothing changes; then the same after a restart. Writes
are counted by the API server itself, and are those of everybody but for Leases and istiod's own ConfigMaps.
Linux only: sizes and CPU times are /proc's.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import numpy as np
import typer
import uvloop
from prometheus_client.parser import text_string_to_metric_families

if not __package__:  # run as a file: the project's root is not on the path then
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.memory import memory_mb
from bench.report import Figure, JsonOption, Report, at_most, progress, quiet_logs
from meshctl.adapters.kubernetes.client import Client, connect
from meshctl.api.units import format_duration
from meshctl.sim.reference import MODEL, SERVICE_S, SIZES
from tests.cluster.cluster import GATEWAY, Cluster
from tests.harness import manifests
from tests.harness.controller import RunProcess, run_with
from tests.harness.prometheus import PrometheusProcess

ROUTES, ENDPOINTS, NODES = 1000, 10, 100
NAMESPACE = "bench"
FIRST_DECISION_S, RECONCILE_MS, WRITES, MEMORY_MB = 10.0, 50.0, 0, 400.0
FLEET = tuple(gpu for gpu, count in zip(SERVICE_S, (3, 3, 2, 2), strict=True) for _ in range(count))
"""GPUs of one route."""
LOAD_RPS = 150.0
"""Of each route: some 40 % of its capacity."""
CREATES = 16
"""At once, while the cluster is filled."""
PROBE_S = 0.1
QUIET_S, STEADY_S, DEADLINE_S = 20.0, 60.0, 900.0
"""Settled is when nobody wrote for QUIET_S: the guard's dwell is 5 s."""
WRITING = ("APPLY", "POST", "PUT", "PATCH", "DELETE")
NOT_OURS = ("leases", "configmaps", "subjectaccessreviews", "tokenreviews")


# ---------------------------------------------------------------------------------------------- what is in the cluster


def _objects(routes: int) -> Iterable[Sequence[dict[str, Any]]]:
    """In groups of which each needs those before it."""
    yield [_node(number) for number in range(NODES)]
    yield [_profile(gpu) for gpu in SERVICE_S]
    yield [_pod(route, index) for route in range(routes) for index in range(ENDPOINTS)]
    yield [made for route in range(routes) for made in (_service(route), _slice(route))]
    yield [_route(route) for route in range(routes)]


def _object(api: str, kind: str, name: str, namespace: str = NAMESPACE, **more: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name, "labels": more.pop("labels", {})}
    if namespace:
        metadata["namespace"] = namespace
    return {"apiVersion": api, "kind": kind, "metadata": metadata, **more}


def _node(number: int) -> dict[str, Any]:
    gpus = list(SERVICE_S)
    zone = {"topology.kubernetes.io/region": "r", "topology.kubernetes.io/zone": f"z{number % 3}"}
    labels = {"nvidia.com/gpu.product": gpus[number % len(gpus)], **zone}
    return _object("v1", "Node", f"node-{number}", "", labels=labels)


def _node_of(route: int, index: int) -> str:
    """One with the GPU that endpoint `index` is to have."""
    gpus = list(SERVICE_S)
    return f"node-{(route * len(gpus)) % NODES + gpus.index(FLEET[index])}"


def _profile(gpu: str) -> dict[str, Any]:
    base_s, per_item_s = SERVICE_S[gpu]
    service = {"base": format_duration(base_s), "perItem": format_duration(per_item_s)}
    return _placed(manifests.profile(f"{MODEL}-{gpu.lower()}", model=MODEL, gpu=gpu, service=service))


def _placed(made: dict[str, Any]) -> dict[str, Any]:
    made["metadata"]["namespace"] = NAMESPACE
    return made


def _pod(route: int, index: int) -> dict[str, Any]:
    """As large as such pods are: probes, resources, environment."""
    probe = {"httpGet": {"path": "/v2/health/ready", "port": 8000}, "periodSeconds": 5}
    numbers = (("http", 8000), ("grpc", 8001), ("metrics", 8002))
    container = {
        "name": "triton",
        "image": "triton",
        "args": ["tritonserver", "--model-repository=/models", "--http-header-forward-pattern=x-.*"],
        "env": [{"name": f"SETTING_{number}", "value": "some value"} for number in range(10)],
        "resources": {"limits": {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"}},
        "readinessProbe": probe,
        "livenessProbe": probe,
        "ports": [{"name": name, "containerPort": port} for name, port in numbers],
    }
    labels = {"app": f"r{route:04}", "pod-template-hash": "5d4f8c7b9", "team": f"team-{route % 20}"}
    spec = {"nodeName": _node_of(route, index), "containers": [container]}
    return _object("v1", "Pod", f"r{route:04}-5d4f8c7b9-{index:05}", labels=labels, spec=spec)


def _service(route: int) -> dict[str, Any]:
    """Headless, as there are more than its range has addresses."""
    return _object(
        "v1", "Service", f"r{route:04}", spec={"clusterIP": "None", "ports": [{"name": "http", "port": 8000}]}
    )


def _slice(route: int) -> dict[str, Any]:
    name = f"r{route:04}"
    endpoints = [
        {
            "addresses": [f"10.{route // 250}.{route % 250}.{index + 1}"],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "nodeName": _node_of(route, index),
            "targetRef": {"kind": "Pod", "namespace": NAMESPACE, "name": f"{name}-5d4f8c7b9-{index:05}"},
        }
        for index in range(ENDPOINTS)
    ]
    return _object(
        "discovery.k8s.io/v1",
        "EndpointSlice",
        f"{name}-abcde",
        labels={"kubernetes.io/service-name": name},
        addressType="IPv4",
        ports=[{"name": "http", "port": 8000, "protocol": "TCP"}],
        endpoints=endpoints,
    )


def _route(route: int) -> dict[str, Any]:
    classes = [
        {"name": s.name, "min": s.min_batch, "max": s.max_batch, "batch": int(s.batch), "share": s.share} for s in SIZES
    ]
    name = f"r{route:04}"
    return _placed(
        manifests.route(
            name,
            model=MODEL,
            hosts=[f"{name}.example"],
            gateways=[GATEWAY],
            expectedLoad=LOAD_RPS,
            requestSize={"classes": classes},
            backend={"service": {"name": name, "port": 8000}},
        )
    )


async def _fill(cluster: Cluster, client: Client, routes: int) -> None:
    await cluster.kubectl("create", "namespace", NAMESPACE)
    await cluster.kubectl("wait", "--for=create", "serviceaccount/default", "--namespace", NAMESPACE, "--timeout=30s")
    for group in _objects(routes):
        waiting = iter(group)

        async def worker(waiting: Any = waiting) -> None:
            for made in waiting:
                await client.create(made, deadline_s=60.0)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(CREATES):
                tasks.create_task(worker())


# -------------------------------------------------------------------------------------------------- what is looked at


@dataclass
class Probe:
    """How long the admin API takes to answer: what a proxy waits, too, as both are the same event loop."""

    controller: RunProcess
    times_ms: list[float] = field(default_factory=list)

    async def run(self) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30.0)) as session:
            while True:
                began_s = time.perf_counter()
                async with session.get(f"{self.controller.admin}/healthz") as answer:
                    await answer.read()
                self.times_ms.append(1e3 * (time.perf_counter() - began_s))
                await asyncio.sleep(PROBE_S)  # a pace

    def figures(self, when: str) -> list[Figure]:
        """And begins anew."""
        times, self.times_ms = self.times_ms, []
        note = f"{len(times)} times; worst {max(times):.0f} ms"
        return [Figure(f"{when}: /healthz answers, p99", float(np.quantile(times, 0.99)), "ms", note=note)]


@asynccontextmanager
async def probing(controller: RunProcess) -> AsyncIterator[Probe]:
    probe = Probe(controller)
    task = asyncio.create_task(probe.run())
    try:
        yield probe
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _writes(cluster: Cluster) -> Counter[str]:
    """Requests that write, by resource and verb, since the API server started."""
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(await cluster.kubectl("get", "--raw", "/metrics")):
        for sample in family.samples if family.name == "apiserver_request" else ():
            labels = sample.labels
            if sample.name.endswith("_total") and labels["verb"] in WRITING and labels["resource"] not in NOT_OURS:
                found[f"{labels['verb']} {labels['resource']}/{labels['subresource']} {labels['code']}"] += int(
                    sample.value
                )
    return found


async def _settled(cluster: Cluster, before: Counter[str]) -> tuple[float, Counter[str]]:
    """When (monotonic) the last write was made, and all since `before`."""
    last, last_s = await _writes(cluster), time.monotonic()
    async with asyncio.timeout(DEADLINE_S):
        while time.monotonic() - last_s < QUIET_S:
            await asyncio.sleep(1.0)  # another process's counters are all there is to wait on
            if (now := await _writes(cluster)) != last:
                last, last_s = now, time.monotonic()
    return last_s, last - before


@dataclass(frozen=True, slots=True)
class Reconciles:
    count: float
    sum_s: float
    within: float
    """The target."""


async def _reconciles(controller: RunProcess) -> Reconciles:
    async with aiohttp.ClientSession() as session, session.get(f"{controller.admin}/metrics") as answer:
        text = await answer.text()
    name, bound = "meshctl_reconcile_duration_seconds", f'le="{RECONCILE_MS / 1e3}"'
    values = {
        line.partition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name)
    }
    return Reconciles(values[f"{name}_count"], values[f"{name}_sum"], values[f"{name}_bucket{{{bound}}}"])


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _published(controller: RunProcess) -> float:
    """When (wall clock) the first plan was put in force."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            for line in controller.lines():
                if line["event"] == "published":
                    return datetime.fromisoformat(line["timestamp"]).timestamp()
            await asyncio.sleep(0.05)  # the log is a file: there is nothing to wait on but its growth


# --------------------------------------------------------------------------------------------------------------- runs


async def _measure(report: Report, cluster: Cluster, options: Sequence[str], log: Path, name: str, routes: int) -> None:
    """One run: start, until settled, and a minute of nothing."""
    before, began_s, wall_s = await _writes(cluster), time.monotonic(), time.time()
    async with run_with(log, *options) as controller, probing(controller) as probe:
        pid = controller.process.pid
        serving_s = time.monotonic() - began_s
        first_s = await _published(controller) - wall_s
        cpu_s = _cpu_s(pid)
        what = (
            f"{routes} routes x {ENDPOINTS} endpoints; process and imports included; listening after {serving_s:.1f} s"
        )
        report.add(Figure(f"{name} to first decision", first_s, "s", at_most(FIRST_DECISION_S), what))
        report.details[f"{name}: CPU to first decision, s"] = cpu_s
        last_s, writes = await _settled(cluster, before)
        made = sum(writes.values())
        note = "; ".join(f"{count} {what}" for what, count in writes.most_common(8))
        target = at_most(WRITES) if name == "restart" else None
        report.add(Figure(f"{name}: writes until settled", made, "writes", target, note))
        if made:
            report.add(Figure(f"{name} to last write", last_s - began_s, "s", note=f"CPU {_cpu_s(pid):.0f} s"))
        report.add(*probe.figures(f"{name}, until settled"))
        await _steady(report, cluster, controller, probe, name)
        await controller.end(signal.SIGTERM)  # it gives its Lease back


async def _steady(report: Report, cluster: Cluster, controller: RunProcess, probe: Probe, name: str) -> None:
    pid = controller.process.pid
    writes, reconciles = await _writes(cluster), await _reconciles(controller)
    probe.times_ms.clear()
    cpu_s, began_s = _cpu_s(pid), time.monotonic()
    await asyncio.sleep(STEADY_S)  # a measurement's length, not a wait for something
    busy = (_cpu_s(pid) - cpu_s) / (time.monotonic() - began_s)
    report.add(*probe.figures(f"{name}, steady"))
    after, made = await _reconciles(controller), await _writes(cluster) - writes
    count = after.count - reconciles.count
    mean_ms = 1e3 * (after.sum_s - reconciles.sum_s) / count
    within = (after.within - reconciles.within) / count
    note = f"{count:.0f} in {STEADY_S:.0f} s, {within:.0%} of them within {RECONCILE_MS:g} ms; {busy:.0%} of a core"
    report.add(Figure(f"{name}, steady: reconcile, mean", mean_ms, "ms", at_most(RECONCILE_MS), note))
    report.add(Figure(f"{name}, steady: writes", sum(made.values()), "writes", at_most(WRITES), str(dict(made) or "")))
    size, highest = memory_mb(pid)
    report.add(Figure(f"{name}, steady: resident", size, "MB", at_most(MEMORY_MB), f"highest {highest:.0f} MB"))


async def _bench(report: Report, directory: Path, routes: int) -> None:
    async with (
        Cluster(directory / "cluster", istio=True) as cluster,
        PrometheusProcess(directory / "prometheus", {}) as prometheus,
    ):
        began_s = time.monotonic()
        async with connect(cluster.kubeconfig) as client:
            await _fill(cluster, client, routes)
        progress(f"{routes} routes and {routes * ENDPOINTS} pods are there after {time.monotonic() - began_s:.0f} s")
        options = [
            *("--kubeconfig", str(cluster.kubeconfig), "--lease", f"{NAMESPACE}/meshctl"),
            *("--istio", "--istiod", cluster.istiod_debug, "--prometheus", prometheus.url),
        ]
        for name in ("start", "restart"):
            await _measure(report, cluster, options, directory / f"{name}.log", name, routes)


def main(
    as_json: JsonOption = False,
    routes: Annotated[int, typer.Option("--routes", help="How many ModelRoutes.")] = ROUTES,
    keep: Annotated[Path | None, typer.Option("--keep", metavar="DIRECTORY", help="Keep logs and data here.")] = None,
) -> None:
    """Measure `meshctl run` with a thousand routes in a real cluster."""
    quiet_logs()
    report = Report("cluster")
    with (
        tempfile.TemporaryDirectory(prefix="meshctl-bench-") as directory,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(_bench(report, keep or Path(directory), routes))
    report.show(as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
