"""A kubelet's device manager: its real protocol over real unix sockets, in the order of the real one's calls.

It registers plugins, watches their devices, gives containers devices (GetPreferredAllocation where there is a choice,
Allocate, PreStartContainer), remembers them over a restart, and tells of them by the pod-resources API. Like the real
one (1.37) it passes IDs in no order, removes all sockets in its directory when it starts, and refuses a socket that it
is connected to already.
"""

# ruff: noqa: RUF009  (betterproto2.field returns a dataclasses.field: nothing is shared between messages)

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import orjson
from betterproto2 import TYPE_MESSAGE, TYPE_STRING, Message
from betterproto2 import field as proto_field
from grpc import StatusCode, aio

from deviceplugin import kubeletapi as api
from deviceplugin.podresources import CHECKPOINT
from meshctl.sharing import Owner
from tests.harness.tools import DEADLINE_S, until


class AdmissionError(Exception):
    """The kubelet refuses a container: by itself (no code), or since the plugin did."""

    def __init__(self, message: str, code: StatusCode | None = None) -> None:
        super().__init__(message)
        self.code = code


@dataclass(eq=False)
class Plugin:
    """A registered plugin, as long as its ListAndWatch lasts."""

    endpoint: str
    channel: aio.Channel
    options: api.DevicePluginOptions
    watching: asyncio.Task[None] | None = None

    async def call(self, method: str, request: Message) -> bytes:
        """Raises AdmissionError with the plugin's words."""
        try:
            return bytes(await self.channel.unary_unary(method)(bytes(request), timeout=DEADLINE_S))
        except aio.AioRpcError as error:
            raise AdmissionError(error.details() or "", error.code()) from error


@dataclass
class Resource:
    """What the kubelet knows of one resource."""

    plugins: list[Plugin] = field(default_factory=list)
    """The last one is asked."""
    healthy: dict[str, bool] = field(default_factory=dict)
    """By device ID, in the plugin's order."""
    lists: int = 0
    """That were received."""
    fewest: int = 0
    """Healthy devices at any time since the first list."""
    most: int = 0

    def update(self, healthy: dict[str, bool]) -> None:
        count = sum(healthy.values())
        self.fewest = min(self.fewest, count) if self.lists else count
        self.most = max(self.most, count)
        self.healthy = healthy


