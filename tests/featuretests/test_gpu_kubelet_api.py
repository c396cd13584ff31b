"""The agent's device plugin server and pod-resources client, spoken to over real unix sockets as a kubelet does."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path

import pytest
import structlog
from grpc import StatusCode, aio

from deviceplugin import kubeletapi as api
from deviceplugin.allocate import Reason, RefusedSlotsError
from deviceplugin.podresources import CHECKPOINT, PodResources
from deviceplugin.ports import ContainerResponse, Device, DeviceNode, Mount
from deviceplugin.server import Patience, PluginServer
from meshctl.errors import InputError, MeshctlError, UnavailableError
from meshctl.sharing import RESOURCE, Owner, Slot
from tests.harness.fake_kubelet import AdmissionError, FakeKubelet
from tests.harness.tools import DEADLINE_S, until

OTHER = "hpe.com/whole-gpus"
A, B = Owner("team-a", "pod-a", "main"), Owner("team-b", "pod-b", "main")
IMPATIENT = Patience(register_s=0.5, unwatched_s=0.3)
RESPONSE = ContainerResponse(
    envs={"NVIDIA_VISIBLE_DEVICES": "GPU-0", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "30"},
    mounts=(Mount("/run/meshctl/mps/GPU-0/pipe", "/run/mps"), Mount("/opt/x", "/etc/x", read_only=True)),
    devices=(DeviceNode("/dev/null", "/dev/nvidia0"),),
    annotations={"meshctl.io/slots": "3"},
    cdi_devices=("nvidia.com/gpu=GPU-0",),
)


class Desk:
    """A `Backend` that gives whatever is asked of it, and remembers what it was asked."""

    def __init__(self, ids: Iterable[str] = ()) -> None:
        self.slots: dict[str, list[Device]] = {RESOURCE: [Device(text, healthy=True) for text in ids]}
        self.calls: list[tuple[str, list[str]]] = []
        self.failure: Exception | None = None
        """What every call raises."""
        self.gate = asyncio.Event()
        """No Allocate ends before it is set."""
        self.gate.set()
        self._changed = asyncio.Event()

    def change(self, slots: Sequence[Device], resource: str = RESOURCE) -> None:
        self.slots[resource] = list(slots)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def devices(self, resource: str) -> Sequence[Device]:
        return tuple(self.slots.get(resource, ()))

    async def wait_changed(self, resource: str, seen: Sequence[Device]) -> Sequence[Device]:
        while self.devices(resource) == tuple(seen):
            await self._changed.wait()
        return self.devices(resource)

    async def preferred(self, resource: str, available: Sequence[str], must: Sequence[str], size: int) -> list[str]:
        self._called("preferred", available)
        return (list(must) + sorted(set(available) - set(must)))[:size]

    async def allocate(self, resource: str, containers: Sequence[Sequence[str]]) -> list[ContainerResponse]:
        self._called("allocate", *containers)
        await self.gate.wait()
        return [RESPONSE] * len(containers)

    async def pre_start(self, resource: str, ids: Sequence[str]) -> None:
        self._called("pre_start", ids)

    def _called(self, method: str, *containers: Sequence[str]) -> None:
        self.calls += [(method, sorted(ids)) for ids in containers]
        if self.failure is not None:
            raise self.failure


def ids_of(gpus: int, replicas: int) -> list[str]:
    return [str(Slot(f"GPU-{gpu}", number)) for gpu in range(gpus) for number in range(replicas)]


@pytest.fixture
async def kubelet(tmp_path: Path) -> AsyncIterator[FakeKubelet]:
    async with FakeKubelet(tmp_path) as kubelet:
        yield kubelet


@pytest.fixture
def desk() -> Desk:
    return Desk(ids_of(2, 4))


@asynccontextmanager
async def running(server: PluginServer) -> AsyncIterator[PluginServer]:
    """The server runs; an error of its own is the test's."""
    task = asyncio.create_task(server.run())
    try:
        yield server
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def plugin_of(kubelet: FakeKubelet, desk: Desk, resource: str = RESOURCE) -> AsyncIterator[PluginServer]:
    """A server that the kubelet knows the devices of."""
    async with running(PluginServer(kubelet.plugin_dir, resource, desk, patience=IMPATIENT)) as server:
        await kubelet.has(resource, len(desk.devices(resource)))
        yield server


