"""Plans in, Istio objects out: in which order, and what is left alone."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest

from istio.names import DESTINATION_RULE, SERVICE_ENTRY, VIRTUAL_SERVICE
from istio.render import render
from istio.steps import Written
from meshctl.errors import MeshctlError, RefusedError, UnavailableError
from meshctl.model import Mechanism, Origin, RouteId, RoutePlan
from meshctl.ports import ObjectKey
from tests.harness.istio_plans import meshed, objects
from tests.harness.istio_writer import ToldConfirmation, Writing, writing

A, B = "192.0.2.1:8000", "192.0.2.2:8000"
ROUTE = RouteId("team/resnet")
VS = ObjectKey(VIRTUAL_SERVICE, "team", "resnet")
ENTRIES = [f"apply {SERVICE_ENTRY} resnet.{size}.size" for size in ("small", "medium", "large", "default")]
RULE = f"apply {DESTINATION_RULE} resnet.size"
ROOT = f"apply {VIRTUAL_SERVICE} resnet"


def resnet(first: int = 300, **changes: Any) -> RoutePlan:
    return meshed(ROUTE, {A: first, B: 1000 - first}, **changes)


def resumed(plan: RoutePlan, at: str) -> RoutePlan:
    spec = dataclasses.replace(plan.route.spec, origin=Origin("uid-1", 1, at))
    return dataclasses.replace(plan, route=dataclasses.replace(plan.route, spec=spec))


async def in_force(it: Writing, plan: RoutePlan | None = None) -> None:
    """Put a route in force, then forget the writes."""
    it.plan(plan or resnet())
    await it.until(lambda: it.objects.find(VS) is not None, "the route is there")
    await it.settled()
    it.objects.writes.clear()


async def test_a_new_route_has_its_backends_before_its_virtual_service() -> None:
    """Nothing names a host that is not known to every gateway."""
    async with writing(Writing(confirmation=ToldConfirmation(opened=False))) as it:
        assert it.plan(resnet()) == 1
        await it.until(lambda: bool(it.confirmation.watched), "the backends are written")
        assert it.written() == [*ENTRIES, RULE]
        assert "the gateways to know" in it.writer.status().waiting[ROUTE]
        *most, last = sorted(it.confirmation.watched)
        it.confirmation.tell(most)
        await it.settled()
        assert it.objects.find(VS) is None
        it.confirmation.tell([last])
        await it.until(lambda: it.objects.find(VS) is not None, "the VirtualService is written")
        await it.settled()
        assert it.written() == [*ENTRIES, RULE, ROOT]
        assert it.writer.status().waiting == {}
        assert it.writer.in_force() == {ROUTE: it.plans[ROUTE].weights}


async def test_a_steady_plan_writes_nothing_nor_does_a_restart() -> None:
    """What is live is the state: a second writer over the same objects has nothing to do."""
    async with writing() as it:
        await in_force(it)
        assert it.plan(it.plans[ROUTE]) == 0
        assert it.plan(resnet()) == 0  # another object that says the same
        await it.settled()
        assert it.objects.writes == []
    async with writing(Writing(objects=it.objects, confirmation=ToldConfirmation(opened=False))) as again:
        again.plan(resnet())
        assert again.writer.in_force() == {ROUTE: again.plans[ROUTE].weights}
        await again.settled()
        assert again.objects.writes == []
        assert again.confirmation.watched == frozenset()


async def test_a_change_of_weights_waits_for_nothing() -> None:
    """Only the ServiceEntries are written, one write each, though nothing is confirmed."""
    async with writing() as it:
        await in_force(it)
        it.confirmation.open = False
        assert it.plan(resnet(500)) == 1
        await it.until(lambda: len(it.objects.writes) >= len(ENTRIES), "the weights are written")
        await it.settled()
        assert it.written() == ENTRIES
        assert it.writer.in_force()[ROUTE]["small"] == {A: 500, B: 500}
        assert it.writer.status().waiting == {}


async def test_another_mechanism_is_made_before_the_old_one_is_broken() -> None:
    """Subsets beside the size classes, then the switch, then the size classes go."""
    async with writing() as it:
        await in_force(it)
        it.confirmation.open = False
        it.plan(resnet(mechanism=Mechanism.SUBSETS))
        await it.until(lambda: bool(it.confirmation.watched), "the subsets are there")
        assert it.written() == [f"apply {SERVICE_ENTRY} resnet.subsets", f"apply {DESTINATION_RULE} resnet.subsets"]
        assert it.writer.in_force() == {ROUTE: resnet().weights}
        it.confirmation.tell(it.confirmation.watched)
        await it.until(lambda: ROOT in it.written(), "the VirtualService names subsets")
        await it.until(lambda: VS in {w.key for w in it.confirmation.watched}, "the gateways are to forget")
        assert not [w for w in it.written() if w.startswith("delete")]
        it.confirmation.tell(it.confirmation.watched)
        await it.until(lambda: sum(w.startswith("delete") for w in it.written()) == 5, "the old ones are gone")
        assert it.written()[3] == f"delete {DESTINATION_RULE} resnet.size"


async def test_a_route_that_is_gone_goes_from_the_front() -> None:
    """The VirtualService first; the backends when no gateway has it any more."""
    async with writing() as it:
        await in_force(it)
        it.confirmation.open = False
        assert it.plan() == 1
        await it.until(lambda: Written(VS, "") in it.confirmation.watched, "its end is to be confirmed")
        assert it.written() == [f"delete {VIRTUAL_SERVICE} resnet"]
        it.confirmation.tell([Written(VS, "")])
        await it.until(lambda: len(it.objects.writes) == 6, "the rest is gone")
        assert not any(it.objects.every(kind) for kind in (SERVICE_ENTRY, DESTINATION_RULE, VIRTUAL_SERVICE))
        await it.settled()
        assert it.writer.in_force() == {}


async def test_leftovers_of_a_route_deleted_meanwhile_are_removed_but_not_before_routes_are_known() -> None:
    """A route that is in no plan loses its objects only when there is no ModelRoute of that name."""
    it = Writing()
    for value in objects(render(resnet())):
        await it.objects.apply(value)
    it.objects.writes.clear()
    it.objects.set_missing("ModelRoute", "not listed yet")
    model_route = {
        "apiVersion": "meshctl.io/v1alpha1",
        "kind": "ModelRoute",
        "metadata": {"name": "resnet", "namespace": "team"},
    }
    it.objects.put(model_route)
    async with writing(it):
        await it.settled()
        it.plan()
        await it.settled()
        it.objects.set_missing("ModelRoute", "")
        await it.settled()
        assert it.objects.writes == []  # it may be invalid for now: people will correct it
        it.objects.remove(ObjectKey("ModelRoute", "team", "resnet"))
        await it.until(lambda: len(it.objects.writes) == 6, "all is removed")
        assert it.written()[0] == f"delete {VIRTUAL_SERVICE} resnet"


def edited(it: Writing, weight: int = 1) -> dict[str, Any]:
    """Somebody's change to our VirtualService."""
    value = copy.deepcopy(dict(it.objects.find(VS) or {}))
    value["spec"]["http"][0]["timeout"] = f"{weight}s"
    return value


