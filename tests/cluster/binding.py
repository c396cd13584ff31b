"""What tests of bindings need of the cluster: nodes and GPUs that are objects alone, pods, and `meshctl extender`."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from meshctl.adapters.kubernetes.client import Client
from meshctl.adapters.kubernetes.kinds import KINDS
from meshctl.api.allocation import read_allocation
from meshctl.errors import RefusedError
from meshctl.extender.fence import CONDITION
from meshctl.extender.ports import PodId
from meshctl.ports import ObjectKey
from meshctl.sharing import RESOURCE
from tests.harness.tools import DEADLINE_S, ToolProcess, completed, page, until

BINDING, STATUS, LEASE = "POST pods", "PATCH pods", "PUT leases"
"""As the proxy calls the requests of a binder."""
NO_ROOM = "no GPU has 1 of hpe.com/gpus free"
ALLOCATABLE = {"cpu": "64", "memory": "256Gi", "pods": "250"}


@dataclass
class Stand:
    """A namespace, and a node of its own."""

    client: Client
    namespace: str
    node: str = ""
    gpu: str = ""
    """UUID."""

    async def with_gpu(self, slots: int, **status: Any) -> Stand:
        """The node and its one GPU, as an agent would write it."""
        self.node, self.gpu = f"node-{self.namespace}", f"GPU-{self.namespace}"
        await self.make_node(self.node)
        await self.make_gpu(self.node, self.gpu)
        await self.say_gpu(self.node, self.gpu, slots, **status)
        return self

    async def make_node(self, name: str) -> None:
        status = {"allocatable": ALLOCATABLE, "capacity": ALLOCATABLE}
        await self.client.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "status": status})

    async def make_gpu(self, node: str, uuid: str) -> None:
        await self.client.create(_gpu(node, uuid))

    async def say_gpu(self, node: str, uuid: str, slots: int, **status: Any) -> None:
        """How it is shared, as the agent says."""
        counted = {"total": slots, "used": 0, "free": slots, "unavailable": 0}
        said = {"mode": "TimeSlicing", "resourceName": RESOURCE, "slots": counted, "product": "Tesla T4", **status}
        value = _gpu(node, uuid) | {"status": said}
        await self.client.apply(value, subresource="status", manager="agent", force=True)

    async def pod(
        self, name: str, slots: int = 1, namespace: str = "", annotations: Mapping[str, str] | None = None
    ) -> PodId:
        main = {"name": "main", "image": "i", "resources": {"limits": {RESOURCE: str(slots)}}}
        metadata = {"name": name, "namespace": namespace or self.namespace, "annotations": dict(annotations or {})}
        spec = {"schedulerName": "nobody", "containers": [main]}
        raw = await self.client.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
        return PodId(raw["metadata"]["namespace"], name, raw["metadata"]["uid"])

    async def pods(self, count: int, prefix: str = "p") -> list[PodId]:
        return list(await asyncio.gather(*(self.pod(f"{prefix}{number}") for number in range(count))))

    async def now(self, pod: PodId) -> dict[str, Any]:
        raw = await self.client.get(key(pod))
        assert raw is not None
        return raw

    async def planned(self) -> Mapping[str, int]:
        """Pod -> slots of the GPU, of all pods that have the node: what the annotations say, which must be there."""
        return {name: gpus[self.gpu] for name, gpus in (await self.recount()).items()}

    async def recount(self) -> Mapping[str, Mapping[str, int]]:
        """Pod -> UUID -> slots, of the pods that have a node and have not ended, from the API server alone."""
        found: dict[str, Mapping[str, int]] = {}
        for raw in (await self.client.list("Pod", self.namespace)).items:
            if raw["spec"].get("nodeName") and raw["status"]["phase"] not in ("Succeeded", "Failed"):
                allocation = read_allocation(raw["metadata"]["annotations"])
                assert allocation is not None
                found[raw["metadata"]["name"]] = allocation.by_container()["main"]
        return found

    async def booked(self) -> Mapping[str, int]:
        """UUID -> slots, likewise."""
        found: dict[str, int] = defaultdict(int)
        for gpus in (await self.recount()).values():
            for uuid, slots in gpus.items():
                found[uuid] += slots
        return found

    async def fenced(self, pod: PodId) -> bool:
        """A take-over, or the search for a lost answer, has written to the pod."""
        return any(
            condition["type"] == CONDITION for condition in (await self.now(pod))["status"].get("conditions", ())
        )


def _gpu(node: str, uuid: str) -> dict[str, Any]:
    kind = KINDS["GPU"]
    value = {"apiVersion": kind.api_version, "kind": kind.name, "metadata": {"name": uuid.lower()}}
    return value | {"spec": {"node": node, "uuid": uuid}}


def key(pod: PodId) -> ObjectKey:
    return ObjectKey("Pod", pod.namespace, pod.name)


async def told(holds: bool) -> bool:
    """What is known here, for `until`."""
    return holds


class Extender(ToolProcess):
    """`meshctl extender`, started when it binds; with `standby`, when it knows the cluster. Asked over plain HTTP."""

    name = "extender"

    def __init__(
        self,
        directory: Path,
        kubeconfig: Path,
        lease: str,
        *,
        standby: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`lease` is NAMESPACE/NAME."""
        super().__init__(directory)
        self.standby = standby
        self._options = (f"--kubeconfig={kubeconfig}", f"--lease={lease}")
        self._environment = environment or {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def ready_url(self) -> str:
        return f"{self.url}/{'healthz' if self.standby else 'readyz'}"

    def command(self) -> Sequence[str | Path]:
        return (sys.executable, "-m", "meshctl", "extender", f"--listen=127.0.0.1:{self.ports[0]}", *self._options)

    def environment(self) -> Mapping[str, str]:
        return {**os.environ, **self._environment}

    async def leads(self) -> bool:
        """Whether it binds."""
        return await completed(page, f"{self.url}/readyz") is not None

    async def post(self, verb: str, asked: object) -> Any:
        """What is answered, as 200; bytes are sent as they are. Raises aiohttp.ClientError when nobody answers."""
        how = {"data": asked} if isinstance(asked, bytes) else {"json": asked}
        limits = aiohttp.ClientTimeout(total=DEADLINE_S)
        async with (
            aiohttp.ClientSession(timeout=limits) as session,
            session.post(f"{self.url}/{verb}", **how) as answer,
        ):
            assert answer.status == 200
            return await answer.json()

    async def bind(self, pod: PodId, node: str) -> str:
        """What the scheduler is told: "" when the pod is bound."""
        asked = {"PodName": pod.name, "PodNamespace": pod.namespace, "PodUID": pod.uid, "Node": node}
        return str((await self.post("bind", asked)).get("Error", ""))

    async def filter(self, pod: Mapping[str, Any], nodes: Sequence[str]) -> str:
        """The node that was chosen; "" for none. Raises RefusedError with what is said instead of an answer."""
        answer = await self.post("filter", {"Pod": pod, "NodeNames": nodes})
        if answer["Error"]:
            raise RefusedError(answer["Error"])
        return "".join(answer["NodeNames"])

    async def holds_nothing(self) -> None:
        """Returns when no reservation is left, and no binding is under way."""

        async def nothing() -> bool:
            metrics = (await completed(page, f"{self.url}/metrics") or "").splitlines()
            return {f"meshctl_extender_{name} 0.0" for name in ("reservations", "bindings_under_way")} <= set(metrics)

        await until(nothing, f"no reservation is left; log: {self.log}")
