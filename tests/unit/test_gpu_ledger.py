"""The ledger: what the kubelet says, what it was promised since, and nothing else."""

from __future__ import annotations

import pytest

from deviceplugin.ledger import GONE_S, PENDING_S, UNKNOWN_TENANT, Grant, Ledger, Pending
from meshctl.sharing import Owner, Slot, Ticket

A0, A1, A2, B0 = Slot("GPU-a", 0), Slot("GPU-a", 1), Slot("GPU-a", 2), Slot("GPU-b", 0)
SERVER = Owner("x", "server", "main")
OTHER = Owner("y", "other", "main")


def grant(*slots: Slot, owners: tuple[Owner, ...] = (SERVER,)) -> Grant:
    ticket = Ticket(owners[0]) if owners else None
    return Grant(slots, ticket, frozenset(owner.namespace for owner in owners), frozenset(owners))


def test_what_was_granted_is_pending_until_a_listing_shows_whose_it_is() -> None:
    """And the ledger that it was granted in stays as it was."""
    empty = Ledger()
    promised = empty.granted([grant(A0, A1)], 10.0)
    assert promised.pending == dict.fromkeys((A0, A1), Pending(10.0, frozenset({"x"}), frozenset({SERVER}), SERVER))
    assert promised.used("GPU-a") == {0, 1}
    assert promised.busy("GPU-a")
    assert promised.holders("GPU-a") == {}
    shown = promised.observed({A0: SERVER, A1: SERVER}, 11.0)
    assert shown == Ledger({A0: SERVER, A1: SERVER})
    assert shown.holders("GPU-a") == {SERVER: (0, 1)}
    assert empty == Ledger()


def test_what_nobody_got_is_pending_for_a_minute() -> None:
    """A pod that was refused after its Allocate leaves nothing for longer."""
    promised = Ledger().granted([grant(A0)], 10.0)
    assert promised.observed({}, 10.0 + PENDING_S) == promised
    assert promised.observed({}, 10.1 + PENDING_S) == Ledger()


def test_what_is_not_shown_any_more_is_free() -> None:
    """At once, and only that."""
    both = Ledger({A0: SERVER, B0: OTHER})
    assert both.observed({B0: OTHER}, 5.0) == Ledger({B0: OTHER})
    assert not both.observed({B0: OTHER}, 5.0).busy("GPU-a")


def test_a_listing_says_nothing_of_what_was_granted_after_it_was_asked_for() -> None:
    """It shows the slot's last owner, who is gone."""
    ledger = Ledger({A0: OTHER}).granted([grant(A0)], 10.0)
    assert ledger.held == {}
    late = ledger.observed({A0: OTHER, B0: OTHER}, 9.0)
    assert late.held == {B0: OTHER}
    assert late.pending == ledger.pending


def test_the_slots_of_an_init_container_stay_while_its_pod_lives() -> None:
    """No listing shows them, and the kubelet gives them to nobody else."""
    init = Owner("x", "server", "fetch")
    ledger = Ledger().granted([grant(A0, A1, owners=(OTHER, init))], 10.0)
    later = ledger.observed({B0: OTHER}, 1000.0, {init})
    assert later.used("GPU-a") == {0, 1}
    assert later.observed({B0: OTHER}, 1000.0) == Ledger({B0: OTHER})
    assert later.observed({B0: OTHER}, 1000.0, hidden=None) == later, "the pods are not known: it may be such a one's"


def test_a_slot_that_is_offered_again_is_the_new_ones() -> None:
    """Whoever held it, or was promised it, has ended, or hands it on within its pod."""
    ledger = Ledger({A0: OTHER}, {A1: Pending(1.0, frozenset({"y"}))}).granted([grant(A0, A1)], 2.0)
    assert ledger.held == {}
    assert {promise.namespaces for promise in ledger.pending.values()} == {frozenset({"x"})}


