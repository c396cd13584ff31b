"""Which slots a container gets, and what is refused with which words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from deviceplugin.allocate import Grant, Reason, RefusedSlotsError, Shared, check, prefer
from deviceplugin.ledger import Ledger, Pending
from meshctl.sharing import RESOURCE, Gpu, Isolation, Mode, Owner, Packing, Sharing, Slot, Ticket

OTHER = "hpe.com/whole"


def card(uuid: str, replicas: int = 4, *, open_: bool = True, **sharing: Any) -> Shared:
    gpu = Gpu(uuid, "Tesla V100", 16 << 30, (7, 0))
    return Shared(gpu, Sharing("policy", replicas=replicas, **sharing), open_, "" if open_ else "XID 79")


def cards(*all_of_them: Shared) -> dict[str, Shared]:
    return {one.gpu.uuid: one for one in all_of_them}


A, B = card("GPU-a"), card("GPU-b")
TWO = cards(A, B)


def ids(uuid: str, *numbers: int) -> list[str]:
    return [str(Slot(uuid, number)) for number in numbers]


def everything(gpus: Mapping[str, Shared]) -> list[str]:
    return [text for uuid, one in gpus.items() for text in ids(uuid, *range(one.sharing.replicas))]


def ticket(pod: str = "x/p", container: str = "main", /, asked: int = 1, peak: int = 0, **gpus: int) -> Ticket:
    """GPU-a is written ``a``."""
    namespace, name = pod.split("/")
    planned = {f"GPU-{letter}": count for letter, count in gpus.items()}
    return Ticket(Owner(namespace, name, container), planned, RESOURCE, sum(gpus.values()) or asked, peak=peak)


def preferred(
    gpus: Mapping[str, Shared],
    size: int,
    *tickets: Ticket,
    available: Sequence[str] | None = None,
    must: Sequence[str] = (),
    ledger: Ledger | None = None,
) -> list[str]:
    offered = everything(gpus) if available is None else available
    return prefer(RESOURCE, gpus, offered, must, size, ledger or Ledger(), tickets)


def refused(gpus: Mapping[str, Shared], size: int, *tickets: Ticket, **more: Any) -> tuple[Reason, str]:
    with pytest.raises(RefusedSlotsError) as caught:
        preferred(gpus, size, *tickets, **more)
    return caught.value.reason, str(caught.value).partition(": ")[2]


def judged(
    *containers: Sequence[str], gpus: Mapping[str, Shared] = TWO, ledger: Ledger | None = None, **more: Any
) -> Any:
    return check(RESOURCE, gpus, containers, ledger or Ledger(), more.get("tickets", ()))


def not_granted(*containers: Sequence[str], **more: Any) -> tuple[Reason, str]:
    with pytest.raises(RefusedSlotsError) as caught:
        judged(*containers, **more)
    return caught.value.reason, str(caught.value).partition(": ")[2]


# ------------------------------------------------------------------------------------------------------------- packing


def test_packed_takes_the_fullest_gpu_that_has_room() -> None:
    """The lowest numbers of it, whatever the order of the offer; of equal GPUs the first by UUID."""
    offer = [*ids("GPU-a", 0, 1, 2), *ids("GPU-b", 3, 1)]
    assert preferred(TWO, 2, available=offer) == ids("GPU-b", 1, 3)
    assert preferred(TWO, 2, available=offer[::-1]) == ids("GPU-b", 1, 3)
    assert preferred(TWO, 3, available=offer) == ids("GPU-a", 0, 1, 2)
    assert preferred(TWO, 1) == ids("GPU-a", 0)


def test_spread_takes_the_emptiest_gpu() -> None:
    """But one GPU, when a container may not have several."""
    gpus = cards(card("GPU-a", packing=Packing.SPREAD), card("GPU-b", packing=Packing.SPREAD))
    assert preferred(gpus, 2, available=[*ids("GPU-a", 0, 1), *ids("GPU-b", 1, 2, 3)]) == ids("GPU-b", 1, 2)


def test_spread_over_several_gpus_deals_evenly() -> None:
    """What is bound counts; a GPU that is empty gives no more."""
    way: dict[str, Any] = {"packing": Packing.SPREAD, "several_gpus": True}
    gpus = cards(card("GPU-a", **way), card("GPU-b", **way), card("GPU-c", 1, **way))
    assert preferred(gpus, 3) == [*ids("GPU-a", 0), *ids("GPU-b", 0), *ids("GPU-c", 0)]
    assert preferred(gpus, 5) == [*ids("GPU-a", 0, 1), *ids("GPU-b", 0, 1), *ids("GPU-c", 0)]
    assert preferred(gpus, 3, must=ids("GPU-a", 2, 3)) == [*ids("GPU-a", 2, 3), *ids("GPU-b", 0)]


def test_packed_over_several_gpus_fills_as_few_as_possible() -> None:
    """One if it has room; else the largest, and the tightest fit for what is left."""
    gpus = cards(*(card(f"GPU-{letter}", several_gpus=True) for letter in "abc"))
    offer = [*ids("GPU-a", 0, 1), *ids("GPU-b", 0, 1, 2, 3), *ids("GPU-c", 0, 1, 2)]
    assert preferred(gpus, 4, available=offer) == ids("GPU-b", 0, 1, 2, 3)
    assert preferred(gpus, 5, available=offer) == [*ids("GPU-a", 0), *ids("GPU-b", 0, 1, 2, 3)]
    assert preferred(gpus, 5, available=offer, must=ids("GPU-c", 2)) == [*ids("GPU-a", 0, 1), *ids("GPU-c", 0, 1, 2)]


def test_an_init_container_goes_where_those_behind_it_have_room() -> None:
    """The kubelet makes them follow it; where no GPU has that room, it goes where it can itself."""
    offer = [*ids("GPU-a", 0, 1), *ids("GPU-b", 0, 1, 2)]
    assert preferred(TWO, 2, ticket(asked=2), available=offer) == ids("GPU-a", 0, 1)
    assert preferred(TWO, 2, ticket(asked=2, peak=3), available=offer) == ids("GPU-b", 0, 1)
    assert preferred(TWO, 2, ticket(asked=2, peak=4), available=offer) == ids("GPU-a", 0, 1)


def test_what_must_be_included_decides_the_gpu() -> None:
    """Even against packing, and even when it is not offered besides."""
    offer = [*ids("GPU-a", 0), *ids("GPU-b", 0, 1, 3)]
    assert preferred(TWO, 2, available=offer, must=ids("GPU-b", 3)) == ids("GPU-b", 0, 3)
    assert preferred(TWO, 2, available=offer[:2], must=ids("GPU-b", 3)) == ids("GPU-b", 0, 3)
    assert refused(TWO, 3, available=offer[:2], must=ids("GPU-b", 3)) == (
        Reason.TOO_FEW,
        "3 hpe.com/gpus can't be had: GPU-b has 2 free slots",
    )


@pytest.mark.parametrize(
    ("must", "size", "reason"),
    [
        (["GPU-a::0", "GPU-a::1"], 1, Reason.TOO_FEW),
        (["GPU-a::0", "GPU-b::0"], 3, Reason.SEVERAL_GPUS),
        (["GPU-a::7"], 2, Reason.UNKNOWN_DEVICE),
        (["GPU-z::0"], 2, Reason.FOREIGN_DEVICE),
        ([], 0, Reason.NOTHING_ASKED),
    ],
)
def test_what_the_kubelet_may_not_insist_on(must: list[str], size: int, reason: Reason) -> None:
    """Each with its own reason."""
    assert refused(TWO, size, must=must)[0] is reason


def test_slots_that_are_no_more_are_not_chosen() -> None:
    """The kubelet lists them for a moment: of closed GPUs, of more replicas than there are, of another resource."""
    gpus = cards(A, replace(B, open=False, why_closed="XID 79"), card("GPU-c", resource=OTHER))
    offer = [*ids("GPU-a", 3, 4, 9), *ids("GPU-b", 0, 1), *ids("GPU-c", 0), *ids("GPU-z", 0), "nonsense"]
    assert preferred(gpus, 1, available=offer) == ids("GPU-a", 3)
    assert refused(gpus, 2, available=offer) == (
        Reason.UNHEALTHY,
        "2 hpe.com/gpus can't be had: GPU-a has 1 free slot, GPU-b takes no container: XID 79",
    )


# -------------------------------------------------------------------------------------------------------------- reasons


def test_no_room_says_what_each_gpu_has() -> None:
    """Free slots enough, but not on one GPU."""
    offer = [*ids("GPU-a", 0, 1), *ids("GPU-b", 2, 3)]
    words = "3 hpe.com/gpus can't be had: GPU-a has 2 free slots, GPU-b has 2 free slots"
    assert refused(TWO, 3, available=offer) == (Reason.NO_ROOM, words)


def test_too_few_is_not_no_room() -> None:
    """Not even all GPUs together have enough."""
    assert refused(TWO, 3, available=ids("GPU-a", 0, 1)) == (
        Reason.TOO_FEW,
        "3 hpe.com/gpus can't be had: GPU-a has 2 free slots, GPU-b has no free slots",
    )
    assert refused({}, 1) == (Reason.TOO_FEW, "1 hpe.com/gpus can't be had: no GPU of this node is shared so")


def test_more_than_a_gpu_has_is_several_gpus() -> None:
    """No emptying of GPUs will help."""
    assert refused(TWO, 5)[0] is Reason.SEVERAL_GPUS


def test_a_closed_gpu_is_the_reason_only_where_it_would_have_had_room() -> None:
    """The ledger tells: of a closed GPU the kubelet offers nothing."""
    gpus = cards(A, card("GPU-b", open_=False))
    full = Ledger({Slot("GPU-b", number): Owner("x", "p", "main") for number in range(3)})
    assert refused(gpus, 2, available=ids("GPU-a", 0))[0] is Reason.UNHEALTHY
    assert refused(gpus, 2, available=ids("GPU-a", 0), ledger=full)[0] is Reason.TOO_FEW


def test_exclusive_gpus_are_free_or_in_use() -> None:
    """Whole GPUs have one slot each."""
    gpus = cards(*(card(f"GPU-{letter}", 1, mode=Mode.EXCLUSIVE) for letter in "ab"))
    assert preferred(gpus, 1, available=ids("GPU-b", 0)) == ids("GPU-b", 0)
    words = "1 hpe.com/gpus can't be had: GPU-a is in use, GPU-b is in use"
    assert refused(gpus, 1, available=[]) == (Reason.EXCLUSIVE_IN_USE, words)
    assert refused(gpus, 2)[0] is Reason.SEVERAL_GPUS


# -------------------------------------------------------------------------------------------------------------- tickets


def test_a_ticket_beats_packing() -> None:
    """The likeliest candidate's first; one without a ticket waits behind those with one."""
    offer = [*ids("GPU-a", 0), *ids("GPU-b", 1, 2)]
    assert preferred(TWO, 1, ticket(b=1), ticket("x/q", a=1), available=offer) == ids("GPU-b", 1)
    assert preferred(TWO, 1, ticket(), ticket("x/q", b=1), available=offer) == ids("GPU-b", 1)


