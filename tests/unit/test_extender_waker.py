"""Who has the scheduler try pods again: which replica, and for which of them."""

from __future__ import annotations

import asyncio
from typing import Any

from meshctl.extender.ports import PodId
from meshctl.extender.views import VIEWS
from meshctl.extender.waker import Waker
from meshctl.ports import KubeObject, ObjectKey
from tests.harness.extender_objects import Told, container, node, pod, pod_id, site
from tests.harness.tools import until

REFUSED = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}


class Replica:
    """A binder that leads or not, and notes whom it wakes."""

    def __init__(self) -> None:
        self.unready = "another replica binds"
        self.woken: list[PodId] = []

    async def wake(self, pod: PodId) -> None:
        self.woken.append(pod)


def refused(name: str, **more: Any) -> dict[str, Any]:
    value = pod(name, **more)
    return {**value, "status": {**value["status"], "conditions": [REFUSED]}}


def seen(told: Told, *values: dict[str, Any]) -> dict[ObjectKey, KubeObject]:
    """What a reflector holds of them; the ledger is told, too."""
    told.tell("Pod", *values)
    return {VIEWS["Pod"].key(value): VIEWS["Pod"].kept(value) for value in values}


async def test_who_leads_wakes_pods_that_the_one_before_has_refused() -> None:
    """He gave the Lease back, so that nothing else was written to them; and this replica has run for long by then."""
    told, replica = site(), Replica()
    pods = seen(told)
    running = asyncio.create_task(Waker(told.ledger, replica, pods).run())
    await asyncio.sleep(0)
    pods |= seen(told, refused("waits"), pod("not-tried"), refused("going", metadata={"deletionTimestamp": "now"}))
    replica.unready = ""
    await until(lambda: _is(replica.woken), "the pod is woken")
    assert replica.woken == [pod_id(pod("waits"))]
    running.cancel()
    await asyncio.wait({running})


async def test_room_on_nodes_that_the_scheduler_did_not_ask_about_wakes_nobody() -> None:
    """Its node selector excludes them. What can't be read, or is a fault, harms no other pod."""
    told, replica = site(), Replica()
    replica.unready = ""
    told.tell("Node", node("small"))
    pods = seen(told, pod("picky"), pod("easy"), unreadable := pod("x", container(slots=1), resources={"requests": 1}))
    waker = Waker(told.ledger, replica, pods)
    for value, names in ((unreadable, None), (pod("picky"), ["small"]), (pod("easy"), ["small", "n"])):
        waker.refused(pod_id(value), names)
    running = asyncio.create_task(waker.run())
    await until(lambda: _is(replica.woken), "the pod is woken")
    assert replica.woken == [pod_id(pod("easy"))]
    running.cancel()
    await asyncio.wait({running})


async def _is(found: object) -> bool:
    return bool(found)
