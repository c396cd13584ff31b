"""What the scheduler extender costs kube-scheduler: pods bound per second, with it and without.

    python -m bench.scheduler [--json] [--quick] [--pods N] [--rounds N] [--keep DIRECTORY]

Real are etcd, kube-apiserver, kube-scheduler and `meshctl extender` (HTTPS, client certificates, as deploy/extender
has it); nodes and GPUs are objects that nobody stands behind. In each round all pods are there before the scheduler
starts; they are bound, counted again from what the API server has, and deleted. Rounds without and with the extender
take turns, and the scheduler is otherwise the same: deploy/'s configuration (which scores all nodes), and no limit to
its requests. Where all processes share few cores, what is measured is CPU time: each one's is told.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import uvloop
from prometheus_client.parser import text_string_to_metric_families

if not __package__:  # run as a file: the project's root is not on the path then
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.apistub import GPUS, NAMESPACE, SLOTS, node, pending_pod, uuid
from bench.memory import cpu_s
from bench.report import Figure, JsonOption, Report, at_least, at_most, progress, quiet_logs
from meshctl.adapters.kubernetes.client import Client, connect
from meshctl.adapters.kubernetes.kinds import KINDS
from meshctl.api.allocation import read_allocation
from tests.cluster.cluster import Cluster
from tests.cluster.processes import Scheduler
from tests.harness.extender import ExtenderProcess
from tests.harness.gpus import gpu_object
from tests.harness.tools import ToolProcess

SHARE = 0.8
"""Of the throughput without the extender."""
PROFILE = "meshctl-scheduler"
UNLIMITED = {"qps": 10_000, "burst": 10_000}
CREATES = 16
"""At once, while the cluster is filled."""
DEADLINE_S = 900.0
SILENCE_S = 60.0
"""Longer without a pod that is bound, and something is wrong."""
VERBS = ("filter", "bind")


@dataclass(frozen=True, slots=True)
class Scale:
    nodes: int
    pods: int

    def __str__(self) -> str:
        return f"{self.nodes} nodes x {GPUS} GPUs, {self.pods} pods"


FULL, QUICK = Scale(1000, 5000), Scale(50, 250)


@dataclass(frozen=True, slots=True)
class Round:
    """One time all pods."""

    per_s: float
    """From the first that was bound to the last."""
    cpu_ms: Mapping[str, float]
    """Of each process, a pod."""
    samples: Mapping[str, float]
    """The extender's metrics, by sample; empty without it."""
    unplanned: int
    """Pods that do not say which GPUs they have."""
    overbooked: int
    """GPUs of which more slots are given than they have."""


# ---------------------------------------------------------------------------------------------- what is in the cluster


def _node(number: int) -> dict[str, Any]:
    found = node(number)
    metadata = {name: found["metadata"][name] for name in ("name", "labels")}
    return {"apiVersion": "v1", "kind": "Node", **found, "metadata": metadata}


def _gpus(scale: Scale) -> Iterable[dict[str, Any]]:
    for number in range(scale.nodes):
        for index in range(GPUS):
            yield gpu_object(_node(number)["metadata"]["name"], uuid(number, index), SLOTS)


