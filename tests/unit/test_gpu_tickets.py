"""Tickets: what pods ask for, what the scheduler planned, and who an Allocate may be for."""

from __future__ import annotations

from typing import Any

import pytest

from deviceplugin.ledger import Grant, Ledger
from deviceplugin.tickets import LONGEST_PLAN, candidates, hidden, tickets_of
from meshctl.api.allocation import ALLOCATION, Allocation, ContainerAllocation
from meshctl.sharing import RESOURCE, Owner, Slot, Ticket
from tests.harness.model_kubelet import Container, Kind, Pod

OTHER = "hpe.com/whole"


def pod(*containers: Container, namespace: str = "x", name: str = "p", created: str = "2026-01-01T00:00:00Z") -> Pod:
    return Pod(namespace, name, containers, created)


def tickets(*pods: Pod) -> list[Ticket]:
    return [ticket for one in pods for ticket in tickets_of(one.object(), [RESOURCE, OTHER]).tickets]


def test_one_ticket_for_each_container_that_asks() -> None:
    """Init containers first, with the plan, and with the room that those behind an init container need."""
    found = tickets_of(
        pod(
            Container("fetch", 2, Kind.INIT, (("GPU-a", 2),)),
            Container("proxy", 0, Kind.SIDECAR),
            Container("warm", 1, Kind.SIDECAR, (("GPU-b", 1),)),
            Container("main", 3, plan=(("GPU-a", 2), ("GPU-b", 1))),
        ).object(),
        [RESOURCE],
    )
    order = ("2026-01-01T00:00:00Z", "x", "p")
    assert found.problems == ()
    assert found.tickets == (
        Ticket(Owner("x", "p", "fetch"), {"GPU-a": 2}, RESOURCE, 2, order, init=True, peak=3),
        Ticket(Owner("x", "p", "warm"), {"GPU-b": 1}, RESOURCE, 1, order, peak=1),
        Ticket(Owner("x", "p", "main"), {"GPU-a": 2, "GPU-b": 1}, RESOURCE, 3, order, peak=3),
    )
    assert hidden(found.tickets) == {Owner("x", "p", "fetch")}


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_pod_that_has_ended_has_no_tickets(phase: str) -> None:
    """Whatever its spec says."""
    assert tickets_of(pod(Container("main", 1)).object(phase=phase), [RESOURCE]).tickets == ()


def test_a_terminating_pod_still_has_its_tickets() -> None:
    """It may be one that the kubelet has yet to admit."""
    ending = pod(Container("main", 1)).object()
    ending["metadata"]["deletionTimestamp"] = "2026-01-01T00:01:00Z"
    assert len(tickets_of(ending, [RESOURCE]).tickets) == 1


def test_only_our_resources_count() -> None:
    """CPUs and other people's devices are not ours; 0 asks for nothing."""
    value = pod(Container("main", 0)).object()
    value["spec"]["containers"][0]["resources"]["limits"] = {"cpu": "2", "nvidia.com/gpu": "1", RESOURCE: "0"}
    assert tickets_of(value, [RESOURCE]).tickets == ()
    value["spec"]["containers"] = [{"name": "bare"}, {"name": "empty", "resources": {}}]
    del value["spec"]["initContainers"], value["status"]
    assert tickets_of(value, [RESOURCE]).tickets == ()