def test_a_ticket_may_be_for_several_gpus() -> None:
    """Where their policies allow it."""
    gpus = cards(card("GPU-a", several_gpus=True), card("GPU-b", several_gpus=True))
    assert preferred(gpus, 3, ticket(a=1, b=2)) == [*ids("GPU-a", 0), *ids("GPU-b", 0, 1)]
    words = "no container may have slots of several GPUs: 1 of GPU-a, 2 of GPU-b"
    assert refused(TWO, 3, ticket(a=1, b=2)) == (
        Reason.SEVERAL_GPUS,
        f"x/p[main] is planned for 1 of GPU-a, 2 of GPU-b: {words}",
    )


@pytest.mark.parametrize(
    ("planned", "reason", "words"),
    [
        ("z", Reason.WRONG_GPU, "GPU-z is no GPU that this node shares"),
        ("c", Reason.WRONG_PRODUCT, "GPU-c (Tesla V100) is shared as hpe.com/whole"),
        ("d", Reason.UNHEALTHY, "GPU-d takes no container: XID 79"),
        ("b", Reason.NO_ROOM, "GPU-b has no free slots"),
        ("e", Reason.EXCLUSIVE_IN_USE, "GPU-e is in use"),
    ],
)
def test_a_ticket_that_cannot_be_met_is_refused_with_its_own_reason(planned: str, reason: Reason, words: str) -> None:
    """Another GPU has room, but it is not the one that the scheduler counted on."""
    gpus = cards(A, B, card("GPU-c", resource=OTHER), card("GPU-d", open_=False), card("GPU-e", 1, mode=Mode.EXCLUSIVE))
    offer = ids("GPU-a", 0, 1)
    found = refused(gpus, 1, ticket(**{planned: 1}), available=offer)
    assert found == (reason, f"x/p[main] is planned for 1 of GPU-{planned}: {words}")
    assert preferred(gpus, 1, ticket(**{planned: 1}), ticket("x/q"), available=offer) == ids("GPU-a", 0)
    assert preferred(gpus, 1, ticket(**{planned: 1}), ticket("x/q", a=1), available=offer) == ids("GPU-a", 0)


