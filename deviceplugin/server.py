"""The kubelet's device plugin API (v1beta1) in front of a `Backend`, and a registration that lasts.

Every registration has a socket of its own, under a name never used before, and serves before it registers. A new one
follows when kubelet.sock was created anew (a kubelet that started; it also removed our socket), when our socket is
gone, and when nobody watches our devices although a kubelet should. It is registered before the old one ends, so a
kubelet that is still the same never sees the devices go.

Rejected: one fixed name. A kubelet (1.37) refuses to register a socket that it is still connected to, and then never
notices its end: every later registration fails until it restarts. And gRPC removes whatever lies at the path that it
listens at: when it starts (another agent's socket) and when it ends (our own next one).
Rejected: inotify. Two `lstat` calls every 0.1 s cost nothing, see a directory that was made anew or mounted over, and
need no library.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import secrets
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import grpc
import structlog
from betterproto2 import Message
from grpc import StatusCode, aio
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential

from deviceplugin import kubeletapi as api
from deviceplugin.allocate import Reason, RefusedSlotsError
from deviceplugin.podresources import CHANNEL, Identity, address, identity
from deviceplugin.ports import Backend
from meshctl.errors import InputError, MeshctlError, UnavailableError

log = structlog.get_logger(__name__)

Observe = Callable[[str, float, str], None]
"""Told of each call that ended: its method, seconds, and OK, a `Reason`, or the name of a gRPC code."""

FIRST_RETRY_S, LONGEST_RETRY_S = 0.05, 0.5
STOP_GRACE_S = 2.0
"""For an Allocate that is being answered."""
_LONGEST_PATH = 107
"""Bytes in sockaddr_un.sun_path, less the 0 at its end."""
_TOKEN_BYTES = 4

_CODES = dict.fromkeys(
    (Reason.UNKNOWN_DEVICE, Reason.DUPLICATE_DEVICE, Reason.FOREIGN_DEVICE, Reason.NOTHING_ASKED),
    StatusCode.INVALID_ARGUMENT,
) | {Reason.NOT_READY: StatusCode.UNAVAILABLE}
"""Any other reason is FAILED_PRECONDITION: well asked, and it cannot be."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for the kubelet, in seconds."""

    poll_s: float = 0.1
    """A new kubelet.sock is seen within this."""
    register_s: float = 5.0
    """It answers Register once it has connected to us and asked for our options."""
    unwatched_s: float = 2.0
    """A kubelet that registered us opens ListAndWatch at once, and never ends it."""


