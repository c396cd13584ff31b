"""The whole agent over the real nvidia-ml-py and a driver of the tests' own: what becomes of a node's slots and of the
containers that have some when a GPU, the driver, an MPS daemon or the agent itself fails."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from deviceplugin.agent import Agent, Parts
from deviceplugin.checkpoint import Checkpoint
from deviceplugin.metrics import Metrics
from deviceplugin.mps import MpsDaemons
from deviceplugin.node import Node
from deviceplugin.nvml import NvmlInventory
from deviceplugin.podresources import PodResources
from deviceplugin.watch import FileView, PolicyFile
from meshctl.controller.clock import MonotonicClock
from meshctl.ports import KubeObject
from meshctl.sharing import RESOURCE, Owner, Slot
from tests.harness import hasty_agent
from tests.harness.agent import AgentProcess
from tests.harness.fake_kubelet import AdmissionError
from tests.harness.gpu_site import ONE, SLICED, SPACED, TWO, GpuSite, gpu_site, holders, told
from tests.harness.mps_control import BINARY, Client, alive
from tests.harness.tools import DEADLINE_S, until

A, B, C = (Owner("team", pod, "main") for pod in "abc")
DEFAULT_MODE, EXCLUSIVE_PROCESS = 0, 3


@pytest.fixture
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GpuSite]:
    async with gpu_site(tmp_path_factory.mktemp("s")) as site:
        yield site


def healthy(site: GpuSite, uuid: str) -> int:
    """Slots of one GPU that the kubelet may give."""
    return sum(well for text, well in site.kubelet.devices(RESOURCE).items() if Slot.parse(text).uuid == uuid)


async def counted(agent: AgentProcess, line: str) -> None:
    """Waits for a line of the metrics."""

    async def holds() -> bool:
        return line in agent.metrics().splitlines()

    await until(holds, f"the metrics say {line}")


def xids(uuid: str, code: int, *, ignored: bool, count: int = 1) -> str:
    return f'meshctl_agent_xids_total{{gpu="{uuid}",ignored="{str(ignored).lower()}",xid="{code}"}} {count}.0'


# ----------------------------------------------------------------------------------------------------------- the driver


async def test_without_a_driver_it_ends_and_says_what_to_do(site: GpuSite) -> None:
    """Exit status 1, for the command line is right; neither a socket nor a state file is left that says no GPUs."""
    site.driver.refuse_init(9)
    before = sorted(site.kubelet.plugin_dir.iterdir())
    status, said = await asyncio.to_thread(site.agent(hasty=False).refused)
    assert status == 1
    assert said.splitlines()[-1] == (
        "meshctl: NVML: nvmlInit: Driver Not Loaded: the kernel has no NVIDIA driver: install NVIDIA's driver, in a"
        " container let NVIDIA's container runtime mount it; on a node without GPUs give --inventory file:PATH"
    )
    assert sorted(site.kubelet.plugin_dir.iterdir()) == before
    assert not site.state.exists()


async def test_a_gpu_that_hangs_in_the_driver_takes_nothing_else_along(site: GpuSite) -> None:
    """Its slots are unhealthy, its containers keep theirs, the other GPU's are given; it recovers when it answers."""
    async with site.agent() as agent:
        await site.kubelet.has(RESOURCE, 8)
        hung = await site.given(A)
        other = TWO.uuid if hung == ONE.uuid else ONE.uuid
        site.driver.hang(hung)
        await site.kubelet.has(RESOURCE, 4)
        assert healthy(site, hung) == 0
        assert "no answer within" in await told(agent, hung, "Healthy", "ProbeTimeout")
        assert await site.given(B, 4) == other
        await holders(agent, A, B)
        await counted(agent, f'meshctl_agent_gpu_healthy{{gpu="{hung}"}} 0.0')
        site.driver.heal(hung)
        await site.kubelet.has(RESOURCE, 8)
        await holders(agent, A, B)
        assert agent.condition(hung, "Healthy")["reason"] == "Healthy"


async def test_it_starts_and_ends_although_a_gpu_hangs(site: GpuSite) -> None:
    """It serves the others; the one that hangs joins them when it answers. A call that never ends stops no SIGTERM."""
    site.driver.hang(ONE.uuid)
    async with site.agent() as agent:
        await site.kubelet.has(RESOURCE, 4)
        assert await site.given(A) == TWO.uuid
        site.driver.heal(ONE.uuid)
        await site.kubelet.has(RESOURCE, 8)
        site.driver.hang(ONE.uuid)
        await site.kubelet.has(RESOURCE, 4)
        process = agent.process
        assert process is not None
        process.terminate()
        assert await asyncio.to_thread(process.wait, DEADLINE_S) == 0
    assert [path for path in site.kubelet.plugin_dir.iterdir() if path.name.startswith("meshctl")] == []


