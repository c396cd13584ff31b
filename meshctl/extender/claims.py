"""What a pod on a node takes of its GPUs, as far as anybody knows; and what is taken of a GPU by nobody known. Pure.

Who is believed, of each container by itself:

| what is known | it has |
|---|---|
| the kubelet has admitted the pod, and a GPU of the node names the container | what the GPU says |
| its annotation gives it as many slots as it asks for, of GPUs of this node | what the annotation says |
| neither, and nothing of the pod runs yet | what it asks for, of EACH GPU that it may be on |
| neither, and it runs | nothing: the GPUs say what is used |

So no pod is planned onto slots that another may be about to get: the agent says within a second of the kubelet which
they are. Where that word contradicts the plan (a forged annotation, a kubelet that would not be steered), it wins.
A holder of which no such pod is known (deleted by force, or its predecessor of the same name) counts as nobody known.

Rejected: to guess the GPU of a pod that somebody else has bound (wrong guesses book a GPU twice); to believe the GPUs
alone (between the binding and the kubelet's admission they do not know of the pod).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum

from meshctl.core.packing.vocabulary import Ask, Charge, Demand, Device, Placement
from meshctl.extender.gpus import Card, Holding
from meshctl.extender.pods import Plan, plan_of, running
from meshctl.ports import KubeObject


def charge_of(pod: KubeObject, demand: Demand, node: str, devices: Mapping[str, Device], held: Plan) -> Charge:
    """What the pod takes of `node`, whose GPUs are `devices` (by UUID). `held` is what they say of its containers,
    where the kubelet has admitted it."""
    planned = {} if not demand.asks else plan_of(pod, demand.asks)
    runs = running(pod)
    gpus: dict[str, dict[str, int]] = {}
    for ask in demand.asks:
        if ask.container in held:
            found: Mapping[str, int] = held[ask.container]
        elif _possible(planned.get(ask.container), ask, devices) or (runs and ask.container in planned):
            found = {uuid: slots for uuid, slots in planned[ask.container].items() if uuid in devices}
        elif runs:
            continue
        else:
            found = {uuid: ask.slots for uuid, device in devices.items() if _may_be_on(ask, device)}
        mine = gpus.setdefault(ask.container, {})
        mine.update({uuid: max(slots, mine.get(uuid, 0)) for uuid, slots in found.items()})
    return Placement(node, gpus).charge(demand)


class Whose(StrEnum):
    """What is known of a holder that a GPU names."""

    CHARGED = "charged"
    """Its pod is charged with slots of the GPU."""
    ENDED = "ended"
    """Its pod has ended: the pod's own word is newer than the GPU's."""
    NOBODY = "nobody"
    """No such pod is known on the node."""


def unknown_slots(card: Card, whose: Callable[[Holding], Whose], planned: int) -> int:
    """Slots of the GPU that are used by nobody known.

    What is promised to a container that is starting is that of the pods which are charged with slots of the GPU, and
    not named yet: `planned` is what all pods that were seen on the node are charged with."""
    by: dict[Whose, set[int]] = {each: set() for each in Whose}
    for holding in card.holdings:
        by[whose(holding)] |= holding.slots
    charged, nobody = by[Whose.CHARGED], by[Whose.NOBODY] - by[Whose.CHARGED]
    promised = card.used - len(charged | nobody | by[Whose.ENDED])
    return len(nobody) + max(0, promised - max(0, planned - len(charged)))


def _possible(plan: Mapping[str, int] | None, ask: Ask, devices: Mapping[str, Device]) -> bool:
    """Whether a container can have got what its annotation says."""
    return bool(plan) and all(
        uuid in devices and devices[uuid].resource == ask.resource and slots <= devices[uuid].slots
        for uuid, slots in (plan or {}).items()
    )


def _may_be_on(ask: Ask, device: Device) -> bool:
    return device.resource == ask.resource and (device.several or device.slots >= ask.slots)


def held_by(pod: KubeObject, asks: Sequence[Ask], cards: Iterable[Card]) -> Plan:
    """Container -> UUID -> slots, as the GPUs of its node say of those that ask for slots."""
    metadata = pod["metadata"]
    me = (metadata.get("namespace", ""), metadata["name"])
    asking = {ask.container for ask in asks}
    found: dict[str, dict[str, int]] = {}
    for card in cards:
        for holding in card.holdings:
            if holding.pod[1:] == me and holding.container in asking:
                found.setdefault(holding.container, {})[card.uuid] = len(holding.slots)
    return found