def test_a_ticket_is_not_passed_over_for_another_of_the_same_pod() -> None:
    """The kubelet allocates a pod's containers in order, so it is not the second one that asks."""
    first, second = ticket(z=1), ticket("x/p", "side", a=1)
    assert refused(TWO, 1, first, second)[0] is Reason.WRONG_GPU
    assert refused(TWO, 1, first, ticket("x/p", "side"))[0] is Reason.WRONG_GPU
    assert preferred(TWO, 1, second, first) == ids("GPU-a", 0)


def test_a_ticket_for_another_gpu_than_its_pod_is_on() -> None:
    """The slots of the pod's init container come with the call: it can be none of these tickets."""
    reason, words = refused(TWO, 2, ticket(b=2), must=ids("GPU-a", 0))
    assert (reason, words) == (
        Reason.PLAN_MISMATCH,
        "x/p[main] is planned for 2 of GPU-b: the kubelet asks for 2 slots, and has given it 1 of GPU-a",
    )
    assert preferred(TWO, 2, ticket(b=2), ticket("x/q", a=2), must=ids("GPU-a", 3)) == ids("GPU-a", 0, 3)


# -------------------------------------------------------------------------------------------------------------- tenants

TENANTS = cards(card("GPU-a", isolation=Isolation.TENANT), card("GPU-b", isolation=Isolation.TENANT))
ON_A = Ledger({Slot("GPU-a", 0): Owner("x", "old", "main")})


