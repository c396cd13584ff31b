"""What a former leader wrote, or is still writing, when this process takes over.

A binding carries the resourceVersion of the pod that its writer knew, chosen BEFORE he looked whether he leads. So
whatever he writes late, a stopped process or a request that hangs, it is for a version from before somebody else led.
A take-over therefore (1) lists all pods, consistently, and (2) writes a condition into the status of each that waits
for GPUs: its version rises, and every late binding of it fails in the API server, for good. What the list and the
writes show is in the mirror before anything is bound: nothing of the former leader is missing there.

The same write finds out what became of a binding whose answer was lost: it shows the pod as it then is, and what it
does not show will not come. docs/decisions/0008-who-may-bind.md has the argument, and what was rejected.

A condition, and not an annotation: the right to patch pods/status is a small part of the right to patch pods. Either is
a reason for the scheduler to try the pod again at once, which does no harm here, and `waker` makes use of.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from contextlib import aclosing

import structlog

from meshctl.adapters.kubernetes.client import Client
from meshctl.adapters.kubernetes.faults import AbsentError, ForbiddenError
from meshctl.adapters.kubernetes.kinds import KINDS, Raw
from meshctl.errors import RefusedError
from meshctl.extender.pods import extended
from meshctl.extender.ports import PodId
from meshctl.ports import KubeObject, ObjectKey

CONDITION = "meshctl.io/Binder"
MANAGER = "meshctl-extender"
PARALLEL = 32
"""Writes at a time; one takes the API server some 4 ms."""
_DEADLINE_S = 4.0
"""Of a write with its retries."""

log = structlog.get_logger(__name__)


class Fence:
    """`wrote` takes each pod as the API server shows it (a reflector's); `identity` is this process's, for people."""

    def __init__(self, client: Client, identity: str, wrote: Callable[[Raw], object]) -> None:
        self._client, self._identity, self._wrote = client, identity, wrote

    async def take_over(self, *, released: bool) -> int:
        """Whatever was begun before is done, and known here, or will fail. How many pods were written to: none when
        the Lease was `released`, as then nothing is under way; what was done the watch may not have told yet.

        Harmless when repeated. Raises what the first request that failed raised: then do it all again.
        """
        waiting = await self._waiting()
        if released:
            return 0
        gate = asyncio.Semaphore(PARALLEL)

        async def void(pod: PodId) -> None:
            async with gate:
                await self.void(pod)

        try:
            async with asyncio.TaskGroup() as tasks:
                for pod in waiting:
                    tasks.create_task(void(pod))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from failed
        return len(waiting)

    async def _waiting(self) -> list[PodId]:
        """The pods that may ask for GPUs and have no node, as of one moment; the mirror learns all pods of it."""
        waiting: list[PodId] = []
        pages = self._client.pages(KINDS["Pod"])
        async with aclosing(pages):
            async for page in pages:
                for raw in page.items:
                    self._wrote(raw)
                    if not raw["spec"].get("nodeName") and _may_ask(raw):
                        metadata = raw["metadata"]
                        waiting.append(PodId(metadata["namespace"], metadata["name"], metadata["uid"]))
        return waiting

    async def void(self, pod: PodId) -> bool:
        """Bindings of the versions of `pod` up to now are done, and known here, or will fail. False: the pod is gone.

        Raises RefusedError or UnavailableError when that is not certain.
        """
        # The token makes it another write each time: one that changes nothing leaves the version as it is.
        message = f"bindings from before are void; {self._identity} binds ({secrets.token_hex(4)})"
        condition = {"type": CONDITION, "status": "True", "reason": "TakenOver", "message": message}
        metadata = {"namespace": pod.namespace, "name": pod.name, "uid": pod.uid}
        kind = KINDS["Pod"]
        wanted = {
            "apiVersion": kind.api_version,
            "kind": kind.name,
            "metadata": metadata,
            "status": {"conditions": [condition]},
        }
        try:
            raw = await self._client.apply(
                wanted, subresource="status", manager=MANAGER, force=True, deadline_s=_DEADLINE_S
            )
        except AbsentError:
            return False
        except ForbiddenError as error:
            raise RefusedError(f"{error} (grant patch on pods/status)") from error
        except RefusedError:
            if await self._replaced(pod):
                return False
            raise
        self._wrote(raw)
        return True

    async def _replaced(self, pod: PodId) -> bool:
        """Another pod has its name: the API server then says that the UID can't be changed."""
        raw = await self._client.get(ObjectKey("Pod", pod.namespace, pod.name), deadline_s=_DEADLINE_S)
        if raw is not None and raw["metadata"]["uid"] == pod.uid:
            return False
        if raw is not None:
            self._wrote(raw)
        return True


def _may_ask(pod: KubeObject) -> bool:
    """Whether a container asks for any extended resource: which of them are shared GPUs the former leader may have
    known better. A pod with a gate can't be bound: the API server refuses that, and to open the gate is a write, too.
    There may be thousands of them, where something else queues pods."""
    spec = pod["spec"]
    if spec.get("schedulingGates"):
        return False
    containers = (*(spec.get("initContainers") or ()), *(spec.get("containers") or ()))
    return any(extended(container, "pod") for container in containers)
