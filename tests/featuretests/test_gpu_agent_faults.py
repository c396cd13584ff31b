"""Faults on purpose against the whole agent: wrong input, a broken disk, a second agent, a kubelet that goes away.

Each is a clear error that names the place and what to do, and nothing is lost: no slot, no promise, no file.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from deviceplugin.main import Config, serve
from meshctl.address import Address
from meshctl.errors import InputError
from meshctl.sharing import RESOURCE, Owner, Slot
from tests.harness.agent import AgentProcess, inventory
from tests.harness.fake_kubelet import AdmissionError
from tests.harness.gpu_site import SLICED, GpuSite, gpu_site, holders, told
from tests.harness.tools import DEADLINE_S, page, until

A, B, C = (Owner("team", pod, "main") for pod in "abc")
UUIDS = ("GPU-1", "GPU-2")


@pytest.fixture
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GpuSite]:
    """Its GPUs are those of an inventory file."""
    async with gpu_site(tmp_path_factory.mktemp("s")) as site:
        inventory(site.root, *UUIDS)
        yield site


def agent_of(site: GpuSite, *options: str | Path) -> AgentProcess:
    return site.agent(f"--inventory=file:{site.root / 'gpus.json'}", *options)


def slots(uuid: str, *numbers: int) -> list[str]:
    return [str(Slot(uuid, number)) for number in numbers]


def plugin_sockets(site: GpuSite) -> list[str]:
    return sorted(path.name for path in site.kubelet.plugin_dir.iterdir() if path.name.startswith("meshctl"))


# ------------------------------------------------------------------------------------------------ starts that must fail


def config(site: GpuSite, **more: Any) -> Config:
    given: dict[str, Any] = {
        "inventory": f"file:{site.root / 'gpus.json'}",
        "policy": site.root / "policies.yaml",
        "plugin_dir": site.kubelet.plugin_dir,
        "pod_resources": site.kubelet.pod_resources,
        "mps_root": site.root / "m",
        "state": site.state,
    }
    return Config(node="node-1", **{**given, **more})


async def refused(config: Config) -> str:
    """What a start that must fail for the caller's fault says."""
    with pytest.raises(InputError) as caught:
        async with asyncio.timeout(DEADLINE_S):
            await serve(config, asyncio.Event())
    return str(caught.value)


async def run(site: GpuSite) -> bytes:
    """A run that gives a slot away, and is killed; the state file that it leaves."""
    async with agent_of(site) as agent:
        await site.kubelet.has(RESOURCE, 8)
        await site.given(A)
        await agent.end(signal.SIGKILL)
    return site.state.read_bytes()


