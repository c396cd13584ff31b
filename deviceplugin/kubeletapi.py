"""The messages between this agent and the kubelet: device plugins v1beta1, pod-resources v1. Bytes only, no I/O.

Of each message the fields that are used, with the numbers and types of the kubelet's own definitions; what is left out
(NUMA topology, CPUs, memory, DRA) is skipped when it arrives, as protobuf asks of a reader. Written by hand rather than
generated: two dozen fields need no compiler in the build, and the types of a betterproto2 message are Python's.

Source: k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1/api.proto and .../podresources/v1/api.proto.
"""

# ruff: noqa: RUF009  (betterproto2.field returns a dataclasses.field: nothing is shared between messages)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from betterproto2 import TYPE_BOOL, TYPE_INT32, TYPE_MAP, TYPE_MESSAGE, TYPE_STRING, Message, field, map_meta

from deviceplugin import ports

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


@dataclass(eq=False, repr=False)
class ContainerDevices(Message):
    """Of pod-resources: devices of one resource; one resource may stand in several of these (one per NUMA node)."""

    resource: str = field(1, TYPE_STRING)
    ids: list[str] = field(2, TYPE_STRING, repeated=True)


@dataclass(eq=False, repr=False)
class ContainerResources(Message):
    name: str = field(1, TYPE_STRING)
    devices: list[ContainerDevices] = field(2, TYPE_MESSAGE, repeated=True)


@dataclass(eq=False, repr=False)
class PodResources(Message):
    name: str = field(1, TYPE_STRING)
    namespace: str = field(2, TYPE_STRING)
    containers: list[ContainerResources] = field(3, TYPE_MESSAGE, repeated=True)


@dataclass(eq=False, repr=False)
class ListPodResourcesResponse(Message):
    pods: list[PodResources] = field(1, TYPE_MESSAGE, repeated=True)


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


def warm_up() -> None:
    """betterproto2 looks each class over at its first message, 40 ms for all: not in an Allocate."""
    for kind in Message.__subclasses__():
        if kind.__module__ == __name__:
            kind.parse(bytes(kind()))