@asynccontextmanager
async def client_of(kubelet: FakeKubelet) -> AsyncIterator[aio.Channel]:
    """A channel to the plugin, beside the kubelet's."""
    [endpoint] = kubelet.endpoints(RESOURCE)
    async with aio.insecure_channel(f"unix:{kubelet.plugin_dir / endpoint}") as channel:
        yield channel


def sockets(kubelet: FakeKubelet) -> list[str]:
    kubelets = (api.KUBELET_SOCKET, CHECKPOINT)
    return sorted(path.name for path in kubelet.plugin_dir.iterdir() if path.name not in kubelets)


async def registered_again(kubelet: FakeKubelet, times: int) -> None:
    async def holds() -> bool:
        return len(kubelet.registrations) >= times

    await until(holds, f"{times} registrations")


# ------------------------------------------------------------------------------------------------------- what it offers


async def test_a_kubelet_sees_all_slots_as_soon_as_the_plugin_registers(kubelet: FakeKubelet, desk: Desk) -> None:
    """Serving comes before Register: the kubelet asks for options and devices at once, and gets them."""
    desk.slots[RESOURCE][5] = Device("GPU-1::1", healthy=False)
    async with running(PluginServer(kubelet.plugin_dir, RESOURCE, desk)) as server:
        await kubelet.has(RESOURCE, 7)
        assert kubelet.devices(RESOURCE) == {text: text != "GPU-1::1" for text in ids_of(2, 4)}
        assert list(kubelet.devices(RESOURCE)) == ids_of(2, 4)
        assert kubelet.registrations == [(RESOURCE, kubelet.endpoints(RESOURCE)[0])]
        options = kubelet.resources[RESOURCE].plugins[0].options
        assert (options.pre_start_required, options.get_preferred_allocation_available) == (True, True)
        assert server.watched
        assert server.registrations == 1
    assert not server.watched


async def test_every_change_is_told_as_a_full_list(kubelet: FakeKubelet, desk: Desk) -> None:
    """One GPU that falls ill, then grows; slots of another resource are no news."""
    async with plugin_of(kubelet, desk):
        desk.change([Device(text, healthy=not text.startswith("GPU-0")) for text in ids_of(2, 4)])
        await kubelet.has(RESOURCE, 4)
        assert len(kubelet.devices(RESOURCE)) == 8
        desk.change([Device("x::0", healthy=True)], OTHER)
        desk.change([Device(text, healthy=True) for text in ids_of(2, 5)])
        await kubelet.has(RESOURCE, 10)
        assert kubelet.resources[RESOURCE].lists == 3
        assert len(kubelet.registrations) == 1


async def test_a_container_gets_what_the_backend_says(kubelet: FakeKubelet, desk: Desk) -> None:
    """GetPreferredAllocation, Allocate, PreStartContainer in the kubelet's order, with its IDs; the answer is whole."""
    async with plugin_of(kubelet, desk):
        answer = await kubelet.admit(A, RESOURCE, 3)
        await kubelet.start_container(A, RESOURCE)
        chosen = ["GPU-0::0", "GPU-0::1", "GPU-0::2"]
        assert desk.calls == [("preferred", ids_of(2, 4)), ("allocate", chosen), ("pre_start", chosen)]
        assert bytes(answer) == bytes(api.allocated([RESPONSE]).containers[0])
        assert answer.envs == RESPONSE.envs
        assert [(mount.container_path, mount.read_only) for mount in answer.mounts] == [
            ("/run/mps", False),
            ("/etc/x", True),
        ]
        await kubelet.admit(B, RESOURCE, 2, reusable=["GPU-0::0"])
        assert desk.calls[-1] == ("allocate", ["GPU-0::0", "GPU-0::3"])