class FakeKubelet:
    """An async context manager; may be stopped and started in between. `root` gets its directories."""

    def __init__(self, root: Path, seed: int = 0) -> None:
        self.registrations: list[tuple[str, str]] = []
        """(resource, endpoint) of each Register, refused ones too."""
        self.resources: dict[str, Resource] = {}
        self.held: dict[tuple[Owner, str], list[str]] = {}
        """(container, resource) -> its device IDs; survives a restart, as the kubelet's checkpoint does."""
        self.deaf = asyncio.Event()
        """While it is set, calls of Register and List get no answer."""
        self.knows_pods = True
        """Whether it has heard of its pods since it started; until then it shows none."""
        self._random = random.Random(seed)  # noqa: S311 (the order of IDs)
        self._server: aio.Server | None = None
        for name in ("device-plugins", "pod-resources"):
            (root / name).mkdir(parents=True, exist_ok=True)
        # The path of a unix socket has 107 characters at most, and a test's directory alone may have 75.
        self._directory = os.open(root, os.O_PATH | os.O_DIRECTORY)
        self.root = Path(f"/proc/{os.getpid()}/fd/{self._directory}")

    @property
    def plugin_dir(self) -> Path:
        return self.root / "device-plugins"

    @property
    def pod_resources(self) -> Path:
        return self.root / "pod-resources" / "kubelet.sock"

    async def __aenter__(self) -> FakeKubelet:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        os.close(self._directory)

    async def start(self) -> None:
        """Removes every socket, then listens."""
        for path in self.plugin_dir.iterdir():
            if path.is_socket():
                path.unlink()
        self._server = aio.server()
        handler = {api.REGISTER: self._register, api.LIST_PODS: self._list_pods}
        self._server.add_generic_rpc_handlers((Handlers(handler),))
        for path in (self.plugin_dir / api.KUBELET_SOCKET, self.pod_resources):
            path.unlink(missing_ok=True)
            self._server.add_insecure_port(f"unix:{path}")
        await self._server.start()

    async def stop(self) -> None:
        """As if it was killed: connections end, devices are unknown."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)
        for resource in self.resources.values():
            for plugin in list(resource.plugins):
                await self.drop(plugin)
        self.resources.clear()

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def drop(self, plugin: Plugin) -> None:
        """Hangs up on a plugin, for no reason."""
        if plugin.watching is not None:
            plugin.watching.cancel()
            with suppress(asyncio.CancelledError):
                await plugin.watching
        await plugin.channel.close()

    # ------------------------------------------------------------------------------------------------------ what it is

    def endpoints(self, resource: str) -> list[str]:
        """Names of the sockets of the plugins that are connected."""
        return [plugin.endpoint for plugin in self.resources.get(resource, Resource()).plugins]

    def devices(self, resource: str) -> dict[str, bool]:
        """Device IDs, and whether they are healthy; empty when no plugin said anything."""
        return dict(self.resources.get(resource, Resource()).healthy)

    async def has(self, resource: str, healthy: int) -> None:
        """Waits until so many devices are healthy."""

        async def holds() -> bool:
            return sum(self.devices(resource).values()) == healthy

        await until(holds, f"{healthy} healthy devices of {resource}")

    def available(self, resource: str) -> list[str]:
        """Healthy IDs that no container holds, in no order."""
        used = {text for (_, of), ids in self.held.items() if of == resource for text in ids}
        free = [text for text, healthy in self.devices(resource).items() if healthy and text not in used]
        self._random.shuffle(free)
        return free

    # -------------------------------------------------------------------------------------------------- what it does

    async def admit(
        self, owner: Owner, resource: str, count: int, reusable: Collection[str] = ()
    ) -> api.ContainerAllocateResponse:
        """Gives a container `count` devices, those of its pod's init containers first (`reusable`).

        Raises AdmissionError; then nothing is held that was not.
        """
        ids = await self._chosen(self._plugin(resource), resource, count, list(reusable)[:count])
        answer = await self.ask(resource, ids)
        self.held[owner, resource] = ids
        self._remember()
        return answer[0]

    async def ask(self, resource: str, *containers: list[str]) -> list[api.ContainerAllocateResponse]:
        """An Allocate of these IDs, right or wrong; nothing is remembered of it. Raises AdmissionError."""
        request = api.ContainersDeviceIds([api.DeviceIds(ids) for ids in containers])
        return api.AllocateResponse.parse(await self._plugin(resource).call(api.ALLOCATE, request)).containers

    async def start_container(self, owner: Owner, resource: str) -> None:
        """What precedes each start of a container, the first as any other. Raises AdmissionError."""
        plugin = self._plugin(resource)
        if plugin.options.pre_start_required:
            await plugin.call(api.PRE_START, api.DeviceIds(self.held[owner, resource]))

    def end(self, owner: Owner) -> None:
        """The container's pod is gone."""
        self.held = {key: ids for key, ids in self.held.items() if key[0] != owner}

    def _plugin(self, resource: str) -> Plugin:
        known = self.resources.get(resource)
        if known is None or not known.plugins:
            raise AdmissionError(f"cannot allocate unregistered device {resource}")
        return known.plugins[-1]

    async def _chosen(self, plugin: Plugin, resource: str, count: int, must: list[str]) -> list[str]:
        free = self.available(resource)
        needed = count - len(must)
        if len(free) < needed:
            raise AdmissionError(f"requested number of devices unavailable for {resource}: {needed} of {len(free)}")
        if 0 < needed < len(free) and plugin.options.get_preferred_allocation_available:
            asked = api.ContainerPreferredAllocationRequest(free + must, must, count)
            data = await plugin.call(api.PREFERRED, api.PreferredAllocationRequest([asked]))
            preferred = [text for text in api.ContainersDeviceIds.parse(data).containers[0].ids if text in free]
            free = preferred + [text for text in free if text not in preferred]
        chosen = must + free[:needed]
        self._random.shuffle(chosen)
        return chosen

    # -------------------------------------------------------------------------------------------------- what it serves

    async def _register(self, data: bytes, context: Any) -> bytes:
        request = api.RegisterRequest.parse(data)
        resource, endpoint = request.resource_name, request.endpoint
        self.registrations.append((resource, endpoint))
        if self.deaf.is_set():
            await asyncio.Event().wait()
        known = self.resources.setdefault(resource, Resource())
        if request.version != api.VERSION or endpoint in self.endpoints(resource):
            await context.abort(StatusCode.UNKNOWN, f"device plugin already connected: {endpoint}")
        channel = aio.insecure_channel(f"unix:{self.plugin_dir / endpoint}")
        get_options = channel.unary_unary(api.GET_OPTIONS)
        options = api.DevicePluginOptions.parse(await get_options(b"", timeout=DEADLINE_S))
        plugin = Plugin(endpoint, channel, options)
        known.plugins.append(plugin)
        plugin.watching = asyncio.create_task(self._watch(known, plugin))
        return b""

    async def _watch(self, resource: Resource, plugin: Plugin) -> None:
        try:
            async for data in plugin.channel.unary_stream(api.LIST_AND_WATCH)(b""):
                listed = api.ListAndWatchResponse.parse(data).devices
                resource.update({device.id: device.health == api.HEALTHY for device in listed})
                resource.lists += 1
        except aio.AioRpcError:
            pass  # the plugin is gone
        finally:
            resource.plugins.remove(plugin)
            if not resource.plugins:
                resource.update(dict.fromkeys(resource.healthy, False))

    async def _list_pods(self, data: bytes, context: Any) -> bytes:
        if self.deaf.is_set():
            await asyncio.Event().wait()
        return bytes(listed_pods(self.held if self.knows_pods else {}))

    def _remember(self) -> None:
        """The checkpoint, as the real one writes it: pods that ended are in it until the next is admitted."""
        entries = [
            {"PodUID": owner.pod, "ContainerName": owner.container, "ResourceName": resource, "DeviceIDs": {"-1": ids}}
            for (owner, resource), ids in self.held.items()
        ]
        data = {"Data": {"PodDeviceEntries": entries or None, "RegisteredDevices": {}}, "Checksum": 0}
        (self.plugin_dir / CHECKPOINT).write_bytes(orjson.dumps(data))


