"""What the ledger makes of objects that come, change, contradict each other and go."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from meshctl.core.packing.vocabulary import Reason
from meshctl.extender.ports import BindError, PodId, Victims
from meshctl.extender.views import VIEWS
from meshctl.ports import ObjectKey
from tests.harness.extender_objects import NAMESPACE, Told, container, node, pod, pod_id, site, uuids
from tests.harness.gpus import condition, gpu_object
from tests.harness.manifests import profile, route

A, B = uuids()
PLAN = {"server": {A: 3}}
GOING = {"deletionTimestamp": "2026-05-04T10:00:00Z"}


def used(total: int, used: int) -> dict[str, int]:
    return {"total": total, "used": used, "free": total - used, "unavailable": 0}


# -------------------------------------------------------------------------------------------------- who is believed


def test_a_pod_that_somebody_else_bound_may_be_on_any_gpu_until_the_agent_says() -> None:
    """Without an annotation: it counts on both; then where it is; one that runs and is on none has none."""
    told = site().tell("Pod", pod(node="n"))
    assert told.free(A, B) == [1, 1]
    told.tell("GPU", gpu_object("n", A, 4, [("team-a", "p", "server", [0, 1, 2])]))
    assert told.free(A, B) == [1, 1]
    told.tell("Pod", pod(node="n", started=True))
    assert told.free(A, B) == [1, 4]
    told.tell("GPU", gpu_object("n", A, 4)).tell("Pod", pod(node="n", started=True, phase="Running"))
    assert told.free(A, B) == [4, 4]


def test_the_kubelet_may_have_given_less_than_planned_nowhere() -> None:
    """Each container by itself: one as the agent says, the other, which it does not name yet, as planned."""
    told = site(slots=10)
    value = pod("p", container("a", 3), container("b", 2), node="n", plan={"a": {A: 3}, "b": {A: 2}}, started=True)
    told.tell("Pod", value).tell("GPU", gpu_object("n", B, 10, [("team-a", "p", "a", [0, 1, 2])]))
    assert told.free(A, B) == [8, 7]


def test_a_predecessor_of_the_same_name_is_not_the_pod() -> None:
    """A StatefulSet's pod comes again before the agent has seen the old one go: its slots are still in use."""
    told = site().tell("GPU", gpu_object("n", A, 4, [("team-a", "p", "server", [0, 1, 2])]))
    assert told.free(A) == [1]
    told.tell("Pod", pod(node="n", plan={"server": {B: 3}}))
    assert told.free(A, B) == [1, 1]
    told.tell("GPU", gpu_object("n", A, 4)).tell("Pod", pod(node="n", plan={"server": {B: 3}}, started=True))
    assert told.free(A, B) == [4, 1]


def test_a_holder_that_is_on_another_node_is_its_predecessor() -> None:
    """The pod is charged where it is, and what the old one has stays taken."""
    told = site().tell("Node", node("m")).tell("GPU", gpu_object("m", "GPU-M", 4))
    told.tell("GPU", gpu_object("m", "GPU-M", 4, [("team-a", "p", "server", [0])]))
    told.tell("Pod", pod(node="n", plan=PLAN, started=True))
    assert told.free(A, "GPU-M") == [1, 3]


def test_slots_that_nobody_known_uses_are_not_free() -> None:
    """A pod that was deleted by force, and one to which slots are just promised; not one that is charged already."""
    told = site().tell("GPU", gpu_object("n", A, 4, [("team-a", "gone", "c", [3])], slots=used(4, 2)))
    assert told.free(A) == [2]
    told.tell("Pod", pod("q", slots=1, node="n", plan={"server": {A: 1}}))
    assert told.free(A) == [2]
    told.tell("GPU", gpu_object("n", A, 4, slots=used(4, 1)))
    assert told.free(A) == [3]


def test_a_reservation_is_not_who_slots_were_promised_to() -> None:
    """Its pod is on no node: the kubelet has not heard of it."""
    told = site(gpus=1).tell("GPU", gpu_object("n", A, 4, slots=used(4, 1))).tell("Pod", pod())
    told.ledger.reserve(pod_id(pod()), "n")
    told.tell("GPU", gpu_object("n", A, 4, slots=used(4, 1), driver="580"))
    assert told.free(A) == [0]


