"""The GPU operator: what it says of each GPUSharingPolicy, what a container may ask for, and what it writes when."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from meshctl.api import gpuresources
from meshctl.controller import gpuoperator
from meshctl.controller.gpuclaims import GpuTotals
from meshctl.controller.gpuoperator import CHECK_S, REFUSED_S, GpuOperator
from meshctl.controller.metrics import Metrics
from meshctl.errors import RefusedError, UnavailableError
from meshctl.ports import KubeObject, ObjectKey
from tests.harness.cluster_objects import node
from tests.harness.controller import ManualClock
from tests.harness.gpus import NOW, condition, gpu_object
from tests.harness.manifests import sharing_policy
from tests.harness.objects import MemoryObjects
from tests.harness.tools import until

CONFIG = ObjectKey("ConfigMap", "ns", gpuresources.NAME)


@dataclass
class Operated:
    """A cluster in memory with an operator; time moves when a test says so."""

    objects: MemoryObjects = field(default_factory=MemoryObjects)
    clock: ManualClock = field(default_factory=ManualClock)
    wall: datetime = field(default_factory=lambda: datetime.fromisoformat(NOW))
    leads: bool = True

    def __post_init__(self) -> None:
        self.operator = self.another()

    def another(self) -> GpuOperator:
        """A second replica, or the first one after a restart."""

        async def read(key: ObjectKey) -> KubeObject | None:
            return self.objects.find(key)

        api, lead = self.objects, lambda: self.leads
        return GpuOperator(self.objects, api, read, lead, self.clock, namespace="ns", wall=lambda: self.wall)

    def put(self, *values: Mapping[str, Any]) -> None:
        for value in values:
            self.objects.put(value)

    def policy(self, name: str, created: str = NOW, **spec: Any) -> None:
        value = sharing_policy(name, **spec)
        value["metadata"]["creationTimestamp"] = created
        self.put(value)

    async def look(self) -> int:
        """One pass; how many writes it made."""
        before = len(self.objects.writes)
        await self.operator.look()
        return len(self.objects.writes) - before

    def status(self, name: str) -> Any:
        found = self.objects.find(ObjectKey("GPUSharingPolicy", "", name))
        assert found is not None
        return found["status"]

    def told(self, name: str, type_: str) -> tuple[str, str, str]:
        (found,) = (c for c in self.status(name)["conditions"] if c["type"] == type_)
        return found["status"], found["reason"], found["message"]

    def limits(self) -> Any:
        found = self.objects.find(CONFIG)
        return None if found is None else found["data"]

    def events(self) -> list[tuple[str, str]]:
        return [(event.about.name, event.reason) for event in self.objects.events]


def card(node_name: str, uuid: str, by: str = "", generation: int = 1, **status: Any) -> dict[str, Any]:
    """A V100; shared as generation `generation` of policy `by` says, or not at all ("")."""
    said: dict[str, Any] = {"computeCapability": "7.0", "driver": "550.54", "policy": in_force(by, generation)}
    if not by:
        said |= {"mode": None, "slots": None, "resourceName": None, "policy": None}
    return gpu_object(node_name, uuid, **{**said, **status})


def in_force(name: str, generation: int, wanted: str = "", wanted_generation: int = 0) -> dict[str, Any]:
    return {"name": name, "generation": generation, "wanted": wanted, "wantedGeneration": wanted_generation}


@pytest.fixture
def cluster() -> Operated:
    """Nodes n1 and n2, of which n1 is labelled pool=a."""
    here = Operated()
    here.put(node("n1", pool="a"), node("n2"))
    return here


# ------------------------------------------------------------------------------------------------------------- statuses


async def test_a_policy_in_force_on_every_gpu_is_programmed(cluster: Operated) -> None:
    """Counts, progress by node and conditions with times and generations; then nothing is written any more, not even
    after a restart, and not for a heartbeat."""
    cluster.policy("p", replicas=4)
    cluster.put(card("n1", "GPU-1", "p"), card("n1", "GPU-2", "p"), card("n2", "GPU-3", "p"))
    assert await cluster.look() == 3  # status, Event, ConfigMap
    status = cluster.status("p")
    assert (status["observedGeneration"], status["gpus"], status["ready"]) == (1, 3, 3)
    assert status["nodes"] == [
        {"name": "n1", "gpus": 2, "ready": 2, "message": ""},
        {"name": "n2", "gpus": 1, "ready": 1, "message": ""},
    ]
    assert cluster.told("p", "Accepted") == ("True", "Accepted", "it is for 3 GPUs of 2 nodes")
    assert cluster.told("p", "Programmed") == ("True", "Programmed", "3 of 3 GPUs shared so")
    assert cluster.told("p", "Conflict")[:2] == ("False", "NoConflict")
    assert {(c["observedGeneration"], c["lastTransitionTime"]) for c in status["conditions"]} == {(1, NOW)}
    assert cluster.events() == [("p", "Programmed")]
    cluster.wall += timedelta(minutes=1)
    cluster.put(card("n2", "GPU-3", "p", heartbeat="2026-05-04T10:01:00Z"))
    assert await cluster.look() == 0
    cluster.operator = cluster.another()
    assert await cluster.look() == 0


async def test_a_change_is_waited_for_and_says_for_whom(cluster: Operated) -> None:
    """What the agent says is passed on; an agent that has said nothing yet is waited for; the done node comes last."""
    cluster.policy("p", replicas=4)
    cluster.put(card("n1", "GPU-1", "p"), card("n1", "GPU-2", "p"), card("n2", "GPU-3", "p"))
    await cluster.look()
    cluster.policy("p", replicas=8)
    waits = condition("Shared", "False", "WaitingForPods", "waits for default/a[c] to end; until then ...")
    cluster.put(
        card("n1", "GPU-1", "p", 2),
        card("n1", "GPU-2", "p", 2),
        card("n2", "GPU-3", "p", policy=in_force("p", 1, "p", 2), conditions=[waits]),
        card("n2", "GPU-4", "p", held=[("default", "b", "c", [0])]),
        card("n2", "GPU-5"),
    )
    await cluster.look()
    status = cluster.status("p")
    assert (status["gpus"], status["ready"]) == (5, 2)
    assert [(n["name"], n["ready"]) for n in status["nodes"]] == [("n2", 0), ("n1", 2)]
    message = (
        "GPU-3: waits for default/a[c] to end; until then ...; GPU-4: waits for default/b to end;"
        " GPU-5: the agent has not taken it up yet"
    )
    assert status["nodes"][0]["message"] == message
    assert cluster.told("p", "Programmed") == ("False", "Waiting", f"2 of 5 GPUs shared so; node n2: {message}")
    assert cluster.events() == [("p", "Programmed")]


async def test_49_replicas_at_a_client_cap_of_48_are_refused_on_those_gpus(cluster: Operated) -> None:
    """The operator says so by itself, once for all such GPUs of a node; the GPU with a newer driver takes it."""
    cluster.policy("p", replicas=49)
    cluster.put(card("n1", "GPU-1"), card("n1", "GPU-2"), card("n2", "GPU-3", "p", driver="590.10"))
    await cluster.look()
    status, reason, message = cluster.told("p", "Programmed")
    assert (status, reason) == ("False", "TooManyReplicas")
    assert message.startswith("1 of 3 GPUs shared so; node n1: GPU-1, GPU-2: 49 slots are 49 clients")
    assert cluster.events() == [("p", "TooManyReplicas")]


async def test_what_only_the_agent_knows_is_a_refusal_too(cluster: Operated) -> None:
    """MIG is on: the agent's reason becomes the policy's."""
    cluster.policy("p")
    mig = condition("Shared", "False", "MigEnabled", "MIG is on")
    cluster.put(card("n1", "GPU-1", policy=in_force("", 0, "p", 1), conditions=[mig]))
    cluster.put(card("n1", "GPU-2", "p"))
    await cluster.look()
    assert cluster.told("p", "Programmed") == (
        "False",
        "MigEnabled",
        "1 of 2 GPUs shared so; node n1: GPU-1: MIG is on",
    )


async def test_a_silent_agent_is_told_of(cluster: Operated) -> None:
    """Five minutes after its last heartbeat; its GPUs stay as it said last, and so do the words from then on."""
    cluster.policy("p")
    cluster.put(card("n1", "GPU-1", "p"), card("n2", "GPU-2", "p", heartbeat="2026-05-04T10:04:30Z"))
    cluster.wall += timedelta(minutes=5)
    await cluster.look()
    assert cluster.told("p", "Programmed")[2] == "2 of 2 GPUs shared so"
    cluster.wall += timedelta(seconds=1)
    await cluster.look()
    said = f"the agent is silent since {NOW}"
    assert cluster.told("p", "Programmed") == ("True", "Programmed", f"2 of 2 GPUs shared so; node n1: {said}")
    assert [n["message"] for n in cluster.status("p")["nodes"]] == [said, ""]
    cluster.wall += timedelta(minutes=5)
    assert await cluster.look() == 1  # n2's has fallen silent, too
    assert await cluster.look() == 0


@pytest.mark.parametrize(
    ("spec", "accepted"),
    [
        (
            {"nodeSelector": {"pool": "b", "gpu": "yes"}},
            (
                "False",
                "NoNodes",
                "no node has the labels gpu=yes,pool=b: correct spec.nodeSelector, or label the nodes",
            ),
        ),
        (
            {"products": ["NVIDIA H200"], "nodeSelector": {"pool": "a"}},
            (
                "False",
                "NoGpus",
                (
                    "1 node selected, with no GPU of spec.products (NVIDIA H200);"
                    " the products there are: Tesla V100-SXM2-16GB"
                ),
            ),
        ),
        ({"products": ["NVIDIA-Tesla-V100-SXM2-16GB"]}, ("True", "Accepted", "it is for 1 GPU of 1 node")),
    ],
    ids=["no node", "no GPU", "written otherwise"],
)
async def test_a_policy_that_selects_nothing_is_not_accepted(
    cluster: Operated, spec: dict[str, Any], accepted: tuple[str, str, str]
) -> None:
    """It says which labels or products were looked for and which are there; spaces, hyphens and NVIDIA are the same."""
    cluster.policy("p", **spec)
    cluster.put(card("n1", "GPU-1"))
    await cluster.look()
    assert cluster.told("p", "Accepted") == accepted
    if accepted[0] == "False":
        assert cluster.told("p", "Programmed") == ("False", accepted[1], "see Accepted")
        assert cluster.events() == [("p", accepted[1])]


async def test_nodes_whose_agents_have_said_nothing_yet_are_no_error(cluster: Operated) -> None:
    """Nor is a GPU object without a status; when the agents speak, the policy is accepted all along."""
    cluster.policy("p")
    cluster.put({**card("n1", "GPU-1"), "status": {}})
    await cluster.look()
    said = "no agent tells of GPUs on the 2 nodes that it selects yet"
    assert cluster.told("p", "Accepted") == ("True", "Accepted", said)
    assert cluster.told("p", "Programmed") == ("Unknown", "NoGpus", said)
    assert cluster.events() == []


async def test_an_invalid_policy_says_so_and_is_for_no_gpu(cluster: Operated) -> None:
    """One that an older schema let in; the other policy has the GPU. Corrected, it is accepted again, with an Event."""
    cluster.policy("bad", priority=7, sharing="yes")
    cluster.policy("good")
    cluster.put(card("n1", "GPU-1", "good"))
    await cluster.look()
    status, reason, message = cluster.told("bad", "Accepted")
    assert (status, reason) == ("False", "Invalid")
    assert "spec.sharing: is not a field here" in message
    assert cluster.told("good", "Programmed")[0] == "True"
    cluster.policy("bad", nodeSelector={"pool": "a"}, products=["Tesla-T4"])
    await cluster.look()
    assert cluster.told("bad", "Accepted")[:2] == ("False", "NoGpus")
    cluster.policy("bad", priority=-7)
    cluster.put(card("n2", "GPU-2", "good"))
    await cluster.look()
    assert cluster.told("bad", "Accepted")[:2] == ("False", "Overruled")


@pytest.mark.parametrize(
    ("loser", "why"),
    [
        ({"priority": -1}, "whose priority 0 is higher than -1"),
        ({"created": "2026-05-04T10:00:01Z"}, f"which has the same priority and is older (since {NOW})"),
        ({}, "which has the same priority and age, and comes first by name"),
    ],
    ids=["priority", "age", "name"],
)
async def test_of_two_policies_for_one_gpu_the_loser_says_which_won_and_why(
    cluster: Operated, loser: dict[str, Any], why: str
) -> None:
    """On the GPUs that both select; the winner has no conflict; the end of it is an Event, as was its beginning."""
    cluster.policy("a", nodeSelector={"pool": "a"})
    cluster.policy("b", **loser)
    cluster.put(card("n1", "GPU-1", "a"), card("n1", "GPU-2", "a"), card("n2", "GPU-3", "b"))
    await cluster.look()
    said = f"2 GPUs (GPU-1 on n1, GPU-2 on n1) shared by policy a instead, {why}"
    assert cluster.told("b", "Conflict") == ("True", "Overruled", said)
    assert cluster.told("b", "Programmed") == ("True", "Programmed", "1 of 1 GPU shared so")
    assert cluster.told("a", "Conflict")[0] == "False"
    cluster.objects.remove(ObjectKey("GPUSharingPolicy", "", "a"))
    await cluster.look()
    assert cluster.told("b", "Conflict")[0] == "False"
    assert [event for event in cluster.events() if event[0] == "b"] == [
        ("b", "Programmed"),
        ("b", "Conflict"),
        ("b", "ConflictEnded"),
    ]


# -------------------------------------------------------------------------------------------------------- the ConfigMap


async def test_what_one_container_may_ask_for(cluster: Operated) -> None:
    """The GPU with most slots, in force or wanted; a node's GPUs where several are allowed; 0 where none is known."""
    cluster.policy("mps", replicas=4, nodeSelector={"pool": "a"})
    cluster.policy("slices", mode="TimeSlicing", severalGPUs=True, replicas=3, resourceName="x.io/gpu", priority=-1)
    cluster.policy("nowhere", resourceName="x.io/none", nodeSelector={"pool": "z"})
    cluster.put(card("n1", "GPU-1"), card("n1", "GPU-2"), card("n2", "GPU-3"), card("n2", "GPU-4"))
    await cluster.look()
    assert cluster.limits() == {"hpe.com_gpus": "4", "x.io_gpu": "6", "x.io_none": "0"}