class PluginServer:
    """Offers one resource to the kubelet whose sockets are in `directory`. `run` it; it belongs to the loop that does.

    A `Backend.allocate` that is under way when the kubelet hangs up is cancelled, like any call of a client that left.
    """

    def __init__(
        self,
        directory: Path,
        resource: str,
        backend: Backend,
        observe: Observe | None = None,
        patience: Patience = Patience(),
    ) -> None:
        """Raises InputError when the path of `directory` is too long."""
        self.resource = resource
        self.registrations = 0
        """That a kubelet accepted."""
        self._directory = directory.absolute()
        self._kubelet = self._directory / api.KUBELET_SOCKET
        self._backend, self._observe = backend, observe or (lambda method, seconds, outcome: None)
        self._patience = patience
        self._endpoint: _Endpoint | None = None
        """What the kubelet knows."""
        # Injective: "_" is not in the domain that a resource's name begins with.
        self._prefix = f"meshctl-{resource.replace('/', '_')}-"
        excess = len(os.fsencode(self._fresh_path())) - _LONGEST_PATH
        if excess > 0:  # no way around it: the kubelet has to connect to the same path
            raise InputError(
                f"--plugin-dir: {directory} is {excess} bytes too long for the path of a unix socket in it"
            )

    @property
    def watched(self) -> bool:
        """Whether a kubelet gets our devices now."""
        return self._endpoint is not None and self._endpoint.watchers > 0

    async def run(self) -> None:
        """Serves, registers, and does so again whenever it must, until cancelled; then the sockets are gone.

        Raises InputError when another agent serves the resource, or the directory can't be read.
        """
        api.warm_up()
        try:
            self._clear_away()
        except OSError as error:
            raise InputError(f"--plugin-dir: can't clear {self._directory} of old sockets: {error}") from error
        try:
            while True:
                endpoint, kubelet = await self._registered()
                old, self._endpoint = self._endpoint, endpoint
                if old is not None:
                    await old.close()
                log.warning("plugin.registering_again", resource=self.resource, why=await self._lost(endpoint, kubelet))
        finally:
            if self._endpoint is not None:
                await self._endpoint.close()
                self._endpoint = None

    def _fresh_path(self) -> Path:
        return self._directory / f"{self._prefix}{secrets.token_hex(_TOKEN_BYTES)}.sock"

    def _clear_away(self) -> None:
        """Removes what agents left that ended without a chance to. Raises InputError when one of them is alive."""
        ours = re.compile(re.escape(self._prefix) + rf"[0-9a-f]{{{2 * _TOKEN_BYTES}}}\.sock")
        for path in sorted(path for path in self._directory.iterdir() if ours.fullmatch(path.name)):
            if _listening(path):
                raise InputError(f"another agent serves {self.resource} at {path}; end it, or use another --plugin-dir")
            path.unlink(missing_ok=True)

    # --------------------------------------------------------------------------------------------------- registration

    async def _registered(self) -> tuple[_Endpoint, Identity]:
        """A new endpoint that a kubelet accepted, and that kubelet; tried until one does."""
        async for attempt in AsyncRetrying(
            wait=wait_exponential(FIRST_RETRY_S, max=LONGEST_RETRY_S),
            retry=retry_if_exception_type(UnavailableError),
            before_sleep=self._tell_of_failure,
        ):
            with attempt:
                return await self._attempt()
        raise AssertionError("retries have no end")

    async def _attempt(self) -> tuple[_Endpoint, Identity]:
        """Raises UnavailableError; then nothing is left of it, and what a late kubelet makes of it ends at once."""
        kubelet = await self._kubelet_there()
        endpoint = _Endpoint(self._fresh_path(), self.resource, self._backend, self._observe)
        try:
            await endpoint.open()
            await self._register(endpoint.path.name)
        except BaseException:
            await endpoint.close()
            raise
        self.registrations += 1
        log.info("plugin.registered", resource=self.resource, socket=str(endpoint.path))
        return endpoint, kubelet

    async def _kubelet_there(self) -> Identity:
        """Waits until somebody listens at kubelet.sock, for as long as it takes. A file alone may be a dead one's."""
        while True:
            kubelet = identity(self._kubelet)
            if kubelet is not None and _listening(self._kubelet):
                return kubelet
            await asyncio.sleep(self._patience.poll_s)

    async def _register(self, name: str) -> None:
        request = api.RegisterRequest(api.VERSION, name, self.resource, api.OPTIONS)
        async with aio.insecure_channel(address(self._kubelet), options=CHANNEL) as channel:
            try:
                await channel.unary_unary(api.REGISTER)(bytes(request), timeout=self._patience.register_s)
            except aio.AioRpcError as error:
                raise UnavailableError(
                    f"the kubelet did not register {self.resource}: Register at {self._kubelet}: "
                    f"{error.code().name}: {error.details()}"
                ) from error

    def _tell_of_failure(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        log.warning("plugin.not_registered", resource=self.resource, attempt=state.attempt_number, error=str(error))

    async def _lost(self, endpoint: _Endpoint, kubelet: Identity) -> str:
        """Returns, with the reason in words, when the registration is of no use any more."""
        clock = asyncio.get_running_loop().time
        watched_s = clock()
        while True:
            await asyncio.sleep(self._patience.poll_s)
            if identity(self._kubelet) not in (kubelet, None):
                return "kubelet.sock was created anew"
            if not endpoint.there:
                return f"{endpoint.path.name} was removed"
            if endpoint.watchers:
                watched_s = clock()
            elif clock() - watched_s > self._patience.unwatched_s:
                return f"nobody watched the devices for {self._patience.unwatched_s:g} s"


class _Endpoint:
    """One socket that serves the device plugin API, from `open` to `close`."""

    def __init__(self, path: Path, resource: str, backend: Backend, observe: Observe) -> None:
        self.path = path
        self.watchers = 0
        """Streams of ListAndWatch that are open."""
        self._resource, self._backend, self._observe = resource, backend, observe
        self._server = aio.server()
        self._bound: Identity | None = None
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def open(self) -> None:
        """Returns when it serves. Raises UnavailableError when it can't."""
        self._server.add_generic_rpc_handlers((_Handlers(self._methods()),))
        try:
            self._server.add_insecure_port(address(self.path))
        except RuntimeError as error:
            raise UnavailableError(f"can't listen at {self.path} (--plugin-dir): {error}") from error
        await self._server.start()
        self._bound = identity(self.path)

    async def close(self) -> None:
        """Waits a moment for calls under way, then ends the streams and removes the socket."""
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), STOP_GRACE_S)
        finally:
            await self._server.stop(None)

    @property
    def there(self) -> bool:
        """Whether the socket at its path is still the one that it listens at."""
        return self._bound is not None and identity(self.path) == self._bound

    def _methods(self) -> dict[str, grpc.RpcMethodHandler]:
        unary = {
            api.GET_OPTIONS: self._get_options,
            api.PREFERRED: self._preferred,
            api.ALLOCATE: self._allocate,
            api.PRE_START: self._pre_start,
        }
        methods = {method: self._unary(method, answer) for method, answer in unary.items()}
        return methods | {api.LIST_AND_WATCH: grpc.unary_stream_rpc_method_handler(self._list_and_watch)}

    async def _get_options(self, _: bytes) -> Message:
        return api.OPTIONS

    async def _preferred(self, data: bytes) -> Message:
        asked = api.PreferredAllocationRequest.parse(data).containers
        ids = [await self._backend.preferred(self._resource, c.available, c.must_include, c.size) for c in asked]
        return api.ContainersDeviceIds([api.DeviceIds(chosen) for chosen in ids])

    async def _allocate(self, data: bytes) -> Message:
        asked = [container.ids for container in api.ContainersDeviceIds.parse(data).containers]
        return api.allocated(await self._backend.allocate(self._resource, asked))

    async def _pre_start(self, data: bytes) -> Message:
        await self._backend.pre_start(self._resource, api.DeviceIds.parse(data).ids)
        return api.Empty()

    async def _list_and_watch(self, _: bytes, context: Any) -> None:
        """All slots, now and at every change. What changes while the kubelet does not read is one change to it."""
        self.watchers += 1
        try:
            slots = self._backend.devices(self._resource)
            while True:
                await context.write(bytes(api.listed(slots)))
                slots = await self._backend.wait_changed(self._resource, slots)
        except (aio.InternalError, aio.UsageError) as error:
            log.info("plugin.watch_ended", resource=self._resource, error=str(error))  # the kubelet is gone
        except Exception as error:
            await self._fail(api.LIST_AND_WATCH, error, context)
            raise
        finally:
            self.watchers -= 1

    def _unary(self, method: str, answer: Callable[[bytes], Awaitable[Message]]) -> grpc.RpcMethodHandler:
        """Answers in bytes, counts, measures, and says why not."""

        async def handle(data: bytes, context: Any) -> bytes:
            started_s, outcome = perf_counter(), StatusCode.CANCELLED.name
            self._count(1)
            try:
                response = bytes(await answer(data))
                outcome = StatusCode.OK.name
            except Exception as error:
                outcome = _judged(error)[1]
                await self._fail(method, error, context)
                raise  # not reached: to fail is to abort the call
            finally:
                self._count(-1)
                self._observe(method.rpartition("/")[2], perf_counter() - started_s, outcome)
            return response

        return grpc.unary_unary_rpc_method_handler(handle)

    async def _fail(self, method: str, error: Exception, context: Any) -> None:
        """Ends the call with the words of `error`, which the kubelet shows in an Event of the pod."""
        code, outcome = _judged(error)
        told = {"resource": self._resource, "method": method.rpartition("/")[2], "error": str(error)}
        if code is StatusCode.INTERNAL:
            log.error("plugin.call_failed", **told, exc_info=error)
        else:
            log.warning("plugin.call_refused", **told, outcome=outcome)
        await context.abort(code, str(error) or type(error).__name__)

    def _count(self, change: int) -> None:
        self._calls += change
        if self._calls:
            self._idle.clear()
        else:
            self._idle.set()


def _judged(error: Exception) -> tuple[StatusCode, str]:
    """The code of an error, and what it is called in metrics: the one table of our errors and gRPC's."""
    match error:
        case RefusedSlotsError():
            return _CODES.get(error.reason, StatusCode.FAILED_PRECONDITION), error.reason
        case MeshctlError():  # not its fault and not for ever: the kubelet tries a container's start again
            return StatusCode.UNAVAILABLE, StatusCode.UNAVAILABLE.name
        case _:
            return StatusCode.INTERNAL, StatusCode.INTERNAL.name


def _listening(path: Path) -> bool:
    """Whether somebody may listen at it: not when nothing is there, or what somebody left who is gone."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        return probe.connect_ex(str(path)) not in (errno.ENOENT, errno.ECONNREFUSED)


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no type hints
    """Routes the methods that we serve, with bytes in and out."""

    def __init__(self, methods: dict[str, grpc.RpcMethodHandler]) -> None:
        self._methods = methods

    def service(self, call: Any) -> Any:
        return self._methods.get(call.method)
