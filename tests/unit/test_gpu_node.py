"""The agent's picture of its node: when a GPU may be shared otherwise, and what the kubelet is told meanwhile."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deviceplugin.allocate import Grant
from deviceplugin.node import Node
from deviceplugin.objects import status_of
from deviceplugin.policies import Refusal, Wanted
from deviceplugin.ports import GpuLostError
from meshctl.sharing import Gpu, HealthRules, Mode, MpsPhase, MpsStatus, OnChange, Owner, Sharing, Slot, Ticket

A, B = "GPU-a", "GPU-b"
SLICED = Sharing("sliced", 1, mode=Mode.TIME_SLICING, replicas=4)
MPS = Sharing("mps", 1, replicas=4)
SERVER = Owner("team", "server", "main")
RUNNING = MpsStatus(MpsPhase.RUNNING, pid=1)


def _gpu(uuid: str) -> Gpu:
    return Gpu(uuid, "Tesla V100", 1 << 34, (7, 0))


def _node(*uuids: str, sharing: Sharing = SLICED) -> Node:
    """All shared as `sharing` says, and the kubelet has said that nobody holds anything."""
    node = Node.restored(None)
    node.found([_gpu(uuid) for uuid in uuids or (A,)])
    _ask(node, sharing)
    for uuid in node.due():
        node.begun(uuid)
        node.finished(uuid, changed=True)
    node.listed({}, 0.0)
    return node


def _ask(node: Node, sharing: Sharing | None, refusal: Refusal | None = None) -> None:
    wanted = Wanted(sharing, "policy", refusal=refusal)
    node.asked(dict.fromkeys(node.cards, wanted if sharing or refusal else Wanted()))


def _hold(node: Node, *numbers: int, uuid: str = A) -> None:
    node.listed({Slot(uuid, number): SERVER for number in numbers}, 1.0)


def _healthy(node: Node, now_s: float = 2.0, resource: str = SLICED.resource) -> list[bool]:
    return [device.healthy for device in node.devices(resource, now_s)]


def test_a_new_gpu_is_shared_before_the_kubelet_says_anything() -> None:
    """Nobody can hold slots that were never offered."""
    node = Node.restored(None)
    node.found([_gpu(A)])
    assert node.devices(SLICED.resource, 0.0) == ()
    _ask(node, SLICED)
    assert node.due() == (A,)


def test_every_slot_of_every_gpu_is_told_in_the_same_order() -> None:
    """Device IDs are UUID::number, by UUID."""
    node = _node(B, A)
    assert [device.id for device in node.devices(SLICED.resource, 2.0)] == [
        f"{uuid}::{number}" for uuid in (A, B) for number in range(4)
    ]
    assert node.devices("other.com/gpus", 2.0) == ()


def test_a_change_waits_for_the_pods_and_takes_no_slot_from_them() -> None:
    """onChange Wait: as before, for new pods too, until nobody is on the GPU; then it is due."""
    node = _node()
    _hold(node, 0, 1)
    _ask(node, replace(SLICED, generation=2, replicas=2))
    assert node.due() == ()
    assert _healthy(node) == [True] * 4
    _hold(node)
    assert node.due() == (A,)


def test_a_change_that_drains_withdraws_free_slots_only() -> None:
    """onChange Drain: who holds slots keeps them healthy; nobody gets another one."""
    node = _node()
    _hold(node, 1)
    _ask(node, replace(SLICED, generation=2, replicas=2, on_change=OnChange.DRAIN))
    assert _healthy(node) == [False, True, False, False]
    assert node.seen(A, 2.0, "").withdrawn


def test_a_promise_counts_as_a_holder() -> None:
    """Between Allocate and the kubelet's listing nothing may change under the container."""
    node = _node()
    node.ledger = node.ledger.granted([Grant((Slot(A, 0),))], 1.0)
    _ask(node, replace(SLICED, replicas=2))
    assert node.due() == ()


def test_without_the_kubelets_word_nothing_that_was_shared_changes() -> None:
    """A restarted agent that cannot ask does not take silence for an empty GPU."""
    node = Node.restored(_node().saved(0.0))
    node.found([_gpu(A)])
    _ask(node, replace(SLICED, replicas=2))
    assert node.due() == ()
    node.listed({}, 1.0)
    assert node.due() == (A,)


def test_what_concerns_no_pod_takes_effect_at_once() -> None:
    """Rules of health, packing and the policy's name or generation need no empty GPU."""
    node = _node()
    _hold(node, 0)
    soft = replace(SLICED, policy="other", generation=7, health=HealthRules(recover_after_s=5.0))
    _ask(node, soft)
    assert node.cards[A].sharing == soft
    assert node.due() == ()


