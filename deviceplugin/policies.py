"""Which policy a GPU is shared by, and what that comes to for this GPU. Pure.

Of the policies that select a GPU (its node by labels, it by product) one wins: the higher priority, then the older,
then the first by name. The winner alone decides: where the GPU cannot be shared as it says, the GPU is refused and
keeps what is in force. Rejected: falling back to the next policy, which would share a GPU as nobody who looks at the
winner expects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from deviceplugin.containers import MPS_CAPABILITY, client_cap
from meshctl.api.gpulabels import hyphened
from meshctl.api.gpusharingpolicy import GPUSharingPolicy, GPUSharingPolicySpec
from meshctl.sharing import Gpu, Mode, Sharing


class Refusal(StrEnum):
    """Why a GPU is not shared as the policy that won says; it stays as it is."""

    MIG_ENABLED = "MigEnabled"
    TOO_MANY_REPLICAS = "TooManyReplicas"
    POLICIES_UNKNOWN = "PoliciesUnknown"
    """The API server has not listed them (yet)."""
    NODE_UNKNOWN = "NodeUnknown"
    """The node's labels are not known (yet), and the winner may depend on them."""


@dataclass(frozen=True, slots=True)
class Policy:
    """A valid GPUSharingPolicy."""

    name: str
    spec: GPUSharingPolicySpec
    generation: int = 0
    created: str = ""
    """RFC 3339, so that it sorts as text; "" when it is not from a cluster: younger than any that is."""

    @property
    def rank(self) -> tuple[int, bool, str, str]:
        """The least wins."""
        return (-self.spec.priority, not self.created, self.created, self.name)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the policies come to for one GPU. Without a policy for it: as it is by default."""

    sharing: Sharing | None = None
    """None: no policy is for it, or it is `refused`."""
    policy: str = ""
    """The one that won."""
    generation: int = 0
    """Of that policy."""
    refusal: Refusal | None = None
    message: str = ""
    """Of a refusal, or of what the GPU makes of the policy (TimeSlicing instead of MPS), in words; else ""."""
    others: tuple[str, ...] = ()
    """Policies that select the GPU too, the strongest first."""

    @property
    def refused(self) -> bool:
        """The GPU cannot be shared as the policy says, or nobody knows how it is to be: what is in force stays."""
        return self.refusal is not None


def policy_of(value: GPUSharingPolicy) -> Policy:
    metadata = value.metadata
    return Policy(metadata.name, value.spec, metadata.generation, metadata.creation_timestamp)


def wanted(
    gpu: Gpu, node: str, labels: Mapping[str, str] | None, policies: Iterable[Policy] | None, driver: str = ""
) -> Wanted:
    """What `policies` come to for `gpu` of `node`, which has `labels`; None: these are not known."""
    if policies is None:
        return Wanted(refusal=Refusal.POLICIES_UNKNOWN, message="the GPUSharingPolicies are not known yet")
    for_it = sorted((policy for policy in policies if _for_product(policy.spec, gpu)), key=lambda policy: policy.rank)
    if labels is None and for_it and for_it[0].spec.node_selector:
        message = f"the labels of node {node} are not known yet; policy {for_it[0].name} goes by them"
        return Wanted(refusal=Refusal.NODE_UNKNOWN, message=message)
    chosen = [policy for policy in for_it if _selects(policy.spec, labels or {})]
    if not chosen:
        return Wanted()
    sharing, refusal, message = _shared(gpu, chosen[0], driver)
    others = tuple(policy.name for policy in chosen[1:])
    return Wanted(sharing, chosen[0].name, chosen[0].generation, refusal, message, others)


def product_key(product: str) -> str:
    """Products with the same one are the same: NVML writes ``NVIDIA A100-SXM4-40GB``, GPU discovery hyphens only, and
    older drivers no ``NVIDIA``."""
    return hyphened(product).removeprefix("NVIDIA-")


def _for_product(spec: GPUSharingPolicySpec, gpu: Gpu) -> bool:
    return not spec.products or product_key(gpu.product) in {product_key(product) for product in spec.products}


def _selects(spec: GPUSharingPolicySpec, labels: Mapping[str, str]) -> bool:
    return all(labels.get(name) == value for name, value in spec.node_selector.items())


def _shared(gpu: Gpu, policy: Policy, driver: str) -> tuple[Sharing | None, Refusal | None, str]:
    """As the policy says, or why not; words on what the GPU makes of it."""
    if gpu.mig:
        return None, Refusal.MIG_ENABLED, f"MIG is on: NVIDIA's own plugin shares {gpu.uuid}; turn MIG off, or leave it"
    sharing = policy.spec.sharing(policy.name, policy.generation)
    if sharing.mode is Mode.MPS and gpu.compute_capability < MPS_CAPABILITY:
        message = f"TimeSlicing instead of MPS: that needs compute capability 7.0, {gpu.product} has {capability(gpu)}"
        return replace(sharing, mode=Mode.TIME_SLICING), None, message
    if sharing.mode is Mode.MPS and (refused := _too_many(gpu, sharing, driver)):
        return None, Refusal.TOO_MANY_REPLICAS, refused
    return sharing, None, ""


def _too_many(gpu: Gpu, sharing: Sharing, driver: str) -> str:
    """Why the MPS server would turn clients away; "" when it would not."""
    cap = client_cap(gpu, driver)
    each, clients = sharing.clients_per_container, sharing.replicas * sharing.clients_per_container
    if clients <= cap:
        return ""
    times = f" x {each} clients each" if each > 1 else ""
    return (
        f"{sharing.replicas} slots{times} are {clients} clients of one MPS server, and {gpu.product} with driver"
        f" {driver or '(unknown)'} takes {cap}: fewer replicas{' or clientsPerContainer' if each > 1 else ''}"
    )


def capability(gpu: Gpu) -> str:
    """``7.0``."""
    major, minor = gpu.compute_capability
    return f"{major}.{minor}"