async def test_all_slots_of_a_large_node_at_once(kubelet: FakeKubelet) -> None:
    """16 GPUs of 48 slots: listed, and all in one Allocate."""
    desk = Desk(ids_of(16, 48))
    async with plugin_of(kubelet, desk):
        await kubelet.admit(A, RESOURCE, 768)
        assert desk.calls == [("allocate", sorted(ids_of(16, 48)))]


async def test_two_resources_are_two_plugins(kubelet: FakeKubelet, desk: Desk) -> None:
    """Each has its own socket and devices; one that is taken away leaves the other as it is."""
    desk.change([Device("GPU-9::0", healthy=True)], OTHER)
    async with plugin_of(kubelet, desk):
        async with plugin_of(kubelet, desk, OTHER):
            assert len(sockets(kubelet)) == 2
            assert list(kubelet.devices(OTHER)) == ["GPU-9::0"]
        await kubelet.has(OTHER, 0)
        assert kubelet.resources[RESOURCE].fewest == 8
        assert sockets(kubelet) == kubelet.endpoints(RESOURCE)


async def test_many_watch_at_the_same_time(kubelet: FakeKubelet, desk: Desk) -> None:
    """A kubelet that restarted may still have a stream of its former life: each gets every list."""
    async with plugin_of(kubelet, desk), client_of(kubelet) as channel:
        streams = [channel.unary_stream(api.LIST_AND_WATCH)(b"") for _ in range(3)]
        first = [await asyncio.wait_for(stream.read(), DEADLINE_S) for stream in streams]
        desk.change([])
        second = [await asyncio.wait_for(stream.read(), DEADLINE_S) for stream in streams]
        assert [len(api.ListAndWatchResponse.parse(data).devices) for data in (*first, *second)] == [8, 8, 8, 0, 0, 0]


async def test_a_slow_reader_holds_up_nobody_and_gets_the_last_list(kubelet: FakeKubelet) -> None:
    """What changes while it does not read is coalesced; others are told at once, and Allocate works."""
    texts = ids_of(16, 48)
    desk = Desk(texts)
    async with plugin_of(kubelet, desk), client_of(kubelet) as channel:
        slow = channel.unary_stream(api.LIST_AND_WATCH)(b"")
        for ill in range(1, 21):
            desk.change([Device(text, healthy=at >= ill) for at, text in enumerate(texts)])
            await kubelet.has(RESOURCE, 768 - ill)
        await kubelet.admit(A, RESOURCE, 1)
        healthy = 0
        while healthy != 748:
            data = await asyncio.wait_for(slow.read(), DEADLINE_S)
            listed = api.ListAndWatchResponse.parse(data).devices
            healthy = sum(device.health == api.HEALTHY for device in listed)
            assert len(listed) == 768


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (RefusedSlotsError(Reason.UNKNOWN_DEVICE, "GPU-7::1 is no slot of this node"), StatusCode.INVALID_ARGUMENT),
        (RefusedSlotsError(Reason.DUPLICATE_DEVICE, "GPU-0::1 twice"), StatusCode.INVALID_ARGUMENT),
        (RefusedSlotsError(Reason.SEVERAL_GPUS, "slots of GPU-0 and GPU-1"), StatusCode.FAILED_PRECONDITION),
        (RefusedSlotsError(Reason.NOT_READY, "its MPS daemon is starting"), StatusCode.UNAVAILABLE),
        (MeshctlError("the state file can't be written"), StatusCode.UNAVAILABLE),
        (KeyError("GPU-0"), StatusCode.INTERNAL),
    ],
    ids=lambda value: value.name if isinstance(value, StatusCode) else type(value).__name__,
)
async def test_a_refusal_has_its_code_and_its_words(
    kubelet: FakeKubelet, desk: Desk, failure: Exception, code: StatusCode
) -> None:
    """The kubelet gets both, holds nothing, and the next call is answered; only a bug is logged with its traceback."""
    async with plugin_of(kubelet, desk):
        await kubelet.admit(B, RESOURCE, 8)
        kubelet.end(B)
        desk.failure = failure
        with structlog.testing.capture_logs() as logs, pytest.raises(AdmissionError) as refused:
            await kubelet.admit(A, RESOURCE, 8)
        assert refused.value.code is code
        assert str(refused.value) == str(failure)
        assert [entry.get("exc_info") for entry in logs] == [failure if code is StatusCode.INTERNAL else None]
        assert kubelet.held == {}
        desk.failure = None
        await kubelet.admit(A, RESOURCE, 8)
        assert len(kubelet.registrations) == 1


