"""The node agent: what an Allocate takes, a kubelet's restart, what it weighs, and what it does when nothing happens.

    python bench/agent.py [--json] [--quick] [--only allocate|restart|cluster]

The whole `meshctl agent`, as users start it, with 16 GPUs of 48 slots from an inventory file, and the kubelet's side of
its protocols over real unix sockets; `cluster` adds a real API server with 110 pods on the node. There is no GPU: MPS
is a stand-in that speaks the real control protocol, and nothing runs on it. Calls come one right after the other, as
when many pods start together; what they are compared with, a plugin that answers at once and one write of such a state
file, is measured in the same run. Linux only: sizes and CPU times are /proc's.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from grpc import aio

if not __package__:  # run as a file: the project's root is not on the path then
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.memory import cpu_s, memory_mb
from bench.report import Figure, JsonOption, Report, at_most, progress, quantiles, quiet_logs
from deviceplugin import kubeletapi as api
from deviceplugin.ledger import PENDING_S
from deviceplugin.podresources import address
from meshctl.adapters.kubernetes.client import Client, connect
from meshctl.ports import ObjectKey
from meshctl.sharing import RESOURCE, Mode, Owner, Slot
from meshctl.statefile import StateFile
from tests.cluster.cluster import Cluster
from tests.cluster.gpunode import ACCOUNT, DEPLOY, pod
from tests.harness.agent import AgentProcess, inventory, policies
from tests.harness.fake_kubelet import FakeKubelet, Handlers, listed_pods
from tests.harness.mps_control import BINARY, StandIn
from tests.harness.tools import DEADLINE_S, ToolProcess, until

GPUS, SLOTS, SIZES = 16, 48, (1, 8)
UUIDS = tuple(f"GPU-{number:08x}-1111-2222-3333-444444444444" for number in range(GPUS))
FULL = 0.8
"""Part of the slots that is in use."""
ALLOCATE_MS, REGISTERED_S, MEMORY_MB, IDLE_RATIO = 5.0, 1.0, 100.0, 0.02
CALLS, RESTARTS, PODS, IDLE_S = 2000, 50, 110, 30.0
QUICK_CALLS, QUICK_RESTARTS, QUICK_PODS, QUICK_IDLE_S = 40, 3, 12, 2.0
NODE = "node-1"
"""As `AgentProcess` has it."""
LONGEST_AWAY_S = 3.0
"""Of a kubelet that restarts: shorter and longer than what the agent's plugin waits for one that does not watch."""


class Part(StrEnum):
    ALLOCATE = "allocate"
    RESTART = "restart"
    CLUSTER = "cluster"


@dataclass(frozen=True, slots=True)
class Scale:
    calls: int
    restarts: int
    pods: int
    idle_s: float


# ------------------------------------------------------------------------------------------------- the kubelet's side


