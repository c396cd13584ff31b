"""States of the controller in, status and Events on Kubernetes objects out."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from meshctl.controller.objectstatus import (
    CONCURRENCY,
    GAP_S,
    NUMBERS_S,
    PATIENCE_S,
    PAUSE_S,
    REFUSED_S,
    SETTLE_S,
    StatusWriter,
)
from meshctl.controller.state import State
from meshctl.core.decide import Memory, decide
from meshctl.errors import MeshctlError, RefusedError, UnavailableError
from meshctl.model import (
    DataPlaneStatus,
    EndpointSignals,
    Origin,
    Plan,
    Problem,
    ProxyStatus,
    Reason,
    ReasonCode,
    RouteId,
    RoutePlan,
    RouteSignals,
    Signal,
    Snapshot,
)
from meshctl.ports import Desired, KubeObject, ObjectKey, Observed
from meshctl.told import PER_MINUTE
from tests.harness.controller import DEADLINE_S, ManualClock, desired_route, routes
from tests.harness.objects import MemoryObjects

ID = RouteId("demo/resnet")
KEY = ObjectKey("ModelRoute", "demo", "resnet")
PROFILE = ObjectKey("ModelProfile", "demo", "resnet-t4")
GATEWAY = ProxyStatus("gw-0.istio-system", "", synced=True, mesh=True)
SERVED = DataPlaneStatus((GATEWAY,))
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@dataclass
class Told:
    """A ModelRoute in a cluster, and the writer that tells of it. Time moves when a test says so."""

    objects: MemoryObjects = field(default_factory=MemoryObjects)
    clock: ManualClock = field(default_factory=ManualClock)
    leads: bool = True
    started_s: float = 0.0
    dataplane: DataPlaneStatus = SERVED
    problems: tuple[Problem, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the RoutePlan."""
    spec: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.put({"model": "resnet50"})
        self.writer = self.another()

    def another(self) -> StatusWriter:
        """A second controller, or the first one after a restart."""
        wall = lambda: START + timedelta(seconds=self.clock.time_s - 1000.0)  # noqa: E731 (reads best where it is used)
        return StatusWriter(self.objects, self.objects, lambda: self.leads, self.clock, wall=wall)

    def put(self, spec: Mapping[str, Any], key: ObjectKey = KEY) -> KubeObject:
        metadata = {"namespace": key.namespace, "name": key.name}
        value = {"apiVersion": "meshctl.io/v1alpha1", "kind": key.kind, "metadata": metadata, "spec": dict(spec)}
        return self.objects.put(value)

    def plan(self) -> RoutePlan:
        metadata = self.live()["metadata"]
        origin = Origin(metadata["uid"], metadata["generation"])
        desired = desired_route(str(ID), gateways=("istio-system/gateway",), origin=origin, **self.spec)
        plan, _ = decide(Snapshot(routes(desired), {}), Memory(), 1000.0)
        return dataclasses.replace(plan.routes[ID], **self.changes)

    def state(self, **changes: Any) -> State:
        plan, now_s = self.plan(), self.clock.now_s()
        signals = {e.id: EndpointSignals(pending=Signal(0.0, now_s)) for e in plan.route.endpoints}
        state = State(
            now_s=now_s,
            started_s=self.started_s,
            plan=Plan({ID: plan}),
            published=True,
            desired=Desired({ID: plan.route}, self.problems),
            observed=Observed({ID: RouteSignals(endpoints=signals)}),
            dataplane=self.dataplane,
            gateways=1,
            failures=(),
            reconciles=1,
        )
        return dataclasses.replace(state, **changes)

    async def tell(self, after_s: float = 0.0, **changes: Any) -> int:
        """Let the writer see the state as it is `after_s` from now; how many writes of status that made."""
        self.clock.time_s += after_s
        before = len(self.statuses())
        await self.writer.write(self.state(**changes))
        return len(self.statuses()) - before

    def statuses(self) -> list[ObjectKey]:
        return [write.key for write in self.objects.writes if write.verb == "status"]

    def live(self, key: ObjectKey = KEY) -> KubeObject:
        found = self.objects.find(key)
        assert found is not None
        return found

    def condition(self, type_: str, key: ObjectKey = KEY) -> Mapping[str, Any]:
        (found,) = (c for c in self.live(key)["status"]["conditions"] if c["type"] == type_)
        return dict(found)

    def events(self) -> list[str]:
        return [event.reason for event in self.objects.events]


@pytest.fixture
def told() -> Told:
    return Told()


# ------------------------------------------------------------------------------------------------------------- status