def test_a_pod_that_ended_is_believed_before_the_gpu_that_names_it() -> None:
    """The agent looks a moment later."""
    told = site().tell("GPU", gpu_object("n", A, 4, [("team-a", "p", "server", [0, 1, 2])]))
    told.tell("Pod", pod(node="n", started=True))
    assert told.free(A) == [1]
    told.tell("Pod", pod(node="n", phase="Succeeded"))
    assert told.free(A) == [4]


def test_a_pod_that_ended_elsewhere_says_nothing_of_its_predecessor() -> None:
    """That was deleted by force, and its containers may still run."""
    told = site(gpus=1).tell("Node", node("m"))
    told.tell("GPU", gpu_object("n", A, 4, [(NAMESPACE, "p", "server", [0, 1, 2])]))
    for where in ("m", ""):
        told.tell("Pod", pod("p", uid="uid-2", phase="Failed", node=where))
        assert told.free(A) == [1]
    told.tell("Pod", pod("p", uid="uid-2", phase="Failed", node="n"))
    assert told.free(A) == [4]


def test_the_slots_of_an_init_container_stay_with_its_pod() -> None:
    """No listing names it; the agent counts what it left to nobody as promised. Once."""
    value = pod("p", container("a", 1), init=[container("warm", 3)], node="n", started=True)
    value["metadata"]["annotations"] = pod(plan={"warm": {A: 3}, "a": {A: 1}})["metadata"]["annotations"]
    told = site().tell("Pod", value)
    told.tell("GPU", gpu_object("n", A, 4, [("team-a", "p", "a", [0])], slots=used(4, 3)))
    assert told.free(A) == [1]


@pytest.mark.parametrize("text", ["{", "x" * 100_000, '{"version": 1, "containers": 3}', '{"version": 9}'])
def test_an_annotation_that_is_garbage_is_none(text: str) -> None:
    """Nothing fails; the pod may be on any GPU of its node."""
    told = site().tell("Pod", pod(node="n", metadata={"annotations": {"meshctl.io/gpu-allocation": text}}))
    assert told.free(A, B) == [1, 1]


# ----------------------------------------------------------------------------------------- nodes and GPUs come and go


def test_a_gpu_object_that_vanishes_and_comes_back_is_as_before() -> None:
    """Meanwhile the node has one GPU less; what was reserved on it stays so."""
    told = site().tell("Pod", pod("p", node="n", plan=PLAN, started=True, phase="Running"), pod("q"))
    told.ledger.reserve(pod_id(pod("q")), "n")
    before = told.free(A, B)
    for uuid in (A, B):
        told.gone("GPU", gpu_object("n", uuid))
    decision = told.ledger.decide(pod("r", slots=1), ["n"])
    assert decision.refused["n"].reason is Reason.NO_GPU
    told.tell("GPU", *(gpu_object("n", uuid, 4) for uuid in (B, A)))
    assert told.free(A, B) == before == [1, 1]


def test_a_node_that_vanishes_and_comes_back_is_as_before() -> None:
    """Whether its object or its GPUs come first."""
    told = site().tell("Pod", pod("p", node="n", plan=PLAN))
    told.gone("Node", node())
    assert told.ledger.decide(pod("q"), ["n"]).refused["n"].reason is Reason.UNKNOWN_NODE
    assert told.free(A) == [0]
    told.tell("Node", node())
    assert told.free(A, B) == [1, 4]


def test_a_gpu_that_is_shared_otherwise_is_another_resource_at_once() -> None:
    """Pods that ask for it were nobody's concern before."""
    told, value = site(), pod("p", container("c", 2, "example.com/large"))
    assert not told.ledger.asks(value)
    told.tell("GPU", gpu_object("n", A, 4, resourceName="example.com/large"))
    assert told.ledger.asks(value)
    placement = told.ledger.decide(value, None).placement
    assert placement is not None
    assert placement.gpus == {"c": {A: 2}}
    told.tell("GPU", gpu_object("n", A, 4))
    assert not told.ledger.asks(value)
    assert told.ledger.asks(pod())


