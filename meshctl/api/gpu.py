"""GPU: one physical GPU. The agent of its node writes it; people, the operator and the scheduler extender read it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from meshctl import sharing
from meshctl.api.base import API_VERSION, ClusterMetadata, Conditions, Strict, cel, wrong

QUANTITY = r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?$"
Count = Annotated[int, Field(ge=0)]


class GPUSpec(Strict):
    """Which GPU this is."""

    node: Annotated[str, Field(min_length=1, max_length=253)]
    """Name of its node."""
    uuid: Annotated[str, Field(min_length=1, max_length=59)]
    """As NVML writes it; metadata.name is the same in small letters."""


class GPUHolder(Strict):
    """A container that has slots of the GPU."""

    namespace: Annotated[str, Field(max_length=63)]
    """Of the pod."""
    pod: Annotated[str, Field(max_length=253)]
    """Name of the pod."""
    container: Annotated[str, Field(max_length=63)]
    """Name of the container in the pod."""
    slots: Annotated[tuple[Count, ...], Field(strict=False, max_length=100)]
    """Indices of the slots, ascending."""


class GPUSlots(Strict):
    """The GPU's slots by state; total = used + free + unavailable."""

    total: Count
    """All of them."""
    used: Count
    """Held by a container, or promised to one that is starting."""
    free: Count
    """May be given to the next container."""
    unavailable: Count
    """Neither: the GPU is unhealthy, or withdrawn until it is shared otherwise."""


class GPUMps(Strict):
    """The GPU's MPS control daemon."""

    state: Annotated[sharing.MpsPhase, Field(strict=False)]
    """Off: none is wanted. Failed: it is started again when no process of a container is left on the GPU."""
    clients: Count | None = None
    """Processes connected."""
    restarts: Count = 0
    """Since the agent started."""
    message: Annotated[str, Field(max_length=1024)] = ""
    """Why it failed, or what it waits for."""


class GPUPolicy(Strict):
    """The GPUSharingPolicy in force."""

    name: Annotated[str, Field(max_length=253)]
    """Of the policy."""
    generation: Count
    """Of the policy, as the GPU is shared now."""
    wanted: Annotated[str, Field(max_length=253)] = ""
    """Policy that waits for the GPU's pods to end; "" when none does."""
    wanted_generation: Count = 0
    """Of that policy."""


class GPUStatus(Strict):
    """What the agent of the node says of the GPU."""

    product: Annotated[str, Field(max_length=128)] | None = None
    """As NVML writes it."""
    memory: Annotated[str, Field(pattern=QUANTITY, max_length=32)] | None = None
    """Of the device: 16Gi."""
    compute_capability: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+$")] | None = None
    """7.0, for example."""
    driver: Annotated[str, Field(max_length=64)] | None = None
    """Version of the driver."""
    resource_name: Annotated[str, Field(max_length=253)] | None = None
    """Extended resource that its slots are offered as."""
    mode: Annotated[sharing.Mode, Field(strict=False)] | None = None
    """How it is shared now; none: no policy is for it."""
    isolation: Annotated[sharing.Isolation, Field(strict=False)] | None = None
    """Who may be on it at the same time."""
    several_gpus: Annotated[bool | None, Field(alias="severalGPUs")] = None
    """One container may have slots of this GPU and of others."""
    policy: GPUPolicy | None = None
    """Which policy it is shared by."""
    slots: GPUSlots | None = None
    """Its slots by state; none: no policy is for it."""
    summary: Annotated[str, Field(max_length=32)] | None = None
    """Used and total, as `kubectl get` shows it: 3/10."""
    tenant: Annotated[str, Field(max_length=63)] | None = None
    """Namespace whose pods are on it, with isolation Tenant."""
    holders: Annotated[tuple[GPUHolder, ...], Field(strict=False, max_length=100)] | None = None
    """Who has its slots, as the kubelet says."""
    mps: GPUMps | None = None
    """Its MPS control daemon."""
    heartbeat: Annotated[str, Field(max_length=40)] | None = None
    """When the agent last looked; written at most once a minute if nothing else changed."""
    conditions: Conditions | None = None
    """Healthy: new containers may be given it. Shared: as its policy says. WithinLimits: no container has more
    processes on it than its share allows for."""


class GPU(Strict):
    """One physical GPU, and who holds it."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("self.metadata.name == self.spec.uuid.lowerAscii()", "metadata.name must be spec.uuid in small letters")
        )
    )

    api_version: Literal["meshctl.io/v1alpha1"] = API_VERSION
    kind: Literal["GPU"] = "GPU"
    metadata: ClusterMetadata
    spec: GPUSpec
    status: GPUStatus | None = None

    @model_validator(mode="after")
    def _named(self) -> GPU:
        if self.metadata.name != self.spec.uuid.lower():
            wrong(f"{self.metadata.name!r} must be spec.uuid in small letters", "metadata", "name")
        return self
