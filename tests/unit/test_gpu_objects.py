"""The GPU object of a GPU, and which of its changes are told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from deviceplugin.ledger import Ledger, Pending
from deviceplugin.objects import (
    NODE_LABEL,
    Seen,
    acted_on,
    gpu_object,
    node_label,
    notices,
    quantity,
    said,
    stamped,
    status_of,
)
from deviceplugin.policies import Refusal, Wanted
from meshctl.api.gpu import GPU
from meshctl.sharing import Gpu, Health, Isolation, Mode, MpsPhase, MpsStatus, Owner, Sharing, Slot
from meshctl.told import conditions_of

CARD = Gpu("GPU-Ab1", "Tesla V100-SXM2-16GB", 16 << 30, (7, 0))
FOUR = Sharing("four", 3, replicas=4)
TEN = Sharing("ten", 1)
RUNNING = MpsStatus(MpsPhase.RUNNING, 77, clients=2)
SEEN = Seen(gpu=CARD, driver="580.1", sharing=FOUR, wanted=Wanted(FOUR, "four", 3), mps=RUNNING, over="")
TRAIN, SERVE = Owner("team-b", "train", "main"), Owner("team-a", "serve", "triton")
LEDGER = Ledger(
    {Slot("GPU-Ab1", 2): TRAIN, Slot("GPU-Ab1", 0): SERVE, Slot("GPU-Ab1", 1): TRAIN, Slot("GPU-2", 3): SERVE}
)
EMPTY = Ledger()
NOW, LATER = "2026-01-01T00:00:00Z", "2027-01-01T00:00:00Z"


def condition(seen: Seen, type_: str = "Shared", ledger: Ledger = EMPTY) -> tuple[str, str, str]:
    found = conditions_of(status_of(seen, ledger))[type_]
    return found["status"], found["reason"], found["message"]


def told(before: Seen | None, after: Seen, ledger: Ledger = EMPTY) -> list[tuple[str, str]]:
    old = {} if before is None else status_of(before, ledger)
    return [(notice.type, notice.reason) for notice in notices(old, status_of(after, ledger))]


def test_a_shared_gpu_as_its_object() -> None:
    """All of it: a card with three of four slots held, by two containers."""
    value = gpu_object("node-1", "uid-1", SEEN, LEDGER)
    status = value.pop("status")
    conditions = conditions_of(status)
    del status["conditions"]
    assert value == {
        "apiVersion": "meshctl.io/v1alpha1",
        "kind": "GPU",
        "metadata": {
            "name": "gpu-ab1",
            "labels": {NODE_LABEL: "node-1"},
            "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": "node-1", "uid": "uid-1"}],
        },
        "spec": {"node": "node-1", "uuid": "GPU-Ab1"},
    }
    assert status == {
        "product": "Tesla V100-SXM2-16GB",
        "memory": "16Gi",
        "computeCapability": "7.0",
        "driver": "580.1",
        "resourceName": "hpe.com/gpus",
        "mode": "MPS",
        "isolation": "None",
        "severalGPUs": False,
        "policy": {"name": "four", "generation": 3, "wanted": "", "wantedGeneration": 0},
        "slots": {"total": 4, "used": 3, "free": 1, "unavailable": 0},
        "summary": "3/4",
        "holders": [
            {"namespace": "team-a", "pod": "serve", "container": "triton", "slots": [0]},
            {"namespace": "team-b", "pod": "train", "container": "main", "slots": [1, 2]},
        ],
        "mps": {"state": "Running", "clients": 2, "restarts": 0, "message": ""},
    }
    assert {type_: found["status"] for type_, found in conditions.items()} == {
        "Healthy": "True",
        "Shared": "True",
        "WithinLimits": "True",
    }
    assert conditions["Shared"]["message"] == "MPS, 4 slots of hpe.com/gpus (policy four, generation 3)"


@pytest.mark.parametrize(
    "seen",
    [
        SEEN,
        Seen(gpu=CARD),
        replace(SEEN, wanted=Wanted(TEN, "ten", 1), withdrawn=True),
        replace(SEEN, wanted=Wanted(None, "x", 1, Refusal.TOO_MANY_REPLICAS, "w" * 5000), sharing=None),
        replace(SEEN, health=Health(False, "Xid", "x" * 5000), over="m" * 5000, mps=MpsStatus(MpsPhase.FAILED)),
        replace(SEEN, gpu=replace(CARD, product="p" * 300, memory_bytes=12_345), driver="d" * 100),
    ],
    ids=["shared", "bare", "draining", "refused", "ill", "long"],
)
@pytest.mark.parametrize("ledger", [EMPTY, LEDGER], ids=["free", "held"])
def test_every_object_is_valid(seen: Seen, ledger: Ledger) -> None:
    """By the API's own model, whatever the words are; and slots add up."""
    value = stamped(gpu_object("node-1", "", seen, ledger), {}, NOW)
    status = GPU.model_validate(value).status
    assert status is not None
    if status.slots:
        assert status.slots.total == status.slots.used + status.slots.free + status.slots.unavailable
    assert status.heartbeat == NOW


