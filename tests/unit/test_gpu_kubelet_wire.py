"""The kubelet's messages, byte for byte, against Google's own protobuf with the kubelet's definitions."""

from __future__ import annotations

import re
from typing import Any

import pytest
from betterproto2 import Message
from google.protobuf import (  # type: ignore[import-untyped]  # it has no type hints
    descriptor_pb2,
    descriptor_pool,
    json_format,
    message_factory,
)

from deviceplugin import kubeletapi as api
from deviceplugin.ports import ContainerResponse, Device, DeviceNode, Mount
from meshctl.sharing import Owner

PROTO = """
message DevicePluginOptions { bool pre_start_required = 1; bool get_preferred_allocation_available = 2; }
message RegisterRequest {
  string version = 1; string endpoint = 2; string resource_name = 3; DevicePluginOptions options = 4; }
message ListAndWatchResponse { repeated Device devices = 1; }
message TopologyInfo { repeated NUMANode nodes = 1; }
message NUMANode { int64 ID = 1; }
message Device { string ID = 1; string health = 2; TopologyInfo topology = 3; }
message PreStartContainerRequest { repeated string devices_ids = 1; }
message PreferredAllocationRequest { repeated ContainerPreferredAllocationRequest container_requests = 1; }
message ContainerPreferredAllocationRequest {
  repeated string available_deviceIDs = 1; repeated string must_include_deviceIDs = 2; int32 allocation_size = 3; }
message PreferredAllocationResponse { repeated ContainerPreferredAllocationResponse container_responses = 1; }
message ContainerPreferredAllocationResponse { repeated string deviceIDs = 1; }
message AllocateRequest { repeated ContainerAllocateRequest container_requests = 1; }
message ContainerAllocateRequest { repeated string devices_ids = 1; }
message CDIDevice { string name = 1; }
message AllocateResponse { repeated ContainerAllocateResponse container_responses = 1; }
message ContainerAllocateResponse {
  map envs = 1; repeated Mount mounts = 2; repeated DeviceSpec devices = 3; map annotations = 4;
  repeated CDIDevice cdi_devices = 5; }
message Mount { string container_path = 1; string host_path = 2; bool read_only = 3; }
message DeviceSpec { string container_path = 1; string host_path = 2; string permissions = 3; }
message ListPodResourcesResponse { repeated PodResources pod_resources = 1; }
message PodResources { string name = 1; string namespace = 2; repeated ContainerResources containers = 3; }
message ContainerResources {
  string name = 1; repeated ContainerDevices devices = 2; repeated int64 cpu_ids = 3;
  repeated ContainerMemory memory = 4; }
message ContainerMemory { string memory_type = 1; uint64 size = 2; TopologyInfo topology = 3; }
message ContainerDevices { string resource_name = 1; repeated string device_ids = 2; TopologyInfo topology = 3; }
"""
"""The kubelet's api.proto files (v1.37), all in one; `map` is map<string, string>."""

_FIELD = re.compile(r"(repeated )?(\w+) (\w+) = (\d+);")


