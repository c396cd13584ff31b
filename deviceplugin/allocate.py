"""Which slots a container gets, or why it gets none. Pure.

`prefer` chooses before the kubelet does, `check` judges what the kubelet chose. An error of either ends the pod, so
only what can't succeed is refused, with a `Reason` and the numbers.

Invariants: a container's slots are of one GPU, unless the policies of all its GPUs allow several; what the kubelet said
must be there is there; with isolation Tenant a GPU that some namespace is on goes to nobody who may be of another.

Three steps choose the GPU:
1. What the kubelet insists on (slots of the pod's finished init containers) is there already.
2. The tickets, the likeliest candidate's first. One that can't be met is passed over for somebody else's, never for
   another of the same pod: the kubelet allocates a pod's containers in order. A container without a ticket waits behind
   those with one, since any GPU is right for it. When everybody has a ticket and none can be met, the first one's
   obstacle is the answer: another GPU would not be what the scheduler counted on.
3. The policies' packing. Packed takes the GPU with the fewest offered slots that still has enough, Spread the one with
   the most; GPUs that suffice for the containers that follow an init container there come first.

How much room a GPU has is what the kubelet offers, never what the ledger says: the kubelet accounts for each slot, the
ledger is behind it. The ledger tells who else is on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from deviceplugin.ledger import Grant as Grant
from deviceplugin.ledger import Ledger
from meshctl.errors import MeshctlError
from meshctl.sharing import Gpu, Isolation, Mode, Owner, Packing, Sharing, Slot, Ticket


class Reason(StrEnum):
    """Why slots are refused."""

    UNKNOWN_DEVICE = "UnknownDevice"
    """No device ID, or a slot that its GPU does not have."""
    DUPLICATE_DEVICE = "DuplicateDevice"
    """One slot twice in one call."""
    FOREIGN_DEVICE = "ForeignDevice"
    """Of a GPU that this node does not share, or under another resource."""
    NOTHING_ASKED = "NothingAsked"
    TOO_FEW = "TooFew"
    """The node has not so many free slots."""
    SEVERAL_GPUS = "SeveralGpus"
    """It takes slots of several GPUs, and their policies do not allow it."""
    NO_ROOM = "NoRoom"
    """The node has so many free slots, but no GPU that may be taken has."""
    UNHEALTHY = "Unhealthy"
    """The GPU is closed: unhealthy, or on its way to being shared otherwise."""
    WRONG_GPU = "WrongGpu"
    """The ticket is for a GPU that this node does not share."""
    WRONG_PRODUCT = "WrongProduct"
    """The ticket is for a GPU that is shared under another resource."""
    PLAN_MISMATCH = "PlanMismatch"
    """Everyone who may be asking has a ticket for another GPU."""
    TENANT_CONFLICT = "TenantConflict"
    """Another namespace is on the GPU."""
    TENANT_UNKNOWN = "TenantUnknown"
    """Somebody is on the GPU, and nobody knows who asks."""
    EXCLUSIVE_IN_USE = "ExclusiveInUse"
    """A whole GPU is asked for, and each is in use."""
    NOT_READY = "NotReady"
    """The GPU can't be used just now; trying again may help."""