async def test_no_limit_sinks_below_what_is_in_force(cluster: Operated) -> None:
    """Fewer replicas count when no GPU has more any more; that several GPUs were allowed, when no GPU goes on so."""
    cluster.policy("p", replicas=10, mode="TimeSlicing", severalGPUs=True)
    cards = [card("n1", uuid, "p") for uuid in ("GPU-1", "GPU-2")]
    cluster.put(*cards)
    await cluster.look()
    assert cluster.limits() == {"hpe.com_gpus": "20"}
    cluster.policy("p", replicas=5, mode="TimeSlicing")
    cluster.operator = cluster.another()
    await cluster.look()
    assert cluster.limits() == {"hpe.com_gpus": "20"}
    slots = {"total": 5, "used": 0, "free": 5, "unavailable": 0}
    cluster.put(card("n1", "GPU-1", "p", 2, slots=slots))
    assert await cluster.look() == 1  # the status
    cluster.put(card("n1", "GPU-2", "p", 2, slots=slots))
    await cluster.look()
    assert cluster.limits() == {"hpe.com_gpus": "5"}


async def test_a_resource_whose_policy_is_gone_stays_while_a_gpu_has_it(cluster: Operated) -> None:
    """The last one leaves an empty ConfigMap, so that nothing is limited by what is not there."""
    cluster.put(card("n1", "GPU-1", "gone", resourceName="x.io/gpu"))
    await cluster.look()
    assert cluster.limits() == {"x.io_gpu": "10"}
    cluster.objects.remove(ObjectKey("GPU", "", "gpu-1"))
    await cluster.look()
    assert cluster.limits() == {}
    assert await cluster.look() == 0