def _kubelet() -> Any:
    """Messages by name."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="kubelet.proto", package="k", syntax="proto3")
    entry = file.message_type.add(name="Holder").nested_type.add(name="Entry")  # what a map is on the wire
    entry.field.add(name="key", number=1, label=1, type=kinds.TYPE_STRING)
    entry.field.add(name="value", number=2, label=1, type=kinds.TYPE_STRING)
    for name, body in re.findall(r"message (\w+) \{(.*?)\}", PROTO, re.DOTALL):
        message = file.message_type.add(name=name)
        for repeated, kind, field, number in _FIELD.findall(body):
            added = message.field.add(name=field, number=int(number), label=3 if repeated or kind == "map" else 1)
            if (scalar := getattr(kinds, f"TYPE_{kind.upper()}", None)) is not None:
                added.type = scalar
            else:
                added.type, added.type_name = kinds.TYPE_MESSAGE, ".k.Holder.Entry" if kind == "map" else f".k.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        message.name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"k.{message.name}"))
        for message in file.message_type
    }


KUBELET = _kubelet()
IDS = ["GPU-0::2", "GPU-1::5", "GPU-0::0"]
CONTAINER = ContainerResponse(
    envs={"NVIDIA_VISIBLE_DEVICES": "GPU-0", "EMPTY": "", "": "x"},
    mounts=(Mount("/opt/hpe-gpu", "/etc/hpe-gpu", read_only=True), Mount("/a", "/b")),
    devices=(DeviceNode("/dev/null", "/dev/hpe0"), DeviceNode("/dev/x", "/dev/y", "rwm")),
    annotations={"hpe.com/slices": "3"},
    cdi_devices=("nvidia.com/gpu=GPU-0", "vendor.com/a=ü"),
)


def bytes_of(name: str, data: dict[str, Any]) -> bytes:
    """As the kubelet writes it."""
    return bytes(json_format.ParseDict(data, KUBELET[name]()).SerializeToString(deterministic=True))


def read_by_kubelet(name: str, message: Message) -> dict[str, Any]:
    """What the kubelet reads; fields that it does not know fail."""
    read = KUBELET[name].FromString(bytes(message))
    written = read.SerializeToString(deterministic=True)
    read.DiscardUnknownFields()
    assert read.SerializeToString(deterministic=True) == written
    found: dict[str, Any] = json_format.MessageToDict(read, preserving_proto_field_name=True)
    return found


@pytest.mark.parametrize(
    ("name", "message", "expected"),
    [
        (
            "RegisterRequest",
            api.RegisterRequest(api.VERSION, "meshctl.sock", "hpe.com/gpus", api.OPTIONS),
            {
                "version": "v1beta1",
                "endpoint": "meshctl.sock",
                "resource_name": "hpe.com/gpus",
                "options": {"pre_start_required": True, "get_preferred_allocation_available": True},
            },
        ),
        (
            "ListAndWatchResponse",
            api.listed([Device("GPU-0::0", healthy=True), Device("GPU-0::1", healthy=False)]),
            {"devices": [{"ID": "GPU-0::0", "health": "Healthy"}, {"ID": "GPU-0::1", "health": "Unhealthy"}]},
        ),
        ("ListAndWatchResponse", api.listed([]), {}),
        (
            "PreferredAllocationResponse",
            api.ContainersDeviceIds([api.DeviceIds(IDS), api.DeviceIds([])]),
            {"container_responses": [{"deviceIDs": IDS}, {}]},
        ),
        (
            "AllocateResponse",
            api.allocated([CONTAINER, ContainerResponse()]),
            {
                "container_responses": [
                    {
                        "envs": [
                            {"value": "x"},
                            {"key": "EMPTY"},
                            {"key": "NVIDIA_VISIBLE_DEVICES", "value": "GPU-0"},
                        ],
                        "mounts": [
                            {"container_path": "/etc/hpe-gpu", "host_path": "/opt/hpe-gpu", "read_only": True},
                            {"container_path": "/b", "host_path": "/a"},
                        ],
                        "devices": [
                            {"container_path": "/dev/hpe0", "host_path": "/dev/null", "permissions": "rw"},
                            {"container_path": "/dev/y", "host_path": "/dev/x", "permissions": "rwm"},
                        ],
                        "annotations": [{"key": "hpe.com/slices", "value": "3"}],
                        "cdi_devices": [{"name": "nvidia.com/gpu=GPU-0"}, {"name": "vendor.com/a=ü"}],
                    },
                    {},
                ]
            },
        ),
    ],
)
def test_the_kubelet_reads_what_we_write(name: str, message: Message, expected: dict[str, Any]) -> None:
    """Every field of every message that we send, maps as they are on the wire."""
    assert read_by_kubelet(name, message) == expected


def test_we_read_what_the_kubelet_asked_of_a_plugin() -> None:
    """Requests as a real kubelet (1.37) sent them: IDs in no order, one container a call, must-include left out."""
    asked = {"available_deviceIDs": IDS, "allocation_size": 3}
    preferred = api.PreferredAllocationRequest.parse(
        bytes_of("PreferredAllocationRequest", {"container_requests": [asked, asked | {"must_include_deviceIDs": IDS}]})
    )
    assert [(c.available, c.must_include, c.size) for c in preferred.containers] == [(IDS, [], 3), (IDS, IDS, 3)]
    allocate = {"container_requests": [{"devices_ids": IDS}, {}]}
    assert [c.ids for c in api.ContainersDeviceIds.parse(bytes_of("AllocateRequest", allocate)).containers] == [IDS, []]
    assert api.DeviceIds.parse(bytes_of("PreStartContainerRequest", {"devices_ids": IDS})).ids == IDS


def test_we_read_who_holds_what_and_skip_the_rest() -> None:
    """Topology (negative node IDs too), CPUs and memory are not ours; one resource may stand in several parts."""
    topology = {"nodes": [{"ID": "-1"}, {"ID": str(2**62)}]}
    devices = [
        {"resource_name": "hpe.com/gpus", "device_ids": IDS[:2], "topology": topology},
        {"resource_name": "hpe.com/gpus", "device_ids": IDS[2:]},
    ]
    memory = [{"memory_type": "memory", "size": str(2**63), "topology": topology}]
    container = {"name": "main", "devices": devices, "cpu_ids": ["1", "7"], "memory": memory}
    pods = [{"name": "idle", "namespace": "a"}, {"name": "busy", "namespace": "b", "containers": [container]}]
    answer = tuple(api.shown(bytes_of("ListPodResourcesResponse", {"pod_resources": pods})))
    owner = Owner("b", "busy", "main")
    assert answer == ((owner, "hpe.com/gpus", tuple(IDS[:2])), (owner, "hpe.com/gpus", tuple(IDS[2:])))


def test_who_holds_what_is_read_whole_or_not_at_all() -> None:
    """Wherever the answer ends too soon, but for where a pod ends, it is refused: silence is not for free slots."""
    device = {"resource_name": "hpe.com/gpus", "device_ids": IDS}
    pods = [{"name": "a" * 200, "namespace": "ns", "containers": [{"name": "main", "devices": [device]}]}] * 2
    data = bytes_of("ListPodResourcesResponse", {"pod_resources": pods})
    assert [len(list(api.shown(data[:end]))) for end in (0, len(data) // 2, len(data))] == [0, 1, 2]
    for end in set(range(1, len(data))) - {len(data) // 2}:
        with pytest.raises(ValueError, match="end"):
            list(api.shown(data[:end]))
    with pytest.raises(ValueError, match="wire type 7"):
        list(api.shown(b"\x0f"))