class RefusedSlotsError(MeshctlError):
    """The slots are not given. The message begins with the reason, and is for who looks at the pod."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Shared:
    """A GPU that has slots."""

    gpu: Gpu
    sharing: Sharing
    """In force."""
    open: bool = True
    """New containers may come."""
    why_closed: str = ""


def prefer(
    resource: str,
    gpus: Mapping[str, Shared],
    available: Sequence[str],
    must: Sequence[str],
    size: int,
    ledger: Ledger,
    candidates: Sequence[Ticket],
) -> list[str]:
    """`size` device IDs for one container, sorted by GPU and number; all of `must` among them, the rest of `available`.

    `gpus` are all GPUs of the node that have slots, by UUID; `candidates` as `tickets.candidates` has them. What
    `available` lists of closed GPUs, or of slots that are no more, is not chosen. Raises RefusedSlotsError; `check`
    then takes what comes out, as long as nothing happens in between. 16 GPUs x 48 slots: under 1 ms.
    """
    if size < 1:
        raise RefusedSlotsError(Reason.NOTHING_ASKED, f"{size} {resource} for a container")
    bound = _by_gpu(_known(resource, gpus, text) for text in set(must))
    if (least := sum(map(len, bound.values()))) > size:
        raise RefusedSlotsError(Reason.TOO_FEW, f"{size} {resource} can't include {least}: {', '.join(sorted(must))}")
    offered = _by_gpu(slot for text in {*available, *must} if (slot := _of(resource, gpus, text)) is not None)
    ask = _Ask(resource, size, gpus, offered, bound, ledger, candidates)
    plan = _planned(ask)
    if plan is None:
        plan = _packed(ask)
    return [str(slot) for uuid in sorted(plan) for slot in ask.slots(uuid, plan[uuid])]


def check(
    resource: str,
    gpus: Mapping[str, Shared],
    containers: Sequence[Sequence[str]],
    ledger: Ledger,
    candidates: Sequence[Ticket],
) -> tuple[Grant, ...]:
    """What each container of an Allocate gets, all of them or (RefusedSlotsError) none. Changes nothing.

    `candidates` may be those for other numbers of slots, too. A slot that the ledger shows as somebody's is not refused
    for that: the kubelet knows better.
    """
    if not containers or not all(containers):
        raise RefusedSlotsError(Reason.NOTHING_ASKED, f"an Allocate of {resource} without device IDs")
    counts = Counter(text for texts in containers for text in texts)
    if twice := sorted(text for text, count in counts.items() if count > 1):
        raise RefusedSlotsError(Reason.DUPLICATE_DEVICE, f"in one Allocate more than once: {', '.join(twice)}")
    asked = [tuple(sorted(_known(resource, gpus, text) for text in texts)) for texts in containers]
    return tuple(
        _judged(gpus, slots, ledger, [one for one in candidates if one.asked == len(slots)]) for slots in asked
    )


def _judged(gpus: Mapping[str, Shared], slots: tuple[Slot, ...], ledger: Ledger, asking: Sequence[Ticket]) -> Grant:
    """What one container gets when it gets exactly `slots`."""
    counts = Counter(slot.uuid for slot in slots)
    owners = frozenset(ticket.owner for ticket in asking)
    if (obstacle := _several(gpus, counts)) is not None:
        raise obstacle.refusal()
    for uuid in counts:
        mine = [slot for slot in slots if slot.uuid == uuid]
        if (obstacle := _closed(gpus[uuid]) or _occupied(gpus[uuid], mine, ledger, owners)) is not None:
            raise obstacle.refusal()
    right = sorted((ticket for ticket in asking if ticket.gpus in ({}, counts)), key=lambda one: not one.gpus)
    if asking and not right:
        plans = "; ".join(f"{one.owner} for {_text(one.gpus)}" for one in asking)
        raise RefusedSlotsError(Reason.PLAN_MISMATCH, f"the kubelet takes {_text(counts)}; planned are {plans}")
    return Grant(slots, next(iter(right), None), frozenset(owner.namespace for owner in owners), owners)


# ----------------------------------------------------------------------------------------------------- one container


@dataclass(frozen=True, slots=True)
class _Ask:
    """One container that asks, and all that its answer depends on."""

    resource: str
    size: int
    gpus: Mapping[str, Shared]
    offered: Mapping[str, tuple[Slot, ...]]
    """By GPU: what it may get, `bound` among it; ascending."""
    bound: Mapping[str, tuple[Slot, ...]]
    """By GPU: what it must get."""
    ledger: Ledger
    candidates: Sequence[Ticket]

    def room(self, uuid: str) -> int:
        return len(self.offered.get(uuid, ()))

    def slots(self, uuid: str, count: int) -> list[Slot]:
        """Which `count` of the GPU's: those that must be, then the lowest numbers."""
        bound = self.bound.get(uuid, ())
        rest = (slot for slot in self.offered.get(uuid, ()) if slot not in bound)
        return sorted([*bound, *rest][:count])


class _Obstacle(NamedTuple):
    """Why a GPU, or a plan, is not for a container."""

    reason: Reason
    words: str

    def refusal(self, what: str = "") -> RefusedSlotsError:
        return RefusedSlotsError(self.reason, what + self.words)


def _planned(ask: _Ask) -> Mapping[str, int] | None:
    """UUID -> slots, of the likeliest ticket that can be met; None when no ticket decides."""
    passed: dict[tuple[str, str], RefusedSlotsError] = {}
    anywhere = False
    for ticket in ask.candidates:
        pod = (ticket.owner.namespace, ticket.owner.pod)
        if pod in passed:
            continue
        if not ticket.gpus:
            anywhere = True
        elif (obstacle := _against(ask, ticket.gpus)) is None:
            return ticket.gpus
        else:
            passed[pod] = obstacle.refusal(f"{ticket.owner} is planned for {_text(ticket.gpus)}: ")
    if passed and not anywhere:
        raise next(iter(passed.values()))
    return None


def _against(ask: _Ask, plan: Mapping[str, int]) -> _Obstacle | None:
    """What stands against giving the container what `plan` says."""
    if sum(plan.values()) != ask.size or any(len(slots) > plan.get(uuid, 0) for uuid, slots in ask.bound.items()):
        bound = _text({uuid: len(slots) for uuid, slots in ask.bound.items()}) or "none before"
        return _Obstacle(Reason.PLAN_MISMATCH, f"the kubelet asks for {ask.size} slots, and has given it {bound}")
    for uuid in sorted(plan):
        if (obstacle := _obstacle(ask, uuid, plan[uuid])) is not None:
            return obstacle
    return _several(ask.gpus, plan)