def test_a_kubelet_that_forgot_its_pods_frees_nothing() -> None:
    """Just started, it shows none while the API server is away; the API server said last that the pod lives."""
    ledger = Ledger({A0: SERVER, A1: OTHER})
    assert ledger.observed({}, 5.0, alive={SERVER}) == Ledger({A0: SERVER})
    assert ledger.observed({B0: OTHER}, 5.0, alive={SERVER, OTHER}) == Ledger({A0: SERVER, B0: OTHER})


def test_what_a_pod_was_promised_stays_while_the_kubelet_has_forgotten_it() -> None:
    """Killed before a listing could show the pod, it shows none until the API server is back: longer than a promise
    lasts. One that it shows has what is shown, and no promise besides."""
    promised = Ledger().granted([grant(A0)], 10.0)
    late_s = 11.0 + PENDING_S
    assert promised.observed({}, late_s, alive={SERVER}) == promised
    assert promised.observed({B0: SERVER}, late_s, alive={SERVER}) == Ledger({B0: SERVER})
    assert promised.observed({}, late_s, alive={OTHER}) == Ledger()


def test_a_forgotten_owners_slot_is_whoever_the_kubelet_shows() -> None:
    """Its word on a slot wins."""
    assert Ledger({A0: SERVER}).observed({A0: OTHER}, 5.0, alive={SERVER, OTHER}) == Ledger({A0: OTHER})


def test_what_was_promised_to_a_pod_that_ended_is_free_soon() -> None:
    """It ended before a listing could show it. Not at once, the watched pods may be behind; and not what they never
    were: their watch may hang."""
    promised = Ledger().granted([grant(A0)], 10.0).granted([grant(B0, owners=())], 10.0)
    assert promised.observed({}, 10.1 + GONE_S, alive=()) == promised
    lived = promised.observed({}, 11.0, alive={SERVER})
    assert lived.observed({}, 10.0 + GONE_S, alive=()) == lived
    assert set(lived.observed({}, 10.1 + GONE_S, alive=()).pending) == {B0}
    assert lived.observed({}, 10.1 + GONE_S, alive={SERVER}) == lived
    assert lived.observed({}, 10.1 + GONE_S) == lived


def test_an_allocate_that_failed_is_withdrawn() -> None:
    """What others hold or were promised stays."""
    before = Ledger({B0: OTHER}, {A2: Pending(1.0)})
    after = before.granted([grant(A0, A1)], 2.0)
    assert after.withdrawn([A0, A1, B0]) == before


def test_tenants_are_all_who_may_be_there() -> None:
    """A pending slot counts for everybody who may have asked, and for an unknown one when nobody is known."""
    ledger = Ledger({A0: SERVER}).granted([grant(A1, owners=(OTHER, SERVER))], 1.0)
    assert ledger.tenants("GPU-a") == {"x", "y"}
    assert ledger.granted([grant(B0, owners=())], 1.0).tenants("GPU-b") == {UNKNOWN_TENANT}
    assert ledger.tenants("GPU-b") == frozenset()


def test_who_had_an_offered_slot_is_no_tenant_any_more() -> None:
    """A pod loses all its slots together; the others on the GPU stay."""
    ledger = Ledger({A0: SERVER, A1: Owner("x", "server", "sidecar"), A2: OTHER})
    assert ledger.tenants("GPU-a", [A0]) == {"y"}
    assert ledger.tenants("GPU-a", [A2]) == {"x"}
    promised = Ledger().granted([grant(A0, A1)], 1.0).granted([grant(A2, owners=(OTHER,))], 2.0)
    assert promised.tenants("GPU-a", [A0]) == {"y"}


def test_holders_are_in_order() -> None:
    """Of names, and of slots."""
    ledger = Ledger({A2: SERVER, A1: OTHER, A0: SERVER, B0: SERVER})
    assert list(ledger.holders("GPU-a").items()) == [(SERVER, (0, 2)), (OTHER, (1,))]


def test_a_slot_is_never_both() -> None:
    """The invariant is checked whenever a ledger is made."""
    with pytest.raises(ValueError, match="both held and pending: GPU-a::0"):
        Ledger({A0: SERVER}, {A0: Pending(1.0)})
