"""Which slot is whose, as the kubelet says, and what it was promised since. Pure.

The kubelet is the authority: what its pod-resources show is held. An Allocate does not say whose it is, so its slots
are `pending`, with all who may have asked, until a listing shows the owner, or `PENDING_S` have passed and it is clear
that nobody got them (the pod was refused after all). When the kubelet offers a slot again, its old owner is history.

Invariant: a slot is never both held and pending. A `Ledger` is a value: whoever changes it gets another one, so that
a change that fails half way has changed nothing.

Rejected: to book slots on the pod that seems to have asked. Two equal pods that start together can't be told apart,
and a wrong booking would stay. Whom it seems to be is remembered (`Pending.likely`), and decides only an order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from meshctl.sharing import Owner, Slot, Ticket

PENDING_S = 60.0
"""The kubelet shows the owner within a second of an Allocate that it accepted; a minute is for a very busy one."""
GONE_S = 5.0
"""The pods that are watched may be behind those by which the slot was given; not by as much as this."""
UNKNOWN_TENANT = ""
"""Stands among the tenants of a GPU for a container of which nobody knows the namespace."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What one container of an Allocate gets."""

    slots: tuple[Slot, ...]
    """Ascending."""
    ticket: Ticket | None = None
    """Of the likeliest candidate that these slots are right for."""
    namespaces: frozenset[str] = frozenset()
    """The container is of one of these; empty: nobody knows."""
    owners: frozenset[Owner] = frozenset()
    """Who may have asked."""


@dataclass(frozen=True, slots=True)
class Pending:
    """One slot that an Allocate gave out, and of which no listing has shown the owner yet."""

    at_s: float
    """When; on the clock of every other time that the ledger is told."""
    namespaces: frozenset[str] = frozenset()
    """The owner is of one of these; empty: nobody knows."""
    owners: frozenset[Owner] = frozenset()
    """Who may have asked."""
    likely: Owner | None = None
    """Who it seems to be: the oldest whose ticket this is."""
    seen: bool = field(default=False, compare=False)
    """One of `owners` was among those alive since: when none is any more, they have ended."""


@dataclass(frozen=True, slots=True)
class _OnGpu:
    """What one GPU's slots say, put together."""

    used: frozenset[int]
    held: tuple[tuple[int, Owner], ...]
    pending: tuple[tuple[int, Pending], ...]


_NOTHING = _OnGpu(frozenset(), (), ())