@dataclass
class Admissions:
    """A kubelet's, one after the other: what the plugin's calls took, in ms. Everything else is not counted."""

    kubelet: FakeKubelet
    random: random.Random = field(default_factory=lambda: random.Random(1))  # noqa: S311 (which pods come and go)
    shown: dict[Owner, bytes] = field(default_factory=dict)
    """What pod-resources has of each container, encoded once: a kubelet does that in another process."""
    preferred_ms: list[float] = field(default_factory=list)
    allocate_ms: list[float] = field(default_factory=list)

    async def admit(self, owner: Owner, size: int) -> dict[str, int]:
        """UUID -> slots that the container got."""
        free = self.kubelet.available(RESOURCE)
        channel = self.kubelet.resources[RESOURCE].plugins[-1].channel
        asked = api.ContainerPreferredAllocationRequest(free, [], size)
        data = await _timed(channel, api.PREFERRED, bytes(api.PreferredAllocationRequest([asked])), self.preferred_ms)
        ids = api.ContainersDeviceIds.parse(data).containers[0].ids
        request = bytes(api.ContainersDeviceIds([api.DeviceIds(ids)]))
        await _timed(channel, api.ALLOCATE, request, self.allocate_ms)
        self.kubelet.held[owner, RESOURCE] = ids
        self.shown[owner] = bytes(listed_pods({(owner, RESOURCE): ids}))
        return dict(Counter(Slot.parse(text).uuid for text in ids))

    def end(self, owner: Owner) -> None:
        self.kubelet.end(owner)
        del self.shown[owner]

    def size(self) -> int:
        return self.random.randint(*SIZES)

    @property
    def full(self) -> bool:
        return sum(map(len, self.kubelet.held.values())) >= FULL * GPUS * SLOTS

    def used(self) -> Counter[str]:
        """Slots by GPU, as the kubelet has it."""
        return Counter(Slot.parse(text).uuid for ids in self.kubelet.held.values() for text in ids)

    @property
    def socket(self) -> Path:
        return self.kubelet.root / "pods.sock"

    @asynccontextmanager
    async def listed(self) -> AsyncIterator[None]:
        """Serves pod-resources."""

        async def answer(_: bytes, context: Any) -> bytes:
            return b"".join(self.shown.values())

        server = aio.server()
        server.add_generic_rpc_handlers((Handlers({api.LIST_PODS: answer}),))
        server.add_insecure_port(address(self.socket))
        await server.start()
        try:
            yield
        finally:
            await server.stop(None)


async def _timed(channel: aio.Channel, method: str, data: bytes, times_ms: list[float]) -> bytes:
    call = channel.unary_unary(method)
    began_s = time.perf_counter()
    answer: bytes = await call(data, wait_for_ready=True)
    times_ms.append(1e3 * (time.perf_counter() - began_s))
    return answer


@dataclass
class Stand:
    """An agent and its kubelet."""

    agent: AgentProcess
    admissions: Admissions

    @property
    def kubelet(self) -> FakeKubelet:
        return self.admissions.kubelet

    @property
    def pid(self) -> int:
        assert self.agent.process is not None  # noqa: S101 (it runs as long as the stand is there)
        return self.agent.process.pid


@asynccontextmanager
async def standing(directory: Path, mode: Mode, *options: str | Path) -> AsyncIterator[Stand]:
    """All slots are the kubelet's when it begins."""
    await asyncio.to_thread(directory.mkdir)
    inventory(directory, *UUIDS)
    async with FakeKubelet(directory / "kubelet") as kubelet:
        admissions = Admissions(kubelet)
        agent = AgentProcess(
            directory / "agent",
            kubelet.plugin_dir,
            admissions.socket,
            f"--inventory=file:{directory / 'gpus.json'}",
            f"--mps-control={BINARY}",
            *(options or (f"--policy={policies(directory, default=_policy(mode))}",)),
        )
        try:
            async with admissions.listed(), agent:
                await kubelet.has(RESOURCE, GPUS * SLOTS)
                yield Stand(agent, admissions)
        finally:  # daemons outlive the agent, by design
            for uuid in UUIDS if mode is Mode.MPS else ():
                await StandIn(agent.directory / "mps", uuid).clear()


def _policy(mode: Mode) -> dict[str, Any]:
    return {"mode": mode.value, "replicas": SLOTS}


# ------------------------------------------------------------------------------------------------------------ Allocate


async def bench_allocate(report: Report, directory: Path, scale: Scale) -> None:
    """Without a cluster, in time slices and by MPS."""
    for mode in (Mode.TIME_SLICING, Mode.MPS):
        async with standing(directory / mode.value, mode) as stand:
            note = f"{GPUS} GPUs x {SLOTS} slots, {mode}"
            await _idle(report, stand, scale.idle_s, note)
            await _churn(stand.admissions, scale.calls)
            if mode is Mode.TIME_SLICING:
                await _limits(report, stand, directory, scale.calls)
            _calls(report, stand, f"{note}, {FULL:.0%} in use, asked for {SIZES[0]} to {SIZES[1]}")
            await _agrees(report, stand, note)