def test_cpu_and_memory_of_all_pods_count() -> None:
    """Of those without GPUs, too; of those that ended not."""
    told = site().tell("Pod", pod("p", container(cpu="30"), node="n"))
    asking = pod("q", container("c", 1, cpu="3"))
    assert told.ledger.decide(asking, ["n"]).refused["n"].reason is Reason.CPU
    told.tell("Pod", pod("p", container(cpu="30"), node="n", phase="Failed"))
    assert told.ledger.decide(asking, ["n"]).placement is not None


# -------------------------------------------------------------------------------------------------------- reservations


OBSTACLES: dict[str, Callable[[Told], object]] = {
    "not seen yet": lambda told: told.gone("Pod", pod()),
    "has UID other now": lambda told: told.tell("Pod", pod(uid="other")),
    "it is being deleted": lambda told: told.tell("Pod", pod(metadata=GOING)),
    "it has ended: Failed": lambda told: told.tell("Pod", pod(phase="Failed")),
    "it is bound to m already": lambda told: told.tell("Pod", pod(node="m")),
    "its binding to n is under way": lambda told: told.ledger.reserve(pod_id(pod()), "n"),
    "UnknownNode": lambda told: told.gone("Node", node()),
}


@pytest.mark.parametrize("problem", OBSTACLES)
def test_what_cannot_be_bound_is_not_reserved_and_says_why(problem: str) -> None:
    """And changes nothing."""
    told = site().tell("Pod", pod())
    OBSTACLES[problem](told)
    before = dict(told.ledger.fleet.charges)
    with pytest.raises(BindError) as caught:
        told.ledger.reserve(pod_id(pod()), "n")
    assert problem in str(caught.value) or problem == "UnknownNode"
    assert "team-a/p" in str(caught.value)
    assert dict(told.ledger.fleet.charges) == before


def test_a_pod_that_asks_for_no_gpu_is_bound_wherever_the_scheduler_says() -> None:
    """It knows CPU and memory to the byte; Filter did not look at them either. A node that is not there is none."""
    told = site().tell("Pod", big := pod("big", container(cpu="64")))
    assert told.ledger.reserve(pod_id(big), "n").placement.gpus == {}
    told.ledger.release("uid-big")
    with pytest.raises(BindError, match="does not fit on gone any more"):
        told.ledger.reserve(pod_id(big), "gone")


def test_a_reservation_becomes_the_pods_charge_when_it_is_seen() -> None:
    """Then a release does nothing: the pod is on the node."""
    told = site().tell("Pod", pod())
    placement = told.ledger.reserve(pod_id(pod()), "n").placement
    assert list(told.ledger.reserved) == ["uid-p"]
    told.tell("Pod", pod(node="n", plan=placement.gpus))
    told.ledger.release("uid-p")
    assert (dict(told.ledger.reserved), sorted(told.free(A, B))) == ({}, [1, 4])


@pytest.mark.parametrize("how", ["gone", "ended", "recreated"])
def test_a_reservation_ends_with_its_pod(how: str) -> None:
    """Whatever becomes of its binding."""
    told = site().tell("Pod", pod())
    told.ledger.reserve(pod_id(pod()), "n")
    if how == "gone":
        told.gone("Pod", pod())
    else:
        told.tell("Pod", pod(phase="Failed") if how == "ended" else pod(uid="other"))
    assert (dict(told.ledger.reserved), told.free(A, B)) == ({}, [4, 4])


def test_a_pod_whose_binding_is_under_way_is_told_the_same_node_again() -> None:
    """Its own reservation is not in its way; on other nodes it is decided anew."""
    told = site(gpus=1).tell("Node", node("m")).tell("GPU", gpu_object("m", "GPU-M", 4)).tell("Pod", pod())
    placement = told.ledger.reserve(pod_id(pod()), "n").placement
    assert told.ledger.decide(pod(), None).placement == placement
    assert told.ledger.decide(pod(), ["m", "n"]).placement == placement
    elsewhere = told.ledger.decide(pod(), ["m"]).placement
    assert elsewhere is not None
    assert elsewhere.node == "m"


