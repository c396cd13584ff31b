"""The messages between this agent and the kubelet: device plugins v1beta1, pod-resources v1. Bytes only, no I/O.

Of each message the fields that are used, with the numbers and types of the kubelet's own definitions; what is left out
(NUMA topology, CPUs, memory, DRA) is skipped when it arrives, as protobuf asks of a reader. Written by hand rather than
generated: two dozen fields need no compiler in the build, and the types of a betterproto2 message are Python's.

Source: k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1/api.proto and .../podresources/v1/api.proto.
"""

# ruff: noqa: RUF009  (betterproto2.field returns a dataclasses.field: nothing is shared between messages)

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from betterproto2 import TYPE_BOOL, TYPE_INT32, TYPE_MAP, TYPE_MESSAGE, TYPE_STRING, Message, field, map_meta

from deviceplugin import ports
from meshctl.sharing import Owner

VERSION = "v1beta1"
HEALTHY, UNHEALTHY = "Healthy", "Unhealthy"
KUBELET_SOCKET = "kubelet.sock"
"""Where the kubelet listens for registrations, in the directory of the plugins' sockets."""

REGISTER = "/v1beta1.Registration/Register"
GET_OPTIONS = "/v1beta1.DevicePlugin/GetDevicePluginOptions"
LIST_AND_WATCH = "/v1beta1.DevicePlugin/ListAndWatch"
PREFERRED = "/v1beta1.DevicePlugin/GetPreferredAllocation"
ALLOCATE = "/v1beta1.DevicePlugin/Allocate"
PRE_START = "/v1beta1.DevicePlugin/PreStartContainer"
LIST_PODS = "/v1.PodResourcesLister/List"

_STRINGS = map_meta(TYPE_STRING, TYPE_STRING)


@dataclass(eq=False, repr=False)
class Empty(Message):
    """Nothing: also what ListPodResourcesRequest and PreStartContainerResponse are."""


@dataclass(eq=False, repr=False)
class DevicePluginOptions(Message):
    pre_start_required: bool = field(1, TYPE_BOOL)
    get_preferred_allocation_available: bool = field(2, TYPE_BOOL)


OPTIONS = DevicePluginOptions(pre_start_required=True, get_preferred_allocation_available=True)
"""Ours."""


@dataclass(eq=False, repr=False)
class RegisterRequest(Message):
    version: str = field(1, TYPE_STRING)
    endpoint: str = field(2, TYPE_STRING)
    """Name of the plugin's socket, in the directory of the kubelet's."""
    resource_name: str = field(3, TYPE_STRING)
    options: DevicePluginOptions | None = field(4, TYPE_MESSAGE, optional=True)


@dataclass(eq=False, repr=False)
class Device(Message):
    id: str = field(1, TYPE_STRING)
    health: str = field(2, TYPE_STRING)


@dataclass(eq=False, repr=False)
class ListAndWatchResponse(Message):
    devices: list[Device] = field(1, TYPE_MESSAGE, repeated=True)


@dataclass(eq=False, repr=False)
class ContainerPreferredAllocationRequest(Message):
    available: list[str] = field(1, TYPE_STRING, repeated=True)
    must_include: list[str] = field(2, TYPE_STRING, repeated=True)
    size: int = field(3, TYPE_INT32)


@dataclass(eq=False, repr=False)
class PreferredAllocationRequest(Message):
    containers: list[ContainerPreferredAllocationRequest] = field(1, TYPE_MESSAGE, repeated=True)


@dataclass(eq=False, repr=False)
class DeviceIds(Message):
    """ContainerPreferredAllocationResponse, ContainerAllocateRequest and PreStartContainerRequest: the same bytes."""

    ids: list[str] = field(1, TYPE_STRING, repeated=True)


@dataclass(eq=False, repr=False)
class ContainersDeviceIds(Message):
    """PreferredAllocationResponse and AllocateRequest."""

    containers: list[DeviceIds] = field(1, TYPE_MESSAGE, repeated=True)


@dataclass(eq=False, repr=False)
class Mount(Message):
    container_path: str = field(1, TYPE_STRING)
    host_path: str = field(2, TYPE_STRING)
    read_only: bool = field(3, TYPE_BOOL)


@dataclass(eq=False, repr=False)
class DeviceSpec(Message):
    container_path: str = field(1, TYPE_STRING)
    host_path: str = field(2, TYPE_STRING)
    permissions: str = field(3, TYPE_STRING)


