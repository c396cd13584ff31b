"""The node's GPUs as NVIDIA's driver knows them, through nvidia-ml-py.

A call into the driver may hang for ever, most of all when a GPU is broken, and cannot be interrupted. So each GPU has a
thread of its own (`_Lane`), and so have the events and what concerns no single GPU: what hangs takes its own thread
along and nobody else's. They are daemon threads: the process ends although one hangs.

Invariants: nobody waits for the driver longer than the deadline; while a call for a GPU hangs, the next ones fail at
once and say so; no foreign exception leaves this module.

A GPU that comes while the agent runs (hotplug, a reloaded driver) is seen by the agent's next run: NVML counts GPUs
once. One that was lost and answers again is the same GPU all the while.

Rejected: asyncio.to_thread (threads that hang fill its pool, and keep the process from ending); NVML in a child process
(another 40 MB, and a process that hangs in the driver cannot be killed either); version 2 of the memory's query (its
total is that of version 1, and drivers for Kepler lack it).
"""

from __future__ import annotations

import asyncio
import ctypes
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import structlog

from deviceplugin.ports import GpuError, GpuLostError, GpuTimeoutError, Xid
from meshctl.sharing import Gpu

log = structlog.get_logger(__name__)

DEADLINE_S = 5.0
"""Of one call: a driver that is well answers in milliseconds, without persistence mode the first call takes seconds."""
EVENT_WAIT_MS = 1000
"""For how long one call waits for an event: `close` waits as long, and a GPU that answers again to be listened to."""
T = TypeVar("T")

_INSTALL = (
    "install NVIDIA's driver, in a container let NVIDIA's container runtime mount it; "
    "on a node without GPUs give --inventory file:PATH"
)
ERRORS: Mapping[str, tuple[type[GpuError], str]] = {
    "NVML_ERROR_GPU_IS_LOST": (GpuLostError, ""),
    "NVML_ERROR_GPU_NOT_FOUND": (GpuLostError, ""),
    "NVML_ERROR_NOT_FOUND": (GpuLostError, ""),
    "NVML_ERROR_TIMEOUT": (GpuTimeoutError, ""),
    "NVML_ERROR_LIBRARY_NOT_FOUND": (GpuError, f"libnvidia-ml.so.1 is not there: {_INSTALL}"),
    "NVML_ERROR_DRIVER_NOT_LOADED": (GpuError, f"the kernel has no NVIDIA driver: {_INSTALL}"),
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": (
        GpuError,
        "the driver in the kernel is of another version than its libraries: reboot the node, or load the driver again",
    ),
    "NVML_ERROR_NO_PERMISSION": (GpuError, "run the agent as root, in Kubernetes with privileged: true"),
    "NVML_ERROR_RESET_REQUIRED": (GpuError, "reset the GPU, or reboot the node"),
}
"""NVML's errors that are of a kind of their own, or need more words than NVML's. All others are GpuError."""
_CANNOT = ("NVML_ERROR_NOT_SUPPORTED", "NVML_ERROR_FUNCTION_NOT_FOUND")
"""The GPU, or an older driver, has no such thing."""


@dataclass(frozen=True, slots=True)
class _Nvml:
    """nvidia-ml-py's functions by name. What they raise is GpuError, and names who was asked for what."""

    module: Any
    who: str = "NVML"

    def __call__(self, function: str, *arguments: object) -> Any:
        try:
            return getattr(self.module, function)(*arguments)
        except self.module.NVMLError as error:
            kind, advice = next((of for name, of in ERRORS.items() if self._is(error, name)), (GpuError, ""))
            raise kind(": ".join(filter(None, (self.who, function, str(error), advice)))) from error

    def optional(self, function: str, *arguments: object) -> Any:
        """None where there is no such thing."""
        try:
            return self(function, *arguments)
        except GpuError as error:
            if any(self._is(error.__cause__, name) for name in _CANNOT):
                return None
            raise

    def of(self, who: str) -> _Nvml:
        return replace(self, who=who)

    def constant(self, name: str) -> int:
        return int(getattr(self.module, name))

    def _is(self, error: Any, name: str) -> bool:
        return bool(error.value == getattr(self.module, name, None))