def annotated(text: str) -> dict[str, Any]:
    value = pod(Container("main", 3), Container("side", 1)).object()
    value["metadata"]["annotations"] = {ALLOCATION: text}
    return value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("not JSON", "Invalid JSON"),
        ('{"version": 2}', "version: Input should be less than or equal to 1"),
        (
            '{"containers": [{"name": "main", "gpus": {"GPU-a": 2}}]}',
            "container main asks for 3 hpe.com/gpus and is given 2",
        ),
        ('{"containers": [{"name": "main", "gpus": {"GPU-a": 3}}]}', "container side is not in it"),
        ('{"containers": [{"name": "ghost", "gpus": {"GPU-a": 3}}]}', "container ghost asks for no slot of this node"),
    ],
)
def test_a_plan_that_does_not_hold_is_said_and_not_followed(text: str, problem: str) -> None:
    """The containers still have tickets: they ask all the same."""
    found = tickets_of(annotated(text), [RESOURCE])
    assert [ticket.asked for ticket in found.tickets] == [3, 1]
    assert any(said.startswith(f"pod x/p: {ALLOCATION}: ") and problem in said for said in found.problems)
    followed = {ticket.owner.container: dict(ticket.gpus) for ticket in found.tickets if ticket.gpus}
    assert followed == ({"main": {"GPU-a": 3}} if "side" in problem else {})


def test_a_plan_of_any_length_is_not_read() -> None:
    """A forged one of 256 KiB, in each of 110 pods, would cost the agent its time and memory."""
    found = tickets_of(annotated(" " * 2**18), [RESOURCE])
    assert [ticket.asked for ticket in found.tickets] == [3, 1]
    assert found.problems == (f"pod x/p: {ALLOCATION}: 262144 characters are no plan (at most 16384)",)
    gpus = {f"GPU-{number:08}-2fa1-11d2-883f-0016d3cca427": 48 for number in range(2)}
    plan = Allocation(containers=tuple(ContainerAllocation(name=f"container-{n:03}", gpus=gpus) for n in range(100)))
    assert len(plan.text()) < LONGEST_PLAN, "what a scheduler writes is shorter"


def test_a_container_of_two_resources_has_no_plan() -> None:
    """The annotation does not say which GPU is for which resource."""
    value = pod(Container("main", 1, plan=(("GPU-a", 2),))).object()
    value["spec"]["containers"][0]["resources"]["limits"][OTHER] = "1"
    found = tickets_of(value, [RESOURCE, OTHER])
    assert [(ticket.resource, dict(ticket.gpus)) for ticket in found.tickets] == [(RESOURCE, {}), (OTHER, {})]
    assert "which GPU is for which" in found.problems[0]


def test_a_number_that_is_none_is_said() -> None:
    """The API server lets only whole numbers through; whatever else it is, it is not guessed."""
    value = pod(Container("main", 1)).object()
    value["spec"]["containers"][0]["resources"]["limits"][RESOURCE] = "1k"
    found = tickets_of(value, [RESOURCE])
    assert found.tickets == ()
    assert found.problems == ("pod x/p: container main asks for '1k' hpe.com/gpus, which is no whole number",)


def test_candidates_ask_for_as_many_and_hold_nothing() -> None:
    """The oldest pod first, its containers in order; nobody that the kubelet has acknowledged."""
    old = pod(Container("a", 2), Container("b", 2), Container("c", 3), name="old", created="2026-01-01T00:00:01Z")
    new = pod(Container("a", 2), namespace="b", name="new", created="2026-01-01T00:00:02Z")
    twin = pod(Container("a", 2), namespace="a", name="twin", created="2026-01-01T00:00:02Z")
    known = tickets_of(pod(Container("a", 2), name="runs").object(started=True), [RESOURCE]).tickets
    asking = [*tickets(new, twin, old), *known]
    found = candidates(asking, RESOURCE, 2, Ledger({Slot("GPU-a", 0): Owner("x", "old", "a")}))
    assert [str(ticket.owner) for ticket in found] == ["x/old[b]", "a/twin[a]", "b/new[a]"]
    assert candidates(asking, OTHER, 2, Ledger()) == ()


def test_who_seems_to_have_got_theirs_comes_last() -> None:
    """It may be wrong, so they stay candidates."""
    first, second = tickets(pod(Container("a", 1), Container("b", 1)))
    ledger = Ledger().granted([Grant((Slot("GPU-a", 0),), first)], 1.0)
    assert candidates([first, second], RESOURCE, 1, ledger) == (second, first)