def test_what_was_seen_of_a_pod_is_that_of_its_life() -> None:
    """Its node, its newest version; of another life of the name nothing."""
    told, me, other = site(), pod_id(pod()), PodId("team-a", "p", "other")
    assert (told.ledger.version(me), told.ledger.bound_to(me)) == ("", "")
    told.tell("Pod", pod(metadata={"resourceVersion": "7"}))
    assert (told.ledger.version(me), told.ledger.version(other)) == ("7", "")
    told.tell("Pod", pod(node="n"))
    assert (told.ledger.bound_to(me), told.ledger.bound_to(other)) == ("n", "")


# ------------------------------------------------------------------------------------------------------------- tenants


def isolated() -> Told:
    return site(isolation="Tenant")


def test_pods_of_two_tenants_that_ask_alike_wait_for_each_other() -> None:
    """While the first may still be before the kubelet, be it seen on the node or reserved; then nobody waits."""
    mine, other = pod("p"), pod("q", namespace="team-b")
    told = isolated().tell("Pod", mine, other)
    assert told.ledger.waits_for(pod_id(mine), "n") == ""
    told.ledger.reserve(pod_id(other), "n")
    words = "pod team-b/q of another namespace, which asks for 3 of hpe.com/gpus, too, is starting on n"
    assert told.ledger.waits_for(pod_id(mine), "n") == words
    told.tell("Pod", pod("q", namespace="team-b", node="n"))
    assert told.ledger.waits_for(pod_id(mine), "n") == words
    assert told.ledger.waits_for(pod_id(mine), "m") == ""
    told.tell("Pod", pod("q", namespace="team-b", node="n", started=True))
    assert told.ledger.waits_for(pod_id(mine), "n") == ""


def test_of_two_reservations_the_older_does_not_wait() -> None:
    """Else both would, for ever."""
    mine, other = pod("p"), pod("q", namespace="team-b")
    told = isolated().tell("Pod", mine, other)
    told.ledger.reserve(pod_id(mine), "n")
    told.ledger.reserve(pod_id(other), "n")
    assert told.ledger.waits_for(pod_id(mine), "n") == ""
    assert "team-a/p" in told.ledger.waits_for(pod_id(other), "n")


@pytest.mark.parametrize(
    "other", [pod("q"), pod("q", namespace="team-b", slots=2), pod("q", namespace="team-b", slots=0)]
)
def test_pods_that_can_be_told_apart_do_not_wait(other: dict[str, Any]) -> None:
    """Of one namespace; that ask for other numbers; that ask for none."""
    told = isolated().tell("Pod", pod("p"), other)
    told.ledger.reserve(pod_id(other), "n")
    assert told.ledger.waits_for(pod_id(pod("p")), "n") == ""


def test_where_gpus_are_not_isolated_nobody_waits() -> None:
    """Tenants may be on one GPU together there, so whose an Allocate is does not matter as much."""
    other = pod("q", namespace="team-b")
    told = site().tell("Pod", pod("p"), other)
    told.ledger.reserve(pod_id(other), "n")
    assert told.ledger.waits_for(pod_id(pod("p")), "n") == ""


def test_an_isolated_gpu_with_somebody_unknown_is_for_nobody() -> None:
    """Whose namespace that is, nobody knows for certain."""
    told = isolated().tell("GPU", gpu_object("n", A, 4, slots=used(4, 1), isolation="Tenant"))
    placement = told.ledger.decide(pod(slots=1), None).placement
    assert placement is not None
    assert placement.gpus == {"server": {B: 1}}


# --------------------------------------------------------------------------------------------------------------- models