@dataclass(frozen=True, slots=True)
class _Card:
    """One GPU as NVML calls it."""

    gpu: Gpu
    handle: Any
    nvml: _Nvml
    """Speaks of this GPU."""

    @property
    def address(self) -> int | None:
        return _address(self.handle)


class NvmlInventory:
    """`Inventory` of the driver. NVML is opened by the first `gpus`, which raises GpuError as long as there is none."""

    def __init__(self, deadline_s: float = DEADLINE_S, event_wait_ms: int = EVENT_WAIT_MS) -> None:
        self.driver = ""
        self._deadline_s = deadline_s
        self._node = _Lane("NVML", deadline_s)
        self._lanes: dict[int, _Lane] = {}
        """By NVML's index, which stays while NVML is open."""
        self._cards: dict[int, _Card] = {}
        self._said: dict[int, str] = {}
        self._nvml: _Nvml | None = None
        self._xids: asyncio.Queue[Xid] = asyncio.Queue()
        self._events = _Events(event_wait_ms, self._xids.put_nowait)

    async def gpus(self) -> tuple[Gpu, ...]:
        """A GPU that is lost, or never answered, is left out, as the log says. One that hangs is as it was before."""
        nvml = await self._opened()
        count = await self._node.call("nvmlDeviceGetCount", lambda: nvml("nvmlDeviceGetCount"))
        await asyncio.gather(*(self._look(nvml, index) for index in range(count)))
        self._events.listen(nvml, self._cards.values())
        return tuple(card.gpu for _, card in sorted(self._cards.items()))

    async def probe(self, uuid: str) -> None:
        await self._ask(uuid, "probe", _probe)

    async def next_xid(self) -> Xid:
        return await self._xids.get()

    async def set_exclusive(self, uuid: str, exclusive: bool) -> None:
        mode = "EXCLUSIVE_PROCESS" if exclusive else "DEFAULT"
        await self._ask(uuid, f"set the compute mode {mode}", lambda nvml, handle: _set_mode(nvml, handle, mode))

    async def processes(self, uuid: str) -> tuple[int, ...] | None:
        return await self._ask(uuid, "list processes", _processes)

    async def close(self) -> None:
        """Ends what does not hang. While a call hangs NVML is not shut down: that would hang too."""
        lanes = [self._node, *self._lanes.values()]
        ended = await asyncio.to_thread(self._events.end, self._deadline_s)
        nvml, self._nvml = self._nvml, None
        self._cards = {}
        if nvml is not None and ended and not any(lane.hangs for lane in lanes):
            try:
                await self._node.call("nvmlShutdown", lambda: nvml("nvmlShutdown"))
            except GpuError as error:
                log.warning("NVML was not shut down", error=str(error))
        for lane in lanes:
            lane.end()

    async def _opened(self) -> _Nvml:
        if self._nvml is not None:
            return self._nvml
        self._nvml, self.driver = nvml, _ = await self._node.call("nvmlInit", _open)
        return nvml

    async def _look(self, nvml: _Nvml, index: int) -> None:
        """Note the GPU of this index as it is now."""
        lane = self._lanes.setdefault(index, _Lane(f"GPU {index}", self._deadline_s))
        try:
            card = await lane.call("describe", lambda: _described(nvml, index))
        except GpuError as error:
            if isinstance(error, GpuLostError):
                self._cards.pop(index, None)
            if self._said.get(index) != str(error):
                log.warning("a GPU cannot be described", index=index, error=str(error))
            self._said[index] = str(error)
        else:
            lane.name = card.gpu.uuid
            self._cards[index] = card
            self._said.pop(index, None)

    async def _ask(self, uuid: str, what: str, calls: Callable[[_Nvml, Any], T]) -> T:
        card = next((card for card in self._cards.values() if card.gpu.uuid == uuid), None)
        if card is None:
            raise GpuLostError(f"{uuid}: {what}: NVML does not show this GPU")
        return await self._lanes[card.gpu.index].call(what, lambda: calls(card.nvml, card.handle))


