"""Which GPUSharingPolicy each GPU of the cluster is to have, as the objects say, and what that comes to. Pure.

What is wanted is not decided here: `deviceplugin.policies` says it, to the node's agent and here alike, so that what
people read on a policy is what the agent does. From the claims come the most slots that one container can get of each
resource (for the admission policy) and totals (for metrics).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from deviceplugin.policies import Policy, Wanted, policy_of, wanted
from meshctl.api.gpusharingpolicy import GPUSharingPolicy
from meshctl.api.objects import Key, read_object
from meshctl.ports import KubeObject, ObjectKey
from meshctl.sharing import Gpu

KIND = "GPUSharingPolicy"
Nodes = Mapping[str, Mapping[str, str]]
"""Labels by node."""


@dataclass(frozen=True, slots=True)
class Read:
    """A GPUSharingPolicy object, read."""

    raw: KubeObject
    policy: Policy | None
    """None: it is not valid (an older schema let it in)."""
    fault: str = ""
    """What is wrong with it, in words."""

    @property
    def name(self) -> str:
        return str(self.raw["metadata"]["name"])


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU object, of which its node's agent has told what it is."""

    gpu: Gpu
    node: str
    driver: str
    status: Mapping[str, Any]

    @property
    def in_force(self) -> tuple[str, int] | None:
        """Name and generation of the policy that it is shared by now."""
        policy = self.status.get("policy")
        return (str(policy["name"]), int(policy["generation"])) if policy and self.status.get("mode") else None


@dataclass(frozen=True, slots=True)
class Claim:
    """A GPU, and the policy that it is to have."""

    card: Card
    wanted: Wanted

    @property
    def settled(self) -> bool:
        """It is shared as its policy says now."""
        policy = (self.wanted.policy, self.wanted.generation) if self.wanted.policy else None
        return self.card.in_force == policy

    @property
    def done(self) -> bool:
        """Likewise, and nothing speaks against it (any more: the driver may be older than it was)."""
        return self.settled and not self.wanted.refused


def read_policy(raw: KubeObject, before: Read | None = None) -> Read:
    """`before` itself where it was read from this very object."""
    if before is not None and before.raw is raw:
        return before
    key = Key(KIND, "", str(raw["metadata"]["name"]))
    manifest = read_object({name: value for name, value in raw.items() if name != "status"}, str(key))
    declared = manifest.objects.get(key)
    if declared is not None and isinstance(declared.value, GPUSharingPolicy):
        return Read(raw, policy_of(declared.value))
    return Read(raw, None, "; ".join(f"{fault.field}: {fault.message}" for fault in manifest.faults))


def cards_of(objects: Iterable[KubeObject]) -> list[Card]:
    """Ordered by node, then UUID. A GPU of which nothing is told yet is none."""
    found = [card for value in objects if (card := _card(value)) is not None]
    return sorted(found, key=lambda card: (card.node, card.gpu.uuid))


def _card(value: KubeObject) -> Card | None:
    spec, status = value["spec"], value.get("status") or {}
    major, _, minor = str(status.get("computeCapability") or "").partition(".")
    if not (status.get("product") and major.isdecimal() and minor.isdecimal()):
        return None
    memory_bytes = 0  # no policy goes by it
    gpu = Gpu(str(spec["uuid"]), str(status["product"]), memory_bytes, (int(major), int(minor)))
    return Card(gpu, str(spec["node"]), str(status.get("driver") or ""), status)


def claims_of(cards: Iterable[Card], nodes: Nodes, policies: Iterable[Policy]) -> list[Claim]:
    """In the order of `cards`. GPUs of one node and product are looked at once."""
    policies = tuple(policies)
    known: dict[object, Wanted] = {}
    claims = []
    for card in cards:
        same = (card.node, card.driver, card.gpu.product, card.gpu.compute_capability)
        if same not in known:
            known[same] = wanted(card.gpu, card.node, nodes.get(card.node), policies, card.driver)
        claims.append(Claim(card, known[same]))
    return claims


# ----------------------------------------------------------------------------------------- what a container may ask for


def limits(claims: Iterable[Claim], policies: Mapping[str, Policy], before: Mapping[str, int]) -> dict[str, int]:
    """Resource -> most slots that one container can get anywhere, now or when its policy is in force; 0: not known.

    `before` is what was told last: no limit sinks while a GPU goes on being shared by an older version of its policy,
    of which it is not known here whether it allowed several GPUs.
    """
    found = {policy.spec.resource_name: 0 for policy in policies.values()}
    on_node: Counter[tuple[str, str]] = Counter()
    moving: set[str] = set()
    for claim in claims:
        for resource, (slots, several) in _slots(claim, policies).items():
            where = (resource, claim.card.node)
            on_node[where] = on_node[where] + slots if several else max(on_node[where], slots)
            found[resource] = max(found.get(resource, 0), on_node[where])
            if not claim.settled:
                moving.add(resource)
    return {name: max(value, before.get(name, 0)) if name in moving else value for name, value in found.items()}


def _slots(claim: Claim, policies: Mapping[str, Policy]) -> dict[str, tuple[int, bool]]:
    """Resource -> slots of the GPU, in force or wanted, and whether its node's others may be added to them."""
    found: dict[str, tuple[int, bool]] = {}
    status, sharing = claim.card.status, claim.wanted.sharing
    if claim.card.in_force is not None and status.get("resourceName"):
        policy = policies.get(claim.card.in_force[0])
        slots = int((status.get("slots") or {}).get("total", 0))
        found[str(status["resourceName"])] = slots, policy is not None and policy.spec.several_gpus
    if sharing is not None:
        slots, several = found.get(sharing.resource, (0, False))
        found[sharing.resource] = max(slots, sharing.replicas), several or sharing.several_gpus
    return found


# --------------------------------------------------------------------------------------------------------------- totals

SLOT_STATES = ("used", "free", "unavailable")


@dataclass(frozen=True, slots=True)
class GpuTotals:
    """The cluster's GPUs in numbers, for metrics."""

    slots: Mapping[tuple[str, str], int] = field(default_factory=lambda: MappingProxyType({}))
    """(resource, one of `SLOT_STATES`) -> slots."""
    gpus: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """Status of the condition Healthy -> GPUs."""
    policies: Mapping[tuple[str, str], int] = field(default_factory=lambda: MappingProxyType({}))
    """(condition, status) -> policies."""


def totals(cards: Iterable[Card], statuses: Iterable[Mapping[str, Any]]) -> GpuTotals:
    slots: Counter[tuple[str, str]] = Counter()
    gpus: Counter[str] = Counter()
    for card in cards:
        gpus[condition(card, "Healthy").get("status", "Unknown")] += 1
        said = card.status.get("slots") or {}
        for state in SLOT_STATES if card.status.get("resourceName") else ():
            slots[str(card.status["resourceName"]), state] += int(said.get(state, 0))
    policies = Counter((str(c["type"]), str(c["status"])) for status in statuses for c in status["conditions"])
    return GpuTotals(dict(slots), dict(gpus), dict(policies))


def condition(card: Card, type_: str) -> Mapping[str, Any]:
    """What the agent says; {} when it does not."""
    return next((c for c in card.status.get("conditions") or () if c.get("type") == type_), {})


def labels_of(nodes: Mapping[ObjectKey, KubeObject]) -> dict[str, Mapping[str, str]]:
    return {key.name: value["metadata"].get("labels") or {} for key, value in nodes.items()}