def test_a_gpu_is_for_one_namespace_at_a_time() -> None:
    """Packed would take GPU-a for both."""
    offer = [*ids("GPU-a", 1, 2), *ids("GPU-b", 0, 1, 2, 3)]
    assert preferred(TENANTS, 1, ticket("x/p"), available=offer, ledger=ON_A) == ids("GPU-a", 1)
    assert preferred(TENANTS, 1, ticket("y/p"), available=offer, ledger=ON_A) == ids("GPU-b", 0)
    assert preferred(TWO, 1, ticket("y/p"), available=offer, ledger=ON_A) == ids("GPU-a", 1)


def test_a_gpu_must_be_safe_for_everybody_who_may_be_asking() -> None:
    """Also while it is only promised; and a ticket for it helps nobody."""
    both = (ticket("x/p"), ticket("y/q"))
    offer = [*ids("GPU-a", 1, 2), *ids("GPU-b", 0, 1, 2, 3)]
    assert preferred(TENANTS, 1, *both, available=offer, ledger=ON_A) == ids("GPU-b", 0)
    assert refused(TENANTS, 1, *both, available=offer[:2], ledger=ON_A) == (
        Reason.TENANT_CONFLICT,
        "1 hpe.com/gpus can't be had: GPU-a is taken by x, and a pod of x or y asks, GPU-b has no free slots",
    )
    promised = Ledger(pending={Slot("GPU-a", 0): Pending(1.0, frozenset({"x", "y"}))})
    assert refused(TENANTS, 1, ticket("y/q", a=1), available=offer, ledger=promised)[0] is Reason.TENANT_CONFLICT


def test_nobody_known_gets_only_an_empty_gpu() -> None:
    """Without the API server, or before it told of the pod."""
    offer = [*ids("GPU-a", 1), *ids("GPU-b", 0, 1)]
    assert preferred(TENANTS, 1, available=offer, ledger=ON_A) == ids("GPU-b", 0)
    assert refused(TENANTS, 1, available=offer[:1], ledger=ON_A)[0] is Reason.TENANT_UNKNOWN
    unknown = Ledger(pending={Slot("GPU-a", 0): Pending(1.0)})
    reason, words = not_granted(ids("GPU-a", 1), gpus=TENANTS, ledger=unknown, tickets=[ticket("x/p")])
    assert (reason, words) == (Reason.TENANT_CONFLICT, "GPU-a is taken by somebody, and a pod of x asks")


def test_slots_handed_on_within_a_pod_keep_their_tenant() -> None:
    """An init container's slots for the next container; those who have others of the GPU still count."""
    held = Ledger(
        {Slot("GPU-a", 0): Owner("x", "p", "fetch"), Slot("GPU-a", 1): Owner("x", "p", "fetch")},
        {Slot("GPU-a", 2): Pending(1.0, frozenset({"y"}))},
    )
    reused = ids("GPU-a", 0)
    assert not_granted(reused, gpus=TENANTS, ledger=held, tickets=[ticket("x/p")])[0] is Reason.TENANT_CONFLICT
    alone = Ledger(held.held)
    (grant,) = judged(reused, gpus=TENANTS, ledger=alone, tickets=[ticket("x/p"), ticket("y/q")])
    assert grant.namespaces == {"x", "y"}