def _open() -> tuple[_Nvml, str]:
    import pynvml  # 4 MB that a node with a file for inventory does not need

    nvml = _Nvml(pynvml)
    nvml("nvmlInit")
    return nvml, nvml("nvmlSystemGetDriverVersion")


def _described(nvml: _Nvml, index: int) -> _Card:
    nvml = nvml.of(f"GPU {index}")
    handle = nvml("nvmlDeviceGetHandleByIndex", index)
    uuid = nvml("nvmlDeviceGetUUID", handle)
    nvml = nvml.of(uuid)
    memory_bytes = nvml("nvmlDeviceGetMemoryInfo", handle).total
    if memory_bytes <= 0:
        raise GpuError(
            f"{uuid}: nvmlDeviceGetMemoryInfo: it says {memory_bytes} bytes, so what a share is nobody knows"
        )
    mig = nvml.optional("nvmlDeviceGetMigMode", handle)
    gpu = Gpu(
        uuid=uuid,
        product=nvml("nvmlDeviceGetName", handle),
        memory_bytes=memory_bytes,
        compute_capability=nvml("nvmlDeviceGetCudaComputeCapability", handle),
        minor=nvml.optional("nvmlDeviceGetMinorNumber", handle),
        index=index,
        mig=mig is not None and mig[0] == nvml.constant("NVML_DEVICE_MIG_ENABLE"),
    )
    return _Card(gpu, handle, nvml)


def _probe(nvml: _Nvml, handle: Any) -> None:
    nvml("nvmlDeviceGetMemoryInfo", handle)
    nvml.optional("nvmlDeviceGetComputeMode", handle)


def _set_mode(nvml: _Nvml, handle: Any, mode: str) -> None:
    wanted = nvml.constant(f"NVML_COMPUTEMODE_{mode}")
    if nvml("nvmlDeviceGetComputeMode", handle) != wanted:
        nvml("nvmlDeviceSetComputeMode", handle, wanted)


def _processes(nvml: _Nvml, handle: Any) -> tuple[int, ...] | None:
    """MPS clients are listed apart, their server with the other processes. Drivers before 510 lack version 3."""

    def listed(function: str) -> Any:
        found = nvml.optional(f"{function}_v3", handle)
        return nvml.optional(f"{function}_v2", handle) if found is None else found

    computing = listed("nvmlDeviceGetComputeRunningProcesses")
    if computing is None:
        return None
    clients = listed("nvmlDeviceGetMPSComputeRunningProcesses") or []
    return tuple(sorted({process.pid for process in (*computing, *clients)}))


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value


_Call = tuple["Future[Any]", Callable[[], Any]]


class _Lane:
    """One thread, which makes one call after the other."""

    def __init__(self, name: str, deadline_s: float) -> None:
        self.name = name
        self._deadline_s = deadline_s
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._late: _Call | None = None
        self._late_what = ""

    @property
    def hangs(self) -> bool:
        return self._late is not None and not self._late[0].done()

    async def call(self, what: str, function: Callable[[], T]) -> T:
        """What `function` returns or raises. Raises GpuTimeoutError after the deadline, while an earlier call hangs at
        once."""
        if self.hangs:
            raise GpuTimeoutError(
                f"{self.name}: {what}: not tried, the driver hangs in an earlier call: {self._late_what}"
            )
        if self._thread is None:
            self._thread = threading.Thread(target=_serve, args=(self._calls,), name=self.name, daemon=True)
            self._thread.start()
        future: Future[T] = Future()
        call = (future, function)
        self._calls.put(call)
        try:
            async with asyncio.timeout(self._deadline_s):
                return await asyncio.wrap_future(future)
        except TimeoutError as error:
            if not future.cancel():
                self._late, self._late_what = call, what
            raise GpuTimeoutError(f"{self.name}: {what}: no answer within {self._deadline_s:g} s") from error

    def end(self) -> None:
        self._calls.put(None)


