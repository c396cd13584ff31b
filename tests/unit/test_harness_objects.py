"""MemoryObjects keeps what tests rely on of the real API server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from meshctl.errors import FieldConflictError, UnavailableError
from meshctl.ports import ObjectKey, Objects, ObjectStatus
from tests.harness.objects import MemoryObjects, Write

KEY = ObjectKey("VirtualService", "default", "a")


def wanted(**spec: Any) -> dict[str, Any]:
    metadata = {"namespace": "default", "name": "a", "labels": {"ours": "yes"}}
    return {"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": metadata, "spec": spec}


async def test_applying_the_same_changes_nothing() -> None:
    """The second apply returns the very same object: no new resourceVersion, no wake-up, but it is in the log."""
    objects = MemoryObjects()
    first = await objects.apply(wanted(hosts=["a"]))
    waiter = asyncio.ensure_future(objects.wait_changed())
    await asyncio.sleep(0)
    assert await objects.apply(wanted(hosts=["a"])) is first
    await asyncio.sleep(0)
    assert not waiter.done()
    assert objects.writes == [Write("apply", KEY, changed=True), Write("apply", KEY, changed=False)]
    waiter.cancel()


async def test_a_field_of_another_manager_is_a_conflict_until_forced() -> None:
    """Who changes a field owns it; an apply that says otherwise fails as a whole, and takes it back with force."""
    objects = MemoryObjects()
    await objects.apply(wanted(hosts=["a"], http=[1]))
    live = objects.put(wanted(hosts=["b"], http=[1]), "kubectl-edit")
    with pytest.raises(FieldConflictError, match=r'conflict with "kubectl-edit": \.spec\.hosts'):
        await objects.apply(wanted(hosts=["a"], http=[2]))
    assert objects.find(KEY) is live
    forced = await objects.apply(wanted(hosts=["a"], http=[2]), force=True)
    assert forced["spec"] == {"hosts": ["a"], "http": [2]}
    assert [entry["manager"] for entry in forced["metadata"]["managedFields"]] == ["meshctl"]


async def test_what_an_apply_leaves_out_goes_and_what_others_added_stays() -> None:
    """Fields of ours alone are removed with the apply that no longer has them; others' fields are never touched."""
    objects = MemoryObjects()
    await objects.apply(wanted(hosts=["a"], exportTo=["."]))
    objects.put({**wanted(hosts=["a"], exportTo=["."]), "spec": {"hosts": ["a"], "exportTo": ["."], "tls": [1]}})
    assert (await objects.apply(wanted(hosts=["a"])))["spec"] == {"hosts": ["a"], "tls": [1]}


async def test_identity_counts_as_on_the_server() -> None:
    """The generation counts changes of the spec alone; a removed object comes back with another UID."""
    objects = MemoryObjects(wanted(hosts=["a"]))
    first = objects.find(KEY)
    assert first is not None
    objects.put({**first, "metadata": {**first["metadata"], "labels": {"ours": "no"}}})
    labelled = objects.every("VirtualService")[KEY]["metadata"]
    assert (labelled["generation"], labelled["uid"]) == (1, first["metadata"]["uid"])
    assert labelled["resourceVersion"] != first["metadata"]["resourceVersion"]
    assert objects.put(wanted(hosts=["b"]))["metadata"]["generation"] == 2
    await objects.delete(KEY, "another")
    assert objects.find(KEY) is not None
    await objects.delete(KEY, first["metadata"]["uid"])
    assert objects.put(wanted(hosts=["b"]))["metadata"]["uid"] != first["metadata"]["uid"]


async def test_status_is_written_beside_the_spec() -> None:
    """A status changes neither the generation nor the spec; a failing server takes nothing."""
    objects = MemoryObjects(wanted(hosts=["a"]))
    ports: tuple[Objects, ObjectStatus] = (objects, objects)
    await ports[1].apply_status({**wanted(), "status": {"ready": True}})
    live = ports[0].find(KEY)
    assert live is not None
    assert (live["spec"], live["status"], live["metadata"]["generation"]) == ({"hosts": ["a"]}, {"ready": True}, 1)
    assert objects.put(wanted(hosts=["b"]))["status"] == {"ready": True}
    objects.failing = lambda verb, key: UnavailableError("away")
    with pytest.raises(UnavailableError):
        await objects.apply(wanted(hosts=["c"]))
    assert [write.verb for write in objects.writes] == ["status"]
