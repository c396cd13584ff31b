"""Whose Allocate it is: the agent with a model kubelet and an API server's pods, both as values, and its real parts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from meshctl.sharing import RESOURCE, Isolation, Slot
from tests.harness.agent_world import A, B, World
from tests.harness.model_kubelet import Container, Pod


@pytest.fixture
async def world(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    found = World(tmp_path, getattr(request, "param", Isolation.NONE))
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