async def test_a_status_says_what_holds_and_why(told: Told) -> None:
    """Conditions with generations and times, counts, attainment, and shares by size and GPU class."""
    await told.tell()
    status = told.live()["status"]
    assert {c["type"]: c["status"] for c in status["conditions"]} == {
        "Ready": "True", "Resolved": "True", "MetricsFresh": "True", "SLOFeasible": "True", "Programmed": "True",
        "Conflict": "False",
    }  # fmt: skip
    assert {c["observedGeneration"] for c in status["conditions"]} == {status["observedGeneration"]} == {1}
    assert {c["lastTransitionTime"] for c in status["conditions"]} == {"2026-01-02T03:04:05Z"}
    assert (status["endpoints"], status["readyEndpoints"]) == (2, 2)
    assert status["attainment"].endswith("%")
    assert status["worstClass"] in ("small", "large", "default")
    shares = {(s["size"], s["gpu"]): float(s["share"].rstrip("%")) for s in status["weights"]}
    assert {size for size, _ in shares} == {"small", "large", "default"}
    for size in ("small", "large", "default"):
        assert shares[size, "T4"] + shares[size, "V100"] == pytest.approx(100, abs=0.11)


async def test_a_steady_state_writes_nothing(told: Told) -> None:
    """Neither a minute of reconciles nor numbers that wobble make a write or an Event after the first."""
    told.changes = {"attainment": {"small": 0.996, "large": 0.997}}
    await told.tell()
    before, events = told.live(), told.events()
    for second in range(60):
        worst = 0.9995 - 0.009 * (second % 2)
        told.changes = {"attainment": {"small": 0.997, "large": worst}, "load_rps": 40.0 + second}
        assert await told.tell(after_s=1.0) == 0
    assert told.live() is before
    assert told.events() == events


async def test_a_restart_and_a_failover_write_nothing(told: Told) -> None:
    """Another controller that knows nothing yet leaves a status alone; one that followed finds nothing to say."""
    await told.tell()
    told.clock.time_s += 100.0
    events = len(told.objects.events)
    told.writer, told.started_s = told.another(), told.clock.time_s
    knows_nothing: dict[str, Any] = {"observed": Observed({}), "dataplane": DataPlaneStatus()}
    assert await told.tell(**knows_nothing) == 0
    assert await told.tell(after_s=SETTLE_S - 1, **knows_nothing) == 0
    assert await told.tell(after_s=SETTLE_S) == 0
    told.leads = False
    told.writer = told.another()
    told.dataplane = DataPlaneStatus((GATEWAY,), conflicts={ID: "kubectl-edit has it"})
    assert await told.tell(after_s=SETTLE_S) == 0, "it follows"
    told.leads, told.dataplane = True, SERVED
    assert await told.tell(after_s=1.0) == 0
    assert len(told.objects.events) == events


async def test_a_new_version_is_told_of_at_once_after_a_restart_too(told: Told) -> None:
    """What was never told does not wait for the moments after a start to pass."""
    await told.tell()
    told.put({"model": "resnet50", "policy": "RoundRobin"})
    told.writer, told.started_s = told.another(), told.clock.time_s
    assert await told.tell() == 1
    assert told.live()["status"]["observedGeneration"] == 2


async def test_only_a_flip_moves_the_time_of_a_transition(told: Told) -> None:
    """lastTransitionTime stays where only reason, message or generation change."""
    await told.tell()
    told.dataplane = DataPlaneStatus((GATEWAY,), conflicts={ID: "kubectl-edit changed spec.http"})
    assert await told.tell(after_s=60.0) == 1
    assert told.condition("Conflict")["lastTransitionTime"] == "2026-01-02T03:05:05Z"
    assert told.condition("Resolved")["lastTransitionTime"] == "2026-01-02T03:04:05Z"
    assert "served as the live objects say" in told.condition("Ready")["message"]


async def test_numbers_are_written_when_they_have_moved_far_and_seldom(told: Told) -> None:
    """A point of attainment is worth a write, every ten seconds at most; a condition that turns, at once."""
    told.changes = {"attainment": {"small": 1.0, "large": 1.0}}
    await told.tell()
    told.changes = {"attainment": {"small": 0.99, "large": 1.0}}
    assert await told.tell(after_s=1.0) == 0
    assert await told.tell(after_s=NUMBERS_S) == 1
    assert (told.live()["status"]["attainment"], told.live()["status"]["worstClass"]) == ("99.0%", "small")
    told.changes |= {"feasible": False}
    assert await told.tell(after_s=1.0) == 1
    assert told.condition("SLOFeasible")["status"] == "False"