async def test_a_container_that_may_not_start_yet_starts_when_it_may(kubelet: FakeKubelet, desk: Desk) -> None:
    """PreStartContainer is refused as unavailable, with the reason; the kubelet tries again and keeps the slots."""
    async with plugin_of(kubelet, desk):
        await kubelet.admit(A, RESOURCE, 1)
        desk.failure = RefusedSlotsError(Reason.NOT_READY, "the MPS daemon of GPU-0 is starting")
        with pytest.raises(AdmissionError, match="MPS daemon of GPU-0") as refused:
            await kubelet.start_container(A, RESOURCE)
        assert refused.value.code is StatusCode.UNAVAILABLE
        desk.failure = None
        await kubelet.start_container(A, RESOURCE)
        assert kubelet.held == {(A, RESOURCE): ["GPU-0::0"]}


async def test_bytes_that_are_no_request_fail_that_call_only(kubelet: FakeKubelet, desk: Desk) -> None:
    """The backend is not asked; the next call is answered."""
    async with plugin_of(kubelet, desk), client_of(kubelet) as channel:
        with structlog.testing.capture_logs(), pytest.raises(aio.AioRpcError) as refused:
            await channel.unary_unary(api.PRE_START)(b"\x0a\x01\xff", timeout=DEADLINE_S)
        assert refused.value.code() is StatusCode.INTERNAL
        with pytest.raises(aio.AioRpcError) as unknown:
            await channel.unary_unary("/v1beta1.DevicePlugin/Unheard")(b"", timeout=DEADLINE_S)
        assert unknown.value.code() is StatusCode.UNIMPLEMENTED
        assert desk.calls == []
        await kubelet.admit(A, RESOURCE, 1)


async def test_every_call_is_observed_with_its_outcome(kubelet: FakeKubelet, desk: Desk) -> None:
    """Method, seconds and OK, a reason, or a code: what the agent's metrics are made of."""
    seen: list[tuple[str, str]] = []

    def observe(method: str, seconds: float, outcome: str) -> None:
        assert seconds >= 0
        seen.append((method, outcome))

    async with running(PluginServer(kubelet.plugin_dir, RESOURCE, desk, observe)):
        await kubelet.has(RESOURCE, 8)
        await kubelet.admit(A, RESOURCE, 8)
        for failure in (RefusedSlotsError(Reason.PLAN_MISMATCH, "no"), UnavailableError("no"), RuntimeError("no")):
            desk.failure = failure
            with structlog.testing.capture_logs(), pytest.raises(AdmissionError):
                await kubelet.start_container(A, RESOURCE)
    assert seen == [
        ("GetDevicePluginOptions", "OK"),
        ("Allocate", "OK"),
        ("PreStartContainer", "PlanMismatch"),
        ("PreStartContainer", "UNAVAILABLE"),
        ("PreStartContainer", "INTERNAL"),
    ]


# ----------------------------------------------------------------------------------------------------- registration


async def test_a_restarted_kubelet_is_registered_with_anew(kubelet: FakeKubelet, desk: Desk) -> None:
    """It removed our socket; it gets another with all slots, five times over, and what it holds it keeps."""
    async with plugin_of(kubelet, desk) as server:
        await kubelet.admit(A, RESOURCE, 2)
        for _ in range(5):
            await kubelet.restart()
            await kubelet.has(RESOURCE, 8)
        assert sorted(kubelet.available(RESOURCE)) == sorted(set(ids_of(2, 4)) - set(kubelet.held[A, RESOURCE]))
        assert len(set(kubelet.registrations)) == 6
        assert server.registrations == 6
        await kubelet.admit(B, RESOURCE, 6)


