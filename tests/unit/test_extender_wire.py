"""What kube-scheduler asks and is told: the fields it writes and reads, and requests that make no sense."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson
import pytest

from meshctl.core.packing.vocabulary import Decision, Placement, Reason, Refusal
from meshctl.errors import InputError
from meshctl.extender import wire
from meshctl.extender.ports import PodId, Victims

NODES = ["fake-0", "fake-1", "fake-2", "fake-3"]
POD = {
    "metadata": {"name": "p1", "namespace": "default", "uid": "fdf48ead-29ca-426e-84de-6b6cf8be1510"},
    "spec": {"containers": [{"name": "c", "resources": {"limits": {"hpe.com/gpus": "3"}}}], "priority": 0},
    "status": {"phase": "Pending"},
}
BIND = {"PodName": "p1", "PodNamespace": "default", "PodUID": "fdf48ead-29ca-426e-84de-6b6cf8be1510", "Node": "fake-1"}
BETTER = Refusal(Reason.WORSE, "the pod would fit; fake-1 is better")
NO_ROOM = Refusal(Reason.NO_ROOM, "no GPU has 3 free")
NO_GPU = Refusal(Reason.NO_GPU, "it has no GPU")
Reader = Callable[[bytes], Any]


def by_name(**changes: Any) -> bytes:
    """A Filter request as the scheduler writes it with nodeCacheCapable, but for the pod's details."""
    return orjson.dumps({"Pod": POD, "Nodes": None, "NodeNames": NODES} | changes)


def whole(**changes: Any) -> bytes:
    """The same without nodeCacheCapable."""
    items = [{"metadata": {"name": name, "labels": {"gpu.product": "H200"}}, "status": {}} for name in NODES]
    return orjson.dumps({"Pod": POD, "Nodes": {"metadata": {}, "items": items}, "NodeNames": None} | changes)


def answered(request: bytes, decision: Decision, awaited: str = "") -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads(wire.filtered(wire.read_candidates(request), decision, awaited).body)
    return found


def decided(node: str | None, **refused: Refusal) -> Decision:
    """`refused` has _ for -."""
    placement = None if node is None else Placement(node)
    return Decision(placement, "why", {name.replace("_", "-"): refusal for name, refusal in refused.items()})


def test_a_request_by_names_has_the_pod_and_the_names_in_order() -> None:
    """The pod is handed on as it was sent."""
    asked = wire.read_candidates(by_name())
    assert (asked.pod, asked.names, asked.nodes) == (POD, NODES, None)


def test_a_request_with_whole_nodes_has_their_names() -> None:
    """Without nodeCacheCapable the nodes come as objects."""
    asked = wire.read_candidates(whole())
    assert asked.names == NODES
    assert asked.nodes is not None
    assert asked.nodes["fake-2"]["metadata"]["labels"] == {"gpu.product": "H200"}


def test_no_node_is_a_question_too() -> None:
    """A Go slice that is nil is null in the list of nodes."""
    assert wire.read_candidates(by_name(NodeNames=[])).names == []
    assert wire.read_candidates(whole(Nodes={"metadata": {}, "items": None})).names == []


def test_the_chosen_node_is_the_only_one_and_the_others_say_why_not() -> None:
    """One node passes, so that no score of the scheduler's own decides among several."""
    decision = decided("fake-1", fake_0=NO_GPU, fake_2=BETTER, fake_3=NO_ROOM)
    failed = {"fake-0": "it has no GPU", "fake-2": BETTER.message, "fake-3": NO_ROOM.message}
    expected = {
        "Nodes": None,
        "NodeNames": ["fake-1"],
        "FailedNodes": failed,
        "FailedAndUnresolvableNodes": {},
        "Error": "",
    }
    assert answered(by_name(), decision) == expected


def test_of_many_nodes_only_the_chosen_one_is_told_of() -> None:
    """The scheduler throws the others' reasons away; to write and read thousands costs more than the decision. Where no
    node fits they are the pod's Event."""
    names = [f"n{number}" for number in range(wire.TOLD + 1)]
    others = dict.fromkeys(names[1:], BETTER)
    found = answered(by_name(NodeNames=names), Decision(Placement("n0"), "why", others))
    assert (found["NodeNames"], found["FailedNodes"], found["FailedAndUnresolvableNodes"]) == (["n0"], {}, {})
    found = answered(by_name(NodeNames=names), Decision(None, "why", dict.fromkeys(names, NO_ROOM)))
    assert sorted(found["FailedAndUnresolvableNodes"]) == sorted(names)


