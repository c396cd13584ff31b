"""MPS daemons are started, watched, adopted and ended: real processes of the stand-in, each fault that it knows."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from deviceplugin.mps import MpsDaemons, Pace
from deviceplugin.mpscontrol import MpsError
from meshctl.errors import InputError
from meshctl.sharing import MpsPhase, MpsStatus
from tests.harness.mps_control import BINARY, Client, RecordedInventory, StandIn, alive, gpu
from tests.harness.tools import DEADLINE_S, until

UUIDS = ("GPU-1", "GPU-2")
PATIENT = Pace(probe_s=0.1, answer_s=DEADLINE_S, start_s=DEADLINE_S, quit_s=5.0, first_wait_s=0.05)
"""A slow machine is no hang."""
HASTY = replace(PATIENT, answer_s=2.0, quit_s=2.0, grace_s=0.2, patience=1)
"""For those that do hang."""


@dataclass
class Node:
    """Agents of one node, one after the other, and what they share."""

    root: Path
    inventory: RecordedInventory = field(default_factory=RecordedInventory)
    busy: set[str] = field(default_factory=set)
    agents: list[MpsDaemons] = field(default_factory=list)

    def agent(self, pace: Pace = PATIENT, control: Path = BINARY, cgroup: Path | None = None) -> MpsDaemons:
        agent = MpsDaemons(control, self.root, self.inventory, busy=self.busy.__contains__, pace=pace, cgroup=cgroup)
        self.agents.append(agent)
        return agent

    def standin(self, uuid: str = "GPU-1") -> StandIn:
        return StandIn(self.root, uuid)


@pytest.fixture
async def node(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Node]:
    """A node whose processes end with the test. Its directory has a short name: a socket's path has 107 bytes."""
    node = Node(tmp_path_factory.mktemp("m"))
    try:
        yield node
    finally:
        for agent in node.agents:
            await agent.stop()
        for uuid in UUIDS:
            await node.standin(uuid).clear()
            assert await node.standin(uuid).processes() == []


async def seen(mps: MpsDaemons, holds: Callable[[MpsStatus], bool], what: str, uuid: str = "GPU-1") -> MpsStatus:
    """The first status that `holds`, told by `wait_changed`."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not holds(status := mps.status(uuid)):
                await mps.wait_changed()
            return status
    except TimeoutError as late:
        raise AssertionError(f"not within {DEADLINE_S:g} s: {what}; but {mps.status(uuid)}") from late


async def running(mps: MpsDaemons, uuid: str = "GPU-1") -> int:
    """The daemon's process, when it runs."""
    status = await seen(mps, lambda status: status.phase is MpsPhase.RUNNING, "it runs", uuid)
    assert status.pid is not None
    return status.pid


async def failed(mps: MpsDaemons) -> MpsStatus:
    return await seen(mps, lambda status: status.phase is MpsPhase.FAILED, "it has failed")