async def test_a_kubelet_that_comes_late_is_registered_with(tmp_path: Path, desk: Desk) -> None:
    """The agent may start first: no kubelet.sock, or one that a dead kubelet left, is waited out without a trace."""
    kubelet = FakeKubelet(tmp_path)
    with closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(str(kubelet.plugin_dir / api.KUBELET_SOCKET))
    async with running(PluginServer(kubelet.plugin_dir, RESOURCE, desk)) as server:
        assert sockets(kubelet) == []
        async with kubelet:
            await kubelet.has(RESOURCE, 8)
            assert server.registrations == 1


async def test_a_kubelet_that_never_answers_register_is_asked_again(kubelet: FakeKubelet, desk: Desk) -> None:
    """Each try has a deadline and a socket of its own, which goes with it."""
    kubelet.deaf.set()
    async with running(PluginServer(kubelet.plugin_dir, RESOURCE, desk, patience=IMPATIENT)) as server:
        await registered_again(kubelet, 2)
        assert len(sockets(kubelet)) <= 1
        assert server.registrations == 0
        kubelet.deaf.clear()
        await kubelet.has(RESOURCE, 8)
        assert sockets(kubelet) == kubelet.endpoints(RESOURCE)


async def test_a_kubelet_that_restarts_in_the_middle_of_register(kubelet: FakeKubelet, desk: Desk) -> None:
    """The call ends with it, and the next kubelet is asked."""
    kubelet.deaf.set()
    async with running(PluginServer(kubelet.plugin_dir, RESOURCE, desk)) as server:
        await registered_again(kubelet, 1)
        kubelet.deaf.clear()
        await kubelet.restart()
        await kubelet.has(RESOURCE, 8)
        assert server.registrations == 1
        assert sockets(kubelet) == kubelet.endpoints(RESOURCE)


async def test_a_socket_that_vanishes_is_replaced_without_a_gap(kubelet: FakeKubelet, desk: Desk) -> None:
    """Somebody empties the directory under a kubelet that lives: it never sees fewer healthy slots."""
    async with plugin_of(kubelet, desk):
        [before] = kubelet.endpoints(RESOURCE)
        (kubelet.plugin_dir / before).unlink()

        async def replaced() -> bool:
            return kubelet.endpoints(RESOURCE) not in ([before], []) and before not in kubelet.endpoints(RESOURCE)

        await until(replaced, "another endpoint alone is connected")
        assert kubelet.resources[RESOURCE].fewest == 8
        assert sockets(kubelet) == kubelet.endpoints(RESOURCE)
        await kubelet.admit(A, RESOURCE, 1)


async def test_a_socket_that_is_replaced_by_a_file_is_left_to_its_owner(kubelet: FakeKubelet, desk: Desk) -> None:
    """Ours is somewhere else then."""
    async with plugin_of(kubelet, desk):
        [before] = kubelet.endpoints(RESOURCE)
        (kubelet.plugin_dir / before).unlink()
        (kubelet.plugin_dir / before).write_text("somebody's")
        await registered_again(kubelet, 2)
        await kubelet.has(RESOURCE, 8)
    assert before not in kubelet.endpoints(RESOURCE)


async def test_a_kubelet_that_forgot_us_is_registered_with_again(kubelet: FakeKubelet, desk: Desk) -> None:
    """It hung up without a restart: nobody watches, so the devices would be gone for ever."""
    async with plugin_of(kubelet, desk):
        await kubelet.drop(kubelet.resources[RESOURCE].plugins[0])
        assert not any(kubelet.devices(RESOURCE).values())
        await kubelet.has(RESOURCE, 8)
        assert len(kubelet.registrations) == 2