def _pod(number: int) -> dict[str, Any]:
    """Of 1 to 10 slots. It tolerates what the API server says of new nodes, that they are not ready."""
    found = pending_pod(number)
    metadata = {name: found["metadata"][name] for name in ("name", "namespace", "labels")}
    spec = found["spec"] | {"schedulerName": PROFILE, "tolerations": [{"operator": "Exists"}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


async def _all(make: Callable[[dict[str, Any]], Awaitable[object]], values: Iterable[dict[str, Any]]) -> None:
    waiting = iter(values)

    async def worker() -> None:
        for value in waiting:
            await make(value)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(CREATES):
            tasks.create_task(worker())


async def _fill(cluster: Cluster, client: Client, scale: Scale) -> None:
    await cluster.kubectl("create", "namespace", NAMESPACE)
    await cluster.kubectl("wait", "--for=create", "serviceaccount/default", "--namespace", NAMESPACE, "--timeout=30s")
    # A GPU's status is written together with the GPU: half as many requests.
    whole = '[{"op": "remove", "path": "/spec/versions/0/subresources"}]'
    await cluster.kubectl("patch", "crd", "gpus.meshctl.io", "--type=json", f"--patch={whole}")
    await _all(client.create, map(_node, range(scale.nodes)))
    await _all(client.create, _gpus(scale))


async def _create_pods(client: Client, scale: Scale) -> None:
    await _all(client.create, map(_pod, range(scale.pods)))


async def _delete_pods(cluster: Cluster, client: Client) -> None:
    """There is no kubelet that would end them."""
    path = f"{KINDS['Pod'].path(NAMESPACE)}?gracePeriodSeconds=0"
    async with asyncio.timeout(DEADLINE_S):
        while (await client.list("Pod", NAMESPACE)).items:
            await cluster.kubectl("delete", f"--raw={path}")


# ------------------------------------------------------------------------------------------------------------- a round


async def _bound(client: Client, version: str, count: int) -> list[float]:
    """When (monotonic) each of `count` pods got its node; from `version` on, when none had one."""
    times: list[float] = []
    async with asyncio.timeout(DEADLINE_S):
        while len(times) < count:  # the API server ends a watch that it finds slow
            events = client.watch(
                KINDS["Pod"],
                NAMESPACE,
                version,
                field_selector="spec.nodeName=",  # a pod on a node is gone from there
                timeout_s=DEADLINE_S,
                silence_s=SILENCE_S,
            )
            async with aclosing(events):
                async for event in events:
                    if event is None:
                        continue
                    version = event.value["metadata"]["resourceVersion"]
                    if event.what == "DELETED":
                        times.append(time.monotonic())
                        if len(times) == count:
                            return times
    return times


@asynccontextmanager
async def _extender(cluster: Cluster, directory: Path) -> AsyncIterator[ExtenderProcess]:
    async with ExtenderProcess(directory, cluster.kubeconfig, f"{NAMESPACE}/extender") as extender:
        yield extender


async def _round(
    cluster: Cluster, client: Client, directory: Path, scale: Scale, configured: dict[str, Any], *, with_it: bool
) -> Round:
    """`configured` is the scheduler's configuration without extenders."""
    await _create_pods(client, scale)
    async with AsyncExitStack() as stack:
        processes: dict[str, ToolProcess] = {"kube-apiserver": cluster.apiserver, "etcd": cluster.etcd}
        extender = None
        if with_it:
            extender = await stack.enter_async_context(_extender(cluster, directory / "extender"))
            processes["extender"] = extender
            configured = configured | {"extenders": extender.scheduler_config()["extenders"]}
        version = (await client.list("Pod", NAMESPACE)).resource_version
        watching = asyncio.create_task(_bound(client, version, scale.pods))
        stack.callback(watching.cancel)
        before = _cpu(processes)
        scheduler = Scheduler(directory / "scheduler", cluster.kubeconfig, configured)
        processes["kube-scheduler"] = await stack.enter_async_context(scheduler)
        times = await watching
        used = {name: 1e3 * (now - before.get(name, 0.0)) / scale.pods for name, now in _cpu(processes).items()}
        samples = _samples(extender.metrics()) if extender is not None else {}
    unplanned, overbooked = await _recounted(client)
    await _delete_pods(cluster, client)
    return Round((len(times) - 1) / (times[-1] - times[0]), used, samples, unplanned, overbooked)


def _cpu(processes: Mapping[str, ToolProcess]) -> dict[str, float]:
    return {name: cpu_s(one.process.pid) for name, one in processes.items() if one.process is not None}


async def _recounted(client: Client) -> tuple[int, int]:
    """Pods without an allocation, and GPUs of which more slots are given than they have; as the API server has it."""
    given: Counter[tuple[str, str]] = Counter()
    unplanned = 0
    for raw in (await client.list("Pod", NAMESPACE)).items:
        found = read_allocation(raw["metadata"].get("annotations") or {})
        unplanned += found is None
        for container in found.containers if found is not None else ():
            for gpu, slots in container.gpus.items():
                given[raw["spec"]["nodeName"], gpu] += slots
    return unplanned, sum(slots > SLOTS for slots in given.values())


# ------------------------------------------------------------------------------------------------------------- figures


def _samples(text: str) -> dict[str, float]:
    """``name{label="value",...}`` -> value."""
    return {
        f"{sample.name}{{{','.join(f'{k}={v}' for k, v in sorted(sample.labels.items()))}}}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _quantile_ms(samples: Mapping[str, float], verb: str, quantile: float) -> float:
    """From the buckets of the histogram, a straight line within each; the lowest bound of a quantile beyond them."""
    prefix = "meshctl_extender_request_seconds_bucket{le="
    found = {key.removeprefix(prefix): value for key, value in samples.items() if key.startswith(prefix)}
    counts = {float(le.partition(",")[0]): value for le, value in found.items() if le.endswith(f"verb={verb}}}")}
    bounds = sorted(counts)
    counted = np.array([0.0, *(counts[bound] for bound in bounds[:-1])])
    return 1e3 * float(np.interp(quantile * counts[bounds[-1]], counted, [0.0, *bounds[:-1]]))


def _report(report: Report, rounds: Mapping[bool, list[Round]], scale: Scale) -> None:
    speeds = {with_it: [one.per_s for one in found] for with_it, found in rounds.items()}
    share = float(np.median(speeds[True]) / np.median(speeds[False]))
    for with_it, words in ((False, "without the extender"), (True, "with the extender")):
        note = f"{scale}; {', '.join(f'{speed:.0f}' for speed in speeds[with_it])}"
        report.add(Figure(f"pods bound, {words}", float(np.median(speeds[with_it])), "pods/s", note=note))
    report.add(Figure("throughput with / without", share, "", at_least(SHARE), "of the medians"))
    for with_it, words in ((False, "without"), (True, "with")):
        cpu = {name: np.mean([one.cpu_ms[name] for one in rounds[with_it]]) for name in rounds[with_it][0].cpu_ms}
        note = ", ".join(f"{name} {value:.2f}" for name, value in cpu.items())
        report.add(Figure(f"CPU of a pod, {words}", float(sum(cpu.values())), "ms", note=note))
    ours = rounds[True]
    overbooked, unplanned = (sum(getattr(one, name) for one in ours) for name in ("overbooked", "unplanned"))
    report.add(
        Figure("GPUs booked twice", overbooked, "GPUs", at_most(0), "counted again from the API server"),
        Figure("pods without their GPUs' names", unplanned, "pods", at_most(0), "likewise"),
    )
    _report_requests(report, [one.samples for one in ours])


def _report_requests(report: Report, rounds: list[Mapping[str, float]]) -> None:
    total: Counter[str] = Counter()
    for samples in rounds:
        total.update(samples)
    prefix = "meshctl_extender_requests_total{"
    outcomes = {key.removeprefix(prefix)[:-1]: int(n) for key, n in total.items() if key.startswith(prefix)}
    again = sum(count for key, count in outcomes.items() if key.endswith("verb=bind") and "outcome=bound" not in key)
    bindings = {key.partition("=")[2][:-1]: int(n) for key, n in total.items() if "extender_bindings_total" in key}
    note = "; ".join(f"{count} {what}" for what, count in bindings.items() if count)
    report.add(Figure("Binds that failed; the pod was scheduled again", again, "binds", note=note))
    report.details["requests"] = outcomes
    for verb in VERBS:
        note = f"{sum(count for key, count in outcomes.items() if key.endswith(f'verb={verb}'))} times"
        for quantile, name in ((0.5, "median"), (0.99, "p99")):
            value = _quantile_ms(total, verb, quantile)
            report.add(Figure(f"{verb.capitalize()}, {name}", value, "ms", note=f"{note}; as the extender measures it"))


# ---------------------------------------------------------------------------------------------------------------- main


async def _bench(report: Report, directory: Path, scale: Scale, rounds: int) -> None:
    async with Cluster(directory / "cluster") as cluster, connect(cluster.kubeconfig) as client:
        began_s = time.monotonic()
        await _fill(cluster, client, scale)
        progress(
            f"{scale.nodes} nodes and {scale.nodes * GPUS} GPUs are there after {time.monotonic() - began_s:.0f} s"
        )
        async with _extender(cluster, directory / "first") as extender:
            configured = {name: value for name, value in extender.scheduler_config().items() if name != "extenders"}
        configured |= {"leaderElection": {"leaderElect": False}, "clientConnection": UNLIMITED}
        found: dict[bool, list[Round]] = {False: [], True: []}
        for number in range(rounds):
            for with_it in (False, True):
                where = directory / f"{number}-{'with' if with_it else 'without'}"
                one = await _round(cluster, client, where, scale, configured, with_it=with_it)
                found[with_it].append(one)
                progress(f"{where.name}: {one.per_s:.0f} pods/s; CPU ms a pod: {one.cpu_ms}")
    _report(report, found, scale)


def main(
    as_json: JsonOption = False,
    quick: Annotated[bool, typer.Option("--quick", help="A small cluster, once: does it work?")] = False,
    pods: Annotated[int, typer.Option("--pods", help="In each round, without --quick.")] = FULL.pods,
    rounds: Annotated[int, typer.Option("--rounds", help="Of each kind.")] = 2,
    keep: Annotated[Path | None, typer.Option("--keep", metavar="DIRECTORY", help="Keep logs and data here.")] = None,
) -> None:
    """Measure kube-scheduler with and without `meshctl extender`."""
    quiet_logs()
    report = Report("scheduler")
    with (
        tempfile.TemporaryDirectory(prefix="meshctl-bench-") as directory,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        where = keep or Path(directory)
        runner.run(_bench(report, where, QUICK if quick else Scale(FULL.nodes, pods), 1 if quick else rounds))
    report.show(as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
