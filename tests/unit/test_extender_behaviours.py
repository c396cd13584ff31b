"""The behaviours of GPU sharing that people miss elsewhere, by their numbers: those of what the extender knows.

How a place is chosen is in test_packing_*; here objects go in, as they are watched, and a ledger decides.
"""

from __future__ import annotations

from typing import Any

import pytest

from meshctl.core.packing.vocabulary import Reason
from meshctl.errors import InputError
from meshctl.extender.pods import GPU_PRODUCTS
from meshctl.extender.ports import BindError
from tests.harness.extender_objects import Told, container, node, pod, pod_id, site
from tests.harness.gpus import condition, gpu_object

A, B = "GPU-n-0", "GPU-n-1"


def state(told: Told) -> Any:
    """Everything that a decision may depend on, but for what the policy has learned."""
    fleet = told.ledger.fleet
    devices = [device.uuid for each in fleet.nodes.values() for device in each.devices]
    free = {uuid: (fleet.free(uuid), fleet.used_slots(uuid), fleet.tenants(uuid)) for uuid in sorted(devices)}
    return dict(fleet.nodes), dict(fleet.charges), free, dict(told.ledger.slots())


def test_09_init_containers_are_a_peak() -> None:
    """3 for the init container, then 2 and 1 at once: 3 of one GPU with 4, not 6."""
    told = site(gpus=1)
    value = pod("p", container("a", 2), container("b", 1), init=[container("warm", 3)])
    told.tell("Pod", value)
    reserved = told.ledger.reserve(pod_id(value), "n")
    assert reserved.placement.gpus == {"warm": {A: 3}, "a": {A: 2}, "b": {A: 1}}
    assert told.free(A) == [1]


def test_10_containers_without_gpus_keep_their_position() -> None:
    """Allocations are by name: a container without GPUs has none, and moves nobody."""
    told = site()
    value = pod("p", container("log"), container("main", 3), container("metrics"), container("side", 1))
    told.tell("Pod", value)
    gpus = told.ledger.reserve(pod_id(value), "n").placement.gpus
    assert {name: sum(slots.values()) for name, slots in gpus.items()} == {"main": 3, "side": 1}


@pytest.mark.parametrize("missing", ["WrongProduct", "NoGpu", "TooSmall"])
def test_12_a_mismatch_has_its_own_reason(missing: str) -> None:
    """Another product, another resource, a larger share than any GPU has: said, and no eviction helps."""
    told = site()
    value = {
        "WrongProduct": pod(metadata={"annotations": {GPU_PRODUCTS: "H200"}}),
        "NoGpu": pod("p", container("c", 1, "example.com/large")),
        "TooSmall": pod(slots=5),
    }[missing]
    if missing == "NoGpu":
        told.tell("Node", node("m")).tell("GPU", gpu_object("m", "GPU-m", resourceName="example.com/large"))
    decision = told.ledger.decide(value, ["n"])
    assert decision.placement is None
    assert decision.refused["n"].reason == Reason(missing)
    assert not decision.refused["n"].reason.resolvable


def test_13_an_unhealthy_gpu_takes_nobody_and_says_why() -> None:
    """The other GPU does; when both are unhealthy, the words are the agent's."""
    told, value = site(), pod(slots=1)
    sick = condition("Healthy", "False", "Xid", "Xid 79: fallen off the bus")
    told.tell("GPU", gpu_object("n", A, 4, conditions=[sick]))
    placement = told.ledger.decide(value, None).placement
    assert placement is not None
    assert placement.gpus == {"server": {B: 1}}
    told.tell("GPU", gpu_object("n", B, 4, conditions=[sick]))
    decision = told.ledger.decide(value, ["n"])
    assert decision.refused["n"].reason is Reason.CLOSED
    assert "Xid 79" in decision.refused["n"].message


def test_15_a_simulated_filter_changes_nothing() -> None:
    """Asked again and again, for whomever, it says the same, and nothing is charged."""
    told = site().tell("Pod", pod("p"), pod("q", slots=2, node="n"))
    before = state(told)
    first = told.ledger.decide(pod("p"), ["n", "nowhere"])
    for value in (pod("q2", slots=1), pod("q3", slots=4), pod("p"), pod("large", slots=9)):
        told.ledger.decide(value, None)
    again = told.ledger.decide(pod("p"), ["n", "nowhere"])
    assert (again.placement, dict(again.refused)) == (first.placement, dict(first.refused))
    assert state(told) == before


