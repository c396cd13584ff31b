"""Puts the agent together: the one place of this package that knows all its edges.

The order of the start matters: the lock, the last run's state, the GPUs, who holds them, and only then the kubelet is
told. The end goes the other way: the kubelet is told nothing any more, then MPS daemons that nobody uses end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from deviceplugin.admin import AdminServer
from deviceplugin.agent import Agent, Pace, Parts
from deviceplugin.checkpoint import Checkpoint
from deviceplugin.inventory import open_inventory
from deviceplugin.journal import Journal
from deviceplugin.lock import sole_agent
from deviceplugin.metrics import Metrics
from deviceplugin.mps import MpsDaemons
from deviceplugin.node import Node
from deviceplugin.podresources import PodResources
from deviceplugin.ports import World
from deviceplugin.publish import GpuPublisher
from deviceplugin.server import Observe, PluginServer
from deviceplugin.watch import ClusterView, FileView, PolicyFile
from meshctl.adapters.kubernetes.client import connect
from meshctl.address import Address
from meshctl.controller.clock import MonotonicClock
from meshctl.errors import InputError, MeshctlError

log = structlog.get_logger(__name__)

PLUGIN_RETRY_S = 5.0
TELL_S = 0.2
"""What happens within this is told together: the objects of 16 GPUs are milliseconds, and an Allocate would wait."""
CLUSTER_S = 10.0
"""Longest the start waits for the API server: what was in force goes on without it."""


@dataclass(frozen=True, slots=True)
class Config:
    """What `meshctl agent` is told."""

    node: str
    inventory: str = "nvml"
    """``nvml`` or ``file:PATH``."""
    cluster: bool = False
    kubeconfig: Path | None = None
    """With `cluster`; None: the pod's service account, or $KUBECONFIG."""
    policy: Path | None = None
    """GPUSharingPolicies in a file, instead of the cluster's."""
    plugin_dir: Path = Path("/var/lib/kubelet/device-plugins")
    pod_resources: Path = Path("/var/lib/kubelet/pod-resources/kubelet.sock")
    mps_control: Path = Path("nvidia-cuda-mps-control")
    mps_root: Path = Path("/run/meshctl/mps")
    mps_cgroup: Path | None = None
    """Where daemons are moved to; None: they stay in the agent's, and end with its container."""
    state: Path = Path("/var/lib/meshctl/agent.json")
    admin: Address = field(default_factory=lambda: Address("127.0.0.1", 18002))
    pace: Pace = field(default_factory=Pace)


async def serve(config: Config, ended: asyncio.Event) -> None:
    """Until `ended`. Raises InputError or MeshctlError when it can't start, with nothing left behind."""
    with sole_agent(config.plugin_dir, config.state):
        async with _agent(config) as (agent, publisher):
            plugins = Plugins(config.plugin_dir, agent, agent.parts.metrics.called)
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(work) for work in (agent.run(), plugins.run(), _telling(agent, publisher))]
                await ended.wait()
                for task in running:
                    task.cancel()


async def _telling(agent: Agent, publisher: GpuPublisher | None) -> None:
    """People, by the log and by GPU objects; those not before it is known who holds what: routing would take the pods
    off their GPUs."""
    journal = Journal()
    while True:
        objects = {str(one["spec"]["uuid"]): one for one in agent.objects()}
        journal.follow(objects, agent.parts.clock.now_s())
        if publisher is not None and agent.node.told:
            publisher.update(objects)
        await agent.changed()
        await asyncio.sleep(TELL_S)


class Plugins:
    """One device plugin for each resource that has slots; each goes on alone when another can't."""

    def __init__(self, directory: Path, agent: Agent, observe: Observe, retry_s: float = PLUGIN_RETRY_S) -> None:
        self._directory, self._agent, self._observe, self._retry_s = directory, agent, observe, retry_s
        self._running: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Until it is cancelled; then the kubelet sees all slots go, and keeps the pods that have some."""
        try:
            while True:
                self._follow(self._agent.node.offered())
                await self._agent.changed()
        finally:
            await self._end(*self._running)

    def _follow(self, offered: frozenset[str]) -> None:
        for resource in sorted(offered - self._running.keys()):
            self._running[resource] = asyncio.create_task(self._keep(resource), name=f"plugin {resource}")
        for resource in sorted(self._running.keys() - offered):
            self._running.pop(resource).cancel()

    async def _keep(self, resource: str) -> None:
        activity = f"device plugin {resource}"
        while True:
            self._agent.report(activity, None)
            try:
                await PluginServer(self._directory, resource, self._agent, self._observe).run()
            except MeshctlError as error:
                self._agent.report(activity, error)
            except Exception as error:  # a node without this task would have no slots, and nobody would know why
                log.exception("device plugin failed, trying again", resource=resource)
                self._agent.report(activity, error)
            await asyncio.sleep(self._retry_s)

    async def _end(self, *resources: str) -> None:
        tasks = [self._running.pop(resource) for resource in resources]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def _agent(config: Config) -> AsyncIterator[tuple[Agent, GpuPublisher | None]]:
    """The agent, started, and who tells people of it; without a cluster they look at the admin API."""
    async with AsyncExitStack() as stack:
        clock = MonotonicClock()
        inventory = open_inventory(config.inventory)
        stack.push_async_callback(inventory.close)
        checkpoint = Checkpoint(config.state)
        node = Node.restored(await asyncio.to_thread(checkpoint.load, clock.now_s()))
        holdings = PodResources(config.pod_resources, config.plugin_dir)
        stack.push_async_callback(holdings.close)
        world, publisher = await _world(config, stack)
        mps = MpsDaemons(config.mps_control, config.mps_root, inventory, busy=node.busy, cgroup=config.mps_cgroup)
        parts = Parts(config.node, inventory, mps, holdings, world, checkpoint, clock, Metrics())
        agent = Agent(parts, node, config.pace)
        stack.push_async_callback(agent.stop)
        await agent.start()
        admin = AdminServer(agent, publisher.problems if publisher is not None else tuple)
        await admin.start(config.admin)
        stack.push_async_callback(admin.stop)
        log.info("serving", node=config.node, gpus=len(node.cards), admin=str(admin.address))
        yield agent, publisher


async def _world(config: Config, stack: AsyncExitStack) -> tuple[World, GpuPublisher | None]:
    """Started. Raises InputError for a policy file or a kubeconfig that cannot be used."""
    file = await asyncio.to_thread(PolicyFile, config.policy) if config.policy is not None else None
    if not config.cluster:
        if file is None:
            raise InputError("neither a cluster nor a policy: give --kubeconfig FILE, or --policy FILE")
        return FileView(config.node, file), None
    client = await stack.enter_async_context(connect(config.kubeconfig))
    view = ClusterView(client, config.node, file=file)
    stack.push_async_callback(view.stop)
    await view.start(CLUSTER_S)
    publisher = GpuPublisher(client, config.node)
    await publisher.start()
    stack.push_async_callback(publisher.stop)
    return view, publisher
