"""Whose Allocate it is: the agent with a model kubelet and an API server's pods, both as values, and its real parts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest

from deviceplugin.admin import AdminServer
from deviceplugin.health import GpuHealth
from deviceplugin.ledger import GONE_S
from deviceplugin.node import Saved, SavedGpu
from meshctl.address import Address
from meshctl.api.allocation import ALLOCATION
from meshctl.model import Problem
from meshctl.sharing import RESOURCE, Gpu, Isolation, Mode, MpsPhase, Sharing, Slot
from tests.harness.agent_world import SLICED, A, B, World
from tests.harness.model_kubelet import Container, Pod
from tests.harness.tools import page, until


@pytest.fixture
async def world(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    found = World(tmp_path, SLICED.model_copy(update={"isolation": getattr(request, "param", Isolation.NONE)}))
    await found.start()
    yield found
    await found.agent.stop()


def _pod(name: str, *plan: tuple[str, int], namespace: str = "x", created: str = "2026-01-01T00:00:00Z") -> Pod:
    asks = sum(count for _, count in plan) or 1
    return Pod(namespace, name, (Container("main", asks, plan=plan),), created)


@pytest.mark.parametrize("world", [Isolation.NONE, Isolation.TENANT], indirect=True)
@pytest.mark.parametrize("heard", ["nothing", "the pod", "the kubelet too"])
async def test_a_pod_of_the_same_name_as_the_last_one_gets_the_gpu_that_is_planned(world: World, heard: str) -> None:
    """A StatefulSet's: the agent has seen the last web-0 with slots, and not yet, or half, that it is gone."""
    first, again = _pod("web-0", (A, 2)), _pod("web-0", (B, 2), created="2026-01-01T00:01:00Z")
    neighbour = _pod("neighbour", (A, 1))
    assert await world.ran(neighbour) == ""
    assert await world.ran(first) == ""
    await world.looked()
    world.gone(first)
    if heard == "the kubelet too":
        world.cluster.live.append(again.object())
        await world.looked()
        world.cluster.live.pop()
    elif heard == "the pod":
        world.cluster.told()
    assert await world.ran(again) == ""
    assert world.gpus_of(again) == {B}
    assert world.gpus_of(neighbour) == {A}


@pytest.mark.parametrize("world", [Isolation.TENANT], indirect=True)
async def test_what_a_refused_pod_was_judged_by_is_not_the_next_ones(world: World) -> None:
    """A pod is refused in GetPreferredAllocation; an Allocate that comes without one is judged by the pods of now."""
    assert await world.ran(_pod("mine", (A, 1))) == ""
    assert "NoRoom" in await world.ran(_pod("big", (A, 4)))
    mine = _pod("next", namespace="x")
    world.cluster.live.append(mine.object())
    assert await world.agent.allocate(RESOURCE, [[str(Slot(A, 3))]])


async def test_what_happened_last_is_known_to_the_next_run(world: World) -> None:
    """An XID, and the agent is told to end before it has written that down."""
    world.agent.node.xid(79, B, world.agent.parts.clock.now_s())
    await world.agent.stop()
    saved = world.agent.parts.checkpoint.load(0.0)
    assert saved is not None
    assert {uuid: one.health.xids for uuid, one in saved.gpus.items()} == {A: (), B: (79,)}


async def test_a_plan_that_cannot_be_followed_is_a_problem_with_words(world: World) -> None:
    """The pod gets slots all the same, and whoever looks for the reason finds it at /readyz; it goes with the pod."""
    pod = _pod("odd").object()
    pod["metadata"]["annotations"] = {ALLOCATION: "not JSON"}
    world.cluster.live.append(pod)
    world.cluster.told()
    (problem,) = world.agent.problems()
    assert str(problem.message).startswith(f"pod x/odd: {ALLOCATION}: ")
    server = AdminServer(world.agent, lambda: [Problem("gpus", "not written")])
    await server.start(Address("127.0.0.1", 0))
    try:
        said = await asyncio.to_thread(page, f"http://{server.address}/readyz")
        assert said is not None
        assert [text.partition(":")[0] for text in orjson.loads(said)["problems"]] == ["plan", "gpus"]
    finally:
        await server.stop()
    world.cluster.live.clear()
    world.cluster.told()
    assert world.agent.problems() == ()


async def test_15_to_ask_what_an_allocation_would_be_changes_nothing(world: World) -> None:
    """The kubelet may ask for what it prefers and think better of it: whole GPUs stay free, and the next one gets them.
    The scheduler's Filter asks the same rules, and comes with the extender."""
    free = sorted(world.kubelet.healthy[RESOURCE])
    before = world.agent.node.saved(0.0), world.agent.node.ledger, world.agent.devices(RESOURCE)
    answers = [await world.agent.preferred(RESOURCE, free, [], 4) for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert (world.agent.node.saved(0.0), world.agent.node.ledger, world.agent.devices(RESOURCE)) == before


async def test_16_a_pod_that_something_else_refuses_leaves_no_reservation(world: World) -> None:
    """Its Allocate was answered, and then the kubelet refused the pod: a moment later its slots are free."""
    pod = _pod("unlucky", (A, 4))
    assert await world.ran(pod) == ""
    assert world.agent.node.ledger.used(A) == {0, 1, 2, 3}
    await world.looked()
    world.gone(pod)
    world.later(GONE_S + 1.0)
    await world.looked()
    assert world.agent.node.ledger.used(A) == set()
    assert await world.ran(_pod("next", (A, 4))) == ""


async def test_19_a_forged_annotation_takes_nothing_from_anybody(world: World) -> None:
    """One that came past admission, for a GPU that is taken: the pod is refused, the GPU's pod and the others stay."""
    mine = _pod("mine", (A, 3))
    assert await world.ran(mine) == ""
    before = world.agent.node.ledger
    assert "NoRoom" in await world.ran(_pod("forged", (A, 4), namespace="evil"))
    assert world.agent.node.ledger == before
    assert await world.ran(_pod("honest", (B, 4))) == ""
    assert world.gpus_of(mine) == {A}


async def test_a_card_that_was_taken_out_has_no_mps_daemon_that_is_wanted(tmp_path: Path) -> None:
    """Until it is known that nobody holds its slots it has; then it goes with the card."""
    card = SavedGpu(Gpu("GPU-gone", "Tesla V100", 1 << 34, (7, 0)), Sharing("p", mode=Mode.MPS), GpuHealth())
    world = World(tmp_path, saved=Saved({"GPU-gone": card}))
    world.cluster.watched = None
    await world.start()
    try:
        assert world.agent.parts.mps.status("GPU-gone").phase is not MpsPhase.OFF
        await world.looked()

        async def gone() -> bool:
            return world.agent.parts.mps.status("GPU-gone").phase is MpsPhase.OFF

        await until(gone, "its daemon is not wanted any more")
        assert set(world.agent.node.cards) == {A, B}
    finally:
        await world.agent.stop()