def test_a_node_whose_gpus_are_too_slow_for_the_model_says_so() -> None:
    """The pod is one that the route's Service selects; in a request, and as it is watched."""
    told, labels = site(product="Tesla K80"), {"labels": {"app": "triton"}}
    backend = {"service": {"name": "triton", "port": 8000}}
    told.tell("ModelRoute", namespaced(route("r", model="bert", slo={"latency": "50ms"}, backend=backend))).tell(
        "ModelProfile", namespaced(profile("k80", model="bert", gpu="Tesla-K80", service={"points": {"1": "80ms"}}))
    )
    told.tell(
        "Service", {"metadata": {"name": "triton", "namespace": "team-a"}, "spec": {"selector": labels["labels"]}}
    )
    refusal = told.ledger.decide(pod(metadata=labels), ["n"]).refused["n"]
    assert refusal.reason is Reason.TOO_SLOW
    assert "bert takes 80 ms" in refusal.message
    told.tell("Pod", pod(metadata=labels), pod("other"))
    with pytest.raises(BindError, match="bert takes 80 ms"):
        told.ledger.reserve(pod_id(pod()), "n")
    assert told.ledger.reserve(pod_id(pod("other")), "n").placement.node == "n"


def namespaced(value: dict[str, Any]) -> dict[str, Any]:
    return {**value, "metadata": {**value["metadata"], "namespace": "team-a"}}


# ----------------------------------------------------------------------------------------------------------- preemption


def test_preemption_takes_who_is_on_one_gpu() -> None:
    """The scheduler would evict 2 slots of each GPU's 3; a pod of 4 needs one GPU to itself."""
    told = site()
    told.tell(
        "Pod",
        *(
            pod(name, slots=1, node="n", plan={"server": {gpu: 1}})
            for name, gpu in zip("abcd", (A, A, B, B), strict=True)
        ),
    )
    chosen = {"n": Victims(("uid-a", "uid-c"), 1), "nowhere": Victims(("uid-x",), 0)}
    found = told.ledger.preempt(pod("vip", slots=4, priority=10), chosen)
    assert found.keys() == {"n"}
    assert found["n"].pdb_violations == 1
    assert {"uid-a", "uid-c"} < set(found["n"].uids)
    assert set(found["n"].uids) in ({"uid-a", "uid-b", "uid-c"}, {"uid-a", "uid-c", "uid-d"})


def test_preemption_never_takes_an_equal() -> None:
    """A node where only equals could make room is left out, and nothing is charged otherwise than before."""
    told = site().tell(
        "Pod",
        *(pod(name, slots=3, node="n", plan={"server": {gpu: 3}}, priority=10) for name, gpu in (("a", A), ("b", B))),
    )
    before = dict(told.ledger.fleet.charges)
    assert told.ledger.preempt(pod("vip", slots=4, priority=10), {"n": Victims(("uid-x",), 0)}) == {}
    assert dict(told.ledger.fleet.charges) == before


def nominated(name: str, priority: int) -> dict[str, Any]:
    """The scheduler has evicted others from node n for it."""
    value = pod(name, slots=4, priority=priority)
    return {**value, "status": {**value["status"], "nominatedNodeName": "n"}}


def test_room_that_was_made_for_a_pod_is_not_given_to_one_that_is_no_more_important() -> None:
    """While it waits for its turn: neither by Filter nor by Bind; a more important one may have it, and so may it."""
    told = site(gpus=1).tell("Pod", nominated("vip", 10), pod("equal", slots=1, priority=10), pod("low", slots=1))
    before = dict(told.ledger.fleet.charges)
    for value in (pod("equal", slots=1, priority=10), pod("low", slots=1)):
        decision = told.ledger.decide(value, ["n"])
        assert decision.placement is None
        assert decision.refused["n"].reason is Reason.NO_ROOM
        with pytest.raises(BindError, match="does not fit on n any more"):
            told.ledger.reserve(pod_id(value), "n")
    for value in (pod("higher", slots=1, priority=11), nominated("vip", 10)):
        assert told.ledger.decide(value, ["n"]).placement is not None
    assert dict(told.ledger.fleet.charges) == before
    told.ledger.reserve(pod_id(nominated("vip", 10)), "n")