def test_16_a_failed_bind_leaves_no_reservation() -> None:
    """Released: the ledger is as before, and the pod may be reserved again."""
    told = site().tell("Pod", pod("p"))
    before = state(told)
    told.ledger.reserve(pod_id(pod("p")), "n")
    assert state(told) != before
    told.ledger.release("uid-p")
    assert state(told) == before
    told.ledger.release("uid-p")
    assert state(told) == before
    told.ledger.reserve(pod_id(pod("p")), "n")


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_17_a_terminating_pod_stays_charged_a_terminal_one_is_released_once(phase: str) -> None:
    """Until the kubelet says that it has ended, or it is gone; what another has by then stays."""
    told = site(gpus=1)
    old = pod("p", node="n", plan={"server": {A: 3}}, phase="Running", started=True)
    going = {**old, "metadata": {**old["metadata"], "deletionTimestamp": "2026-05-04T10:01:00Z"}}
    told.tell("Pod", old, going)
    assert told.free(A) == [1]
    told.tell("Pod", {**going, "status": {"phase": phase}})
    assert told.free(A) == [4]
    told.tell("Pod", pod("q", node="n", plan={"server": {A: 3}}))
    told.tell("Pod", {**going, "status": {"phase": phase, "reason": "again"}})
    told.gone("Pod", going)
    assert told.free(A) == [1]


def test_17_a_pod_that_is_gone_is_released() -> None:
    """Without ever having ended."""
    told = site(gpus=1).tell("Pod", pod("p", node="n", plan={"server": {A: 3}}))
    assert told.free(A) == [1]
    assert told.gone("Pod", pod("p")).free(A) == [4]


def test_18_a_ledger_rebuilt_after_a_restart_equals_the_live_one() -> None:
    """After a reservation, its binding, a forced deletion, a GPU that was away, a node that came back."""
    live, value = site(), pod("p")
    live.tell("Pod", value, pod("other", slots=1, node="n"), pod("old", node="n", plan={"server": {A: 3}}))
    live.gone("Pod", pod("old"))
    placement = live.ledger.reserve(pod_id(value), "n").placement
    bound = pod("p", node="n", plan=placement.gpus)
    live.tell("Pod", bound).gone("GPU", gpu_object("n", A)).gone("Node", node())
    gpu = gpu_object("n", A, 4, [("team-a", "old", "server", [0])])
    live.tell("Node", node()).tell("GPU", gpu)
    rebuilt = Told().tell("Pod", pod("other", slots=1, node="n"), bound)
    rebuilt.tell("GPU", gpu_object("n", B, 4), gpu).tell("Node", node())
    assert state(rebuilt) == state(live)


FORGED = {
    "of another node": {"server": {"GPU-m-0": 3}},
    "more than it asks for": {"server": {A: 4}},
    "less than it asks for": {"server": {A: 1}},
    "more than the GPU has": {"server": {A: 5}},
    "for another container": {"nobody": {A: 3}},
}


@pytest.mark.parametrize("plan", FORGED.values(), ids=list(FORGED))
def test_19_a_forged_allocation_is_not_believed(plan: dict[str, dict[str, int]]) -> None:
    """It takes nothing of another node; until the agent says where the pod is, it may be on any GPU of its own."""
    told = site().tell("Node", node("m")).tell("GPU", gpu_object("m", "GPU-m-0", 4))
    slots = 5 if plan == FORGED["more than the GPU has"] else 3
    told.tell("Pod", pod("p", slots=slots, node="n", plan=plan))
    assert told.free("GPU-m-0") == [4]
    assert told.free(A, B) == ([1, 1] if slots == 3 else [4, 4])


def test_19_the_agents_word_wins_over_a_forged_allocation() -> None:
    """The pod is charged where it is, as soon as the kubelet has admitted it; where it says it is, others may go."""
    told = site()
    forged = {"server": {A: 3}}
    told.tell("Pod", pod("p", node="n", plan=forged))
    assert told.free(A, B) == [1, 4]
    told.tell("GPU", gpu_object("n", B, 4, [("team-a", "p", "server", [0, 1, 2])]))
    told.tell("Pod", pod("p", node="n", plan=forged, started=True))
    assert told.free(A, B) == [4, 1]


def test_19_an_annotation_before_the_binding_means_nothing() -> None:
    """A pod that is on no node has nothing, whatever it says; it is placed as any other."""
    told, forged = site(), pod("p", plan={"server": {A: 3}})
    told.tell("Pod", forged)
    assert told.free(A, B) == [4, 4]
    told.ledger.reserve(pod_id(forged), "n")
    assert sorted(told.free(A, B)) == [1, 4]


def test_a_pod_without_a_uid_is_refused_and_changes_nothing() -> None:
    """Two decisions about one pod could not be told from one about two."""
    told = site()
    before = state(told)
    with pytest.raises(InputError, match="uid"):
        told.ledger.decide({**pod(), "metadata": {"name": "p", "namespace": "team-a"}}, None)
    assert state(told) == before


def test_a_place_that_was_taken_meanwhile_is_refused() -> None:
    """Filter said yes to both; the second Bind is told why not."""
    told = site(gpus=1).tell("Pod", pod("p"), pod("q"))
    assert told.ledger.decide(pod("p"), None).placement is not None
    assert told.ledger.decide(pod("q"), None).placement is not None
    told.ledger.reserve(pod_id(pod("p")), "n")
    with pytest.raises(BindError, match="team-a/q does not fit on n any more"):
        told.ledger.reserve(pod_id(pod("q")), "n")
    assert told.free(A) == [1]