# ---------------------------------------------------------------------------------------------------------------- check


def test_what_is_granted() -> None:
    """Slots in order, whose ticket it seems to be, and who it may be for."""
    mine, other, more = ticket("x/p", b=2), ticket("y/q", a=2), ticket("z/r", asked=3)
    assert judged(ids("GPU-b", 3, 1), tickets=[other, mine, more]) == (
        Grant((Slot("GPU-b", 1), Slot("GPU-b", 3)), mine, frozenset("xy"), frozenset({mine.owner, other.owner})),
    )
    assert judged(ids("GPU-b", 0)) == (Grant((Slot("GPU-b", 0),)),)


@pytest.mark.parametrize(
    ("containers", "reason", "words"),
    [
        ([], Reason.NOTHING_ASKED, "an Allocate of hpe.com/gpus without device IDs"),
        ([["GPU-a::0"], []], Reason.NOTHING_ASKED, "an Allocate of hpe.com/gpus without device IDs"),
        ([["GPU-a::0", "GPU-a::0"]], Reason.DUPLICATE_DEVICE, "in one Allocate more than once: GPU-a::0"),
        ([["GPU-a::0"], ["GPU-a::0"]], Reason.DUPLICATE_DEVICE, "in one Allocate more than once: GPU-a::0"),
        ([["GPU-a"]], Reason.UNKNOWN_DEVICE, "'GPU-a' is not UUID::SLOT"),
        ([["GPU-a::01"]], Reason.UNKNOWN_DEVICE, "'GPU-a::01' is not UUID::SLOT"),
        ([["GPU-a::4"]], Reason.UNKNOWN_DEVICE, "GPU-a::4: GPU-a has slots 0 to 3"),
        ([["GPU-z::0"]], Reason.FOREIGN_DEVICE, "GPU-z::0: GPU-z is no GPU that this node shares"),
        ([["GPU-c::0"]], Reason.FOREIGN_DEVICE, "GPU-c::0 is hpe.com/whole, not hpe.com/gpus"),
        ([["GPU-d::0"]], Reason.UNHEALTHY, "GPU-d takes no container: XID 79"),
        ([["GPU-a::0"], ["GPU-d::0"]], Reason.UNHEALTHY, "GPU-d takes no container: XID 79"),
        (
            [["GPU-a::0", "GPU-b::0"]],
            Reason.SEVERAL_GPUS,
            "no container may have slots of several GPUs: 1 of GPU-a, 1 of GPU-b",
        ),
    ],
)
def test_what_is_never_granted(containers: list[list[str]], reason: Reason, words: str) -> None:
    """With its reason; one bad container takes the others with it."""
    gpus = cards(A, B, card("GPU-c", resource=OTHER), card("GPU-d", open_=False))
    assert not_granted(*containers, gpus=gpus) == (reason, words)


def test_slots_of_several_gpus_where_every_policy_allows_it() -> None:
    """One that does not is enough."""
    both = [*ids("GPU-a", 0), *ids("GPU-b", 0)]
    wide = cards(card("GPU-a", several_gpus=True), card("GPU-b", several_gpus=True))
    assert len(judged(both, gpus=wide)[0].slots) == 2
    assert not_granted(both, gpus={**wide, "GPU-b": B})[0] is Reason.SEVERAL_GPUS


def test_another_gpu_than_planned_is_refused_when_everybody_has_a_plan() -> None:
    """One candidate without a ticket, or with one for this GPU, and it may be right."""
    wrong = ticket("x/p", b=1)
    assert not_granted(ids("GPU-a", 0), tickets=[wrong]) == (
        Reason.PLAN_MISMATCH,
        "the kubelet takes 1 of GPU-a; planned are x/p[main] for 1 of GPU-b",
    )
    free = ticket("x/q")
    assert judged(ids("GPU-a", 0), tickets=[wrong, free])[0].ticket == free
    assert judged(ids("GPU-a", 0), tickets=[free, wrong, ticket("x/r", a=1)])[0].ticket == ticket("x/r", a=1)
    assert judged(ids("GPU-a", 0), tickets=[ticket(b=2)])[0].ticket is None


def test_what_the_ledger_shows_as_held_is_granted_all_the_same() -> None:
    """The kubelet accounts for each slot: when it gives one again, its last owner has ended."""
    held = Ledger({Slot("GPU-a", 0): Owner("x", "old", "main")})
    assert judged(ids("GPU-a", 0), ledger=held)[0].slots == (Slot("GPU-a", 0),)
    assert held == Ledger({Slot("GPU-a", 0): Owner("x", "old", "main")})