async def test_what_a_dead_agent_left_is_removed_and_nothing_else(kubelet: FakeKubelet, desk: Desk) -> None:
    """Its socket goes; other plugins' sockets and the kubelet's files stay."""
    stale = "meshctl-hpe.com_gpus-0123abcd.sock"
    kept = ["DEPRECATION", "meshctl-hpe.com_gpus-other-0123abcd.sock", "nvidia.sock"]
    for name in (stale, *kept[1:]):
        with closing(socket.socket(socket.AF_UNIX)) as dead:
            dead.bind(str(kubelet.plugin_dir / name))
    (kubelet.plugin_dir / kept[0]).write_text("{}")
    async with plugin_of(kubelet, desk):
        assert sockets(kubelet) == sorted([*kept, *kubelet.endpoints(RESOURCE)])
    assert sockets(kubelet) == kept


async def test_a_second_agent_is_refused_and_the_first_goes_on(kubelet: FakeKubelet, desk: Desk) -> None:
    """A socket that somebody serves is nobody else's."""
    async with plugin_of(kubelet, desk):
        [endpoint] = kubelet.endpoints(RESOURCE)
        with pytest.raises(InputError, match=rf"another agent serves hpe\.com/gpus at .*{endpoint}"):
            await PluginServer(kubelet.plugin_dir, RESOURCE, Desk()).run()
        assert kubelet.registrations == [(RESOURCE, endpoint)]
        await kubelet.admit(A, RESOURCE, 1)


async def test_a_directory_that_cannot_have_sockets_is_the_callers_mistake(kubelet: FakeKubelet, desk: Desk) -> None:
    """Missing, a file, too long: said at the start, with the option."""
    (file := kubelet.root / "file").touch()
    (long := kubelet.root / ("x" * 100)).mkdir()
    for directory, words in (
        (kubelet.root / "missing", "No such"),
        (file, "Not a directory"),
        (long, "bytes too long"),
    ):
        with pytest.raises(InputError, match=rf"--plugin-dir: .*{words}"):
            await PluginServer(directory, RESOURCE, desk).run()
    assert list(long.iterdir()) == []


async def test_an_allocate_under_way_ends_before_the_server_does(kubelet: FakeKubelet, desk: Desk) -> None:
    """The end of an agent fails no pod that it has already given slots; then the kubelet's devices are unhealthy."""
    desk.gate.clear()
    async with plugin_of(kubelet, desk):
        admission = asyncio.create_task(kubelet.admit(A, RESOURCE, 8))

        async def asked() -> bool:
            return bool(desk.calls)

        await until(asked, "the backend is asked")
        asyncio.get_running_loop().call_later(0.05, desk.gate.set)
    assert (await admission).envs == RESPONSE.envs
    await kubelet.has(RESOURCE, 0)
    assert sockets(kubelet) == []


# ----------------------------------------------------------------------------------------------------- pod-resources


@pytest.fixture
async def pods(kubelet: FakeKubelet) -> AsyncIterator[PodResources]:
    pods = PodResources(kubelet.pod_resources, kubelet.plugin_dir)
    yield pods
    await pods.close()


async def test_the_kubelet_tells_who_holds_which_slot(kubelet: FakeKubelet, pods: PodResources) -> None:
    """Of the resources that were asked for; IDs that are none of ours are left out, and told of once."""
    kubelet.held = {
        (A, RESOURCE): ["GPU-0::3", "GPU-0::1"],
        (B, RESOURCE): ["GPU-1::0", "mig-1"],
        (A, OTHER): ["GPU-2::0"],
        (B, "nvidia.com/gpu"): ["GPU-3"],
    }
    with structlog.testing.capture_logs() as logs:
        for _ in range(2):
            held = await pods.held({RESOURCE, OTHER})
    assert list(held.items()) == [
        (Slot("GPU-0", 1), A),
        (Slot("GPU-0", 3), A),
        (Slot("GPU-1", 0), B),
        (Slot("GPU-2", 0), A),
    ]
    assert [(entry["event"], entry["id"]) for entry in logs] == [("podresources.foreign_id", "mig-1")]
    assert await pods.held(()) == {}