async def test_a_gpu_that_falls_off_the_bus_is_told_of_and_comes_back(site: GpuSite) -> None:
    """All its slots are unhealthy, its container is still told of, the other GPU never notices."""
    async with site.agent() as agent:
        await site.kubelet.has(RESOURCE, 8)
        lost = await site.given(A)
        other = TWO.uuid if lost == ONE.uuid else ONE.uuid
        site.driver.xid(lost, 79)
        site.driver.lose(lost)
        await site.kubelet.has(RESOURCE, 4)
        await told(agent, lost, "Healthy", "Lost")
        await holders(agent, A)
        assert await site.given(B, 4) == other
        assert healthy(site, other) == 4
        site.driver.heal(lost)
        await site.kubelet.has(RESOURCE, 8)
        await holders(agent, A, B)
        site.driver.xid(lost, 79)
        await counted(agent, xids(lost, 79, ignored=False, count=2))


async def test_a_gpu_that_is_lost_when_the_agent_starts_keeps_its_containers(site: GpuSite) -> None:
    """Who holds its slots is known from the kubelet, how it was shared from the state file; it comes back as it was."""
    async with site.agent() as agent:
        await site.kubelet.has(RESOURCE, 8)
        lost = await site.given(A)
        await holders(agent, A)
        await agent.end(signal.SIGKILL)
    site.driver.lose(lost)
    site.policies(default={**SLICED, "replicas": 2})
    async with site.agent() as agent:
        await holders(agent, A)
        await told(agent, lost, "Healthy", "Lost")
        assert agent.gpus()[lost]["slots"] == {"total": 4, "used": 1, "free": 0, "unavailable": 3}
        await site.kubelet.has(RESOURCE, 2)
        site.driver.heal(lost)
        await site.kubelet.has(RESOURCE, 6)
        await told(agent, lost, "Shared", "WaitingForPods")
        await holders(agent, A)


# ----------------------------------------------------------------------------------------------------------------- XIDs


async def test_13_an_xid_marks_all_slots_of_its_gpu_until_probes_bring_it_back(site: GpuSite) -> None:
    """No more and no fewer; a condition and a metric tell of it; what was given is kept; a slot of it is refused."""
    site.policies(default={**SLICED, "health": {"recoverAfter": "1h"}})
    async with site.agent() as agent:
        await site.kubelet.has(RESOURCE, 8)
        uuid = await site.given(A)
        free = next(text for text in site.kubelet.available(RESOURCE) if Slot.parse(text).uuid == uuid)
        site.driver.xid(uuid, 79)
        await site.kubelet.has(RESOURCE, 4)
        assert healthy(site, uuid) == 0
        await told(agent, uuid, "Healthy", "Recovering")
        assert agent.condition(uuid, "Healthy")["message"].startswith("XID 79 (the GPU has fallen off the bus); it ans")
        await counted(agent, xids(uuid, 79, ignored=False))
        with pytest.raises(AdmissionError, match="fallen off the bus"):
            await site.kubelet.ask(RESOURCE, [free])
        await holders(agent, A)
        site.policies(default=SLICED)
        await site.kubelet.has(RESOURCE, 8)
        await told(agent, uuid, "Healthy", "Healthy")


async def test_an_xid_of_an_application_marks_nothing_but_a_critical_one_always_does(site: GpuSite) -> None:
    """Ignored by default (31), or by the policy (94); 45 is both listed as critical and ignored: 14."""
    rules = {"ignoredXIDs": [45, 94], "criticalXIDs": [45], "recoverAfter": "1h"}
    site.policies(default={**SLICED, "health": rules})
    async with site.agent() as agent:
        await site.kubelet.has(RESOURCE, 8)
        site.driver.xid(ONE.uuid, 31)
        site.driver.xid(ONE.uuid, 94)
        await counted(agent, xids(ONE.uuid, 94, ignored=True))
        assert xids(ONE.uuid, 31, ignored=True) in agent.metrics().splitlines()
        site.driver.xid(TWO.uuid, 45)
        await site.kubelet.has(RESOURCE, 4)
        assert (healthy(site, ONE.uuid), healthy(site, TWO.uuid)) == (4, 0)
        assert xids(TWO.uuid, 45, ignored=False) in agent.metrics().splitlines()
        assert agent.condition(ONE.uuid, "Healthy")["reason"] == "Healthy"


