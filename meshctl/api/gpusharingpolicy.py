"""GPUSharingPolicy: how the GPUs of some nodes, or of some products, are shared."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from meshctl import sharing
from meshctl.api.base import (
    API_VERSION,
    LABEL_KEY,
    LABEL_VALUE,
    SET,
    ClusterMetadata,
    Conditions,
    GpuProduct,
    Strict,
    Text,
    Unread,
    cel,
)
from meshctl.api.units import Duration

MOST_REPLICAS = 100
MOST_CLIENTS = 60
"""Client contexts of one MPS server, on the newest drivers; the agent knows what the GPU at hand can."""
RESOURCE_NAME = (
    r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
)
Xid = Annotated[int, Field(ge=1, le=1000)]


class MpsSpec(Strict):
    """Limits of what shares a GPU in space."""

    oversubscription: Annotated[float, Field(ge=1, le=16)] = 1.0
    """Threads of all slots together, in whole GPUs: 1.5 gives each slot half as much again, and none is guaranteed."""
    memory_limit: Literal["Share", "None"] = "Share"
    """Share: a container gets as much device memory as it has slots. None: no limit."""
    clients_per_container: Annotated[int, Field(ge=1, le=16)] = 1
    """Processes on the GPU that a container may have; they divide its share, because MPS limits each process."""


class HealthSpec(Strict):
    """When a GPU is unhealthy, and when healthy again."""

    ignored_xids: Annotated[
        tuple[Xid, ...], Field(strict=False, max_length=64, alias="ignoredXIDs", json_schema_extra=SET)
    ] = ()
    """XIDs that mark nothing, besides those that applications cause (13, 31, 43, 45, 68, 109)."""
    critical_xids: Annotated[
        tuple[Xid, ...], Field(strict=False, max_length=64, alias="criticalXIDs", json_schema_extra=SET)
    ] = ()
    """XIDs that always mark the GPU; they win over ignoredXIDs and over those that applications cause."""
    recover_after: Duration = sharing.HealthRules().recover_after_s
    """A GPU is healthy again when it answered for this long without another XID."""


class GPUSharingPolicySpec(Strict):
    """Which GPUs, under which resource name, shared how."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "self.mode != 'Exclusive' || !has(self.replicas) || self.replicas == 1",
                "an Exclusive GPU has 1 slot",
            ),
            (
                "self.mode != 'MPS' || !self.severalGPUs",
                "severalGPUs excludes mode MPS: a process has one MPS server, and that has one GPU",
            ),
            (
                "self.mode != 'MPS' || !has(self.replicas) || self.replicas * self.mps.clientsPerContainer <= 60",
                "an MPS server has at most 60 clients (48 on older drivers): fewer replicas or clientsPerContainer",
            ),
        )
    )

    node_selector: Annotated[
        dict[Annotated[str, Field(pattern=LABEL_KEY)], Annotated[Text, Field(pattern=LABEL_VALUE)]],
        Field(max_length=32, default_factory=dict),
    ]
    """Labels that a node must have; empty: every node."""
    products: Annotated[tuple[GpuProduct, ...], Field(strict=False, max_length=32, json_schema_extra=SET)] = ()
    """GPU products, as NVML or the node label nvidia.com/gpu.product writes them; empty: every product."""
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    """Of two policies for one GPU the higher wins; of equal ones the older, then the first by name."""
    resource_name: Annotated[str, Field(pattern=RESOURCE_NAME, max_length=253)] = sharing.RESOURCE
    """Extended resource that pods ask for; one is one slot."""
    mode: Annotated[sharing.Mode, Field(strict=False)] = sharing.Mode.MPS
    """MPS: in space, where the GPU can (compute capability 7.0), else in time. TimeSlicing. Exclusive: whole GPUs."""
    replicas: Annotated[int, Field(ge=1, le=MOST_REPLICAS)] | None = None
    """Slots of one GPU; 10 when not given, 1 when Exclusive."""
    isolation: Annotated[sharing.Isolation, Field(strict=False)] = sharing.Isolation.NONE
    """Tenant: pods of one namespace at a time on one GPU."""
    packing: Annotated[sharing.Packing, Field(strict=False)] = sharing.Packing.PACKED
    """Which GPU of a node, when the scheduler chose none: the fullest with room (Packed), or the emptiest (Spread)."""
    several_gpus: Annotated[bool, Field(alias="severalGPUs")] = False
    """One container may get slots of several GPUs."""
    on_change: Annotated[sharing.OnChange, Field(strict=False)] = sharing.OnChange.WAIT
    """When this policy changes and a GPU has pods: wait until it has none, or withdraw its free slots (Drain)."""
    injection: Annotated[sharing.Injection, Field(strict=False)] = sharing.Injection.RUNTIME
    """How the GPU gets into the container: NVIDIA's container runtime, CDI, or plain device nodes."""
    mps: MpsSpec = MpsSpec()
    """Limits of what shares a GPU in space."""
    health: HealthSpec = HealthSpec()
    """When a GPU is unhealthy, and when healthy again."""


class PolicyNode(Strict):
    """How far one node is with a policy."""

    name: Annotated[str, Field(max_length=253)]
    """Of the node."""
    gpus: Annotated[int, Field(ge=0)]
    """GPUs of the node that this policy is for."""
    ready: Annotated[int, Field(ge=0)]
    """Of these, shared as this generation of the policy says."""
    message: Annotated[str, Field(max_length=1024)] = ""
    """What the others wait for."""


class GPUSharingPolicyStatus(Strict):
    """What the GPU operator says of the policy."""

    observed_generation: Annotated[int, Field(ge=0)] | None = None
    """metadata.generation that was last read."""
    gpus: Annotated[int, Field(ge=0)] | None = None
    """GPUs that this policy is for."""
    ready: Annotated[int, Field(ge=0)] | None = None
    """Of these, shared as this generation of the policy says."""
    nodes: Annotated[tuple[PolicyNode, ...], Field(strict=False, max_length=1000)] | None = None
    """Progress by node; those that are not done come first, and at most 1000 are listed."""
    conditions: Conditions | None = None
    """Accepted: it is valid and some GPU takes it. Programmed: every GPU it is for is shared so. Conflict: another
    policy took GPUs that this one selects."""


class GPUSharingPolicy(Strict):
    """How the GPUs of some nodes, or of some products, are shared."""

    api_version: Literal["meshctl.io/v1alpha1"] = API_VERSION
    kind: Literal["GPUSharingPolicy"] = "GPUSharingPolicy"
    metadata: ClusterMetadata
    spec: GPUSharingPolicySpec
    status: Unread = None