@pytest.mark.parametrize("how", ["bound elsewhere", "gone", "nominated no more", "ended", "deleted"])
def test_room_is_kept_no_longer_than_the_pod_waits_for_it(how: str) -> None:
    """Then anybody may have it."""
    told = site(gpus=1).tell("Pod", nominated("vip", 10))
    if how == "gone":
        told.gone("Pod", nominated("vip", 10))
    elif how == "deleted":
        told.tell("Pod", {**(vip := nominated("vip", 10)), "metadata": {**vip["metadata"], **GOING}})
    else:
        node, phase = "m" if how == "bound elsewhere" else "", "Failed" if how == "ended" else "Pending"
        told.tell("Pod", pod("vip", slots=4, priority=10, node=node, phase=phase))
    assert told.ledger.decide(pod("low"), ["n"]).placement is not None


def test_room_is_kept_while_the_last_victims_are_still_ending() -> None:
    """What the first of them leaves is not given away, or the second one would go for nothing."""
    told = site(gpus=1).tell("Pod", nominated("vip", 10))
    gone, ending = (pod(name, slots=2, node="n", plan={"server": {A: 2}}, metadata=GOING) for name in ("v1", "v2"))
    told.tell("Pod", gone, ending)
    assert told.ledger.awaited(nominated("vip", 10)) == "n"
    told.gone("Pod", gone)
    before = dict(told.ledger.fleet.charges)
    assert told.ledger.decide(pod("low", slots=1), ["n"]).placement is None
    assert told.ledger.decide(nominated("vip", 10), ["n"]).placement is None
    assert dict(told.ledger.fleet.charges) == before
    told.gone("Pod", ending)
    assert told.ledger.decide(nominated("vip", 10), ["n"]).placement is not None


def test_a_node_is_waited_for_only_while_less_important_pods_end_there() -> None:
    """Otherwise the scheduler would neither place the pod nor give the node up."""
    told = site(gpus=1).tell("Pod", nominated("vip", 10), pod("stays", node="n", plan=PLAN))
    assert told.ledger.awaited(nominated("vip", 10)) == ""
    told.tell("Pod", pod("equal", slots=1, node="n", priority=10, metadata=GOING))
    assert told.ledger.awaited(nominated("vip", 10)) == ""
    told.tell("Pod", pod("stays", node="n", plan=PLAN, metadata=GOING))
    assert told.ledger.awaited(nominated("vip", 10)) == "n"
    assert told.ledger.awaited(pod("vip", slots=4, priority=10)) == ""


def test_two_equals_that_room_was_made_for_do_not_wait_for_each_other() -> None:
    """There is room for one of them: the first by name has it."""
    told = site(gpus=1).tell("Pod", nominated("a", 10), nominated("b", 10))
    assert told.ledger.decide(nominated("b", 10), ["n"]).placement is None
    assert told.ledger.decide(nominated("a", 10), ["n"]).placement is not None
    assert told.ledger.reserve(pod_id(nominated("a", 10)), "n").placement.node == "n"


def test_no_two_pods_are_promised_the_place_of_one_victim() -> None:
    """The second one has others evicted, not those that go for the first already."""
    told = site(gpus=2).tell("Pod", nominated("first", 10))
    victims = [pod(f"v{uuid}", slots=4, node="n", plan={"server": {uuid: 4}}) for uuid in (A, B)]
    told.tell("Pod", {**victims[0], "metadata": {**victims[0]["metadata"], **GOING}}, victims[1])
    before, second = dict(told.ledger.fleet.charges), pod("second", slots=4, priority=10)
    found = told.ledger.preempt(second, {"n": Victims((f"uid-v{A}",), 0)})
    assert sorted(found["n"].uids) == [f"uid-v{A}", f"uid-v{B}"]
    assert dict(told.ledger.fleet.charges) == before


def test_a_pod_that_asks_for_no_gpu_may_go_anywhere() -> None:
    """No node is chosen for it, and none refused; nor are more pods evicted than the scheduler says."""
    told, value = site(), pod("p", container(cpu="1"))
    decision = told.ledger.decide(value, ["n", "m"])
    assert (decision.placement, dict(decision.refused)) == (None, {})
    chosen = {"m": Victims(("uid-x",), 0)}
    assert told.ledger.preempt(value, chosen) == chosen