def test_a_refused_policy_changes_nothing() -> None:
    """49 replicas at a cap of 48: the GPU goes on as it is, with pods or without."""
    node = _node()
    _ask(node, None, Refusal.TOO_MANY_REPLICAS)
    assert node.due() == ()
    assert _healthy(node) == [True] * 4


def test_a_deleted_policy_drains() -> None:
    """Without a policy a GPU has no slots to give; those that are held stay until their pods end."""
    node = _node()
    _hold(node, 2)
    _ask(node, None)
    assert _healthy(node) == [False, False, True, False]
    _hold(node)
    assert node.due() == (A,)
    node.begun(A)
    node.finished(A, changed=True)
    assert node.devices(SLICED.resource, 3.0) == ()


def test_13_an_xid_marks_all_slots_of_its_gpu_and_no_other() -> None:
    """Not one replica of it; held slots too."""
    node = _node(A, B)
    _hold(node, 0)
    assert node.xid(79, A, 2.0) == (A,)
    assert _healthy(node) == [False] * 4 + [True] * 4


def test_an_xid_of_an_unknown_gpu_marks_all() -> None:
    """When the driver does not say which, none is trusted."""
    node = _node(A, B)
    assert node.xid(79, None, 2.0) == (A, B)
    assert not any(_healthy(node))


def test_14_an_xid_that_the_policy_calls_critical_wins_over_one_that_is_ignored() -> None:
    """31 is an application's by default; the policy in force says otherwise for its GPUs."""
    node = _node(
        sharing=replace(SLICED, health=HealthRules(ignored_xids=frozenset({31}), critical_xids=frozenset({31})))
    )
    node.xid(31, A, 2.0)
    assert not any(_healthy(node))


def test_probes_bring_a_gpu_back() -> None:
    """After recoverAfter of good answers, not before."""
    node = _node(sharing=replace(SLICED, health=HealthRules(recover_after_s=10.0)))
    node.xid(79, A, 2.0)
    node.probed(A, None, 3.0)
    assert not any(_healthy(node, 12.9))
    assert all(_healthy(node, 13.0))


def test_a_gpu_that_recovered_is_not_taken_back_by_a_policy_with_more_patience() -> None:
    """Its trouble is over; the new recoverAfter is for the next."""
    node = _node(sharing=replace(SLICED, health=HealthRules(recover_after_s=10)))
    node.xid(79, A, 100.0)
    for now_s in (101.0, 111.0):
        node.probed(A, None, now_s)
    assert _healthy(node, 112.0) == [True] * 4
    _ask(node, replace(SLICED, generation=2, health=HealthRules(recover_after_s=60)))
    assert _healthy(node, 112.0) == [True] * 4
    node.xid(79, A, 113.0)
    node.probed(A, None, 114.0)
    assert (_healthy(node, 173.0), _healthy(node, 174.0)) == ([False] * 4, [True] * 4)


@pytest.mark.parametrize("seen_by", ["inventory", "probe", "inventory, then a probe that was late"])
def test_a_gpu_that_fell_off_the_bus_is_told_of_and_recovers_by_probes(seen_by: str) -> None:
    """Its slots are unhealthy, its holders known; back again it is like any GPU that was ill, whoever saw it go."""
    node = _node(A, B)
    _hold(node, 0)
    if seen_by == "probe":
        node.probed(A, GpuLostError("GPU is lost"), 1.0)
    node.xid(79, A, 1.5)
    node.found([_gpu(B)])
    if seen_by.endswith("late"):
        node.probed(A, None, 1.7)
    lost = node.cards[A].health(1e6)
    assert (lost.healthy, lost.reason) == (False, "Lost")
    assert "is not among the GPUs of this node any more; XID 79" in lost.message
    assert _healthy(node) == [False] * 4 + [True] * 4
    assert node.ledger.holders(A) == {SERVER: (0,)}
    node.found([_gpu(A), _gpu(B)])
    assert not all(_healthy(node, 1e6))
    node.probed(A, None, 3.0)
    assert node.cards[A].health(4.0).reason == "Recovering"
    assert _healthy(node, 3.0 + SLICED.health.recover_after_s) == [True] * 8


@pytest.mark.parametrize("phase", [MpsPhase.STARTING, MpsPhase.FAILED, MpsPhase.OFF])
def test_slots_shared_by_mps_need_its_daemon(phase: MpsPhase) -> None:
    """Not one slot is offered while the daemon does not run."""
    node = _node(sharing=MPS)
    node.mps(A, MpsStatus(phase, message="why"), 1.0)
    assert not any(_healthy(node, resource=MPS.resource))
    node.mps(A, RUNNING, 2.0)
    assert all(_healthy(node, resource=MPS.resource))