async def test_a_restart_makes_no_ill_gpu_healthy(site: GpuSite) -> None:
    """The next agent knows of the XID, though nothing but the file tells it; no slot is offered even for a moment."""
    site.policies(default={**SLICED, "health": {"recoverAfter": "1h"}})
    async with site.agent() as agent:
        await site.kubelet.has(RESOURCE, 8)
        site.driver.xid(ONE.uuid, 48)
        await site.kubelet.has(RESOURCE, 4)

        async def written() -> bool:
            return b'"xids":[48]' in site.state.read_bytes()

        await until(written, "the XID is in the state file")
        await agent.end(signal.SIGKILL)
    site.kubelet.resources.clear()
    async with site.agent() as agent:
        await told(agent, ONE.uuid, "Healthy", "Recovering")
        await site.kubelet.has(RESOURCE, 4)
        assert (healthy(site, TWO.uuid), site.kubelet.resources[RESOURCE].most) == (4, 4)


# ------------------------------------------------------------------------------------------------------------------ MPS


async def test_gpus_are_exclusive_while_mps_has_them_and_default_afterwards(site: GpuSite) -> None:
    """By a change of policy, and at the agent's end; where a container holds slots, the daemon stays, and its mode."""
    site.policies(default=SPACED)
    async with site.agent() as agent:
        await site.kubelet.has(RESOURCE, 8)
        assert [site.driver.compute_mode(gpu.uuid) for gpu in (ONE, TWO)] == [EXCLUSIVE_PROCESS] * 2
        site.policies(default=SLICED)
        for gpu in (ONE, TWO):
            await until_mode(site, gpu.uuid, DEFAULT_MODE)
            await told(agent, gpu.uuid, "Shared", "Shared")
            assert await site.mps(gpu.uuid).processes() == []
        site.policies(default=SPACED)
        await until_mode(site, ONE.uuid, EXCLUSIVE_PROCESS)
        await site.kubelet.has(RESOURCE, 8)
        held = await site.given(A)
        await holders(agent, A)
    other = TWO.uuid if held == ONE.uuid else ONE.uuid
    assert (site.driver.compute_mode(held), site.driver.compute_mode(other)) == (EXCLUSIVE_PROCESS, DEFAULT_MODE)
    assert (len(await site.mps(held).processes()), await site.mps(other).processes()) == (1, [])


async def until_mode(site: GpuSite, uuid: str, mode: int) -> None:
    async def holds() -> bool:
        return site.driver.compute_mode(uuid) == mode

    await until(holds, f"the compute mode of {uuid} is {mode}")


async def test_a_daemon_that_dies_under_a_client_is_started_when_the_client_is_gone(site: GpuSite) -> None:
    """Its slots are withdrawn and the reason told; a container that starts is held back until the next daemon is up."""
    site.driver.gpus([ONE])
    site.policies(default=SPACED)
    async with site.agent() as agent:
        await site.kubelet.has(RESOURCE, 4)
        await site.given(A, 2)
        await site.kubelet.start_container(A, RESOURCE)
        with Client() as client:
            await site.mps().connect(client)
            servers = await site.mps().servers()
            daemon = next(pid for pid in await site.mps().processes() if pid not in servers)
            site.driver.processes(ONE.uuid, servers, [client.pid])
            await counted(agent, f'meshctl_agent_mps_clients{{gpu="{ONE.uuid}"}} 1.0')
            site.mps().fault("crash")
            await site.kubelet.has(RESOURCE, 0)
            site.mps().mend("crash")
            said = await told(agent, ONE.uuid, "Healthy", "MpsFailed")
            assert f"(process {daemon}) died" in said

            async def waits() -> bool:
                return f"waits for the processes on GPU {ONE.uuid}: {client.pid}" in mps(agent)["message"]

            await until(waits, "the next daemon waits for the client")
            assert mps(agent)["state"] == "Failed"
            await holders(agent, A)
            await counted(agent, f'meshctl_agent_mps_up{{gpu="{ONE.uuid}"}} 0.0')
            restarted = asyncio.create_task(site.kubelet.start_container(A, RESOURCE))
            await counted(agent, f'meshctl_agent_gpu_healthy{{gpu="{ONE.uuid}"}} 0.0')
            assert not restarted.done()
            assert alive(client.pid)
            assert not alive(daemon)
        site.driver.processes(ONE.uuid, [])
        await site.kubelet.has(RESOURCE, 4)
        await asyncio.wait_for(restarted, DEADLINE_S)
        await counted(agent, f'meshctl_agent_mps_restarts_total{{gpu="{ONE.uuid}"}} 1.0')
        await told(agent, ONE.uuid, "Healthy", "Healthy")
        await holders(agent, A)