# ---------------------------------------------------------------------------------------------------- what is absurd

HUGE = str(2**63 - 1)
"""The most that the API server takes, as CPU, as bytes, as GPUs."""


@pytest.mark.parametrize("name", ["n", "m"])
def test_a_pod_that_asks_for_more_than_can_be_counted_spoils_nothing(name: str) -> None:
    """Anybody may write spec.nodeName. Its node is full; others are decided on as if it were not there."""
    told = site(name="n").tell("Node", node("m")).tell("GPU", *(gpu_object("m", uuid) for uuid in uuids(2, "m")))
    told.tell("Pod", *(pod(f"p{at}", container(slots=1, cpu=HUGE, memory=HUGE), node=name) for at in range(3)))
    decision = told.ledger.decide(pod("a"), ["n", "m"])
    assert decision.placement is not None
    assert decision.placement.node == ("m" if name == "n" else "n")
    assert told.ledger.decide(pod("b", container(slots=1, cpu=HUGE)), ["n", "m"]).placement is None
    told.tell("Node", node("huge", cpu=HUGE, memory=HUGE))
    assert told.ledger.decide(pod("a"), ["n", "m"]).placement == decision.placement


@pytest.mark.parametrize("absurd", [container(slots=2**62), container(slots=1, cpu=HUGE)])
def test_what_no_node_could_ever_hold_teaches_the_policy_nothing(absurd: dict[str, Any]) -> None:
    """One pod that asks for 10^18 GPUs would outweigh all others, until the next restart."""
    usual = [pod(f"p{at}", container(slots=2, cpu="4")) for at in range(20)]
    plain, spoilt = site(gpus=2, slots=10), site(gpus=2, slots=10)
    spoilt.tell("Pod", pod("absurd", absurd))
    for told in (plain, spoilt):
        told.tell("Pod", *usual).ledger.warm_up()
        told.tell("Pod", pod("big", container(slots=1, cpu="31"), node="n", plan={"server": {A: 1}}))
    assert spoilt.ledger.fleet.stranded() == plain.ledger.fleet.stranded()
    assert plain.ledger.fleet.stranded()["n"] > 1


def test_a_replica_that_decides_nothing_keeps_nothing_of_pods_that_are_gone() -> None:
    """Months of pods come and go while another replica leads."""
    told, key = site(), ObjectKey("Pod", "team", "p")
    before = sys.getrefcount(key)
    told.ledger.take(key, VIEWS["Pod"].kept(pod()))
    assert sys.getrefcount(key) > before
    told.ledger.take(key, None)
    assert sys.getrefcount(key) == before


# -------------------------------------------------------------------------------------------------------------- figures


def test_warming_up_decides_nothing() -> None:
    """It only comes before what would be done anyway."""
    cold, warm = (site().tell("Pod", pod(), pod("q", node="n", plan=PLAN)) for _ in range(2))
    warm.ledger.warm_up()
    assert warm.ledger.decide(pod(), None) == cold.ledger.decide(pod(), None)
    assert dict(warm.ledger.fleet.charges) == dict(cold.ledger.fleet.charges)


def test_slots_by_state() -> None:
    """Used, reserved, free and closed ones sum up to all."""
    told = site().tell("Pod", pod("p", node="n", plan={"server": {A: 3}}), pod("q", slots=1))
    assert told.ledger.slots() == {"used": 3, "reserved": 0, "free": 5, "closed": 0}
    told.ledger.reserve(pod_id(pod("q")), "n")
    assert told.ledger.slots() == {"used": 3, "reserved": 1, "free": 4, "closed": 0}
    told.tell("GPU", gpu_object("n", B, 4, conditions=[condition("Healthy", "False", "Xid", "79")]))
    assert told.ledger.slots() == {"used": 3, "reserved": 1, "free": 0, "closed": 4}
    told.gone("Node", node())
    assert sum(told.ledger.slots().values()) <= 1
