"""An agent in this process, over real sockets and with real MPS daemons (the stand-in's): what it never gives up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from deviceplugin.main import Plugins
from meshctl.api.gpusharingpolicy import GPUSharingPolicySpec
from meshctl.sharing import RESOURCE, Mode, MpsPhase
from tests.harness.agent_world import SLICED, A, B, World
from tests.harness.fake_kubelet import FakeKubelet
from tests.harness.mps_control import BINARY, Client, StandIn
from tests.harness.tools import until


async def test_a_plugin_survives_what_nobody_thought_of(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The plugin directory becomes a link to itself, which no call expects: when it is one again, slots are offered."""
    world = World(tmp_path)
    await world.start()
    metrics = world.agent.parts.metrics
    directory, aside = tmp_path_factory.mktemp("p") / "p", tmp_path / "aside"  # a socket's path has 107 bytes
    directory.symlink_to(directory)
    plugins = asyncio.create_task(Plugins(directory, world.agent, metrics.called, retry_s=0.05).run())
    try:

        async def failed() -> bool:
            return 'failures_total{activity="device plugin hpe.com/gpus"}' in metrics.exposition().decode()

        await until(failed, "it failed")
        async with FakeKubelet(aside) as kubelet:
            directory.unlink()
            directory.symlink_to(kubelet.plugin_dir)
            await kubelet.has(RESOURCE, 8)
            directory.unlink()
            directory.symlink_to(directory)
            seen = metrics.exposition()

            async def failed_again() -> bool:
                return metrics.exposition() != seen

            await until(failed_again, "it failed again")
            directory.unlink()
            directory.symlink_to(kubelet.plugin_dir)
            await kubelet.restart()
            await kubelet.has(RESOURCE, 8)
    finally:
        plugins.cancel()
        await asyncio.wait([plugins])
        await world.agent.stop()


async def test_an_mps_daemon_with_clients_ends_for_no_policy_and_with_no_agent(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Of a pod that was deleted by force: nobody lists it, and its process runs on. The GPU changes when that ends, and
    until then it gives nothing out and says why; the other one changes at once."""
    async with spaced(tmp_path_factory.mktemp("w")) as (world, root):
        agent = world.agent
        with Client() as client:
            await StandIn(root / "mps", A).connect(client)
            daemons = await StandIn(root / "mps", A).processes()
            world.cluster.policy(SLICED)

            async def other() -> bool:
                said = [problem.message for problem in agent.problems() if problem.where == f"change {A}"]
                return agent.node.cards[B].sharing == agent.node.cards[B].wanted.sharing and bool(said)

            await until(other, "the other GPU has changed, and this one says why not")
            (said,) = [problem.message for problem in agent.problems()]
            assert said == f"GPU {A}: no pod has slots, and its MPS daemon waits for its clients: {client.pid}"
            assert {device.id.partition("::")[0] for device in agent.devices(RESOURCE) if device.healthy} == {B}
            assert await StandIn(root / "mps", A).processes() == daemons

        async def changed() -> bool:
            return agent.node.cards[A].sharing == agent.node.cards[A].wanted.sharing and not agent.problems()

        await until(changed, "the GPU has changed")


async def test_a_gpu_that_begins_to_change_while_an_allocate_waits_is_given_as_it_is_then(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The Allocate of an empty GPU waits for the pods, and meanwhile the policy becomes another: the container must not
    get what held before, and the GPU's MPS daemon end under it."""
    async with spaced(tmp_path_factory.mktemp("w")) as (world, _):
        agent = world.agent
        world.cluster.answers.clear()
        allocating = asyncio.create_task(agent.allocate(RESOURCE, [[f"{A}::0"]]))
        await asyncio.sleep(0)
        world.cluster.policy(SLICED)
        while not agent.node.cards[A].changing:
            await agent.changed()
        world.cluster.answers.set()
        (answer,) = await allocating

        async def changed() -> bool:
            return not agent.node.cards[A].changing

        await until(changed, "the change is over")
        sharing = agent.node.cards[A].sharing
        assert sharing is not None
        assert (sharing.mode is Mode.MPS) == ("CUDA_MPS_PIPE_DIRECTORY" in answer.envs)


async def test_what_an_earlier_agent_left_is_not_ended_when_it_is_wanted_by_then(tmp_path: Path) -> None:
    """The agent asks whether a leftover daemon has clients, the policy becomes MPS, and then comes the answer."""
    control = tmp_path / BINARY.name
    control.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\nuntil [ -e {tmp_path}/go ]; do sleep 0.02; done\nexit 1\n")
    control.chmod(0o755)
    world = World(tmp_path, SLICED, control)
    agent = world.agent
    await world.start()
    running = asyncio.create_task(agent.run())
    try:
        (tmp_path / "mps" / A).mkdir(parents=True)

        async def asked() -> bool:
            return (tmp_path / "asked").exists()

        await until(asked, "the agent asks for clients")
        world.cluster.policy(GPUSharingPolicySpec(mode=Mode.MPS, replicas=4))
        while not agent.node.cards[A].by_mps:
            await agent.changed()
        (tmp_path / "go").touch()

        async def failed() -> bool:
            return agent.parts.mps.status(A).phase is MpsPhase.FAILED

        await until(failed, "the daemon that is wanted was tried")
    finally:
        (tmp_path / "go").touch()
        running.cancel()
        await asyncio.wait([running])
        await agent.stop()


@asynccontextmanager
async def spaced(root: Path) -> AsyncIterator[tuple[World, Path]]:
    """An agent that runs, on a node whose MPS daemons do."""
    world = World(root, GPUSharingPolicySpec(mode=Mode.MPS, replicas=4), BINARY)
    agent = world.agent
    await world.start()
    running = asyncio.create_task(agent.run())
    try:

        async def up() -> bool:
            return all(agent.parts.mps.status(uuid).phase is MpsPhase.RUNNING for uuid in (A, B))

        await until(up, "the daemons run")
        yield world, root
    finally:
        running.cancel()
        await asyncio.wait([running])
        await agent.stop()
        for uuid in (A, B):
            await StandIn(root / "mps", uuid).clear()