def mps(agent: AgentProcess) -> dict[str, Any]:
    found: dict[str, Any] = agent.gpus()[ONE.uuid]["mps"]
    return found


async def test_daemons_outlive_an_agent_that_is_killed_and_are_adopted(site: GpuSite) -> None:
    """The same process, its clients untouched; the policy that was written meanwhile waits for the container."""
    site.driver.gpus([ONE])
    site.policies(default=SPACED)
    with Client() as client:
        async with site.agent() as agent:
            await site.kubelet.has(RESOURCE, 4)
            await site.given(A)
            await site.mps().connect(client)
            site.driver.processes(ONE.uuid, await site.mps().servers(), [client.pid])
            before = await site.mps().processes()
            await agent.end(signal.SIGKILL)
        site.policies(default=SLICED)
        async with site.agent() as agent:
            await holders(agent, A)
            await site.kubelet.has(RESOURCE, 4)
            await counted(agent, f'meshctl_agent_mps_clients{{gpu="{ONE.uuid}"}} 1.0')
            await told(agent, ONE.uuid, "Shared", "WaitingForPods")
            await site.kubelet.start_container(A, RESOURCE)
            assert (await site.mps().processes(), mps(agent)["restarts"]) == (before, 0)
            assert site.driver.compute_mode(ONE.uuid) == EXCLUSIVE_PROCESS
            site.driver.processes(ONE.uuid, [])
            client.end()
            site.kubelet.end(A)
            await until_mode(site, ONE.uuid, DEFAULT_MODE)
            await told(agent, ONE.uuid, "Shared", "Shared")
            assert await site.mps().processes() == []


async def test_a_daemon_that_died_while_there_was_no_agent_is_not_started_under_its_clients(site: GpuSite) -> None:
    """The next agent finds the clients and waits for them as if it had seen the daemon die."""
    site.driver.gpus([ONE])
    site.policies(default=SPACED)
    with Client() as client:
        async with site.agent() as agent:
            await site.kubelet.has(RESOURCE, 4)
            await site.given(A)
            await site.mps().connect(client)
            site.driver.processes(ONE.uuid, [client.pid])
            await agent.end(signal.SIGKILL)
        await site.mps().clear()
        async with site.agent() as agent:
            said = await told(agent, ONE.uuid, "Healthy", "MpsFailed")
            assert str(client.pid) in said
            assert await site.mps().processes() == []
            await holders(agent, A)
            site.driver.processes(ONE.uuid, [])
            client.end()
            await site.kubelet.has(RESOURCE, 4)


async def test_what_is_left_of_mps_is_cleared_up_when_nobody_can_be_using_it(site: GpuSite) -> None:
    """The state file is lost, the policy another, the kubelet away: the daemon stays until its container is gone."""
    site.driver.gpus([ONE])
    site.policies(default=SPACED)
    async with site.agent() as agent:
        await site.kubelet.has(RESOURCE, 4)
        await site.given(A)
        before = await site.mps().processes()
        await agent.end(signal.SIGKILL)
    await site.kubelet.stop()
    site.state.unlink()
    site.policies(default=SLICED)
    async with site.agent() as agent:
        await told(agent, ONE.uuid, "Shared", "Shared")
        await site.kubelet.start()
        await holders(agent, A)
        assert (await site.mps().processes(), site.driver.compute_mode(ONE.uuid)) == (before, EXCLUSIVE_PROCESS)
        site.kubelet.end(A)
        await until_mode(site, ONE.uuid, DEFAULT_MODE)
        assert await site.mps().processes() == []


async def test_without_the_mps_program_it_says_what_to_install_and_gives_nothing(site: GpuSite) -> None:
    """The GPUs are withdrawn, not given without limits; a policy without MPS is in force as soon as it is read."""
    site.policies(default=SPACED)
    async with site.agent("--mps-control=/no/mps") as agent:
        for gpu in (ONE, TWO):
            said = await told(agent, gpu.uuid, "Healthy", "MpsFailed")
            assert "--mps-control /no/mps not found: it comes with NVIDIA's driver" in said
        assert set(site.kubelet.devices(RESOURCE).values()) <= {False}
        site.policies(default=SLICED)
        await site.kubelet.has(RESOURCE, 8)
        assert [site.driver.compute_mode(gpu.uuid) for gpu in (ONE, TWO)] == [DEFAULT_MODE] * 2


