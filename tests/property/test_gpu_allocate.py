"""What is preferred is right, is granted, and is refused only where a search through everything finds nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from deviceplugin.allocate import Grant, RefusedSlotsError, Shared, check, prefer
from deviceplugin.ledger import Ledger, Pending
from meshctl.sharing import RESOURCE, Gpu, Isolation, Mode, Owner, Packing, Sharing, Slot, Ticket

UUIDS = ("GPU-a", "GPU-b", "GPU-c")
OTHER = "hpe.com/whole"
SLOTS = [Slot(uuid, number) for uuid in UUIDS for number in range(4)]


@dataclass(frozen=True)
class Asked:
    """One GetPreferredAllocation."""

    gpus: Mapping[str, Shared]
    available: list[str]
    must: list[str]
    size: int
    ledger: Ledger
    tickets: list[Ticket]

    def answer(self) -> list[str] | None:
        """None: refused."""
        try:
            return prefer(RESOURCE, self.gpus, self.available, self.must, self.size, self.ledger, self.tickets)
        except RefusedSlotsError:
            return None


@st.composite
def asked(draw: st.DrawFn, isolations: tuple[Isolation, ...] = tuple(Isolation)) -> Asked:
    sharings = st.builds(
        Sharing,
        policy=st.just("p"),
        resource=st.sampled_from((RESOURCE, RESOURCE, RESOURCE, OTHER)),
        mode=st.just(Mode.TIME_SLICING),
        replicas=st.integers(1, 4),
        isolation=st.sampled_from(isolations),
        packing=st.sampled_from(Packing),
        several_gpus=st.booleans(),
    )
    uuids = draw(st.lists(st.sampled_from(UUIDS), min_size=1, unique=True))
    gpus = {
        uuid: Shared(Gpu(uuid, "V100", 16 << 30, (7, 0)), draw(sharings), draw(st.sampled_from((True, True, False))))
        for uuid in uuids
    }
    mine = [
        slot
        for slot in SLOTS
        if (shared := gpus.get(slot.uuid)) is not None
        and shared.sharing.resource == RESOURCE
        and slot.number < shared.sharing.replicas
    ]
    size = draw(st.integers(1, 6))
    available = draw(st.lists(st.sampled_from(SLOTS), unique=True))
    must = draw(st.lists(st.sampled_from(mine), unique=True, max_size=min(size, 2))) if mine else []
    tenants = st.dictionaries(
        st.sampled_from(SLOTS), st.builds(Owner, st.sampled_from("xy"), st.sampled_from("pq"), st.just("c"))
    )
    held = draw(tenants)
    promised = st.builds(Pending, st.just(1.0), st.frozensets(st.sampled_from("xy")))
    pending = draw(st.dictionaries(st.sampled_from(SLOTS), promised, max_size=2))
    plans: st.SearchStrategy[dict[str, int]] = st.one_of(
        st.just({}), st.sampled_from(UUIDS).map(lambda uuid: {uuid: size})
    )
    tickets = st.builds(
        Ticket,
        st.builds(Owner, st.sampled_from("xy"), st.sampled_from("rst"), st.just("c")),
        plans,
        asked=st.just(size),
        peak=st.integers(size, 6),
    )
    return Asked(
        gpus,
        [str(slot) for slot in available],
        [str(slot) for slot in must],
        size,
        Ledger({slot: owner for slot, owner in held.items() if slot not in pending}, pending),
        draw(st.lists(tickets, max_size=3, unique_by=lambda ticket: ticket.owner[:2])),
    )


def all_answers(case: Asked) -> Iterator[list[str]]:
    """Every set of IDs that the kubelet could be told, right or wrong."""
    rest = sorted(set(case.available) - set(case.must))
    return (sorted([*case.must, *more]) for more in combinations(rest, case.size - len(case.must)))


def granted(case: Asked, ids: list[str]) -> Grant | None:
    try:
        (grant,) = check(RESOURCE, case.gpus, [ids], case.ledger, case.tickets)
    except RefusedSlotsError:
        return None
    return grant


@settings(max_examples=300)
@given(asked())
def test_what_is_preferred_is_right(case: Asked) -> None:
    """As many as asked for, of what is offered, with what must be; granted; the same however it is listed."""
    if (ids := case.answer()) is None:
        return
    assert len(set(ids)) == len(ids) == case.size
    assert set(case.must) <= set(ids) <= {*case.available, *case.must}
    assert granted(case, ids)
    assert ids == prefer(
        RESOURCE,
        dict(sorted(case.gpus.items(), reverse=True)),
        case.available[::-1],
        case.must[::-1],
        case.size,
        case.ledger,
        case.tickets,
    )


@settings(max_examples=300)
@given(asked((Isolation.NONE,)))
def test_nothing_is_refused_that_could_be_granted(case: Asked) -> None:
    """Of all that could be answered to a container whose GPU nobody chose, `check` would take nothing; where everybody
    has a ticket, nothing that the first one is for.

    Not between tenants: there it matters which slots of a GPU, as whoever had an offered one is gone, and only the
    lowest are tried.
    """
    if case.answer() is not None:
        return
    planned = bool(case.tickets) and all(ticket.gpus for ticket in case.tickets)
    first = set(case.tickets[0].gpus) if planned else set(UUIDS)
    possible = [ids for ids in all_answers(case) if {Slot.parse(one).uuid for one in ids} <= first]
    assert not [ids for ids in possible if granted(case, ids)]


@settings(max_examples=300)
@given(asked(), st.data())
def test_what_is_granted_is_never_wrong(case: Asked, data: st.DataObject) -> None:
    """Whatever IDs the kubelet takes, of its own accord: known, open, of one GPU or allowed, safe for every tenant."""
    texts = data.draw(st.lists(st.sampled_from([str(slot) for slot in SLOTS]), unique=True, min_size=1, max_size=6))
    mine = [ticket for ticket in case.tickets if ticket.asked == len(texts)]
    if (grant := granted(case, texts)) is None:
        return
    assert list(map(str, grant.slots)) == sorted(texts)
    on = {slot.uuid for slot in grant.slots}
    assert all(case.gpus[uuid].open and case.gpus[uuid].sharing.resource == RESOURCE for uuid in on)
    assert len(on) == 1 or all(case.gpus[uuid].sharing.several_gpus for uuid in on)
    assert grant.namespaces == {ticket.owner.namespace for ticket in mine}
    for uuid in on:
        if case.gpus[uuid].sharing.isolation is Isolation.TENANT:
            there = case.ledger.tenants(uuid, grant.slots)
            assert not there or len(grant.namespaces | there) == 1 == len(grant.namespaces)
    after = case.ledger.granted([grant], 2.0)
    assert after.held.keys() | after.pending.keys() == {*chain(case.ledger.held, case.ledger.pending), *grant.slots}