@dataclass(eq=False, repr=False)
class ContainerDevices(Message):
    """Of pod-resources: devices of one resource; one resource may stand in several of these (one per NUMA node)."""

    resource: str = proto_field(1, TYPE_STRING)
    ids: list[str] = proto_field(2, TYPE_STRING, repeated=True)


@dataclass(eq=False, repr=False)
class ContainerResources(Message):
    name: str = proto_field(1, TYPE_STRING)
    devices: list[ContainerDevices] = proto_field(2, TYPE_MESSAGE, repeated=True)


@dataclass(eq=False, repr=False)
class PodResources(Message):
    name: str = proto_field(1, TYPE_STRING)
    namespace: str = proto_field(2, TYPE_STRING)
    containers: list[ContainerResources] = proto_field(3, TYPE_MESSAGE, repeated=True)


@dataclass(eq=False, repr=False)
class ListPodResourcesResponse(Message):
    pods: list[PodResources] = proto_field(1, TYPE_MESSAGE, repeated=True)


def listed_pods(held: dict[tuple[Owner, str], list[str]]) -> ListPodResourcesResponse:
    """The answer of pod-resources List: a pod for each container, for that is all the same to a reader."""
    return ListPodResourcesResponse(
        [
            PodResources(
                owner.pod,
                owner.namespace,
                [ContainerResources(owner.container, [ContainerDevices(resource, ids)])],
            )
            for (owner, resource), ids in held.items()
        ]
    )


class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no type hints
    """Unary methods by name, bytes in and out."""

    def __init__(self, methods: Mapping[str, Callable[[bytes, Any], Awaitable[bytes]]]) -> None:
        self._methods = {name: grpc.unary_unary_rpc_method_handler(answer) for name, answer in methods.items()}

    def service(self, call: Any) -> Any:
        return self._methods.get(call.method)
