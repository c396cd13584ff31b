"""The GPUs of one node as the agent knows them, and what is due. Pure: what happened in, what to do out.

Invariants: a GPU's sharing changes only between `begun` and `finished`, and that begins only when no slot of it is held
or promised; a GPU that somebody holds is never forgotten, whatever the inventory says; time is an argument.

    inventory, policies, XIDs, probes, MPS, the kubelet's word  ->  Node  ->  devices (for the kubelet), shared (for
    `allocate`), due (changes of sharing), saved (for the disk)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType

from deviceplugin.allocate import Shared
from deviceplugin.health import GpuHealth
from deviceplugin.ledger import Ledger, Pending
from deviceplugin.objects import Seen
from deviceplugin.policies import Wanted
from deviceplugin.ports import Device, GpuLostError
from deviceplugin.tickets import hidden
from meshctl.sharing import Gpu, Health, HealthRules, Mode, MpsPhase, MpsStatus, OnChange, Owner, Sharing, Slot, Ticket

HARD = ("resource", "mode", "replicas", "isolation", "oversubscription_ratio", "memory_limit", "clients_per_container")
"""What pods on a GPU were promised: it changes when there are none."""
NO_RULES = HealthRules()


@dataclass(frozen=True, slots=True)
class SavedGpu:
    """One GPU, as the last run left it."""

    gpu: Gpu
    sharing: Sharing | None
    """In force."""
    health: GpuHealth


@dataclass(frozen=True, slots=True)
class Saved:
    """What one run leaves to the next."""

    gpus: Mapping[str, SavedGpu] = field(default_factory=lambda: MappingProxyType({}))
    pending: Mapping[Slot, Pending] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Card:
    """One physical GPU of this node."""

    gpu: Gpu
    present: bool = True
    """The inventory shows it."""
    sharing: Sharing | None = None
    """In force; None: it has no slots."""
    wanted: Wanted = field(default_factory=Wanted)
    obstacle: str = ""
    """Why the last try to share it otherwise failed; "" when it did not."""
    changing: bool = False
    """Between two ways of sharing: no slots are given out."""
    illness: GpuHealth = field(default_factory=GpuHealth)
    mps: MpsStatus = field(default_factory=MpsStatus)
    over: str | None = None
    """Which pod has more processes on it than its share allows for, in words; "": none; None: nobody knows."""

    @property
    def by_mps(self) -> bool:
        """It is shared by an MPS daemon, or will be as soon as that runs."""
        return self.sharing is not None and self.sharing.mode is Mode.MPS

    @property
    def waits_for_mps(self) -> bool:
        return self.by_mps and self.mps.phase is not MpsPhase.RUNNING

    @property
    def rules(self) -> HealthRules:
        asked = self.wanted.sharing or self.sharing
        return asked.health if asked is not None else NO_RULES

    def health(self, now_s: float) -> Health:
        return self.illness.health(now_s, self.rules)

    @property
    def outdated(self) -> bool:
        """Its pods, if any, hold slots of another sharing than is wanted now."""
        if self.wanted.refused:
            return False
        if self.sharing is None or self.wanted.sharing is None:
            return self.sharing is not self.wanted.sharing
        now, then = self.sharing, self.wanted.sharing
        return any(getattr(now, name) != getattr(then, name) for name in HARD)

    @property
    def drains(self) -> bool:
        """Free slots are withdrawn: it waits to be empty. Without a policy it has none to give."""
        wanted = self.wanted.sharing
        return self.outdated and (wanted is None or wanted.on_change is OnChange.DRAIN)


class Node:
    """All GPUs of the node, and who holds their slots."""

    def __init__(self, cards: Mapping[str, Card], ledger: Ledger) -> None:
        self._cards = dict(cards)
        self.ledger = ledger
        self.told = False
        """The kubelet has said who holds what, since this run began."""
        self.unshown: frozenset[Owner] | None = None
        """Who has slots by the API server's word and was in no listing yet: the kubelet may not know its pods (again)
        while they run. None: the pods were never known. Once it was empty it stays so: the ledger keeps them."""

    @classmethod
    def restored(cls, saved: Saved | None) -> Node:
        """As the last run left it; who holds what the kubelet tells. Absent until the inventory shows them."""
        if saved is None:
            return cls({}, Ledger())
        cards = {
            uuid: Card(one.gpu, present=False, sharing=one.sharing, illness=one.health)
            for uuid, one in saved.gpus.items()
        }
        return cls(cards, Ledger(pending=saved.pending))

    def saved(self, now_s: float) -> Saved:
        """What the next run must know. A GPU that is well is saved as such: its last probe is nobody's business."""
        gpus = {
            uuid: SavedGpu(card.gpu, card.sharing, card.illness.settled(now_s, card.rules))
            for uuid, card in self._cards.items()
        }
        return Saved(gpus, self.ledger.pending)

    @property
    def cards(self) -> Mapping[str, Card]:
        return self._cards

    def resources(self) -> frozenset[str]:
        """Resources that have slots, or will."""
        both = ((card.sharing, card.wanted.sharing) for card in self._cards.values())
        return frozenset(sharing.resource for pair in both for sharing in pair if sharing is not None)

    def busy(self, uuid: str) -> bool:
        """Somebody holds a slot of the GPU, or is about to."""
        return self.ledger.busy(uuid)

    def offered(self) -> frozenset[str]:
        """Resources that have slots now."""
        return frozenset(card.sharing.resource for card in self._cards.values() if card.sharing is not None)

    # ------------------------------------------------------------------------------------------------ what happened

    def found(self, gpus: Sequence[Gpu]) -> None:
        """What the inventory shows. A GPU that is not there any more stays, as lost: people must see that it is, and
        it recovers like any that was ill, for it may come and go."""
        now = {gpu.uuid: gpu for gpu in gpus}
        for uuid, card in self._cards.items():
            illness = card.illness
            if uuid not in now:
                illness = illness.probed(GpuLostError(f"{uuid} is not among the GPUs of this node any more"), 0.0)
            self._cards[uuid] = replace(card, gpu=now.get(uuid, card.gpu), present=uuid in now, illness=illness)
        for uuid, gpu in now.items():
            self._cards.setdefault(uuid, Card(gpu))

    def asked(self, wanted: Mapping[str, Wanted]) -> None:
        """What the policies come to; what changes nothing for its pods takes effect at once."""
        for uuid, before in self._cards.items():
            card = replace(before, wanted=wanted.get(uuid, Wanted()))
            at_once = not (card.outdated or card.wanted.refused or card.changing)
            self._cards[uuid] = replace(card, sharing=card.wanted.sharing) if at_once else card

    def xid(self, code: int, uuid: str | None, now_s: float) -> tuple[str, ...]:
        """The GPUs that are concerned: all when nobody knows which."""
        hit = tuple(one for one in sorted(self._cards) if uuid in (None, one))
        for one in hit:
            card = self._cards[one]
            self._cards[one] = replace(card, illness=card.illness.xid(code, now_s, card.rules))
        return hit

    def probed(self, uuid: str, error: Exception | None, now_s: float) -> None:
        """An answer that was under way when the GPU was lost says nothing."""
        if (card := self._cards.get(uuid)) is not None and card.present:
            self._cards[uuid] = replace(card, illness=card.illness.probed(error, now_s).settled(now_s, card.rules))

    def mps(self, uuid: str, status: MpsStatus, now_s: float) -> None:
        if (card := self._cards.get(uuid)) is not None and card.mps != status:
            self._cards[uuid] = replace(card, mps=status, illness=card.illness.mps(status, now_s))

    def counted(self, uuid: str, over: str | None) -> None:
        if (card := self._cards.get(uuid)) is not None:
            self._cards[uuid] = replace(card, over=over)

    def listed(
        self,
        held: Mapping[Slot, Owner],
        asked_at_s: float,
        tickets: Collection[Ticket] | None = (),
        *,
        behind: bool = False,
    ) -> None:
        """The kubelet's word, as of `asked_at_s`; `tickets` of all pods of the node that have not ended (None: they are
        not known yet). `behind`: a pod that the kubelet has not acknowledged there may have been long ago."""
        unseen, alive, waiting = None, None, frozenset[Owner]()
        if tickets is not None:
            unseen, alive = hidden(tickets), frozenset(ticket.owner for ticket in tickets)
            waiting = frozenset(ticket.owner for ticket in tickets if not (ticket.admitted or behind))
        self.ledger = self.ledger.observed(held, asked_at_s, unseen, alive, waiting)
        self.told = True
        if tickets is not None and self.unshown != frozenset():
            running = frozenset(ticket.owner for ticket in tickets if ticket.admitted and not ticket.init)
            self.unshown = running.difference(held.values())
            if not self.unshown:
                self._forget()

    def _forget(self) -> None:
        """What the last run knew, and nobody has or holds: cards that were taken out."""
        for uuid in [uuid for uuid, card in self._cards.items() if not card.present and self.empty(uuid)]:
            del self._cards[uuid]

    # --------------------------------------------------------------------------------------------------- what to do

    def due(self) -> tuple[str, ...]:
        """GPUs that may be shared otherwise now. One that was never shared need not wait for the kubelet's word."""
        return tuple(
            uuid
            for uuid, card in sorted(self._cards.items())
            if card.outdated and not card.changing and (card.sharing is None or self.empty(uuid))
        )

    def empty(self, uuid: str) -> bool:
        """It is known that nobody has a slot of the GPU: it may change, and its MPS daemon may end."""
        return self.unshown == frozenset() and not self.busy(uuid)

    def begun(self, uuid: str) -> None:
        self._cards[uuid] = replace(self._cards[uuid], changing=True)

    def hindered(self, uuid: str, why: str) -> None:
        """It could not be shared otherwise yet; it is tried again."""
        self._cards[uuid] = replace(self._cards[uuid], obstacle=why)

    def finished(self, uuid: str, *, changed: bool) -> None:
        card = self._cards[uuid] if not changed else replace(self._cards[uuid], obstacle="")
        taken = changed and not card.wanted.refused  # it may be another policy by now
        self._cards[uuid] = replace(card, changing=False, sharing=card.wanted.sharing if taken else card.sharing)

    def devices(self, resource: str, now_s: float) -> tuple[Device, ...]:
        """All slots of `resource`. Those of an ill GPU are all ill; of one that drains, those that nobody holds."""
        return tuple(
            device
            for uuid, card in sorted(self._cards.items())
            if card.sharing is not None and card.sharing.resource == resource
            for device in _devices(uuid, card.sharing.replicas, self._given(card, now_s))
        )

    def _given(self, card: Card, now_s: float) -> frozenset[int] | None:
        """Numbers of the card's slots that are well; None: all."""
        if card.changing or not card.health(now_s).healthy or card.waits_for_mps:
            return frozenset()
        return self.ledger.used(card.gpu.uuid) if card.drains else None

    def seen(self, uuid: str, now_s: float, driver: str) -> Seen:
        """What people are told of the GPU."""
        card = self._cards[uuid]
        return Seen(
            gpu=card.gpu,
            driver=driver,
            sharing=card.sharing,
            wanted=card.wanted,
            withdrawn=card.changing or card.drains or card.waits_for_mps,
            health=card.health(now_s),
            mps=card.mps,
            obstacle=card.obstacle,
            over=card.over,
        )

    def shared(self, now_s: float) -> Mapping[str, Shared]:
        """What `allocate` may give out. An MPS daemon that starts is no obstacle: the container waits for it."""
        found = {}
        for uuid, card in self._cards.items():
            if card.sharing is not None:
                health = card.health(now_s)
                found[uuid] = Shared(card.gpu, card.sharing, health.healthy, health.message or health.reason)
        return found


@lru_cache(maxsize=256)
def _devices(uuid: str, replicas: int, given: frozenset[int] | None) -> tuple[Device, ...]:
    """The same objects each time: after each event all slots are compared with what the kubelet was told."""
    return tuple(
        Device(str(Slot(uuid, number)), healthy=given is None or number in given) for number in range(replicas)
    )
