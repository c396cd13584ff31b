"""Faults, and what is spared: one object, one binding or one replica must not take the rest with it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

import pytest
from kubernetes.aio.client.configuration import Configuration

from meshctl.adapters.kubernetes import client as clients
from meshctl.adapters.kubernetes.client import Client
from meshctl.adapters.kubernetes.kinds import Raw
from meshctl.adapters.kubernetes.lease import Lease
from meshctl.extender.binder import KubernetesBinder, Outcome
from meshctl.extender.fence import Fence
from meshctl.extender.main import take
from meshctl.extender.ports import BindError
from meshctl.extender.views import VIEWS
from meshctl.ports import KubeObject, ObjectKey
from tests.harness.extender_objects import Told, container, node, pod, pod_id, site, uuids
from tests.harness.gpus import gpu_object


class Faulty(Client):
    """An API server with one pod, and a client that fails after (`done`) or before the binding was carried out."""

    def __init__(self, told: Told, value: dict[str, Any], *, done: bool) -> None:
        super().__init__(Configuration())
        self._told, self._value, self._done = told, value, done

    async def bind(self, pod: ObjectKey, node: str, *, annotations: Mapping[str, str], **_: Any) -> None:
        if self._done:
            self._value["spec"]["nodeName"] = node
            self._value["metadata"]["annotations"] = dict(annotations)
        raise ZeroDivisionError("a fault")

    async def apply(self, wanted: KubeObject, **_: Any) -> Raw:
        self._value["metadata"]["resourceVersion"] += "0"
        return self._value


class Listing(Client):
    """An API server with some pods; notes which of them are written to."""

    def __init__(self, *pods: dict[str, Any]) -> None:
        super().__init__(Configuration())
        self._pods, self.written = {one["metadata"]["name"]: one for one in pods}, list[str]()

    async def pages(self, *_: Any, **__: Any) -> AsyncGenerator[clients.Listing]:
        yield clients.Listing(tuple(self._pods.values()), "1")

    async def apply(self, wanted: KubeObject, **_: Any) -> Raw:
        self.written.append(wanted["metadata"]["name"])
        return self._pods[wanted["metadata"]["name"]]


class Held(Lease):
    """Ours, and nobody else's ever."""

    leading = True


@pytest.mark.parametrize("done", [False, True])
async def test_a_fault_while_a_pod_is_bound_is_found_out_about_like_a_lost_answer(done: bool) -> None:
    """Its place is free when it was not bound, and charged when it was; never neither or both."""
    told, value = site(gpus=1), pod()
    client = Faulty(told.tell("Pod", value), value, done=done)
    lease = Held(client, "ns", "lease")
    binder = KubernetesBinder(client, told.ledger, lease, wrote=lambda raw: told.tell("Pod", raw))
    if done:
        await binder.bind(pod_id(value), "n")
    else:
        with pytest.raises(BindError, match="a fault; it was not done"):
            await binder.bind(pod_id(value), "n")
    assert binder.counts[Outcome.LOST] > 0
    assert (told.free(*uuids(1)), dict(told.ledger.reserved), binder.under_way) == ([1 if done else 4], {}, 0)
    await client.close()


def test_an_object_that_can_not_be_read_keeps_no_other_from_being_told_of() -> None:
    """They come in one listing, and nothing would tell of them again."""
    told = Told()
    bad, good = node("bad", cpu="-1"), node("n")
    for kind, value in (("Node", bad), ("Node", good), ("GPU", gpu_object("n", "GPU-n-0", 4))):
        kept = VIEWS[kind].kept(value)
        take(told.ledger, VIEWS[kind].key(kept), kept)
    assert told.ledger.decide(pod(), ["bad", "n"]).placement is not None


async def test_a_take_over_writes_to_the_pods_that_may_be_bound_late_and_to_no_others() -> None:
    """Thousands may wait behind a gate, which the API server binds none of."""
    gated = pod("gated", schedulingGates=[{"name": "kueue.x-k8s.io/admission"}])
    client = Listing(pod("waits"), gated, pod("bound", node="n"), pod("plain", container()))
    shown: list[Raw] = []
    assert await Fence(client, "me", shown.append).take_over(released=False) == 1
    assert client.written == ["waits"]
    assert [raw["metadata"]["name"] for raw in shown] == ["waits", "gated", "bound", "plain", "waits"]
    await client.close()