@dataclass(frozen=True)
class Ledger:
    """Every slot of a node that is not free."""

    held: Mapping[Slot, Owner] = field(default_factory=dict)
    """As the kubelet last showed it."""
    pending: Mapping[Slot, Pending] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if both := self.held.keys() & self.pending.keys():
            raise ValueError(f"slots both held and pending: {', '.join(map(str, sorted(both)))}")

    def used(self, uuid: str) -> frozenset[int]:
        """Numbers of the GPU's slots that are held or pending."""
        return self._gpus.get(uuid, _NOTHING).used

    def busy(self, uuid: str) -> bool:
        """Some container has a slot of the GPU, or is about to."""
        return uuid in self._gpus

    def holders(self, uuid: str) -> dict[Owner, tuple[int, ...]]:
        """Who holds which of the GPU's slots, in order of the owners; without what is pending."""
        found: dict[Owner, tuple[int, ...]] = {}
        for number, owner in sorted(self._gpus.get(uuid, _NOTHING).held, key=lambda one: (one[1], one[0])):
            found[owner] = (*found.get(owner, ()), number)
        return found

    def tenants(self, uuid: str, offered: Collection[Slot] = ()) -> frozenset[str]:
        """Namespaces that are on the GPU, or may be; `UNKNOWN_TENANT` among them where one is not known.

        `offered` are slots that the kubelet offers now. Whoever had one of them counts with none: a pod loses all its
        slots at once, or it is the one that gets them (those of its init containers).
        """
        there = self._gpus.get(uuid, _NOTHING)
        gone = {self.held[slot][:2] for slot in offered if slot in self.held}
        void = {self.pending[slot] for slot in offered if slot in self.pending}
        found = {owner.namespace for _, owner in there.held if owner[:2] not in gone}
        for promise in {promise for _, promise in there.pending} - void:
            found |= promise.namespaces or {UNKNOWN_TENANT}
        return frozenset(found)

    def granted(self, grants: Iterable[Grant], now_s: float) -> Ledger:
        """After an Allocate. A slot that was somebody's is the new one's."""
        new = {
            slot: Pending(
                now_s, grant.namespaces, grant.owners, grant.ticket.owner if grant.ticket is not None else None
            )
            for grant in grants
            for slot in grant.slots
        }
        held = {slot: owner for slot, owner in self.held.items() if slot not in new}
        return Ledger(held, {**self.pending, **new})

    def withdrawn(self, slots: Collection[Slot]) -> Ledger:
        """Without what was granted for an Allocate that failed afterwards. Who had the slots before, if anybody, the
        next listing tells."""
        gone = frozenset(slots)
        return Ledger(self.held, {slot: promise for slot, promise in self.pending.items() if slot not in gone})

    def observed(
        self,
        held: Mapping[Slot, Owner],
        now_s: float,
        hidden: Collection[Owner] | None = (),
        alive: Collection[Owner] | None = None,
        waiting: Collection[Owner] = (),
    ) -> Ledger:
        """After a listing that was asked for at `now_s`: what it shows is held, what it does not show is not.

        What was granted after it was asked for it cannot know: that stays pending, whomever it shows there. `hidden`
        are the owners that no listing shows (`tickets.hidden`): what may be theirs stays, too. None: the pods are not
        known (yet), so it may be anybody's. Listings must come in the order in which they were asked for.

        `alive` are the containers of pods that have not ended, as the API server says; None: nobody knows. One that the
        listing does not show at all keeps what it had: a kubelet that has just started may not know its pods yet, and
        does not for as long as the API server is away. So does what may have been promised to it; what was promised to
        those who were alive, and are not any more, is free after `GONE_S`.
        `waiting` are those of `alive` whose pod the kubelet has not acknowledged: what one of them had was another
        pod's of the same name, which has ended (a StatefulSet's).
        """
        missing = frozenset(alive or ()).difference(held.values())
        pending = {
            slot: _followed(promise, alive)
            for slot, promise in self.pending.items()
            if promise.at_s > now_s
            or (
                slot not in held
                and (now_s - promise.at_s <= PENDING_S or _unseen(promise, hidden) or promise.owners & missing)
                and not (now_s - promise.at_s > GONE_S and _ended(promise, alive))
            )
        }
        forgotten = missing.difference(waiting)
        kept = {slot: owner for slot, owner in self.held.items() if owner in forgotten and slot not in held}
        shown = {**held, **kept}
        return Ledger({slot: owner for slot, owner in shown.items() if slot not in pending}, pending)

    @cached_property
    def _gpus(self) -> Mapping[str, _OnGpu]:
        """By GPU, once for each ledger: an Allocate asks for each of 16 GPUs, and a node has 768 slots."""
        held: dict[str, list[tuple[int, Owner]]] = {}
        pending: dict[str, list[tuple[int, Pending]]] = {}
        for slot, owner in self.held.items():
            held.setdefault(slot.uuid, []).append((slot.number, owner))
        for slot, promise in self.pending.items():
            pending.setdefault(slot.uuid, []).append((slot.number, promise))
        found = {}
        for uuid in held.keys() | pending.keys():
            mine, promised = tuple(held.get(uuid, ())), tuple(pending.get(uuid, ()))
            found[uuid] = _OnGpu(frozenset(number for number, _ in (*mine, *promised)), mine, promised)
        return found


def _ended(promise: Pending, alive: Collection[Owner] | None) -> bool:
    """Everybody it may be for has ended: a pod that ended before a listing could show it. Not one that the watch never
    knew: it may hang."""
    return promise.seen and alive is not None and not any(owner in alive for owner in promise.owners)


def _followed(promise: Pending, alive: Collection[Owner] | None) -> Pending:
    seen = promise.seen or (alive is not None and any(owner in alive for owner in promise.owners))
    return promise if seen == promise.seen else replace(promise, seen=seen)


def _unseen(promise: Pending, hidden: Collection[Owner] | None) -> bool:
    return hidden is None or any(owner in hidden for owner in promise.owners)