async def _churn(admissions: Admissions, calls: int) -> None:
    """Fills the node, then lets `calls` more containers come; for each some leave."""
    holding: list[Owner] = []
    number = 0
    while not admissions.full or number < calls:
        measured = admissions.full
        while admissions.full:
            admissions.end(holding.pop(admissions.random.randrange(len(holding))))
        if measured and not number:
            admissions.preferred_ms.clear()
            admissions.allocate_ms.clear()
        number += measured
        owner = Owner("team", f"pod-{len(holding)}-{number}", "main")
        await admissions.admit(owner, admissions.size())
        holding.append(owner)


def _calls(report: Report, stand: Stand, note: str, target_ms: float | None = ALLOCATE_MS) -> None:
    limit = None if target_ms is None else at_most(target_ms)
    report.add(
        *quantiles("GetPreferredAllocation", stand.admissions.preferred_ms, "ms", {0.99: None}, note),
        *quantiles("Allocate", stand.admissions.allocate_ms, "ms", {0.99: limit, 1.0: None}, note),
    )


class InstantPlugin(ToolProcess):
    """`bench.instant`, as a process."""

    name = "instant"
    port_count = 0

    def command(self) -> Sequence[str | Path]:
        return sys.executable, "-m", "bench.instant", self.socket

    @property
    def socket(self) -> Path:
        return self.directory / "p.sock"

    def environment(self) -> Mapping[str, str]:
        return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}

    def ready(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0


async def _limits(report: Report, stand: Stand, directory: Path, calls: int) -> None:
    """What the same calls cost where nothing is decided, and what one write of the state does."""
    ids = [str(Slot(uuid, number)) for uuid in UUIDS for number in range(SLOTS)]
    free = random.Random(1).sample(ids, round((1 - FULL) * len(ids)))  # noqa: S311 (any that many)
    asked = api.ContainerPreferredAllocationRequest(free, [], 4)
    requests = {
        api.PREFERRED: bytes(api.PreferredAllocationRequest([asked])),
        api.ALLOCATE: bytes(api.ContainersDeviceIds([api.DeviceIds(free[:4])])),
    }
    times: dict[str, list[float]] = {method: [] for method in requests}
    async with InstantPlugin(directory) as plugin, aio.insecure_channel(address(plugin.socket)) as channel:
        for _ in range(calls):
            for method, request in requests.items():
                await _timed(channel, method, request, times[method])
    size = (stand.agent.directory / "agent.json").stat().st_size
    writes = _writes(directory, size, calls)
    answers, taken = times[api.ALLOCATE][1:], stand.admissions.allocate_ms  # the first one connected
    report.add(
        *quantiles("Allocate that is answered at once", answers, "ms", {0.99: None}, "the limit: no agent"),
        *quantiles("a state file written and synced", writes, "ms", {0.99: None}, f"{size} bytes"),
        Figure(
            "Allocate / answered at once + one write, medians",
            float(np.median(taken) / (np.median(answers) + np.median(writes))),
            note="1: the agent adds nothing",
        ),
    )


def _writes(directory: Path, size: int, count: int) -> list[float]:
    file = StateFile(directory / "limit.json", 1, "", {})
    body = b'{"a":"%b"}' % (b"x" * size)
    times = []
    for _ in range(count):
        began_s = time.perf_counter()
        file.save(body)
        times.append(1e3 * (time.perf_counter() - began_s))
    return times


async def _agrees(report: Report, stand: Stand, note: str) -> None:
    """Slots of which the agent and the kubelet say different things, once the agent has asked again."""
    used = stand.admissions.used()
    left = Counter[str]()

    async def same() -> bool:
        told = {uuid: status["slots"]["used"] for uuid, status in stand.agent.gpus().items()}
        left.clear()
        left.update({uuid: abs(told.get(uuid, 0) - used[uuid]) for uuid in UUIDS})
        return not left.total()

    try:
        # a container that ended before a listing showed it leaves a promise that lasts PENDING_S
        await until(same, "the agent's ledger is the kubelet's", PENDING_S + DEADLINE_S)
    finally:
        report.add(Figure("slots that agent and kubelet know otherwise", left.total(), "slots", at_most(0), note))


async def _idle(report: Report, stand: Stand, idle_s: float, note: str) -> None:
    """Nobody asks anything, and no pod comes or goes."""
    before_s, began_s = cpu_s(stand.pid), time.monotonic()
    await asyncio.sleep(idle_s)  # a measurement's length, not a wait for something
    busy = (cpu_s(stand.pid) - before_s) / (time.monotonic() - began_s)
    report.add(
        Figure("idle agent", 100 * busy, "% of a core", at_most(100 * IDLE_RATIO), f"{idle_s:g} s; {note}"),
        *_memory(stand, f"while idle; {note}"),
    )


def _memory(stand: Stand, note: str) -> list[Figure]:
    size, highest = memory_mb(stand.pid)
    return [Figure("agent, resident", size, "MB", at_most(MEMORY_MB), f"highest {highest:.0f} MB; {note}")]


# -------------------------------------------------------------------------------------------------- kubelet's restarts


async def bench_restart(report: Report, directory: Path, scale: Scale) -> None:
    """The kubelet is away for a moment, again and again, while containers hold slots."""
    registered, offered = [], []
    async with standing(directory / "restart", Mode.TIME_SLICING) as stand:
        await _churn(stand.admissions, 1)
        kubelet = stand.kubelet
        for _ in range(scale.restarts):
            await kubelet.stop()
            await asyncio.sleep(stand.admissions.random.uniform(0, LONGEST_AWAY_S))  # for how long it is away
            before, began_s = len(kubelet.registrations), time.monotonic()
            await kubelet.start()
            while len(kubelet.registrations) == before:  # noqa: ASYNC110 (a call of another process's)
                await asyncio.sleep(0.001)
            registered.append(time.monotonic() - began_s)
            while sum(kubelet.devices(RESOURCE).values()) < GPUS * SLOTS:  # noqa: ASYNC110 (likewise)
                await asyncio.sleep(0.001)
            offered.append(time.monotonic() - began_s)
        await _agrees(report, stand, f"after {scale.restarts} restarts of the kubelet")
    note = f"from before its sockets are made; it was away for 0 to {LONGEST_AWAY_S:g} s"
    limits = {0.99: at_most(REGISTERED_S), 1.0: at_most(REGISTERED_S)}
    report.add(
        *quantiles("kubelet back -> Register", registered, "s", limits, note),
        *quantiles("kubelet back -> it has all slots", offered, "s", {0.99: None}, note),
    )


# ------------------------------------------------------------------------------------------------------- in a cluster


async def bench_cluster(report: Report, directory: Path, scale: Scale) -> None:
    """A real API server: the agent asks it for the node's pods at each admission, and follows their annotations."""
    async with Cluster(directory / "cluster") as cluster:
        document = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}}
        policy = {"apiVersion": "meshctl.io/v1alpha1", "kind": "GPUSharingPolicy", "metadata": {"name": "default"}}
        await cluster.apply(DEPLOY / "agent" / "namespace.yaml", document, policy | {"spec": _policy(Mode.MPS)})
        rbac = f"--filename={DEPLOY / 'agent' / 'rbac.yaml'}"
        await cluster.kubectl("apply", rbac, f"--namespace={ACCOUNT.partition('/')[0]}")
        namespace = await cluster.namespace()
        account = await asyncio.to_thread(cluster.kubeconfig_bound, ACCOUNT, NODE)
        async with (
            connect(cluster.kubeconfig) as client,
            standing(directory / "node", Mode.MPS, f"--kubeconfig={account}") as stand,
        ):
            await _in_cluster(report, stand, PodChurn(stand.admissions, client, namespace), scale)


