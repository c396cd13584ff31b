"""Objects that say they are ours and are not: somebody copied one."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from istio.names import SERVICE_ENTRY
from meshctl.model import RouteId
from meshctl.ports import ObjectKey
from tests.harness.istio_plans import meshed
from tests.harness.istio_writer import Writing, writing

A, B = "192.0.2.1:8000", "192.0.2.2:8000"
ROUTE = RouteId("team/resnet")


def copied(it: Writing, **metadata: str) -> dict[str, Any]:
    """Our ServiceEntry as people copy it: label and annotation are still ours."""
    found = it.objects.find(ObjectKey(SERVICE_ENTRY, "team", "resnet.small.size"))
    assert found is not None
    value = copy.deepcopy(dict(found))
    own = {name: value["metadata"][name] for name in ("labels", "annotations")}
    # another host: nothing names it, so an object of ours would be pruned
    return {**value, "metadata": {**own, **metadata}, "spec": {**value["spec"], "hosts": ["copy.example"]}}


@pytest.mark.parametrize("place", [{"namespace": "team", "name": "backup"}, {"namespace": "other", "name": "backup"}])
async def test_a_copy_of_our_object_that_others_wrote_is_theirs(place: dict[str, str]) -> None:
    """It is not pruned, holds nothing up, and does not go with the route."""
    async with writing() as it:
        it.plan(meshed(ROUTE, {A: 300, B: 700}))
        await it.until(lambda: ROUTE in it.writer.in_force(), "the route is there")
        await it.settled()
        it.objects.writes.clear()
        theirs = it.objects.put(copied(it, **place), manager="kubectl-client-side-apply")
        it.plan(meshed(ROUTE, {A: 500, B: 500}))
        await it.settled()
        assert it.writer.status().waiting == {}
        assert it.writer.in_force()[ROUTE]["small"] == {A: 500, B: 500}
        it.plan()
        await it.until(lambda: ROUTE not in it.writer.in_force(), "the route is gone")
        await it.settled()
        assert it.objects.find(ObjectKey(SERVICE_ENTRY, place["namespace"], place["name"])) is theirs
        assert [key for key in it.objects.every(SERVICE_ENTRY) if key.name.startswith("resnet")] == []