def test_promised_slots_are_used_and_have_no_holder_yet() -> None:
    """The kubelet will say whose they are."""
    status = status_of(SEEN, Ledger(pending={Slot("GPU-Ab1", 0): Pending(1.0, frozenset({"a"}))}))
    assert (status["slots"]["used"], status["summary"], "holders" in status) == (1, "1/4", False)


@pytest.mark.parametrize(
    "seen",
    [replace(SEEN, health=Health(False, "Xid", "XID 79")), replace(SEEN, withdrawn=True)],
    ids=["unhealthy", "withdrawn"],
)
def test_slots_that_nobody_gets_are_unavailable(seen: Seen) -> None:
    """All that are not held; those that are stay used."""
    assert status_of(seen, LEDGER)["slots"] == {"total": 4, "used": 3, "free": 0, "unavailable": 1}


def test_slots_of_a_gpu_without_a_policy_are_those_that_are_held() -> None:
    """Pods may hold slots longer than the agent knows how they were shared; without pods there are none."""
    bare = Seen(gpu=CARD)
    assert status_of(bare, LEDGER)["slots"] == {"total": 3, "used": 3, "free": 0, "unavailable": 0}
    assert {"slots", "summary", "mode", "mps", "policy", "driver"}.isdisjoint(status_of(bare, EMPTY))


def test_a_tenant_is_named_where_tenants_are_kept_apart() -> None:
    """And only where it is one: of two that were there before, none is."""
    apart = replace(SEEN, sharing=replace(FOUR, isolation=Isolation.TENANT))
    alone = Ledger({Slot("GPU-Ab1", 0): SERVE})
    assert status_of(apart, alone)["tenant"] == "team-a"
    assert "tenant" not in status_of(SEEN, alone)
    assert "tenant" not in status_of(apart, LEDGER)
    assert "tenant" not in status_of(apart, Ledger(pending={Slot("GPU-Ab1", 0): Pending(1.0)}))


@pytest.mark.parametrize(
    ("size", "text"),
    [(16 << 30, "16Gi"), (2 << 40, "2Ti"), (1536 << 20, "1536Mi"), (5 << 10, "5Ki"), (1000, "1000"), (0, "0")],
)
def test_memory_is_the_shortest_exact_quantity(size: int, text: str) -> None:
    """As people write it."""
    assert quantity(size) == text


def test_a_long_name_of_a_node_is_a_label_of_its_own() -> None:
    """At most 63 characters, and another one for another node."""
    long = "a." * 60 + "x"
    assert node_label("node-1") == "node-1"
    assert len(node_label(long)) <= 63
    assert node_label(long) != node_label(long + "y")
    assert node_label(long)[-1].isalnum()


# ---------------------------------------------------------------------------------------------------- condition Shared


def test_a_gpu_without_a_policy_says_so() -> None:
    """One that is going on under a policy that is gone names who is still there."""
    assert condition(Seen(gpu=CARD))[:2] == ("False", "NoPolicy")
    _, reason, message = condition(replace(SEEN, wanted=Wanted()), ledger=LEDGER)
    assert reason == "NoPolicy"
    assert "team-a/serve[triton], team-b/train[main]" in message