async def _in_cluster(report: Report, stand: Stand, churn: PodChurn, scale: Scale) -> None:
    note = f"{scale.pods} pods on the node, real API server, {GPUS} GPUs x {SLOTS} slots, MPS"
    for _ in range(scale.pods):
        await churn.come()
    await _agrees(report, stand, note)
    await _idle(report, stand, scale.idle_s, note)
    stand.admissions.preferred_ms.clear()
    stand.admissions.allocate_ms.clear()
    for _ in range(scale.calls // 10):
        await churn.go()
        await churn.come()
    _calls(report, stand, f"{note}; pods listed anew for each", target_ms=None)
    report.add(Figure("containers on another GPU than planned", churn.astray, "containers", at_most(0), note))
    report.add(*_memory(stand, f"after them; {note}"))


@dataclass
class PodChurn:
    """Pods with a planned GPU, as the scheduler would bind them, and the kubelet that admits them."""

    admissions: Admissions
    client: Client
    namespace: str
    there: list[Owner] = field(default_factory=list)
    number: int = 0
    astray: int = 0

    async def come(self) -> None:
        """One on the fullest GPU that has room."""
        size, used = self.admissions.size(), self.admissions.used()
        uuid = max((uuid for uuid in UUIDS if used[uuid] + size <= SLOTS), key=lambda uuid: (used[uuid], uuid))
        self.number += 1
        owner = Owner(self.namespace, f"triton-7d9c5b6f4-{self.number:05}", "main")
        await self.client.create(_bound(owner, size, uuid))
        self.astray += await self.admissions.admit(owner, size) != {uuid: size}
        await self.client.apply(_running(owner), force=True, subresource="status", manager="kubelet")
        self.there.append(owner)

    async def go(self) -> None:
        owner = self.there.pop(self.admissions.random.randrange(len(self.there)))
        self.admissions.end(owner)
        await self.client.delete(ObjectKey("Pod", owner.namespace, owner.pod))


def _bound(owner: Owner, size: int, uuid: str) -> dict[str, Any]:
    """As large as such pods are; gone at once when it is deleted, as there is no kubelet that ends it."""
    found = dict(pod(owner.pod, owner.namespace, size, plan={uuid: size}))
    environment = [{"name": f"SETTING_{number}", "value": "some value"} for number in range(20)]
    tolerations = [{"operator": "Exists"}]
    [container] = found["spec"]["containers"]
    spec = {"nodeName": NODE, "terminationGracePeriodSeconds": 0, "tolerations": tolerations}
    return found | {"spec": found["spec"] | spec | {"containers": [container | {"env": environment}]}}


def _running(owner: Owner) -> dict[str, Any]:
    """What a kubelet says of a pod that it has admitted."""
    status = {"phase": "Running", "startTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
    metadata = {"name": owner.pod, "namespace": owner.namespace}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": status}


# --------------------------------------------------------------------------------------------------------------- main


def main(
    as_json: JsonOption = False,
    quick: Annotated[bool, typer.Option("--quick", help="Few repeats: does it work?")] = False,
    only: Annotated[list[Part] | None, typer.Option("--only", help="Parts to run; all by default.")] = None,
) -> None:
    """Measure `meshctl agent` and print it."""
    quiet_logs()
    report = Report("agent")
    scale = Scale(CALLS, RESTARTS, PODS, IDLE_S)
    if quick:
        scale = Scale(QUICK_CALLS, QUICK_RESTARTS, QUICK_PODS, QUICK_IDLE_S)
    with tempfile.TemporaryDirectory(prefix="meshctl-") as directory:  # short: MPS's sockets are six levels below it
        asyncio.run(_bench(report, Path(directory), only or list(Part), scale))
    report.show(as_json=as_json)


async def _bench(report: Report, directory: Path, parts: Sequence[Part], scale: Scale) -> None:
    benches = {Part.ALLOCATE: bench_allocate, Part.RESTART: bench_restart, Part.CLUSTER: bench_cluster}
    for part, bench in benches.items():
        if part in parts:
            progress(f"{part} ...")
            await bench(report, directory, scale)


if __name__ == "__main__":
    typer.run(main)
