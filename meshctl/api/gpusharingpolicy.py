"""GPUSharingPolicy: how the GPUs of some nodes, or of some products, are shared.

What one object can say wrongly is refused here, by the same rules in CEL and in Python. What the GPU at hand says (its
compute capability, the clients that its driver allows) only the node's agent knows: see `deviceplugin.policies`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from meshctl.api.base import (
    API_VERSION,
    LABEL_KEY,
    LABEL_VALUE,
    SET,
    ClusterMetadata,
    Conditions,
    GpuProduct,
    Strict,
    Unread,
    cel,
    repeated,
    wrong,
)
from meshctl.api.units import Duration
from meshctl.sharing import (
    REPLICAS,
    RESOURCE,
    HealthRules,
    Injection,
    Isolation,
    Mode,
    OnChange,
    Packing,
    Sharing,
)

MOST_REPLICAS = 100
MOST_CLIENTS = 60
"""Client contexts of one MPS server, on the newest drivers; the agent knows what the GPU at hand can."""
RESOURCE_NAME = (
    r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?"
    r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
)
LONGEST_RESOURCE = 244
"""With ``requests.`` before it, as in a ResourceQuota, it must still have at most 253 characters."""
_NO_DOMAIN = "needs a domain, as in hpe.com/gpus: names without one are Kubernetes' own"
_KUBERNETES = (
    "must not be of a domain that ends with kubernetes.io: the kubelet takes such names for Kubernetes'"
    " own, and no plugin may offer them"
)
_REQUESTS = "must not begin with requests.: Kubernetes keeps that for quotas"
_ONE_SLOT = "an Exclusive GPU has 1 slot"
_ONE_SERVER = "severalGPUs excludes mode MPS: a process has one MPS server, and that has one GPU"
_LABEL_KEY = re.compile(LABEL_KEY)


def _label_keys(labels: dict[str, str]) -> dict[str, str]:
    for key in labels:
        if not _LABEL_KEY.fullmatch(key):
            wrong(f"{key!r} is not a label's key; write e.g. nvidia.com/gpu.product", key)
    return labels


def _null_is_absent(labels: Any) -> Any:
    """As for the API server; see `Strict`."""
    return {key: value for key, value in labels.items() if value is not None} if isinstance(labels, dict) else labels


def _extended(name: str) -> str:
    """Extended resources are what Kubernetes says (k8s.io/component-helpers, IsExtendedResourceName)."""
    if "/" not in name:
        wrong(f"{name!r} {_NO_DOMAIN}")
    if "kubernetes.io/" in name:
        wrong(f"{name!r} {_KUBERNETES}")
    if name.startswith("requests."):
        wrong(f"{name!r} {_REQUESTS}")
    return name


def _once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    again = repeated(values)
    if again is not None:
        wrong(f"{values[again]} stands twice; keep one", again)
    return values


NodeSelector = Annotated[
    dict[str, Annotated[str, Field(pattern=LABEL_VALUE, max_length=63)]],
    Field(
        max_length=32,
        json_schema_extra=cel((f"self.all(key, key.matches(r'{LABEL_KEY}'))", "the keys must be those of labels")),
    ),
    BeforeValidator(_null_is_absent),
    AfterValidator(_label_keys),
]
ResourceName = Annotated[
    str,
    Field(
        pattern=RESOURCE_NAME,
        max_length=LONGEST_RESOURCE,
        json_schema_extra=cel(
            ("self.contains('/')", _NO_DOMAIN),
            ("!self.contains('kubernetes.io/')", _KUBERNETES),
            ("!self.startsWith('requests.')", _REQUESTS),
        ),
    ),
    AfterValidator(_extended),
]
Xids = Annotated[
    tuple[Annotated[int, Field(ge=1, le=1000)], ...],
    Field(strict=False, max_length=64, json_schema_extra=SET),
    AfterValidator(_once),
]
Products = Annotated[
    tuple[GpuProduct, ...],
    Field(strict=False, max_length=32, json_schema_extra=SET),
    AfterValidator(_once),
]


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

    ignored_xids: Annotated[Xids, Field(alias="ignoredXIDs")] = ()
    """XIDs that mark nothing, besides those that applications cause (13, 31, 43, 45, 68, 109)."""
    critical_xids: Annotated[Xids, Field(alias="criticalXIDs")] = ()
    """XIDs that always mark the GPU; they win over ignoredXIDs and over those that applications cause."""
    recover_after: Duration = HealthRules().recover_after_s
    """A GPU is healthy again when it answered for this long without another XID."""

    def rules(self) -> HealthRules:
        return HealthRules(frozenset(self.ignored_xids), frozenset(self.critical_xids), self.recover_after)


class GPUSharingPolicySpec(Strict):
    """Which GPUs, under which resource name, shared how."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "self.mode != 'Exclusive' || !has(self.replicas) || self.replicas == 1",
                _ONE_SLOT,
            ),
            ("self.mode != 'MPS' || !self.severalGPUs", _ONE_SERVER),
            (
                (
                    f"self.mode != 'MPS' || (has(self.replicas) ? self.replicas : {REPLICAS})"
                    f" * self.mps.clientsPerContainer <= {MOST_CLIENTS}"
                ),
                f"replicas times clientsPerContainer must be at most {MOST_CLIENTS}, the clients of one MPS server",
            ),
        )
    )

    node_selector: NodeSelector = Field(default={})
    """Labels that a node must have; empty: every node."""
    products: Products = ()
    """GPU products, as NVML or the node label nvidia.com/gpu.product writes them; empty: every product."""
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    """Of two policies for one GPU the higher wins; of equal ones the older, then the first by name."""
    resource_name: ResourceName = RESOURCE
    """Extended resource that pods ask for; one is one slot."""
    mode: Annotated[Mode, Field(strict=False)] = Mode.MPS
    """MPS: in space, where the GPU can (compute capability 7.0), else in time. TimeSlicing. Exclusive: whole GPUs."""
    replicas: Annotated[int, Field(ge=1, le=MOST_REPLICAS)] | None = None
    """Slots of one GPU; 10 when not given, 1 when Exclusive."""
    isolation: Annotated[Isolation, Field(strict=False)] = Isolation.NONE
    """Tenant: pods of one namespace at a time on one GPU."""
    packing: Annotated[Packing, Field(strict=False)] = Packing.PACKED
    """Which GPU of a node, when the scheduler chose none: the fullest with room (Packed), or the emptiest (Spread)."""
    several_gpus: Annotated[bool, Field(alias="severalGPUs")] = False
    """One container may get slots of several GPUs."""
    on_change: Annotated[OnChange, Field(strict=False)] = OnChange.WAIT
    """When this policy changes and a GPU has pods: wait until it has none, or withdraw its free slots (Drain)."""
    injection: Annotated[Injection, Field(strict=False)] = Injection.RUNTIME
    """How the GPU gets into the container: NVIDIA's container runtime, CDI, or plain device nodes."""
    mps: MpsSpec = MpsSpec()
    """Limits of what shares a GPU in space."""
    health: HealthSpec = HealthSpec()
    """When a GPU is unhealthy, and when healthy again."""

    @model_validator(mode="after")
    def _consistent(self) -> GPUSharingPolicySpec:
        if self.mode is Mode.EXCLUSIVE and self.slots != 1:
            wrong(f"{self.slots} is wrong: {_ONE_SLOT}; leave replicas out, or choose another mode", "replicas")
        if self.mode is Mode.MPS and self.several_gpus:
            wrong(f"{_ONE_SERVER}; remove it, or choose mode TimeSlicing", "severalGPUs")
        each = self.mps.clients_per_container
        if self.mode is Mode.MPS and self.slots * each > MOST_CLIENTS:
            product = f"{self.slots} slots with {each} client{'s' * (each > 1)} each are {self.slots * each} clients"
            field = ("mps", "clientsPerContainer") if each > 1 else ("replicas",)
            wrong(f"{product}; an MPS server has at most {MOST_CLIENTS} (48 on older drivers): lower it", *field)
        return self

    @property
    def slots(self) -> int:
        """Of one GPU."""
        if self.replicas is not None:
            return self.replicas
        return 1 if self.mode is Mode.EXCLUSIVE else REPLICAS

    def sharing(self, name: str, generation: int) -> Sharing:
        """What the policy `name` asks for, for any GPU: `mode` as it is asked, whether the GPU at hand can or not."""
        return Sharing(
            policy=name,
            generation=generation,
            resource=self.resource_name,
            mode=self.mode,
            replicas=self.slots,
            isolation=self.isolation,
            packing=self.packing,
            several_gpus=self.several_gpus,
            on_change=self.on_change,
            injection=self.injection,
            oversubscription_ratio=self.mps.oversubscription,
            memory_limit=self.mps.memory_limit == "Share",
            clients_per_container=self.mps.clients_per_container,
            health=self.health.rules(),
        )


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