def test_a_restart_knows_how_gpus_are_shared_what_was_promised_and_what_is_ill() -> None:
    """The ledger after a restart is the one before it, once the kubelet has said who holds what (18)."""
    node = _node(A, B)
    _hold(node, 0)
    node.ledger = node.ledger.granted([Grant((Slot(B, 3),), namespaces=frozenset({"team"}))], 2.0)
    node.xid(79, B, 2.0)
    again = Node.restored(node.saved(3.0))
    again.found([_gpu(A), _gpu(B)])
    again.listed({Slot(A, 0): SERVER}, 1.0)
    _ask(again, SLICED)
    assert again.ledger == node.ledger
    assert again.devices(SLICED.resource, 4.0) == node.devices(SLICED.resource, 4.0)


def test_a_card_that_was_taken_out_while_the_agent_was_down_is_forgotten() -> None:
    """But not while the kubelet shows a holder of it."""
    saved = _node(A, B).saved(0.0)
    gone, held = Node.restored(saved), Node.restored(saved)
    for node in (gone, held):
        node.found([_gpu(B)])
    gone.listed({}, 1.0)
    held.listed({Slot(A, 0): SERVER}, 1.0)
    assert set(gone.cards) == {B}
    assert set(held.cards) == {A, B}


@pytest.mark.parametrize("known", [False, True])
def test_a_gpu_is_not_taken_for_empty_on_the_word_of_a_kubelet_that_forgot_its_pods(known: bool) -> None:
    """Kubelet and agent have started, and the API server was away: containers run on, and no listing shows them. What
    they run on does not change, whether the pods are known or not, before each was shown once."""
    again = Node.restored(_node(A, B).saved(0.0))
    again.found([_gpu(A), _gpu(B)])
    _ask(again, replace(SLICED, replicas=2))
    runs = Ticket(SERVER, asked=1, admitted=True)
    again.listed({}, 1.0, [runs] if known else None)
    assert (again.due(), again.empty(A)) == ((), False)
    assert again.unshown == ({SERVER} if known else None)
    again.listed({Slot(A, 0): SERVER}, 2.0, [runs])
    assert again.due() == (B,)
    again.listed({}, 3.0, [runs])
    assert again.ledger.holders(A) == {SERVER: (0,)}


def test_a_pod_that_is_running_longer_than_the_watch_knows_keeps_its_slots() -> None:
    """The API server went away before it told of the pod's start, and the kubelet has forgotten its pods. Where it is
    known that the pod has not started, its slots were its namesake's, which has ended."""
    node, seen = _node(), [Ticket(SERVER, asked=1, admitted=False)]
    _hold(node, 0)
    node.listed({}, 2.0, seen, behind=True)
    assert node.ledger.holders(A) == {SERVER: (0,)}
    node.listed({}, 3.0, seen)
    assert not node.busy(A)


def test_who_is_not_shown_may_have_ended_or_be_about_to_start() -> None:
    """A pod that ended before it was shown is waited for no longer; one that the kubelet has not acknowledged, or an
    init container, is never shown and never waited for."""
    again = Node.restored(_node().saved(0.0))
    again.found([_gpu(A)])
    comes, init = (
        Ticket(Owner("team", "new", "main"), asked=1),
        Ticket(Owner("team", "i", "init"), init=True, admitted=True),
    )
    again.listed({}, 1.0, [comes, init, Ticket(SERVER, asked=1, admitted=True)])
    assert not again.empty(A)
    again.listed({}, 2.0, [comes, init])
    assert again.empty(A)


def test_while_it_changes_no_slot_is_offered() -> None:
    """The kubelet must not choose slots that are about to be others."""
    node = _node()
    _ask(node, replace(SLICED, replicas=2))
    node.begun(A)
    assert not any(_healthy(node))
    node.finished(A, changed=False)
    assert _healthy(node) == [True] * 4
    assert node.due() == (A,)


def test_a_change_that_cannot_be_made_yet_says_why() -> None:
    """A process that keeps the MPS server busy, say; the words go when the change is made."""
    node = _node()
    _ask(node, replace(SLICED, replicas=2))
    node.begun(A)
    node.hindered(A, "process 7 is still there")
    node.finished(A, changed=False)
    shared = next(one for one in status_of(node.seen(A, 2.0, ""), node.ledger)["conditions"] if one["type"] == "Shared")
    assert shared["message"].startswith("not yet (process 7 is still there), then: TimeSlicing, 2 slots")
    node.begun(A)
    node.finished(A, changed=True)
    assert node.seen(A, 3.0, "").obstacle == ""