async def test_weights_on_their_way_are_no_news_unless_it_lasts(told: Told) -> None:
    """Each step waits for the proxies for a moment: Programmed stays, and turns when the moment grows long."""
    await told.tell()
    told.dataplane = DataPlaneStatus((GATEWAY,), waiting={ID: "istiod has not pushed it"})
    assert await told.tell(after_s=1.0) == 0
    told.changes = {"drained": frozenset({told.plan().route.endpoints[0].id})}
    assert await told.tell(after_s=1.0) == 1, "other news is told meanwhile"
    assert told.condition("Programmed")["status"] == told.condition("Ready")["status"] == "True"
    assert await told.tell(after_s=PATIENCE_S) == 1
    assert told.condition("Programmed")["reason"] == told.condition("Ready")["reason"] == "Pending"
    assert "istiod has not pushed it" in told.condition("Programmed")["message"]


async def test_an_object_that_never_was_valid_says_so(told: Told) -> None:
    """No plan is made for it: its own faults are in Resolved, and it is not Ready."""
    broken = Problem("ModelRoute demo/resnet", "spec.slo.latency: must be a duration", ID)
    assert await told.tell(plan=Plan({}), desired=Desired({}, (broken,))) == 1
    assert "must be a duration" in told.condition("Resolved")["message"]
    assert told.condition("Ready")["status"] == "False"
    assert told.events() == ["InvalidInput"]


async def test_a_newer_version_that_is_invalid_is_observed(told: Told) -> None:
    """The last good version is served; observedGeneration says that the newest has been looked at."""
    await told.tell()
    plan = told.state().plan
    told.put({"model": 5})
    told.problems = (Problem("ModelRoute demo/resnet", "spec.model: must be a string", ID),)
    assert await told.tell(after_s=1.0, plan=plan) == 1
    assert told.live()["status"]["observedGeneration"] == 2
    assert (told.condition("Resolved")["status"], told.condition("Ready")["status"]) == ("False", "True")


async def test_a_profile_says_whether_it_is_used(told: Told) -> None:
    """Accepted, with the faults of the profile that they name."""
    told.put({"gpu": "T4"}, PROFILE)
    other = Problem("x.yaml:1:1", "ModelProfile demo/resnet-t4x: spec.gpu: is required; add it")
    told.problems = (other,)
    assert await told.tell() == 2
    assert told.condition("Accepted", PROFILE)["status"] == "True"
    told.problems = (other, Problem("ModelProfile demo/resnet-t4", "spec.service: is required; add it"))
    assert await told.tell(after_s=1.0) == 1
    assert told.condition("Accepted", PROFILE)["status"] == "False"
    assert "spec.service" in told.condition("Accepted", PROFILE)["message"]


@pytest.mark.parametrize("published", [True, False])
async def test_what_is_not_from_this_object_is_not_told_of_it(told: Told, published: bool) -> None:
    """A plan for an object of the same name that was deleted, or of a file, is not this one's; nor is no plan."""
    plan = told.state().plan
    told.objects.remove(KEY)
    told.put({"model": "resnet50"})
    assert await told.tell(plan=plan if published else Plan({}), published=published) == 0


# ------------------------------------------------------------------------------------------------------------- Events


async def test_transitions_are_told_once(told: Told) -> None:
    """Programmed, a conflict that comes and goes, an SLO missed and met again, a route suspended and resumed."""
    await told.tell()
    steps: list[Callable[[], object]] = [
        lambda: setattr(told, "dataplane", DataPlaneStatus((GATEWAY,), conflicts={ID: "kubectl-edit has it"})),
        lambda: setattr(told, "dataplane", SERVED),
        lambda: setattr(told, "changes", {"feasible": False}),
        lambda: setattr(told, "changes", {}),
        lambda: setattr(told, "spec", {"suspend": True}),
        lambda: setattr(told, "spec", {}),
        lambda: setattr(told, "dataplane", DataPlaneStatus((GATEWAY,), quarantined={ID: "weight -1"})),
    ]
    for step in steps:
        step()
        for _ in range(3):
            await told.tell(after_s=20.0)
    assert told.events() == [
        "Programmed", "Conflict", "Programmed", "ConflictEnded", "Infeasible", "Feasible", "Suspended", "Resumed",
        "Quarantined",
    ]  # fmt: skip
    conflict = told.objects.events[1]
    assert (conflict.about, conflict.type, conflict.message) == (KEY, "Warning", "kubectl-edit has it")


async def test_a_drained_endpoint_is_named_with_the_reason(told: Told) -> None:
    """Which server, which GPU, and why; and when it is tried again."""
    await told.tell()
    first = told.plan().route.endpoints[0]
    why = Reason(ReasonCode.DRAINED_ERRORS, first.id, "62% of its requests fail")
    told.changes = {"drained": frozenset({first.id}), "reasons": (why,)}
    await told.tell(after_s=1.0)
    told.changes = {}
    await told.tell(after_s=1.0)
    drained, recovered = told.objects.events[-2:]
    assert (drained.type, drained.reason) == ("Warning", "EndpointDrained")
    assert drained.message == f"{first.id} (V100) gets no requests: 62% of its requests fail"
    assert (recovered.type, recovered.reason) == ("Normal", "EndpointRecovered")