async def test_what_somebody_changed_is_left_alone_until_it_is_undone() -> None:
    """A conflict, no write; the weights of what is not disputed go on; when the change is gone so is the conflict."""
    async with writing() as it:
        await in_force(it)
        before = copy.deepcopy(dict(it.objects.find(VS) or {}))
        it.objects.put(edited(it), manager="kubectl-edit")
        await it.until(lambda: ROUTE in it.writer.status().conflicts, "the conflict shows")
        assert "kubectl-edit (spec.http)" in it.writer.status().conflicts[ROUTE]
        assert "meshctl resume team/resnet" in it.writer.status().conflicts[ROUTE]
        it.plan(resnet(500), meshed("team/other", {A: 1000}, hosts=("other.example",)))
        await it.until(lambda: it.objects.find(ObjectKey(VIRTUAL_SERVICE, "team", "other")) is not None, "others go on")
        assert it.written()[:4] == ENTRIES
        assert ROOT not in it.written()
        it.objects.put(before, manager="kubectl-edit")
        await it.until(lambda: not it.writer.status().conflicts, "the conflict ends")
        assert ROOT not in it.written()


async def test_after_an_undone_change_the_next_one_of_ours_is_written() -> None:
    """The other one still owns the field, though nothing of what they said is left in it."""
    async with writing() as it:
        await in_force(it)
        before = copy.deepcopy(dict(it.objects.find(VS) or {}))
        it.objects.put(edited(it), manager="kubectl-edit")
        await it.until(lambda: ROUTE in it.writer.status().conflicts, "the conflict shows")
        it.objects.put(before, manager="kubectl-edit")
        await it.until(lambda: not it.writer.status().conflicts, "the conflict ends")
        it.plan(resnet(timeout_s=7.0))
        await it.until(lambda: ROOT in it.written(), "the new timeout is written")
        assert it.spec(VIRTUAL_SERVICE, "resnet")["http"][0]["timeout"] == "7s"  # type: ignore[index] # JSON