def _obstacle(ask: _Ask, uuid: str, count: int) -> _Obstacle | None:
    """What stands against giving the container `count` slots of the GPU."""
    if (shared := ask.gpus.get(uuid)) is None:
        return _Obstacle(Reason.WRONG_GPU, f"{uuid} is no GPU that this node shares")
    if (resource := shared.sharing.resource) != ask.resource:
        return _Obstacle(Reason.WRONG_PRODUCT, f"{uuid} ({shared.gpu.product}) is shared as {resource}")
    if (obstacle := _closed(shared)) is not None:
        return obstacle
    if ask.room(uuid) < count:
        whole = shared.sharing.mode is Mode.EXCLUSIVE and count == 1
        reason, state = (Reason.EXCLUSIVE_IN_USE, "is in use") if whole else (Reason.NO_ROOM, _free(ask.room(uuid)))
        return _Obstacle(reason, f"{uuid} {state}")
    return _occupied(shared, ask.slots(uuid, count), ask.ledger, frozenset(one.owner for one in ask.candidates))


def _closed(shared: Shared) -> _Obstacle | None:
    if shared.open:
        return None
    return _Obstacle(Reason.UNHEALTHY, f"{shared.gpu.uuid} takes no container: {shared.why_closed}")


def _occupied(shared: Shared, slots: Sequence[Slot], ledger: Ledger, asking: frozenset[Owner]) -> _Obstacle | None:
    """The tenant that excludes some of those who may be asking for `slots`, all of this GPU."""
    if shared.sharing.isolation is not Isolation.TENANT:
        return None
    there = ledger.tenants(shared.gpu.uuid, slots)
    namespaces = {owner.namespace for owner in asking}
    if not there or (namespaces and len(there | namespaces) == 1):
        return None
    who = " or ".join(sorted(namespace or "somebody" for namespace in there))
    if not namespaces:
        return _Obstacle(Reason.TENANT_UNKNOWN, f"{shared.gpu.uuid} is taken by {who}, and no pod is known that asks")
    askers = " or ".join(sorted(namespaces))
    return _Obstacle(Reason.TENANT_CONFLICT, f"{shared.gpu.uuid} is taken by {who}, and a pod of {askers} asks")


def _several(gpus: Mapping[str, Shared], plan: Mapping[str, int]) -> _Obstacle | None:
    if len(plan) < 2 or all(gpus[uuid].sharing.several_gpus for uuid in plan):
        return None
    return _Obstacle(Reason.SEVERAL_GPUS, f"no container may have slots of several GPUs: {_text(plan)}")


# ----------------------------------------------------------------------------------------------------------- packing


def _packed(ask: _Ask) -> Mapping[str, int]:
    """UUID -> slots, as the policies pack."""
    if (obstacle := _several(ask.gpus, {uuid: len(slots) for uuid, slots in ask.bound.items()})) is not None:
        raise obstacle.refusal("the kubelet insists: ")
    mine = [uuid for uuid in sorted(ask.gpus) if ask.gpus[uuid].sharing.resource == ask.resource]
    fitting = [uuid for uuid in mine if ask.bound.keys() <= {uuid} and _obstacle(ask, uuid, ask.size) is None]
    joined = [uuid for uuid in mine if ask.gpus[uuid].sharing.several_gpus and _obstacle(ask, uuid, 1) is None]
    several = ask.bound.keys() <= set(joined) and sum(map(ask.room, joined)) >= ask.size
    spread = all(ask.gpus[uuid].sharing.packing is Packing.SPREAD for uuid in mine)
    if several and spread:
        return _dealt(ask, joined)
    if fitting:
        peak = ask.candidates[0].peak if ask.candidates else 0
        sign = -1 if spread else 1
        return {min(fitting, key=lambda uuid: (ask.room(uuid) < peak, sign * ask.room(uuid), uuid)): ask.size}
    if several:
        return _filled(ask, joined)
    raise _refusal(ask, [uuid for uuid in mine if not ask.bound or uuid in ask.bound])


def _dealt(ask: _Ask, uuids: Sequence[str]) -> Mapping[str, int]:
    """One slot after the other, to the GPU that has given the fewest; of these, to the one with the most left."""
    plan = {uuid: len(slots) for uuid, slots in ask.bound.items()}
    while sum(plan.values()) < ask.size:
        left = {uuid: ask.room(uuid) - plan.get(uuid, 0) for uuid in uuids}
        uuid = min((uuid for uuid in uuids if left[uuid]), key=lambda uuid: (plan.get(uuid, 0), -left[uuid], uuid))
        plan[uuid] = plan.get(uuid, 0) + 1
    return plan