@dataclass(eq=False, repr=False)
class CdiDevice(Message):
    name: str = field(1, TYPE_STRING)


@dataclass(eq=False, repr=False)
class ContainerAllocateResponse(Message):
    envs: dict[str, str] = field(1, TYPE_MAP, map_meta=_STRINGS)
    mounts: list[Mount] = field(2, TYPE_MESSAGE, repeated=True)
    devices: list[DeviceSpec] = field(3, TYPE_MESSAGE, repeated=True)
    annotations: dict[str, str] = field(4, TYPE_MAP, map_meta=_STRINGS)
    cdi_devices: list[CdiDevice] = field(5, TYPE_MESSAGE, repeated=True)


@dataclass(eq=False, repr=False)
class AllocateResponse(Message):
    containers: list[ContainerAllocateResponse] = field(1, TYPE_MESSAGE, repeated=True)


# -------------------------------------------------------------------------------------- from and to the agent's types


def listed(slots: Sequence[ports.Device]) -> ListAndWatchResponse:
    """The slots as the kubelet is told of them."""
    return ListAndWatchResponse([Device(slot.id, HEALTHY if slot.healthy else UNHEALTHY) for slot in slots])


def allocated(containers: Sequence[ports.ContainerResponse]) -> AllocateResponse:
    """What each container gets."""
    return AllocateResponse([_container(response) for response in containers])


def _container(response: ports.ContainerResponse) -> ContainerAllocateResponse:
    return ContainerAllocateResponse(
        envs=dict(sorted(response.envs.items())),
        mounts=[Mount(m.container_path, m.host_path, m.read_only) for m in response.mounts],
        devices=[DeviceSpec(d.container_path, d.host_path, d.permissions) for d in response.devices],
        annotations=dict(sorted(response.annotations.items())),
        cdi_devices=[CdiDevice(name) for name in response.cdi_devices],
    )


class Shown(NamedTuple):
    """Devices of one resource that a container has. One resource may stand in several of these (one per NUMA node, or
    one per device)."""

    owner: Owner
    resource: str
    ids: tuple[str, ...]


def shown(data: bytes) -> Iterator[Shown]:
    """What a ListPodResourcesResponse says. Raises ValueError when it is not whole.

    Read without betterproto2: each Allocate is followed by one of these, and for 150 pods it took 5 ms, this 1 ms; and
    it does not notice where a message ends too soon.
    """
    for pod in _parts(data).get(1, ()):
        about_pod = _parts(pod)
        for container in about_pod.get(3, ()):
            about = _parts(container)
            owner = Owner(_text(about_pod, 2), _text(about_pod, 1), _text(about, 1))
            for devices in about.get(2, ()):
                named = _parts(devices)
                yield Shown(owner, _text(named, 1), tuple(text.decode() for text in named.get(2, ())))


def _text(parts: Mapping[int, Sequence[bytes]], number: int) -> str:
    """The last one counts, none is empty: so protobuf has it."""
    return parts[number][-1].decode() if number in parts else ""


def _parts(data: bytes) -> dict[int, list[bytes]]:
    """The texts and messages in a message, by the number of their field; numbers are passed over."""
    found: dict[int, list[bytes]] = {}
    at = 0
    try:
        while at < len(data):
            key, at = _varint(data, at)
            match key & 7:
                case 0:
                    at = _varint(data, at)[1]
                case 1:
                    at += 8
                case 2:
                    length, at = _varint(data, at)
                    found.setdefault(key >> 3, []).append(data[at : at + length])
                    at += length
                case 5:
                    at += 4
                case kind:
                    raise ValueError(f"a field of wire type {kind}, which protobuf has not")
    except IndexError as error:
        raise ValueError("it ends within a number") from error
    if at > len(data):
        raise ValueError(f"{at - len(data)} bytes are missing at its end")
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where it ends: 7 bits a byte, the lowest first."""
    value = data[at] & 0x7F
    shift = 0
    while data[at] & 0x80:
        at += 1
        shift += 7
        value |= (data[at] & 0x7F) << shift
    return value, at + 1


def warm_up() -> None:
    """betterproto2 looks each class over at its first message, 40 ms for all: not in an Allocate."""
    for kind in Message.__subclasses__():
        if kind.__module__ == __name__:
            kind.parse(bytes(kind()))