async def test_resume_takes_back_what_somebody_changed_once() -> None:
    """One forced write; the next change of theirs is a conflict again."""
    async with writing() as it:
        await in_force(it, resumed(resnet(), ""))
        it.objects.put(edited(it), manager="kubectl-edit")
        await it.until(lambda: ROUTE in it.writer.status().conflicts, "the conflict shows")
        it.plan(resumed(resnet(), "2026-01-01T00:00:00Z"))
        await it.until(lambda: not it.writer.status().conflicts, "it is taken back")
        await it.settled()
        assert [w.force for w in it.objects.writes if w.key == VS] == [True]
        it.objects.put(edited(it, 2), manager="kubectl-edit")
        await it.until(lambda: ROUTE in it.writer.status().conflicts, "theirs again")
        await it.settled()
        assert sum(w.key == VS for w in it.objects.writes) == 1


async def test_who_drops_the_mark_of_a_resume_is_not_written_over_for_ever() -> None:
    """Whoever puts back a copy from before the resume, mark and all: a conflict like any other, not a war."""
    async with writing() as it:
        await in_force(it)
        it.plan(resumed(resnet(), "2026-01-01T00:00:00Z"))
        await it.settled()
        it.objects.writes.clear()
        theirs = edited(it)
        del theirs["metadata"]["annotations"]["meshctl.io/resumed-at"]
        it.objects.put(theirs, manager="kustomize-controller")
        await it.until(lambda: ROUTE in it.writer.status().conflicts, "the conflict shows")
        await it.settled()
        assert it.objects.writes == []


async def test_an_object_of_somebody_else_by_that_name_is_never_written() -> None:
    """A VirtualService that was there before the route: a conflict that says what to do."""
    it = Writing()
    mine = {
        "apiVersion": "networking.istio.io/v1",
        "kind": VIRTUAL_SERVICE,
        "metadata": {"name": "resnet", "namespace": "team"},
    }
    it.objects.put({**mine, "spec": {"hosts": ["mine.example"], "http": []}}, manager="argocd-controller")
    before = it.objects.find(VS)
    async with writing(it):
        it.plan(resumed(resnet(), "2026-01-01T00:00:00Z"))
        await it.until(lambda: ROUTE in it.writer.status().conflicts, "the conflict shows")
        assert "is not meshctl's" in it.writer.status().conflicts[ROUTE]
        assert it.objects.find(VS) is before


async def test_what_is_deleted_again_and_again_is_written_with_back_off() -> None:
    """The first time at once; the second time it is a conflict, until the back-off has passed."""
    async with writing() as it:
        await in_force(it)
        it.objects.remove(VS)
        await it.until(lambda: it.objects.find(VS) is not None, "it is written again")
        await it.settled()
        it.objects.remove(VS)
        await it.until(lambda: ROUTE in it.writer.status().conflicts, "the conflict shows")
        assert it.objects.find(VS) is None
        it.clock.at_s += 61
        await it.until(lambda: it.objects.find(VS) is not None, "after the back-off")
        await it.until(lambda: not it.writer.status().conflicts, "the conflict ends")


async def test_what_was_deleted_once_and_is_there_again_follows_the_plan() -> None:
    """An accident that is over holds nothing up."""
    async with writing() as it:
        await in_force(it)
        key = ObjectKey(SERVICE_ENTRY, "team", "resnet.small.size")
        it.objects.remove(key)
        await it.until(lambda: it.objects.find(key) is not None, "it is written again")
        await it.settled()
        it.plan(resnet(500))
        await it.settled()
        assert it.writer.status().conflicts == {}
        assert it.writer.in_force()[ROUTE]["small"] == {A: 500, B: 500}


async def test_with_another_meshctl_there_is_no_war() -> None:
    """It has our own field manager: written over once, then a conflict; after the back-off it is tried again."""
    async with writing() as it:
        await in_force(it)
        rule = next(v for v in render(it.plans[ROUTE]).backends if v["kind"] == DESTINATION_RULE)

        async def other_version() -> None:
            theirs = copy.deepcopy(dict(rule))
            theirs["spec"]["trafficPolicy"]["connectionPool"]["tcp"]["connectTimeout"] = "9s"
            await it.objects.apply(theirs)
            it.objects.writes.pop()

        await other_version()
        await it.until(lambda: it.written() == [RULE], "it is written over")
        await it.settled()
        await other_version()
        await it.until(lambda: ROUTE in it.writer.status().conflicts, "the conflict shows")
        assert "another meshctl" in it.writer.status().conflicts[ROUTE]
        it.plan(resnet(500))
        await it.until(lambda: it.written() == [RULE, *ENTRIES], "what is not disputed goes on")
        await it.settled()
        assert it.written() == [RULE, *ENTRIES]
        it.clock.at_s += 61
        await it.until(lambda: not it.writer.status().conflicts, "after the back-off it is written again")
        assert it.written() == [RULE, *ENTRIES, RULE]