@pytest.mark.parametrize(("withdrawn", "reason"), [(False, "WaitingForPods"), (True, "Draining")])
def test_a_change_that_waits_says_for_whom(withdrawn: bool, reason: str) -> None:
    """What is in force until then, and what comes; the policy is named as wanted."""
    seen = replace(SEEN, wanted=Wanted(TEN, "ten", 1), withdrawn=withdrawn)
    status, why, message = condition(seen, ledger=LEDGER)
    assert (status, why) == ("False", reason)
    assert message.startswith("waits for team-a/serve[triton], team-b/train[main] to end; until then ")
    assert message.endswith("then MPS, 10 slots of hpe.com/gpus (policy ten, generation 1)")
    assert status_of(seen, LEDGER)["policy"] == {
        "name": "four",
        "generation": 3,
        "wanted": "ten",
        "wantedGeneration": 1,
    }


def test_a_gpu_that_nobody_is_on_changes_in_a_moment() -> None:
    """Which is no news; one that is only promised to somebody waits."""
    changing = replace(SEEN, wanted=Wanted(TEN, "ten", 1), withdrawn=True)
    assert condition(changing)[1] == condition(replace(changing, sharing=None))[1] == "Changing"
    assert told(SEEN, changing) == []
    promised = Ledger(pending={Slot("GPU-Ab1", 0): Pending(1.0)})
    _, reason, message = condition(changing, ledger=promised)
    assert reason == "Draining"
    assert message.startswith("waits for a container that was just given slots to end; until then no new container")


def test_of_many_holders_a_few_are_named() -> None:
    """And how many more there are."""
    many = Ledger({Slot("GPU-Ab1", n): Owner("ns", f"pod-{n}", "c") for n in range(4)})
    assert "ns/pod-2[c] and 1 more to end" in condition(replace(SEEN, wanted=Wanted(TEN, "ten", 1)), ledger=many)[2]


def test_a_refused_policy_says_why_and_what_stays() -> None:
    """With the reason of the refusal."""
    refused = Wanted(None, "big", 2, Refusal.TOO_MANY_REPLICAS, "49 slots are 49 clients")
    status, reason, message = condition(replace(SEEN, wanted=refused))
    assert (status, reason) == ("False", "TooManyReplicas")
    assert message.startswith("policy big: 49 slots are 49 clients; until then MPS, 4 slots")
    assert condition(replace(SEEN, wanted=refused, sharing=None))[2].endswith("it has no slots")


@pytest.mark.parametrize("phase", [MpsPhase.OFF, MpsPhase.STARTING, MpsPhase.FAILED])
def test_mps_without_its_daemon_is_not_shared(phase: MpsPhase) -> None:
    """In the words of who looks after it; in time, no daemon is missed."""
    seen = replace(SEEN, mps=MpsStatus(phase, message="exited with 1"))
    assert condition(seen)[:2] == ("False", f"Mps{phase}")
    assert "exited with 1" in condition(seen)[2]
    sliced = replace(FOUR, mode=Mode.TIME_SLICING)
    assert condition(replace(seen, sharing=sliced, wanted=Wanted(sliced, "four", 3)))[0] == "True"


def test_time_slicing_instead_of_mps_and_weaker_policies_are_said() -> None:
    """Where the policy is in force, too: somebody wonders."""
    found = Wanted(FOUR, "four", 3, message="TimeSlicing instead of MPS: ...", others=("a", "b"))
    message = condition(replace(SEEN, wanted=found))[2]
    assert message.endswith("; TimeSlicing instead of MPS: ...; stronger than a, b, for it too")


@pytest.mark.parametrize(("over", "status"), [(None, "Unknown"), ("", "True"), ("ns/pod[c] has 3 of 1", "False")])
def test_limits_hold_or_not_or_nobody_knows(over: str | None, status: str) -> None:
    """Unknown is not True."""
    found = condition(replace(SEEN, over=over), "WithinLimits")
    assert found[0] == status
    assert (over or "") in found[2]


# ------------------------------------------------------------------------------------------------------- what changes