def test_whole_nodes_are_answered_with_the_whole_node() -> None:
    """Older schedulers take the node from the answer, not from their cache."""
    found = answered(whole(), decided("fake-1", fake_0=NO_ROOM, fake_2=BETTER, fake_3=BETTER))
    assert found["NodeNames"] is None
    assert found["Nodes"]["items"] == [orjson.loads(whole())["Nodes"]["items"][1]]


def test_a_pod_that_nothing_is_refused_to_passes_everywhere() -> None:
    """It asks for no GPU: where it goes is the scheduler's decision."""
    assert answered(by_name(), decided(None))["NodeNames"] == NODES
    assert len(answered(whole(), decided(None))["Nodes"]["items"]) == len(NODES)


def test_a_pod_that_fits_nowhere_sends_nobody_away_in_vain() -> None:
    """The scheduler's preemption would evict nobody on nodes that its own filters let pass, and call that an error."""
    found = answered(by_name(), decided(None, fake_0=NO_GPU, fake_1=NO_ROOM, fake_2=NO_ROOM, fake_3=NO_ROOM))
    assert found["NodeNames"] == []
    assert found["FailedNodes"] == {}
    assert found["FailedAndUnresolvableNodes"]["fake-0"] == "it has no GPU"
    assert len(found["FailedAndUnresolvableNodes"]) == len(NODES)


def test_the_node_whose_victims_are_still_ending_may_come_to_fit() -> None:
    """While it stands in FailedNodes the scheduler waits for them, and evicts nobody else."""
    refused = decided(None, fake_0=NO_GPU, fake_1=NO_ROOM, fake_2=NO_ROOM, fake_3=NO_ROOM)
    found = answered(by_name(), refused, "fake-1")
    assert found["FailedNodes"] == {"fake-1": "no GPU has 3 free"}
    assert sorted(found["FailedAndUnresolvableNodes"]) == ["fake-0", "fake-2", "fake-3"]


def test_a_nominated_node_that_no_eviction_helps_is_given_up() -> None:
    """Its GPUs are gone: the scheduler must look for another node."""
    request = by_name(NodeNames=["fake-0"])
    assert answered(request, decided(None, fake_0=NO_GPU), "fake-0")["FailedNodes"] == {}


def test_the_chosen_node_has_the_best_score_and_those_refused_none() -> None:
    """0 to 10, as the protocol has it."""
    decision = decided("fake-1", fake_0=NO_GPU, fake_2=BETTER, fake_3=NO_ROOM)
    found = orjson.loads(wire.prioritized(wire.read_candidates(by_name()), decision).body)
    assert {one["Host"]: one["Score"] for one in found} == {"fake-0": 0, "fake-1": 10, "fake-2": 1, "fake-3": 0}


def test_a_binding_names_a_pod_of_one_life_and_a_node() -> None:
    """All four are needed."""
    pod = PodId("default", "p1", "fdf48ead-29ca-426e-84de-6b6cf8be1510")
    assert wire.read_binding(orjson.dumps(BIND)) == wire.Binding(pod, "fake-1")
    assert orjson.loads(wire.bound().body) == {"Error": ""}


def test_victims_come_by_uid_or_as_whole_pods() -> None:
    """With and without nodeCacheCapable; the answer is by UID always."""
    meta = {"fake-0": {"Pods": [{"UID": "a"}, {"UID": "b"}], "NumPDBViolations": 1}, "fake-1": {"Pods": None}}
    pods = {"fake-0": {"Pods": [{"metadata": {"uid": "a"}}, {"metadata": {"uid": "b"}}], "NumPDBViolations": 1}}
    by_uid = wire.read_preemption(by_name(NodeNameToVictims=None, NodeNameToMetaVictims=meta))
    assert by_uid.victims == {"fake-0": Victims(("a", "b"), 1), "fake-1": Victims((), 0)}
    of_pods = wire.read_preemption(by_name(NodeNameToVictims=pods, NodeNameToMetaVictims=None))
    assert of_pods.victims == {"fake-0": Victims(("a", "b"), 1)}
    assert wire.read_preemption(by_name()).victims == {}


def test_a_node_without_victims_is_left_out() -> None:
    """The scheduler would end the whole preemption with an error."""
    found = orjson.loads(wire.preempted({"fake-0": Victims((), 0), "fake-1": Victims(("a",), 2)}).body)
    assert found == {"NodeNameToMetaVictims": {"fake-1": {"Pods": [{"UID": "a"}], "NumPDBViolations": 2}}}