def _serve(calls: queue.SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        future, function = call
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001 (raised again where the call was made)
                future.set_exception(error)


class _Events:
    """The thread that waits for XIDs, and tells the event loop of each."""

    def __init__(self, wait_ms: int, tell: Callable[[Xid], None]) -> None:
        self._wait_ms = wait_ms
        self._tell = tell
        self._cards: tuple[_Card, ...] = ()
        """Replaced as a whole: two threads read it."""
        self._said: dict[str, str] = {}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def listen(self, nvml: _Nvml, cards: Iterable[_Card]) -> None:
        """To these from now on."""
        self._cards = tuple(cards)
        if self._thread is None:
            arguments = (nvml, asyncio.get_running_loop())
            self._thread = threading.Thread(target=self._run, args=arguments, name="NVML events", daemon=True)
            self._thread.start()

    def end(self, deadline_s: float) -> bool:
        """Whether the thread has ended by then. Blocks."""
        self._ended.set()
        if self._thread is None:
            return True
        self._thread.join(deadline_s)
        return not self._thread.is_alive()

    def _run(self, nvml: _Nvml, loop: asyncio.AbstractEventLoop) -> None:
        while not self._ended.is_set():
            try:
                self._hear(nvml, loop)
            except GpuError as error:  # a lost GPU fails every wait for the others' events too: a new set leaves it out
                self._say("", str(error))
                self._ended.wait(self._wait_ms / 1000)

    def _hear(self, nvml: _Nvml, loop: asyncio.AbstractEventLoop) -> None:
        """One set of events, until it fails or nobody listens any more."""
        events = nvml("nvmlEventSetCreate")
        names: dict[int | None, str] = {}
        """Address -> UUID of the GPUs in the set."""
        try:
            while not self._ended.is_set():
                for card in self._cards:
                    if card.address not in names and self._registered(card, events):
                        names[card.address] = card.gpu.uuid
                if not names:
                    self._ended.wait(self._wait_ms / 1000)
                elif (event := self._next(nvml, events)) is not None:
                    self._told(loop, Xid(int(event.eventData), names.get(_address(event.device))))
        finally:
            nvml("nvmlEventSetFree", events)

    def _registered(self, card: _Card, events: Any) -> bool:
        nvml, handle = card.nvml, card.handle
        xid = nvml.constant("nvmlEventTypeXidCriticalError")
        try:
            if not (nvml.optional("nvmlDeviceGetSupportedEventTypes", handle) or 0) & xid:
                self._say(nvml.who, f"{nvml.who}: reports no XIDs: only its probes tell whether it is well")
                return False
            nvml("nvmlDeviceRegisterEvents", handle, xid, events)
        except GpuError as error:
            self._say(nvml.who, str(error))
            return False
        self._said.pop(nvml.who, None)
        return True

    def _next(self, nvml: _Nvml, events: Any) -> Any:
        """None: nothing happened meanwhile."""
        try:
            return nvml("nvmlEventSetWait_v2", events, self._wait_ms)
        except GpuTimeoutError:
            return None

    def _told(self, loop: asyncio.AbstractEventLoop, xid: Xid) -> None:
        try:
            loop.call_soon_threadsafe(self._tell, xid)
        except RuntimeError:  # the loop is closed
            self._ended.set()

    def _say(self, who: str, words: str) -> None:
        """Once, not at every wait."""
        if self._said.get(who) != words:
            log.warning("XIDs are not heard", gpu=who, error=words)
        self._said[who] = words