SPOILT: Mapping[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda raw: b"", "zero-length"),
    "cut short": (lambda raw: raw[: len(raw) // 2], "can't be used"),
    "one more slot": (
        lambda raw: raw.replace(b'"replicas":', b'"replicas":1', 1),
        "its checksum does not match its content",
    ),
    "of a newer meshctl": (lambda raw: raw.replace(b'"version":1', b'"version":2', 1), "its version is 2"),
    "of another program": (lambda raw: b'{"hello": "world"}', "'version'"),
    "random bytes": (lambda raw: bytes(range(256)), "can't be used"),
}


async def test_a_state_file_that_is_not_whole_stops_the_start_and_stays_as_it_is(site: GpuSite) -> None:
    """It is never taken for an empty one: it knows what containers were promised. With it restored all goes on."""
    good = await run(site)
    for name, (spoil, said) in SPOILT.items():
        spoilt = spoil(good)
        assert spoilt != good, name
        site.state.write_bytes(spoilt)
        words = await refused(config(site))
        assert words.startswith(f"the state file {site.state} can't be used: "), name
        assert said in words, name
        assert "Nothing was changed. Restore it from a backup, or move it away" in words, name
        assert site.state.read_bytes() == spoilt, name
    status, error = await asyncio.to_thread(agent_of(site).refused)
    assert (status, error.splitlines()[-1]) == (2, f"meshctl: {words}")
    assert site.state.read_bytes() == spoilt
    site.state.write_bytes(good)
    async with agent_of(site) as agent:
        await holders(agent, A)


async def test_a_policy_that_is_not_valid_stops_the_start(site: GpuSite) -> None:
    """File, line and field are named; no state is written for GPUs that nobody said how to share."""
    for policy, said in (
        ({"replicas": 0}, "spec.replicas: must be greater than or equal to 1, not 0"),
        ({"replicas": 61}, "spec.replicas: 61 slots with 1 client each are 61 clients; an MPS server has at most 60"),
        ({"mode": "Exclusive", "replicas": 2}, "spec.replicas: "),
        ({"mode": "Sometimes"}, "spec.mode: "),
    ):
        file = site.policies(default=policy)
        words = await refused(config(site))
        assert words.startswith(f"{file}:1:")
        assert said in words
    assert not site.state.exists()


@pytest.fixture
def taken() -> Iterator[Address]:
    """Somebody else listens there."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield Address("127.0.0.1", other.getsockname()[1])


async def test_what_cannot_be_used_is_named_with_its_option(site: GpuSite, taken: Address) -> None:
    """Of each option; and afterwards the same start with the right ones works: no lock is left behind."""
    (site.root / "file").touch()
    below, gone = site.root / "file" / "below", site.root / "gone"
    for wrong, said in (
        ({"plugin_dir": gone}, f"--plugin-dir: {gone} is not a directory; on a node with a kubelet, mount it"),
        ({"plugin_dir": site.root / "file"}, f"--plugin-dir: {site.root / 'file'} is not a directory"),
        ({"state": below / "agent.json"}, f"cannot make the directory of the state file {below / 'agent.json'} (--st"),
        ({"state": site.root}, f"the state file {site.root} (--state)"),
        ({"policy": gone}, f"{gone}"),
        ({"inventory": "nvidia"}, "the inventory 'nvidia' is unknown; write nvml, or file:PATH"),
        ({"inventory": f"file:{gone}"}, f"{gone}"),
        ({"mps_root": site.root / "file"}, "--mps-root"),
        ({"admin": taken}, f"{taken}"),
    ):
        assert said in await refused(config(site, **wrong))
    assert not gone.exists()
    ended = asyncio.Event()
    ended.set()
    await serve(config(site), ended)


async def test_directories_that_may_not_be_written_are_named_with_whose_they_are(site: GpuSite) -> None:
    """An agent that is not root, or whose volume is read-only, says so at once, not at the first Allocate."""
    before: tuple[str, ...] = ()
    if os.geteuid() == 0:  # root may write everywhere, but for one without that capability
        if shutil.which("setpriv") is None:
            pytest.skip("setpriv (util-linux) takes root its right to write everywhere; it is not here")
        before = ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override")
    state = site.root / "agent"
    state.mkdir()
    for directory, option in ((site.root / "kubelet" / "device-plugins", "--plugin-dir"), (state, "--state")):
        directory.chmod(0o555)
        status, error = await asyncio.to_thread(agent_of(site).refused, *before)
        directory.chmod(0o755)
        assert status == 2
        assert error.startswith(f"meshctl: {option}: ")
        assert error.endswith(f" is not writable for uid {os.geteuid()}; run the agent as root\n")
    assert list(state.iterdir()) == []


async def test_a_second_agent_ends_and_the_first_never_notices(site: GpuSite) -> None:
    """Whether it has the plugin directory or the state file in common with the first; both are named."""
    async with agent_of(site) as first:
        await site.kubelet.has(RESOURCE, 8)
        await site.given(A)
        await holders(first, A)
        before, sockets = site.state.read_bytes(), plugin_sockets(site)
        other = site.root / "other"
        other.mkdir()
        for option, named in (
            (f"--state={other / 'agent.json'}", f"the plugin directory {site.kubelet.plugin_dir} (--plugin-dir)"),
            (f"--plugin-dir={other}", f"the state file {site.state} (--state)"),
        ):
            status, error = await asyncio.to_thread(agent_of(site, option).refused)
            said = f"meshctl: another agent uses {named}: there is one agent per node; end it first\n"
            assert (status, error) == (2, said)
        assert (site.state.read_bytes(), plugin_sockets(site)) == (before, sockets)
        assert (site.kubelet.resources[RESOURCE].fewest, len(site.kubelet.registrations)) == (8, 1)
        await site.given(B)
        await holders(first, A, B)


# --------------------------------------------------------------------------------------------------------- the policies


async def problem(agent: AgentProcess, said: str) -> None:
    """Waits until /readyz says it; "": until it says nothing."""

    async def holds() -> bool:
        found = agent.problems()
        return any(said in one for one in found) if said else not found

    await until(holds, f"/readyz says {said!r}")


async def test_a_policy_file_that_is_broken_later_changes_nothing_and_is_a_problem(site: GpuSite) -> None:
    """The last good one stays in force, for the next containers too, until the file is right again."""
    async with agent_of(site) as agent:
        await site.kubelet.has(RESOURCE, 8)
        file = site.policies(default={**SLICED, "replicas": 0})
        await problem(agent, f"{file}: {file}:1:")
        assert any("(what was read before stays in force)" in one for one in agent.problems())
        file.write_text("replicas: [")
        await problem(agent, "what was read before stays in force")
        file.write_bytes(b"\xff\x00")
        await problem(agent, "what was read before stays in force")
        file.unlink()
        await problem(agent, "No such file")
        file.mkdir()
        await problem(agent, "directory")
        file.rmdir()
        await site.given(A, 4)
        assert site.kubelet.resources[RESOURCE].fewest == 8
        site.policies(default={**SLICED, "replicas": 5})
        await problem(agent, "")
        await site.kubelet.has(RESOURCE, 9)


async def test_of_two_policies_for_one_gpu_it_is_said_which_wins(site: GpuSite) -> None:
    """By priority; the loser is named as such, and takes over where the winner is deleted."""
    loser, winner = {**SLICED, "replicas": 2}, {**SLICED, "replicas": 3, "priority": 7}
    site.policies(first=loser, second=winner)
    async with agent_of(site) as agent:
        await site.kubelet.has(RESOURCE, 6)
        said = await told(agent, "GPU-1", "Shared", "Shared")
        assert "3 slots of hpe.com/gpus (policy second, " in said
        assert said.endswith("stronger than first, for it too")
        site.policies(first=loser)
        await site.kubelet.has(RESOURCE, 4)
        assert "stronger" not in await told(agent, "GPU-1", "Shared", "Shared")


async def test_a_policy_for_a_node_that_does_not_exist_shares_nothing(site: GpuSite) -> None:
    """The GPUs are told of, without slots, with the reason; the kubelet hears of no resource until one is for them."""
    elsewhere = {**SLICED, "nodeSelector": {"kubernetes.io/hostname": "node-2"}}
    site.policies(elsewhere=elsewhere)
    async with agent_of(site) as agent:
        for uuid in UUIDS:
            assert await told(agent, uuid, "Shared", "NoPolicy") == "no GPUSharingPolicy is for it"
            assert "slots" not in agent.gpus()[uuid]
        assert (site.kubelet.registrations, agent.problems()) == ([], [])
        site.policies(elsewhere=elsewhere, here={**SLICED, "nodeSelector": {"kubernetes.io/hostname": "node-1"}})
        await site.kubelet.has(RESOURCE, 8)


# ---------------------------------------------------------------------------------------------------------- allocations


async def test_ids_that_cannot_be_are_refused_in_words_and_change_nothing(site: GpuSite) -> None:
    """Unknown, duplicated, foreign or none at all; one wrong container refuses those beside it, too."""
    one = slots("GPU-1", 0)
    async with agent_of(site) as agent:
        await site.kubelet.has(RESOURCE, 8)
        await site.given(A)
        await holders(agent, A)
        before = agent.gpus(), site.state.read_bytes()
        for asked, said in (
            ([["no-id"]], "'no-id' is not UUID::SLOT"),
            ([["GPU-1::00"]], "'GPU-1::00' is not UUID::SLOT"),
            ([["GPU-1::-1"]], "'GPU-1::-1' is not UUID::SLOT"),
            ([slots("GPU-1", 4)], "GPU-1 has slots 0 to 3"),
            ([slots("GPU-9", 0)], "GPU-9 is no GPU that this node shares"),
            ([one * 2], "GPU-1::0"),
            ([one, one], "GPU-1::0"),
            ([[]], ""),
            ([one, ["no-id"]], "'no-id' is not UUID::SLOT"),
        ):
            with pytest.raises(AdmissionError) as caught:
                await site.kubelet.ask(RESOURCE, *asked)
            assert caught.value.code is not None, asked
            assert caught.value.code.name == "INVALID_ARGUMENT", asked
            assert said in str(caught.value), asked
        with pytest.raises(AdmissionError, match="several GPUs"):
            await site.kubelet.ask(RESOURCE, [*one, *slots("GPU-2", 0)])
        assert (agent.gpus(), site.state.read_bytes()) == before
        assert 'outcome="DuplicateDevice"' in agent.metrics()
        await site.given(B, 4)


async def test_16_what_cannot_be_written_down_is_not_given_and_leaves_no_reservation(site: GpuSite) -> None:
    """A disk that takes nothing: Allocate says which file, the slots are free again, and go out when it is mended."""
    async with agent_of(site) as agent:
        await site.kubelet.has(RESOURCE, 8)
        await site.given(A)
        await holders(agent, A)
        await until_settled(site)
        good = site.state.read_bytes()
        site.state.unlink()
        site.state.mkdir()  # no file can take its place
        used = {uuid: status["slots"]["used"] for uuid, status in agent.gpus().items()}
        for _ in range(2):
            with pytest.raises(AdmissionError, match=r"not given while they cannot be written down: .*agent\.json"):
                await site.given(B)
        assert {uuid: status["slots"]["used"] for uuid, status in agent.gpus().items()} == used
        assert list(site.state.parent.glob(".agent.json.*")) == []
        site.state.rmdir()
        await site.given(B, 4)
        await holders(agent, A, B)
        await until_settled(site)
        assert site.state.read_bytes() == good


async def test_a_full_disk_is_said_and_is_over_when_there_is_room(site: GpuSite) -> None:
    """The kernel's own "No space left on device", while the state is written."""
    async with agent_of(site) as agent:
        await site.kubelet.has(RESOURCE, 8)
        await site.given(A)
        await holders(agent, A)
        await until_settled(site)
        assert agent.problems() == []
        temporary(site, agent).symlink_to("/dev/full")
        before = site.state.read_bytes()
        with pytest.raises(AdmissionError, match=r"agent\.json: No space left on device"):
            await site.given(B)
        assert (temporary(site, agent).is_symlink(), site.state.read_bytes()) == (False, before)
        await site.given(B, 4)
        await holders(agent, A, B)


def temporary(site: GpuSite, agent: AgentProcess) -> Path:
    """What the state is written to before it takes the old one's place."""
    assert agent.process is not None
    return site.state.with_name(f".agent.json.{agent.process.pid}.tmp")


async def until_settled(site: GpuSite) -> None:
    """Until the state file says that every promise was kept: there is nothing to write then."""

    async def holds() -> bool:
        return b'"pending":[]' in site.state.read_bytes()

    await until(holds, "nothing is pending on the disk")


# ---------------------------------------------------------------------------------------------------------- the kubelet


async def test_while_the_kubelet_is_away_nothing_is_released_and_nothing_changes(site: GpuSite) -> None:
    """Its holders stay, whatever the policy says and although the agent restarts; then it registers again as before."""
    async with agent_of(site) as agent:
        await site.kubelet.has(RESOURCE, 8)
        uuid = await site.given(A)
        await holders(agent, A)
        await site.kubelet.stop()
        site.policies(default={**SLICED, "replicas": 2})
        await problem(agent, "the kubelet does not say who holds GPU slots")
        await told(agent, uuid, "Shared", "WaitingForPods")
        await holders(agent, A)
        await agent.end(signal.SIGKILL)
    async with agent_of(site) as agent:
        await problem_unready(agent)
        assert agent.gpus()[uuid]["slots"]["total"] == 4
        await site.kubelet.start()
        await holders(agent, A)
        await site.kubelet.has(RESOURCE, 6)
        assert [len(status["holders"]) for status in agent.gpus().values() if status.get("holders")] == [1]
        site.kubelet.end(A)
        await site.kubelet.has(RESOURCE, 4)
        await problem(agent, "")


async def problem_unready(agent: AgentProcess) -> None:
    """Not ready, and the first page says so, before the kubelet was heard."""
    assert page(f"{agent.url}/readyz") is None
    assert page(f"{agent.url}/healthz") is not None


async def test_a_kubelet_that_restarts_while_an_allocate_is_written_down_gets_every_slot_again(site: GpuSite) -> None:
    """The answer that it never read is no reservation: the pod, asked for again, may have the same slots."""
    async with agent_of(site) as agent:
        await site.kubelet.has(RESOURCE, 8)
        other = ({*UUIDS} - {await site.given(A, 4)}).pop()
        await holders(agent, A)
        await until_settled(site)
        disk = temporary(site, agent)
        os.mkfifo(disk)  # whoever opens it for writing waits for a reader
        asked = asyncio.create_task(site.given(B, 4))

        async def promised() -> bool:
            return bool(agent.gpus()[other]["slots"]["used"] == 4)

        await until(promised, "the slots are promised")
        await site.kubelet.stop()
        await asyncio.wait([asked])
        assert asked.cancelled()
        os.close(os.open(disk, os.O_RDONLY | os.O_NONBLOCK))
        await site.kubelet.start()
        await site.kubelet.has(RESOURCE, 8)
        await site.given(B, 4)
        await holders(agent, A, B)
        assert len({text for ids in site.kubelet.held.values() for text in ids}) == 8
        await until_settled(site)
        assert agent.problems() == []


async def test_a_promise_that_the_kubelet_forgot_outlives_a_kill_and_is_in_nobodys_way(site: GpuSite) -> None:
    """The agent and the kubelet were killed before the kubelet remembered the answer: the slots are given anew."""
    async with agent_of(site) as agent:
        await site.kubelet.has(RESOURCE, 8)
        await site.kubelet.ask(RESOURCE, slots("GPU-1", 0, 1))
        await agent.end(signal.SIGKILL)
    assert b'"slot":"GPU-1::0"' in site.state.read_bytes()
    await site.kubelet.restart()
    async with agent_of(site) as agent:
        await site.kubelet.has(RESOURCE, 8)
        assert agent.gpus()["GPU-1"]["slots"]["used"] == 2
        await site.given(A, 4)
        await site.given(B, 4)
        await holders(agent, A, B)


async def test_a_plugin_directory_that_is_made_anew_is_served_as_before(site: GpuSite) -> None:
    """Somebody cleared /var/lib/kubelet under a kubelet that restarts: who holds what is known from pod-resources."""
    async with agent_of(site) as agent:
        await site.kubelet.has(RESOURCE, 8)
        await site.given(A)
        await holders(agent, A)
        await site.kubelet.stop()
        shutil.rmtree(site.kubelet.plugin_dir)
        site.kubelet.plugin_dir.mkdir()
        await site.kubelet.start()
        await site.kubelet.has(RESOURCE, 8)
        await site.given(B, 4)
        await holders(agent, A, B)


async def test_a_resource_that_cannot_be_offered_is_a_problem_with_its_reason(site: GpuSite) -> None:
    """The path of a unix socket has 107 bytes; the agent goes on, and tells of its GPUs."""
    deep = site.root / ("d" * 100)
    deep.mkdir()
    async with agent_of(site, f"--plugin-dir={deep}") as agent:
        await problem(agent, f"device plugin {RESOURCE}: --plugin-dir: {deep} is ")
        assert "bytes too long for the path of a unix socket in it" in " ".join(agent.problems())
        assert set(agent.gpus()) == {*UUIDS}
        assert list(deep.iterdir()) == []