def _filled(ask: _Ask, uuids: Sequence[str]) -> Mapping[str, int]:
    """As few GPUs as possible: those that are bound, then the largest, and for what is left the tightest fit."""
    plan: dict[str, int] = {}
    wanted = ask.size - sum(map(len, ask.bound.values()))
    for uuid, slots in sorted(ask.bound.items()):
        plan[uuid] = len(slots) + min(wanted, ask.room(uuid) - len(slots))
        wanted -= plan[uuid] - len(slots)
    while wanted:
        rest = [uuid for uuid in uuids if uuid not in plan]
        enough = [uuid for uuid in rest if ask.room(uuid) >= wanted]
        uuid = min(enough or rest, key=lambda uuid: (ask.room(uuid) if enough else -ask.room(uuid), uuid))
        plan[uuid] = min(wanted, ask.room(uuid))
        wanted -= plan[uuid]
    return plan


def _refusal(ask: _Ask, uuids: Sequence[str]) -> RefusedSlotsError:
    """Why none of the GPUs will do; the reason is that of the one that came closest."""
    several = {uuid: ask.gpus[uuid].sharing.several_gpus for uuid in uuids}
    obstacles = {uuid: _obstacle(ask, uuid, 1 if several[uuid] else ask.size) for uuid in uuids}
    words = (f"{uuid} {_free(ask.room(uuid))}" if found is None else found.words for uuid, found in obstacles.items())
    return RefusedSlotsError(
        _closest(ask, uuids, {found.reason for found in obstacles.values() if found is not None}),
        f"{ask.size} {ask.resource} can't be had: " + (", ".join(words) or "no GPU of this node is shared so"),
    )


def _closest(ask: _Ask, uuids: Sequence[str], reasons: Collection[Reason]) -> Reason:
    for reason in (Reason.TENANT_CONFLICT, Reason.TENANT_UNKNOWN):
        if reason in reasons:
            return reason
    cards = {uuid: ask.gpus[uuid] for uuid in uuids}
    if any(_free_by_ledger(ask, card) >= ask.size for card in cards.values() if not card.open):
        return Reason.UNHEALTHY
    if reasons == {Reason.EXCLUSIVE_IN_USE}:
        return Reason.EXCLUSIVE_IN_USE
    if sum(ask.room(uuid) for uuid, card in cards.items() if card.open) < ask.size:
        return Reason.TOO_FEW
    return Reason.SEVERAL_GPUS if all(card.sharing.replicas < ask.size for card in cards.values()) else Reason.NO_ROOM


def _free_by_ledger(ask: _Ask, shared: Shared) -> int:
    """Of a closed GPU the kubelet offers nothing, so that only the ledger says whether it would have room."""
    return shared.sharing.replicas - len(ask.ledger.used(shared.gpu.uuid))


# --------------------------------------------------------------------------------------------------------------- IDs


def _of(resource: str, gpus: Mapping[str, Shared], text: str) -> Slot | None:
    """The slot, if it is one that is shared as `resource` now."""
    try:
        return _known(resource, gpus, text)
    except RefusedSlotsError:
        return None


def _known(resource: str, gpus: Mapping[str, Shared], text: str) -> Slot:
    try:
        slot = Slot.parse(text)
    except ValueError as error:
        raise RefusedSlotsError(Reason.UNKNOWN_DEVICE, str(error)) from error
    if (shared := gpus.get(slot.uuid)) is None:
        raise RefusedSlotsError(Reason.FOREIGN_DEVICE, f"{text}: {slot.uuid} is no GPU that this node shares")
    if shared.sharing.resource != resource:
        raise RefusedSlotsError(Reason.FOREIGN_DEVICE, f"{text} is {shared.sharing.resource}, not {resource}")
    if slot.number >= (replicas := shared.sharing.replicas):
        raise RefusedSlotsError(Reason.UNKNOWN_DEVICE, f"{text}: {slot.uuid} has slots 0 to {replicas - 1}")
    return slot


def _by_gpu(slots: Iterable[Slot]) -> Mapping[str, tuple[Slot, ...]]:
    found: dict[str, list[Slot]] = {}
    for slot in sorted(slots):
        found.setdefault(slot.uuid, []).append(slot)
    return {uuid: tuple(mine) for uuid, mine in found.items()}


def _free(room: int) -> str:
    return f"has {room or 'no'} free slot{'' if room == 1 else 's'}"


def _text(plan: Mapping[str, int]) -> str:
    return ", ".join(f"{count} of {uuid}" for uuid, count in sorted(plan.items()))