@pytest.mark.parametrize(
    ("verb", "field", "expected"),
    [
        ("filter", "Error", "it broke"),
        ("bind", "Error", "it broke"),
        ("preempt", "NodeNameToMetaVictims", {}),
    ],
)
def test_what_went_wrong_is_said_where_the_scheduler_reads_it(verb: str, field: str, expected: object) -> None:
    """Where it reads nothing, no node helps."""
    assert orjson.loads(wire.failed(verb, "it broke", "failed").body)[field] == expected


def test_prioritize_without_an_answer_scores_nothing() -> None:
    """Its answer is a list, with no room for words."""
    assert orjson.loads(wire.failed("prioritize", "it broke", "failed").body) == []


WRONG: Mapping[str, tuple[Reader, bytes, str]] = {
    "cut short": (wire.read_candidates, by_name()[:-30], "is no JSON"),
    "empty": (wire.read_candidates, b"", "is no JSON"),
    "no UTF-8": (wire.read_candidates, b'{"Pod": "\xff"}', "is no JSON"),
    "too deep": (wire.read_candidates, b"[" * 100_000, "is no JSON"),
    "a list": (wire.read_candidates, b"[]", "no JSON object"),
    "no pod": (wire.read_candidates, by_name(Pod=None), "Pod has no metadata"),
    "a pod that is a list": (wire.read_candidates, by_name(Pod=[]), "Pod has no metadata"),
    "no spec": (wire.read_candidates, by_name(Pod={"metadata": POD["metadata"]}), "Pod has no spec"),
    "a status that is text": (wire.read_candidates, by_name(Pod=POD | {"status": "new"}), "Pod has no status"),
    "no UID": (
        wire.read_candidates,
        by_name(Pod=POD | {"metadata": {"name": "p1", "namespace": "default"}}),
        "Pod.metadata.uid is missing",
    ),
    "a UID that is a number": (
        wire.read_candidates,
        by_name(Pod=POD | {"metadata": {"name": "p1", "namespace": "default", "uid": 7}}),
        "Pod.metadata.uid is no text",
    ),
    "neither names nor nodes": (wire.read_candidates, by_name(NodeNames=None), "neither NodeNames nor Nodes"),
    "names that are one": (wire.read_candidates, by_name(NodeNames="fake-0"), "NodeNames is no list of names"),
    "names that are numbers": (wire.read_candidates, by_name(NodeNames=["a", 1]), "NodeNames is no list of names"),
    "nodes that are a list": (wire.read_candidates, whole(Nodes=[]), "Nodes is no list of nodes"),
    "nodes that are numbers": (wire.read_candidates, whole(Nodes={"items": [1]}), "Nodes.items has no metadata.name"),
    "a node without a name": (wire.read_candidates, whole(Nodes={"items": [{"metadata": {}}]}), "has no metadata.name"),
    "a node named 7": (wire.read_candidates, whole(Nodes={"items": [{"metadata": {"name": 7}}]}), "is no text"),
    "no pod to bind": (wire.read_binding, orjson.dumps(BIND | {"PodUID": ""}), "PodUID is missing"),
    "no node to bind to": (wire.read_binding, orjson.dumps(BIND | {"Node": None}), "Node is missing"),
    "victims that are a list": (
        wire.read_preemption,
        by_name(NodeNameToMetaVictims=[1]),
        "NodeNameToMetaVictims is no object",
    ),
    "a victim without UID": (
        wire.read_preemption,
        by_name(NodeNameToMetaVictims={"n": {"Pods": [{"UID": ""}]}}),
        "NodeNameToMetaVictims[n].Pods.UID is missing",
    ),
    "victims without a list": (
        wire.read_preemption,
        by_name(NodeNameToVictims={"n": {"Pods": 3}}),
        "NodeNameToVictims[n] has no list of Pods",
    ),
    "violations in words": (
        wire.read_preemption,
        by_name(NodeNameToMetaVictims={"n": {"Pods": [], "NumPDBViolations": "two"}}),
        "NumPDBViolations is no number",
    ),
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_a_request_that_makes_no_sense_says_what_is_wrong(name: str) -> None:
    """The message names the field."""
    read, body, message = WRONG[name]
    with pytest.raises(InputError) as raised:
        read(body)
    assert message in str(raised.value)