def environment(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


async def crashed(node: Node) -> None:
    """The daemon dies at the next question, and its fault with it."""
    control = node.standin().control()
    found = [one.pid for one in await control.find() if not one.server]
    node.standin().fault("crash")

    async def gone() -> bool:
        return not any(map(alive, found))

    await until(gone, "the daemon died")
    node.standin().mend("crash")


async def test_a_daemon_of_its_own_until_it_is_unwanted(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exclusive before it starts, default after it ended; meanwhile it tells its clients; nothing is left.

    It has its GPU by UUID, and no limit for every client of it, even where the agent's own environment has one.
    """
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "7")
    node.inventory.look = lambda uuid: (node.root / uuid / "pipe" / "nvidia-cuda-mps-control.pid").exists()
    mps = node.agent()
    assert mps.status("GPU-1") == MpsStatus()
    mps.want(gpu())
    assert mps.status("GPU-1").phase is MpsPhase.STARTING
    pid = await running(mps)
    assert mps.pipe_directory("GPU-1") == str(node.standin().pipe)
    assert (node.standin().pipe.stat().st_mode & 0o7777, node.root.joinpath("GPU-1").stat().st_mode & 0o777) == (
        0o1777,
        0o755,
    )
    words = environment(pid)
    assert b"CUDA_VISIBLE_DEVICES=GPU-1" in words
    assert not any(word.startswith(b"CUDA_MPS_ACTIVE") for word in words)
    await mps.ready("GPU-1", DEADLINE_S)
    with Client() as client:
        await node.standin().connect(client)
        assert await mps.clients("GPU-1") == (client.pid,)
        await seen(mps, lambda status: status.clients == 1, "the client is counted")
        assert mps.status("GPU-1") == MpsStatus(MpsPhase.RUNNING, pid, 1)
    await seen(mps, lambda status: status.clients == 0, "the client has ended")
    await mps.unwant("GPU-1")
    assert node.inventory.modes == [("GPU-1", True, False), ("GPU-1", False, False)]
    assert not alive(pid)
    assert await node.standin().processes() == []
    assert list(node.root.iterdir()) == []
    assert mps.status("GPU-1") == MpsStatus()
    assert await mps.clients("GPU-1") is None


async def test_two_gpus_share_nothing(node: Node) -> None:
    """Each has its directories, its process, its clients; the end of one leaves the other as it was."""
    mps = node.agent()
    for number, uuid in enumerate(UUIDS):
        mps.want(gpu(uuid, number))
    first, second = [await running(mps, uuid) for uuid in UUIDS]
    assert first != second
    assert mps.pipe_directory("GPU-1") != mps.pipe_directory("GPU-2")
    with Client() as client:
        await node.standin("GPU-2").connect(client)
        assert (await mps.clients("GPU-1"), await mps.clients("GPU-2")) == ((), (client.pid,))
        os.kill(first, signal.SIGKILL)
        await seen(mps, lambda status: status.restarts == 1, "the first is started again")
        await mps.unwant("GPU-1")
        assert await mps.clients("GPU-2") == (client.pid,)
        assert mps.status("GPU-2").pid == second
        assert mps.status("GPU-2").restarts == 0


async def test_a_crash_with_live_clients_waits_for_them(node: Node) -> None:
    """FAILED, with the reason and whom it waits for; the next daemon comes when they are gone, the old server ended."""
    mps = node.agent()
    mps.want(gpu())
    first = await running(mps)
    with Client() as client:
        await node.standin().connect(client)
        (server,) = await node.standin().servers()
        node.inventory.computing["GPU-1"] = (server, client.pid)
        await crashed(node)
        await seen(
            mps,
            lambda status: status.phase is MpsPhase.FAILED and str(client.pid) in status.message,
            "it waits for its client",
        )
        assert mps.status("GPU-1").message.startswith(f"GPU GPU-1: its MPS control daemon (process {first}) died")
        looked = len(node.inventory.modes)
        with pytest.raises(MpsError, match=r"not ready after 0\.3 s: Failed\. .*died"):
            await mps.ready("GPU-1", 0.3)
        assert alive(client.pid)
        assert alive(server)
        assert len(node.inventory.modes) == looked
    status = await seen(mps, lambda status: status.phase is MpsPhase.RUNNING, "it runs again")
    assert status.restarts == 1
    assert status.pid != first
    assert not alive(server)
    await mps.ready("GPU-1", DEADLINE_S)


async def test_where_nobody_sees_processes_the_ledger_decides(node: Node) -> None:
    """A driver that does not tell who computes: the next daemon waits for the containers that hold slots."""
    node.inventory.computing["GPU-1"] = None
    node.busy.add("GPU-1")
    mps = node.agent()
    mps.want(gpu())
    status = await failed(mps)
    assert "waits for the containers that hold its slots" in status.message
    assert await node.standin().processes() == []
    node.busy.clear()
    await running(mps)
    assert mps.status("GPU-1").restarts == 0


async def test_a_crash_without_clients_is_mended_at_once(node: Node) -> None:
    """Seen as FAILED first, so that the GPU is taken out; then a new daemon, counted."""
    mps = node.agent()
    mps.want(gpu())
    first = await running(mps)
    os.kill(first, signal.SIGKILL)
    assert "died" in (await failed(mps)).message
    assert await running(mps) != first
    assert mps.status("GPU-1").restarts == 1


async def test_a_hang_is_ended_by_force(node: Node) -> None:
    """A daemon that does not answer is a failed one; without clients it is killed, and a new one started."""
    mps = node.agent(replace(HASTY, patience=2))
    mps.want(gpu())
    first = await running(mps)
    node.standin().fault("hang")
    status = await failed(mps)
    assert "did not answer" in status.message
    assert "2 times in a row" in status.message

    async def gone() -> bool:
        return not alive(first)

    await until(gone, "it was killed")
    node.standin().mend("hang")
    assert await running(mps) != first
    assert mps.status("GPU-1").restarts == 1


async def test_a_hang_that_passes_costs_nobody_a_daemon(node: Node) -> None:
    """With live clients a daemon that hangs is left alone; when it answers again it is taken back as it is."""
    mps = node.agent(HASTY)
    mps.want(gpu())
    first = await running(mps)
    with Client() as client:
        await node.standin().connect(client)
        node.inventory.computing["GPU-1"] = (client.pid,)
        node.standin().fault("hang")
        await seen(mps, lambda status: str(client.pid) in status.message, "it waits for its client")
        assert alive(first)
        node.standin().mend("hang")
        assert await running(mps) == first
        assert mps.status("GPU-1").restarts == 0
        assert await mps.clients("GPU-1") == (client.pid,)


async def test_another_front_end_is_no_failure(node: Node) -> None:
    """The daemon refuses a front end while it has another one: the question is asked again."""
    mps = node.agent()
    mps.want(gpu())
    await running(mps)
    node.standin().fault("busy")
    await mps.ready("GPU-1", DEADLINE_S)
    assert not (node.standin().pipe / "fault" / "busy").exists()
    assert mps.status("GPU-1").phase is MpsPhase.RUNNING


async def test_a_daemon_that_does_not_start_says_why(node: Node) -> None:
    """Its own last words are the message; it is tried again, and runs when it can; that is no restart."""
    node.standin().fault("refuse")
    mps = node.agent()
    mps.want(gpu())
    status = await failed(mps)
    assert "ended with 1 instead of starting: MPS cannot start: the GPU is not supported" in status.message
    assert "; control.log: [" in status.message
    node.standin().mend("refuse")
    await running(mps)
    assert mps.status("GPU-1").restarts == 0


async def test_a_start_that_never_ends_is_given_up(node: Node) -> None:
    """After its deadline, with the process that tried."""
    node.standin().fault("stall")
    mps = node.agent(replace(PATIENT, start_s=0.3))
    mps.want(gpu())
    assert "did not start within 0.3 s" in (await failed(mps)).message
    await mps.stop()
    assert await node.standin().processes() == []


async def test_a_daemon_that_leaks_is_ended_by_force(node: Node) -> None:
    """It acknowledges `quit` and stays, with its server: both are ended, and only then the mode given back."""
    left: list[list[int]] = []
    mps = node.agent(replace(PATIENT, grace_s=0.2))
    mps.want(gpu())
    pid = await running(mps)
    with Client() as client:
        await node.standin().connect(client)
        (server,) = await node.standin().servers()
    node.standin().fault("leak")
    node.inventory.look = lambda _uuid: left.append([p for p in (pid, server) if alive(p)])
    await mps.unwant("GPU-1")
    assert left == [[]]
    assert not node.standin().pipe.exists()


async def test_a_hanging_daemon_is_unwanted_too(node: Node) -> None:
    """`quit` without an answer: ended by force."""
    mps = node.agent(HASTY)
    mps.want(gpu())
    pid = await running(mps)
    node.standin().fault("hang")
    await mps.unwant("GPU-1")
    assert not alive(pid)
    assert list(node.root.iterdir()) == []


async def test_the_next_agent_adopts(node: Node) -> None:
    """An agent that ends leaves its daemon and its clients alone; the next takes both as they are."""
    first = node.agent()
    first.want(gpu())
    pid = await running(first)
    with Client() as client:
        await node.standin().connect(client)
        node.inventory.computing["GPU-1"] = (client.pid,)
        await first.stop()
        assert alive(pid)
        second = node.agent()
        assert second.left() == ("GPU-1",)
        second.want(gpu())
        assert await running(second) == pid
        assert second.left() == ()
        assert await second.clients("GPU-1") == (client.pid,)
        assert second.status("GPU-1").restarts == 0


async def test_the_next_agent_waits_where_the_daemon_died_meanwhile(node: Node) -> None:
    """Between two agents nobody watched: the clients that are left are found, and waited for."""
    first = node.agent()
    first.want(gpu())
    pid = await running(first)
    await first.stop()
    with Client() as client:
        node.inventory.computing["GPU-1"] = (client.pid,)
        os.kill(pid, signal.SIGKILL)
        second = node.agent()
        second.want(gpu())
        assert f"waits for the processes on GPU GPU-1: {client.pid}" in (await failed(second)).message
    assert await running(second) != pid


async def test_a_daemon_of_an_earlier_agent_is_unwanted(node: Node) -> None:
    """The policy changed while no agent ran: the daemon that nobody wants any more goes, and the mode is given back."""
    first = node.agent()
    first.want(gpu())
    pid = await running(first)
    await first.stop()
    await node.agent().unwant("GPU-1")
    assert not alive(pid)
    assert node.inventory.modes[-1][:2] == ("GPU-1", False)
    assert list(node.root.iterdir()) == []


async def test_the_daemon_of_a_lost_gpu_is_unwanted(node: Node) -> None:
    """There is no mode to give back, and nobody comes to do it later: nothing of it stays."""
    mps = node.agent()
    mps.want(gpu())
    pid = await running(mps)
    node.inventory.lost.add("GPU-1")
    await mps.unwant("GPU-1")
    assert not alive(pid)
    assert mps.left() == ()
    assert list(node.root.iterdir()) == []


async def test_wanted_again_while_it_is_unwanted(node: Node) -> None:
    """The new daemon comes after the old one has gone, never beside it."""
    mps = node.agent()
    mps.want(gpu())
    first = await running(mps)
    leaving = asyncio.create_task(mps.unwant("GPU-1"))
    await asyncio.sleep(0)
    mps.want(gpu())
    await leaving
    assert not alive(first)
    assert await running(mps) != first
    assert [mode for _, mode, _ in node.inventory.modes] == [True, False, True]


async def test_no_program(node: Node) -> None:
    """A node without MPS: FAILED in words that name the option, again and again, and no crash."""
    mps = node.agent(control=node.root / "nvidia-cuda-mps-control")
    mps.want(gpu())
    assert "--mps-control" in (await failed(mps)).message
    assert "not found" in mps.status("GPU-1").message
    with pytest.raises(MpsError, match="not found"):
        await mps.ready("GPU-1", 0.2)
    assert await mps.clients("GPU-1") is None
    await mps.unwant("GPU-1")


async def test_a_directory_that_is_too_deep(node: Node) -> None:
    """A unix socket can't be there: said before the daemon fails without a word."""
    node.root /= "x" * 90
    mps = node.agent()
    mps.want(gpu())
    assert "use a shorter --mps-root" in (await failed(mps)).message


async def test_moved_out_of_the_agents_cgroup(node: Node, tmp_path: Path) -> None:
    """Where the agent is told a cgroup, its daemon is moved there: the agent's container may be replaced."""
    (tmp_path / "mps").mkdir()
    (tmp_path / "mps" / "cgroup.procs").touch()
    mps = node.agent(cgroup=tmp_path / "mps")
    mps.want(gpu())
    pid = await running(mps)
    assert (tmp_path / "mps" / "cgroup.procs").read_text() == f"{pid}\n"


async def test_a_cgroup_that_is_none_is_said(node: Node, tmp_path: Path) -> None:
    """The daemon runs all the same, and its status tells the risk."""
    (tmp_path / "file").touch()
    mps = node.agent(cgroup=tmp_path / "file" / "mps")
    mps.want(gpu())
    await running(mps)
    assert "It ends with the agent's container" in mps.status("GPU-1").message


async def test_a_container_that_calls_itself_a_daemon_is_none(node: Node, tmp_path: Path) -> None:
    """A process of another namespace of process IDs, with the daemon's name, options and variables: it is neither moved
    to the daemons' cgroup, nor ended with them."""
    with _disguised(node.standin(), tmp_path) as fake:

        async def ready() -> bool:
            return (tmp_path / "ready").exists()

        await until(ready, "the process in disguise runs")
        assert await node.standin().processes() == []
        mps = node.agent(cgroup=tmp_path / "cgroup")
        mps.want(gpu())
        daemon = await running(mps)
        assert (tmp_path / "cgroup" / "cgroup.procs").read_text() == f"{daemon}\n"
        await mps.unwant("GPU-1")
        assert fake.poll() is None


@contextlib.contextmanager
def _disguised(standin: StandIn, directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """What a container could do; it makes the file `ready`."""
    program = directory / BINARY.name
    program.write_text("#!/bin/sh\ntouch ready\nread line\n")
    program.chmod(0o755)
    fake = subprocess.Popen(
        ["unshare", "--map-root-user", "--user", "--pid", "--fork", "--kill-child", program, "-d"],
        stdin=subprocess.PIPE,
        cwd=directory,
        env={**os.environ, "CUDA_MPS_PIPE_DIRECTORY": str(standin.pipe)},
    )
    try:
        yield fake
    finally:
        fake.kill()
        fake.communicate(timeout=DEADLINE_S)


async def test_a_long_log_is_emptied(node: Node) -> None:
    """Each question leaves lines in control.log, for years: it does not fill the memory that /run is."""
    mps = node.agent()
    mps.want(gpu())
    await running(mps)
    log = node.standin().control_log
    with log.open("a") as file:
        file.write("x" * (1 << 20))

    async def short() -> bool:
        return log.stat().st_size < 1 << 20

    await until(short, "it is short")
    await mps.ready("GPU-1", DEADLINE_S)


async def test_a_uuid_that_is_a_path_is_refused(node: Node) -> None:
    """An inventory file may say anything; nothing outside the root is touched."""
    mps = node.agent()
    for uuid in ("..", "a/b", ""):
        with pytest.raises(InputError, match="no UUID of a GPU"):
            mps.want(gpu(uuid))
    assert list(node.root.iterdir()) == []


async def test_nobody_wants_it(node: Node) -> None:
    """`ready` of a GPU without a daemon says so, at once."""
    with pytest.raises(MpsError, match="none is wanted"):
        await node.agent().ready("GPU-1", DEADLINE_S)