async def test_what_flutters_is_told_a_few_times_a_minute(told: Told) -> None:
    """One that says the same is not repeated within a minute, and one object has a budget."""
    await told.tell()
    ids = [e.id for e in told.plan().route.endpoints]
    for second in range(59):
        reason = Reason(ReasonCode.DRAINED_ERRORS, ids[0], f"cause {'x' * second}")
        told.changes = {"drained": frozenset(ids[: second % 2]), "reasons": (reason,)}
        await told.tell(after_s=1.0)
    assert len(told.objects.events) == PER_MINUTE
    assert told.events().count("EndpointRecovered") == 1


async def test_a_follower_tells_nothing(told: Told) -> None:
    """Not even afterwards, of what happened while another led."""
    told.leads = False
    await told.tell()
    told.changes = {"drained": frozenset({told.plan().route.endpoints[0].id})}
    await told.tell(after_s=1.0)
    assert told.objects.writes == []
    told.leads = True
    await told.tell(after_s=1.0)
    assert told.events() == ["Programmed"]


# ------------------------------------------------------------------------------------------------------------- faults


def failing(error: MeshctlError, *verbs: str) -> Callable[[str, ObjectKey], MeshctlError | None]:
    return lambda verb, key: error if verb in verbs else None


async def test_an_api_server_that_is_away_is_tried_again(told: Told) -> None:
    """Status and Event come when it is back; until then a Problem says so, and it is left alone for a moment."""
    told.objects.failing = failing(UnavailableError("PATCH: 503"), "status", "event")
    assert await told.tell() == 0
    assert "PATCH: 503" in told.writer.problems()[0].message
    told.objects.failing = lambda verb, key: None
    assert await told.tell(after_s=PAUSE_S / 2) == 0
    told.objects.failing = failing(UnavailableError("POST: 429"), "event")
    assert await told.tell(after_s=PAUSE_S) == 1
    assert told.events() == []
    told.objects.failing = lambda verb, key: None
    await told.tell(after_s=PAUSE_S)
    assert told.events() == ["Programmed"]
    assert told.writer.problems() == ()


async def test_an_object_that_is_refused_is_left_alone_and_told(told: Told) -> None:
    """A status that the API server will not take is tried seldom; other objects are not held up."""
    told.put({"gpu": "T4"}, PROFILE)
    refused = RefusedError("status: forbidden")
    told.objects.failing = lambda verb, key: refused if key == KEY else None
    assert await told.tell() == 1
    for _ in range(3):
        assert await told.tell(after_s=1.0) == 0
        assert "forbidden" in told.writer.problems()[0].message
    told.objects.failing = lambda verb, key: None
    assert await told.tell(after_s=REFUSED_S) == 1
    assert told.writer.problems() == ()


async def test_a_copy_that_is_behind_makes_no_second_write() -> None:
    """Until the watch shows what was written, what was written counts."""

    class Behind(MemoryObjects):
        """Its copy stays as it was."""

        def every(self, kind: str) -> Mapping[ObjectKey, KubeObject]:
            return self.copy.get(kind, {}) if self.copy else super().every(kind)

        copy: Mapping[str, Mapping[ObjectKey, KubeObject]] | None = None

    objects = Behind()
    told = Told(objects)
    objects.copy = {"ModelRoute": dict(objects.every("ModelRoute"))}
    assert [await told.tell(after_s=GAP_S) for _ in range(5)] == [1, 0, 0, 0, 0]
    assert told.events() == ["Programmed"]


async def test_many_objects_are_written_a_few_at_a_time() -> None:
    """However many there are, the API server sees `CONCURRENCY` requests at most."""

    class Counting(MemoryObjects):
        now = most = 0

        async def apply_status(self, wanted: KubeObject) -> KubeObject:
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0)
            self.now -= 1
            return await super().apply_status(wanted)

    objects = Counting()
    told = Told(objects)
    for i in range(100):
        told.put({"gpu": "T4"}, ObjectKey("ModelProfile", "demo", f"p{i:03d}"))
    assert await told.tell() == 101
    assert 1 < objects.most <= CONCURRENCY


async def test_the_task_writes_the_newest_state_and_ends(told: Told) -> None:
    """`update` returns at once; `stop` leaves no task behind."""
    told.writer.start()
    told.writer.update(told.state(published=False))
    told.writer.update(told.state())
    async with asyncio.timeout(DEADLINE_S):
        while not told.events():
            await told.objects.wait_changed() if not told.statuses() else await asyncio.sleep(0)
    await told.writer.stop()
    assert told.statuses() == [KEY]