async def test_what_a_former_leader_wrote_is_no_dispute() -> None:
    """A replica that leads again finds what another one wrote meanwhile, and goes on from there."""
    async with writing() as it:
        await in_force(it)
        it.leads = False
        await it.until(lambda: not it.writer.leading(), "it follows")
        it.plan(resnet(500))
        await it.until(lambda: not it.writer.status().waiting, "a follower waits for nothing")
        async with writing(Writing(objects=it.objects)) as leader:
            leader.plan(resnet(600))
            await leader.settled()
        it.objects.writes.clear()
        it.leads = True
        it.plan(resnet(700))
        await it.settled()
        assert it.written() == ENTRIES
        assert it.writer.status().conflicts == {}


async def test_an_api_server_that_does_not_answer_delays_and_loses_nothing() -> None:
    """Unavailable: the status says so, the write is repeated later."""
    async with writing() as it:
        it.objects.failing = lambda verb, key: UnavailableError("no answer within 10 s")
        it.plan(resnet())
        await it.until(lambda: "no answer" in it.writer.status().waiting.get(ROUTE, ""), "it says what it waits for")
        it.objects.failing = lambda verb, key: None
        it.clock.at_s += 11
        await it.until(lambda: it.objects.find(VS) is not None, "the route is there")
        await it.settled()
        assert it.writer.status().waiting == {}


async def test_an_object_that_is_not_answered_holds_up_its_own_route_only() -> None:
    """A webhook that hangs for one object: the other routes are written, again and again, while it waits its turn."""

    def hang(verb: str, key: ObjectKey) -> MeshctlError | None:
        mine = key.kind == SERVICE_ENTRY and key.name.startswith("resnet")
        return UnavailableError(f"{key}: the webhook timed out") if mine else None

    async with writing() as it:
        it.objects.failing = hang
        vs = ObjectKey(VIRTUAL_SERVICE, "team", "other")
        it.plan(resnet(), meshed("team/other", {A: 1000}, hosts=("other.example",)))
        await it.until(lambda: it.objects.find(vs) is not None, "the other route is there")
        assert "webhook" in it.writer.status().waiting[ROUTE]
        for weight in (700, 600):
            it.plan(resnet(), meshed("team/other", {A: weight, B: 1000 - weight}, hosts=("other.example",)))
            await it.until(lambda: "team/other" not in it.writer.status().waiting, "its weights are written")
        it.objects.failing = lambda verb, key: None
        it.clock.at_s += 11
        await it.until(lambda: it.objects.find(VS) is not None, "the route is there")
        await it.settled()


async def test_what_is_refused_is_not_tried_again_and_holds_up_nobody() -> None:
    """The route is quarantined with the server's words until it changes; other routes go on."""

    def refuse(verb: str, key: ObjectKey) -> MeshctlError | None:
        attempts.append(key)
        mine = key.kind == SERVICE_ENTRY and key.name.startswith("resnet")
        return RefusedError(f"{key}: too large") if mine else None

    attempts: list[ObjectKey] = []
    async with writing() as it:
        it.objects.failing = refuse
        other = meshed("team/other", {A: 1000}, hosts=("other.example",))
        it.plan(resnet(), other)
        await it.until(lambda: ROUTE in it.writer.status().quarantined, "it is quarantined")
        await it.until(lambda: it.objects.find(ObjectKey(VIRTUAL_SERVICE, "team", "other")) is not None, "the other")
        await it.settled()
        assert "too large" in it.writer.status().quarantined[ROUTE]
        assert sum(key.name.startswith("resnet") for key in attempts) == 5  # each backend once, the rule included
        it.objects.failing = lambda verb, key: None
        it.plan(resnet(500), other)
        await it.until(lambda: it.objects.find(VS) is not None, "what changed is tried")
        await it.settled()
        assert it.writer.status().quarantined == {}