def test_the_same_is_said_at_another_time() -> None:
    """Heartbeat and transition times are no difference; a number of clients is one, but nobody acts on it."""
    first, later = (stamped(gpu_object("n", "", SEEN, LEDGER), {}, when)["status"] for when in (NOW, LATER))
    assert first != later
    assert said(first) == said(later)
    busier = status_of(replace(SEEN, mps=replace(RUNNING, clients=3)), LEDGER)
    assert said(busier) != said(first)
    assert acted_on(busier) == acted_on(first)
    assert acted_on(status_of(SEEN, EMPTY)) != acted_on(first)


def test_a_transition_has_the_time_at_which_the_status_flipped() -> None:
    """Not that of each other word."""
    before = stamped(gpu_object("n", "", SEEN, EMPTY), {}, NOW)["status"]
    ill = replace(SEEN, health=Health(False, "Xid", "XID 79"))
    after = conditions_of(stamped(gpu_object("n", "", ill, EMPTY), before, LATER)["status"])
    assert after["Healthy"]["lastTransitionTime"] == LATER
    assert after["Shared"]["lastTransitionTime"] == NOW


def test_health_is_told_when_it_flips() -> None:
    """Once: not again while it recovers, but for a new cause; a new object that is well is no news."""
    ill = replace(SEEN, health=Health(False, "Xid", "XID 79"))
    recovering = replace(SEEN, health=Health(False, "Recovering", "XID 79; ..."))
    lost = replace(SEEN, health=Health(False, "Lost", "gone"))
    assert told(SEEN, ill) == [("Warning", "GpuUnhealthy")]
    assert told(ill, recovering) == []
    assert told(ill, lost) == [("Warning", "GpuUnhealthy")]
    assert told(recovering, SEEN) == [("Normal", "GpuHealthy")]
    assert told(None, ill, EMPTY)[0] == ("Warning", "GpuUnhealthy")
    assert told(SEEN, SEEN) == []


def test_a_change_of_policy_is_told_when_it_waits_and_when_it_is_in_force() -> None:
    """Whoever is waited for may change without a word."""
    waits = replace(SEEN, wanted=Wanted(TEN, "ten", 1))
    done = replace(SEEN, sharing=TEN, wanted=waits.wanted)
    assert told(SEEN, waits, LEDGER) == [("Normal", "PolicyWaits")]
    fewer = Ledger({Slot("GPU-Ab1", 0): SERVE})
    assert notices(status_of(waits, LEDGER), status_of(waits, fewer)) == ()
    assert told(waits, done, LEDGER) == told(waits, done) == [("Normal", "PolicyInForce")]
    newer = replace(waits, wanted=Wanted(replace(TEN, generation=2), "ten", 2))
    assert told(waits, newer, LEDGER) == [("Normal", "PolicyWaits")]
    assert told(None, SEEN) == [("Normal", "PolicyInForce")]
    assert told(SEEN, replace(SEEN, wanted=Wanted())) == [("Normal", "NoPolicy")]
    assert told(None, Seen(gpu=CARD)) == []


def test_a_refused_policy_is_a_warning_and_a_moment_without_knowledge_is_nothing() -> None:
    """What is not known yet is told by nobody."""
    refused = replace(SEEN, wanted=Wanted(None, "big", 2, Refusal.TOO_MANY_REPLICAS, "49"))
    unknown = replace(SEEN, wanted=Wanted(refusal=Refusal.POLICIES_UNKNOWN, message="not yet"))
    assert told(SEEN, refused) == [("Warning", "TooManyReplicas")]
    assert told(SEEN, unknown) == []


def test_a_dead_daemon_is_told_as_bad_health_only() -> None:
    """Neither its end nor its new start is a change of policy."""
    dead: dict[str, Any] = {"mps": MpsStatus(MpsPhase.FAILED), "health": Health(False, "MpsFailed", "died")}
    assert told(SEEN, replace(SEEN, **dead)) == [("Warning", "GpuUnhealthy")]
    assert told(replace(SEEN, **dead), SEEN) == [("Normal", "GpuHealthy")]


def test_too_many_processes_are_a_warning_once() -> None:
    """Their end is told by the condition."""
    over = replace(SEEN, over="ns/pod[c] has 3 of 1")
    assert told(SEEN, over) == [("Warning", "OverLimits")]
    assert told(over, replace(SEEN, over="ns/pod[c] has 4 of 1")) == told(over, SEEN) == []
