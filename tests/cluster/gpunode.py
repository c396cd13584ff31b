"""A cluster with a node that has GPUs: the real kubelet and containerd, `meshctl agent`, and an inventory in a file.

The agent runs beside the node, not in a pod of it, with the account of deploy/agent bound to the node, as a pod's token
would be. MPS is the stand-in of tests/harness/mps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import orjson

from meshctl.api.allocation import ALLOCATION, Allocation, ContainerAllocation
from meshctl.sharing import RESOURCE
from tests.cluster.cluster import Cluster, Document
from tests.cluster.node import IMAGE, NAME, Node
from tests.harness.agent import AgentProcess, inventory
from tests.harness.mps_control import BINARY, StandIn
from tests.harness.tools import DEADLINE_S, Processes, until

DEPLOY = Path(__file__).parents[2] / "deploy"
ACCOUNT = "meshctl-agent/meshctl-agent"
UUIDS = ("GPU-aaaa", "GPU-bbbb")
SLOTS = 4
"""Of each GPU, with the policy `default` that is there from the start."""

FOREVER = "trap exit TERM; sleep 3600 & wait"
"""A script that ends when it is told to, at once."""


class GpuNode(Processes):
    """`up` returns when the kubelet has all slots of `UUIDS`. A test leaves no pod and no policy but `default`."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory
        self.cluster = Cluster(directory / "cluster", scheduler=True)
        self.node = Node(self.cluster, directory / "node")
        self.agent: AgentProcess

    def up(self) -> Self:
        try:
            for part in (self.cluster, self.node):
                part.up()
                self._stack.callback(part.down)
            self._account()
            self.default_policy()
            self.gpus(*UUIDS)
            self.agent = self._agent()
            self._stack.callback(self._end_mps)
            self._start(self.agent)
            self.allocatable(SLOTS * len(UUIDS))
        except BaseException:
            self.down()
            raise
        return self

    def _account(self) -> None:
        agent = DEPLOY / "agent"
        self.cluster.kubectl_now("apply", f"--filename={agent / 'namespace.yaml'}")
        self.cluster.kubectl_now("apply", f"--filename={agent / 'rbac.yaml'}", "--namespace=meshctl-agent")

    def _agent(self) -> AgentProcess:
        return AgentProcess(
            self.directory / "agent",
            self.node.plugin_dir,
            self.node.pod_resources,
            f"--node={NAME}",
            f"--kubeconfig={self.cluster.kubeconfig_bound(ACCOUNT, NAME)}",
            f"--inventory=file:{self.directory / 'gpus.json'}",
            f"--mps-control={BINARY}",
            hasty=True,
        )

    def _end_mps(self) -> None:
        """Daemons outlive the agent, by design."""
        for uuid in UUIDS:
            asyncio.run(StandIn(self.agent.directory / "mps", uuid).clear())

    # ------------------------------------------------------------------------------------------------ what there is

    def gpus(self, *uuids: str) -> None:
        inventory(self.directory, *uuids)

    def default_policy(self) -> None:
        self.policy(mode="MPS", replicas=SLOTS, health={"recoverAfter": "1s"})

    def policy(self, name: str = "default", **spec: Any) -> None:
        document = {
            "apiVersion": "meshctl.io/v1alpha1",
            "kind": "GPUSharingPolicy",
            "metadata": {"name": name},
            "spec": spec,
        }
        self.cluster.kubectl_now("apply", "--filename=-", stdin=orjson.dumps(document).decode())

    def allocatable(self, slots: int, resource: str = RESOURCE) -> None:
        """Returns when the API server says that so many slots may be allocated."""
        path = resource.replace(".", "\\.")
        condition = f"--for=jsonpath={{.status.allocatable.{path}}}={slots}"
        self.cluster.kubectl_now("wait", condition, f"node/{NAME}", f"--timeout={DEADLINE_S:g}s")

    async def status(self) -> dict[str, Any]:
        """Status of the GPU objects on the API server, by UUID."""
        found = await self.cluster.get("gpus")
        return {one["spec"]["uuid"]: one.get("status", {}) for one in found["items"]}

    async def until_status(self, holds: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """Waits until what `status` returns fits; the kubelet is told before the API server."""
        found: dict[str, Any] = {}

        async def fits() -> bool:
            found.clear()
            found.update(await self.status())
            return holds(found)

        await until(fits, f"{what}; log: {self.agent.log}")
        return found

    async def holders(self) -> dict[tuple[str, str, str], dict[str, tuple[int, ...]]]:
        """(namespace, pod, container) -> UUID -> numbers of its slots, as the GPU objects say."""
        found: dict[tuple[str, str, str], dict[str, tuple[int, ...]]] = {}
        for uuid, status in (await self.status()).items():
            for one in status.get("holders", ()):
                key = (one["namespace"], one["pod"], one["container"])
                found.setdefault(key, {})[uuid] = tuple(one["slots"])
        return found

    async def until_holders(self, *pods: str) -> dict[tuple[str, str, str], dict[str, tuple[int, ...]]]:
        """Waits until exactly these pods, by name, hold slots; who holds what."""

        async def holds() -> bool:
            return sorted({pod for _, pod, _ in await self.holders()}) == sorted(pods)

        await until(holds, f"holders are {', '.join(pods) or 'nobody'}; log: {self.agent.log}")
        return await self.holders()

    # -------------------------------------------------------------------------------------------------------- pods

    async def phase(self, namespace: str, pod: str, phase: str) -> Any:
        """The pod, when it has come to it."""
        condition = f"--for=jsonpath={{.status.phase}}={phase}"
        place = f"--namespace={namespace}"
        await self.cluster.kubectl("wait", condition, f"pod/{pod}", place, f"--timeout={DEADLINE_S:g}s")
        return await self.cluster.get("pod", pod, place)

    async def delete(self, namespace: str, *pods: str) -> None:
        """Returns when they are gone, from the ledger too."""
        options = (f"--namespace={namespace}", "--grace-period=1", "--wait", f"--timeout={DEADLINE_S:g}s")
        await self.cluster.kubectl("delete", "pod", *(pods or ("--all",)), *options)
        left = {pod for space, pod, _ in await self.holders() if not (space == namespace and (pod in pods or not pods))}
        await self.until_holders(*left)


def pod(
    name: str,
    namespace: str,
    slots: int,
    script: str = FOREVER,
    *,
    plan: Mapping[str, int] | None = None,
    init: Sequence[int] = (),
    resource: str = RESOURCE,
    **spec: Any,
) -> Document:
    """A pod with one container that asks for `slots` (0: none), after init containers with so many each; `plan` is
    what a scheduler chose. `spec` on top."""

    def container(title: str, count: int, command: str) -> dict[str, Any]:
        found: dict[str, Any] = {"name": title, "image": IMAGE, "command": ["sh", "-c", command]}
        return found | ({"resources": {"limits": {resource: count}}} if count else {})

    metadata: dict[str, Any] = {"name": name, "namespace": namespace}
    if plan is not None:
        allocation = Allocation(containers=(ContainerAllocation(name="main", gpus=dict(plan)),))
        metadata["annotations"] = {ALLOCATION: allocation.text()}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {
            "hostNetwork": True,
            "automountServiceAccountToken": False,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "initContainers": [container(f"init-{place}", count, "true") for place, count in enumerate(init)],
            "containers": [container("main", slots, script)],
            **spec,
        },
    }