async def test_the_config_map_is_put_right_again(cluster: Operated) -> None:
    """A minute after somebody changed or deleted it, whatever else they wrote there stays."""
    cluster.policy("p", replicas=4)
    await cluster.look()
    assert cluster.limits() == {"hpe.com_gpus": "0"}
    live = cluster.objects.find(CONFIG)
    assert live is not None
    theirs = copy.deepcopy(dict(live)) | {"data": {"hpe.com_gpus": "99", "note": "mine"}}
    for change in (lambda: cluster.objects.put(theirs), lambda: cluster.objects.remove(CONFIG)):
        change()
        assert await cluster.look() == 0
        cluster.clock.time_s += CHECK_S
        assert await cluster.look() == 1
        assert cluster.limits()["hpe.com_gpus"] == "0"
        cluster.clock.time_s += CHECK_S
        assert await cluster.look() == 0


async def test_a_cluster_without_policies_and_gpus_is_left_as_it_is(cluster: Operated) -> None:
    """Nothing is created; a kind that is not known holds everything."""
    assert await cluster.look() == 0
    cluster.policy("p")
    for kind in ("GPU", "GPUSharingPolicy", "Node"):
        cluster.objects.set_missing(kind, "not listed yet")
        assert await cluster.look() == 0
        cluster.objects.set_missing(kind, "")
    assert await cluster.look() == 2