async def test_20_more_replicas_than_mps_has_clients_are_refused_and_what_is_in_force_stays(site: GpuSite) -> None:
    """49 on a driver whose servers take 48: the GPU keeps its four, and says which number it is that is too large."""
    site.policies(default=SPACED)
    async with site.agent() as agent:
        await site.kubelet.has(RESOURCE, 8)
        held = await site.given(A)
        site.policies(default={**SPACED, "replicas": 49})
        said = await told(agent, ONE.uuid, "Shared", "TooManyReplicas")
        assert "49 slots are 49 clients of one MPS server" in said
        assert "570.00.stub takes 48" in said
        assert "until then MPS, 4 slots" in said
        await site.given(B, 3)
        assert sorted(map(len, site.kubelet.held.values())) == [1, 3]
        assert len(site.kubelet.devices(RESOURCE)) == 8
        site.policies(default={**SPACED, "replicas": 48})
        await told(agent, held, "Shared", "WaitingForPods")


# ------------------------------------------------------------------------------------------------------- within limits


class Crowd(FileView):
    """A cluster of which only the pods are known."""

    def __init__(self, file: PolicyFile, pods: Mapping[Owner, str]) -> None:
        super().__init__("node-1", file)
        self._pods = [
            {"metadata": {"namespace": owner.namespace, "name": owner.pod, "uid": uid}, "spec": {}, "status": {}}
            for owner, uid in pods.items()
        ]

    def pods(self) -> Sequence[KubeObject]:
        return self._pods


@pytest.fixture
def pod_of_a() -> Iterator[Path]:
    """A cgroup like those that the kubelet makes for pods; gone with the test."""
    mounted = Path("/sys/fs/cgroup")
    unified = (mounted / "cgroup.procs").exists()
    above = (mounted if unified else mounted / "systemd") / f"meshctl-test-{uuid4()}"
    path = above / f"kubepods-pod{str(uuid4()).replace('-', '_')}.slice"
    try:
        path.mkdir(parents=True)
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    yield path
    path.rmdir()
    above.rmdir()


async def test_a_pod_with_more_processes_than_its_share_is_for_is_named(
    site: GpuSite, pod_of_a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MPS limits processes: two of them have twice the container's share. Told for as long as there are two."""
    site.driver.load(monkeypatch)
    file = PolicyFile(site.policies(default=SPACED))
    uid = pod_of_a.stem.removeprefix("kubepods-pod").replace("_", "-")
    site.kubelet.held[A, RESOURCE] = [str(Slot(ONE.uuid, 0))]
    async with AsyncExitStack() as stack:
        gpus = NvmlInventory(DEADLINE_S, event_wait_ms=50)
        stack.push_async_callback(gpus.close)
        holdings = PodResources(site.kubelet.pod_resources, site.kubelet.plugin_dir)
        stack.push_async_callback(holdings.close)
        node, state = Node.restored(None), Checkpoint(site.state)
        mps = MpsDaemons(BINARY, site.root / "m", gpus, busy=node.busy)
        world = Crowd(file, {A: uid})
        parts = Parts("node-1", gpus, mps, holdings, world, state, MonotonicClock(), Metrics())
        agent = Agent(parts, node, hasty_agent.PACE)
        stack.push_async_callback(agent.stop)
        await agent.start()
        running = asyncio.create_task(agent.run())
        stack.callback(running.cancel)
        first, second, stranger = (stack.enter_context(Client()) for _ in range(3))

        async def says(reason: str) -> str:
            """Waits for it; its words."""
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    conditions = {one["type"]: one for one in agent.objects()[0]["status"]["conditions"]}
                    if conditions["WithinLimits"]["reason"] == reason and agent.devices(RESOURCE)[0].healthy:
                        return str(conditions["WithinLimits"]["message"])
                    await agent.changed()

        assert await says("WithinLimits") == ""
        for client in (first, second):
            (pod_of_a / "cgroup.procs").write_text(f"{client.pid}\n")
        site.driver.processes(ONE.uuid, [stranger.pid], [first.pid])
        assert await says("WithinLimits") == ""
        site.driver.processes(ONE.uuid, [stranger.pid], [first.pid, second.pid])
        assert await says("TooManyProcesses") == "team/a has 2 processes on the GPU and limits for 1"
        assert list(agent.node.ledger.held.values()) == [A]
        second.end()
        site.driver.processes(ONE.uuid, [stranger.pid], [first.pid])
        assert await says("WithinLimits") == ""
        first.end()
        running.cancel()
        await asyncio.wait([running])