async def test_a_kubelet_that_is_away_says_nothing_and_is_asked_again(kubelet: FakeKubelet, pods: PodResources) -> None:
    """An error that names the socket and the option, never an empty answer; the same client works when it is back."""
    kubelet.held = {(A, RESOURCE): ["GPU-0::0"]}
    await kubelet.stop()
    with pytest.raises(UnavailableError, match=r"List at .*kubelet\.sock: there is no such socket; .*--pod-resources"):
        await pods.held({RESOURCE})
    await kubelet.start()

    async def answers() -> bool:
        with suppress(UnavailableError):
            return await pods.held({RESOURCE}) == {Slot("GPU-0", 0): A}
        return False

    await until(answers, "the kubelet says who holds the slot")
    await kubelet.restart()
    await until(answers, "it says so after a restart")


async def test_a_kubelet_that_hangs_is_not_waited_for(kubelet: FakeKubelet, pods: PodResources) -> None:
    """The call has a deadline."""
    kubelet.deaf.set()
    with pytest.raises(UnavailableError, match="DEADLINE_EXCEEDED"):
        await pods.held({RESOURCE})


async def test_an_answer_may_be_larger_than_grpcs_default(kubelet: FakeKubelet, pods: PodResources) -> None:
    """5 MB of a node with very many pods."""
    name = "x" * 5000
    kubelet.held = {(Owner("ns", f"{name}{at}", "main"), RESOURCE): [f"GPU-0::{at}"] for at in range(1000)}
    assert len(await pods.held({RESOURCE})) == 1000


async def test_a_young_kubelet_that_shows_no_pods_yet_is_not_believed(
    kubelet: FakeKubelet, desk: Desk, pods: PodResources
) -> None:
    """It restarted and has not heard of its pods; that it gave slots away stands in its checkpoint. Then it has."""
    async with plugin_of(kubelet, desk):
        await kubelet.admit(A, RESOURCE, 2)
        before = await pods.held({RESOURCE})
        kubelet.knows_pods = False
        await kubelet.restart()
        await kubelet.has(RESOURCE, 8)
        for _ in range(2):
            with pytest.raises(UnavailableError, match=r"of 2 slots that it gave away .* GPU-0::0 among them"):
                await pods.held({RESOURCE})
        kubelet.knows_pods = True
        assert await pods.held({RESOURCE}) == before == {Slot("GPU-0", 0): A, Slot("GPU-0", 1): A}


async def test_a_kubelet_that_knows_its_pods_is_believed_when_one_ends(
    kubelet: FakeKubelet, desk: Desk, pods: PodResources
) -> None:
    """Its checkpoint keeps what has ended until the next pod comes: that hides nothing."""
    async with plugin_of(kubelet, desk):
        await kubelet.admit(A, RESOURCE, 1)
        await kubelet.admit(B, RESOURCE, 1)
        assert len(await pods.held({RESOURCE})) == 2
        kubelet.end(A)
        assert await pods.held({RESOURCE}) == {Slot("GPU-0", 1): B}
        kubelet.end(B)
        assert await pods.held({RESOURCE}) == {}


async def test_a_kubelet_that_is_not_young_is_believed(kubelet: FakeKubelet, desk: Desk, pods: PodResources) -> None:
    """What ended while it was away is in its checkpoint: waited for while it is young, and no longer."""
    async with plugin_of(kubelet, desk):
        await kubelet.admit(A, RESOURCE, 1)
        kubelet.end(A)
        await kubelet.restart()
        with pytest.raises(UnavailableError):
            await pods.held({RESOURCE})
        grown = PodResources(kubelet.pod_resources, kubelet.plugin_dir, young_s=0.0)
        assert await grown.held({RESOURCE}) == {}
        await grown.close()


async def test_a_checkpoint_that_cannot_be_read_says_nothing(kubelet: FakeKubelet, pods: PodResources) -> None:
    """Neither does a young kubelet then."""
    (kubelet.plugin_dir / CHECKPOINT).write_text('{"Data": []}')
    with pytest.raises(UnavailableError, match=f"{CHECKPOINT} is no checkpoint"):
        await pods.held({RESOURCE})