# ------------------------------------------------------------------------------------------------------------- replicas


async def test_only_the_leader_writes(cluster: Operated) -> None:
    """A follower writes nothing, and has no Events to tell when it leads after another has written."""
    follower = cluster.another()
    cluster.policy("p")
    cluster.put(card("n1", "GPU-1", "p"))
    cluster.leads = False
    await follower.look()
    assert cluster.objects.writes == []
    cluster.leads = True
    await cluster.look()
    before = list(cluster.objects.writes)
    await follower.look()
    assert cluster.objects.writes == before


async def test_whoever_comes_to_lead_speaks_though_nothing_else_changes(
    cluster: Operated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first look is mostly before that: people would wait for the next one, which is for other things."""
    monkeypatch.setattr(gpuoperator, "LOOK_S", 1e4)
    cluster.policy("p")
    cluster.leads = False
    cluster.operator.start()
    try:
        await until(lambda: _is(cluster.operator.totals() != GpuTotals()), "it has looked")
        assert cluster.objects.writes == []
        cluster.leads = True
        await until(lambda: _is(cluster.objects.writes != []), "it has written")
    finally:
        await cluster.operator.stop()


async def _is(it: bool) -> bool:
    return it


async def test_an_api_server_that_is_away_is_written_to_later(cluster: Operated) -> None:
    """A problem while it is, and nothing is lost or told twice: neither status nor Event nor ConfigMap."""
    cluster.policy("p")
    cluster.put(card("n1", "GPU-1", "p"))
    for verb in ("status", "event", "apply"):
        cluster.objects.failing = partial(_away, verb)
        await cluster.look()
        (problem,) = cluster.operator.problems()
        assert "away" in problem.message
    cluster.objects.failing = lambda *_: None
    await cluster.look()
    assert cluster.operator.problems() == ()
    assert [write.verb for write in cluster.objects.writes] == ["status", "event", "apply"]


def _away(when: str, verb: str, _: ObjectKey) -> UnavailableError | None:
    return UnavailableError("away") if verb == when else None


async def test_what_the_api_server_refuses_holds_up_nothing_else(cluster: Operated) -> None:
    """The refused policy is a problem, and sent again after a while; the other one and the ConfigMap are written."""
    cluster.policy("a")
    cluster.policy("b")
    refused = RefusedError("no")
    cluster.objects.failing = lambda verb, key: refused if (verb, key.name) == ("status", "a") else None
    assert await cluster.look() == 2
    assert [problem.where for problem in cluster.operator.problems()] == ["GPUSharingPolicy a"]
    cluster.objects.failing = lambda *_: None
    assert await cluster.look() == 0
    cluster.clock.time_s += REFUSED_S
    await cluster.look()
    assert cluster.told("a", "Accepted")[0] == "True"
    assert cluster.operator.problems() == ()


# -------------------------------------------------------------------------------------------------------------- metrics


async def test_metrics_count_slots_and_policies(cluster: Operated) -> None:
    """Of a follower too; and what is gone has no series any more."""
    metrics = Metrics()
    metrics.observe_gpus(cluster.operator.totals)
    cluster.policy("p")
    cluster.put(card("n1", "GPU-1", "p", held=[("default", "a", "c", [0, 1])]), card("n1", "GPU-2", "p"))
    cluster.put(card("n2", "GPU-3"))
    cluster.leads = False
    await cluster.look()
    assert _samples(metrics) == {
        ("meshctl_gpu_slots", "hpe.com/gpus", "used"): 2,
        ("meshctl_gpu_slots", "hpe.com/gpus", "free"): 18,
        ("meshctl_gpu_slots", "hpe.com/gpus", "unavailable"): 0,
        ("meshctl_gpus", "True"): 3,
        ("meshctl_gpu_policies", "Accepted", "True"): 1,
        ("meshctl_gpu_policies", "Programmed", "False"): 1,
        ("meshctl_gpu_policies", "Conflict", "False"): 1,
    }
    for name in ("gpu-1", "gpu-2", "gpu-3"):
        cluster.objects.remove(ObjectKey("GPU", "", name))
    cluster.objects.remove(ObjectKey("GPUSharingPolicy", "", "p"))
    await cluster.look()
    assert (cluster.operator.totals(), _samples(metrics)) == (GpuTotals({}, {}, {}), {})


def _samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(metrics.exposition().decode())
    found = (sample for family in families for sample in family.samples if sample.name.startswith("meshctl_gpu"))
    return {(sample.name, *sample.labels.values()): sample.value for sample in found}