async def test_what_istio_would_not_take_is_kept_out_and_the_last_good_stays() -> None:
    """A finding quarantines the route before anything is written."""
    async with writing() as it:
        await in_force(it)
        it.plan(resnet(hosts=("not a host",)))
        await it.until(lambda: ROUTE in it.writer.status().quarantined, "it is quarantined")
        await it.settled()
        assert it.objects.writes == []
        it.plan(resnet())
        await it.settled()
        await it.until(lambda: not it.writer.status().quarantined, "the good one is back")
        assert it.objects.writes == []


async def test_a_follower_writes_nothing_and_goes_on_when_it_leads() -> None:
    """The target is kept; what is in force is known without writing."""
    async with writing(Writing(leads=False)) as it:
        it.plan(resnet())
        await it.settled()
        assert it.objects.writes == []
        it.leads = True
        await it.until(lambda: it.objects.find(VS) is not None, "the leader writes")
        it.leads = False
        it.plan(resnet(500))
        await it.settled()
        assert it.writer.in_force()[ROUTE]["small"] == {A: 300, B: 700}


async def test_without_istios_crds_it_says_so_and_goes_on_when_they_arrive() -> None:
    """No crash, no write, a reason; and no restart needed."""
    it = Writing()
    it.objects.set_missing(VIRTUAL_SERVICE, "the API server has no such kind")
    async with writing(it):
        it.plan(resnet())
        await it.until(lambda: "CRDs" in it.writer.status().waiting.get(ROUTE, ""), "it says why")
        assert it.objects.writes == []
        it.objects.set_missing(VIRTUAL_SERVICE, "")
        await it.until(lambda: it.objects.find(VS) is not None, "the route is there")


async def test_a_route_whose_gateway_does_not_exist_is_written_and_says_that_it_waits() -> None:
    """Nobody is served by it, whoever acknowledges; once the Gateway is there nothing more is to be done."""
    key = ObjectKey("Gateway", "istio-system", "ingress")
    it = Writing()
    gateway = it.objects.find(key)
    assert gateway is not None
    it.objects.remove(key)
    async with writing(it):
        await in_force(it)
        await it.until(lambda: "Gateway istio-system/ingress" in it.writer.status().waiting.get(ROUTE, ""), "it waits")
        it.objects.put(gateway)
        await it.until(lambda: not it.writer.status().waiting, "it is served")
        it.objects.remove(key)
        await it.until(lambda: ROUTE in it.writer.status().waiting, "it waits again")
        await it.settled()
        assert it.objects.writes == []


async def test_a_route_that_leaves_the_mesh_takes_its_objects_with_it() -> None:
    """Without gateways it is served by our xDS alone; a route that never was in the mesh has no objects."""
    async with writing() as it:
        await in_force(it)
        plan = resnet()
        spec = dataclasses.replace(plan.route.spec, gateways=())
        assert it.plan(dataclasses.replace(plan, route=dataclasses.replace(plan.route, spec=spec))) == 1
        await it.until(lambda: len(it.objects.writes) == 6, "all is removed")
        await it.settled()
        assert it.written()[0] == f"delete {VIRTUAL_SERVICE} resnet"


@pytest.mark.parametrize("gone", [A, B])
async def test_a_gpu_class_goes_when_nothing_names_it(gone: str) -> None:
    """With Subsets: the VirtualService stops using the class before its endpoints and its subset go."""
    both = resnet(mechanism=Mechanism.SUBSETS)
    gpus = {A: "A100", B: "L4"}
    both = dataclasses.replace(
        both,
        route=dataclasses.replace(
            both.route, endpoints=tuple(dataclasses.replace(e, gpu=gpus[e.id]) for e in both.route.endpoints)
        ),
    )
    left = dataclasses.replace(
        both,
        route=dataclasses.replace(both.route, endpoints=tuple(e for e in both.route.endpoints if e.id != gone)),
        weights={size: {e: 1000 for e in row if e != gone} for size, row in both.weights.items()},
    )
    async with writing() as it:
        await in_force(it, both)
        it.confirmation.open = False
        it.plan(left)
        await it.until(lambda: bool(it.confirmation.watched), "the gateways are to forget the class")
        assert it.written() == [ROOT]
        assert len(it.spec(DESTINATION_RULE, "resnet.subsets")["subsets"]) == 2  # type: ignore[arg-type] # JSON
        it.confirmation.tell(it.confirmation.watched)
        await it.until(lambda: len(it.written()) == 3, "the class is taken out")
        assert len(it.spec(DESTINATION_RULE, "resnet.subsets")["subsets"]) == 1  # type: ignore[arg-type] # JSON
        assert len(it.spec(SERVICE_ENTRY, "resnet.subsets")["endpoints"]) == 1  # type: ignore[arg-type] # JSON
