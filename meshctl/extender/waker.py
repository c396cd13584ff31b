"""Has the scheduler try pods again that it was refused a place for, once they have one; `waiting` says why and whom."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import structlog

from meshctl.errors import InputError, MeshctlError
from meshctl.extender.binder import KubernetesBinder
from meshctl.extender.books import uid_of
from meshctl.extender.ledger import Ledger
from meshctl.extender.pods import ended, node_of
from meshctl.extender.ports import PodId
from meshctl.extender.views import is_refusal
from meshctl.extender.waiting import EVERY_S, Waiting
from meshctl.ports import KubeObject, ObjectKey

log = structlog.get_logger(__name__)


class Waker:
    """`pods` is the reflector's, live."""

    def __init__(self, ledger: Ledger, binder: KubernetesBinder, pods: Mapping[ObjectKey, KubeObject]) -> None:
        self._ledger, self._binder, self._pods = ledger, binder, pods
        self._waiting = Waiting()

    def refused(self, pod: PodId) -> None:
        """The scheduler was told that it fits nowhere."""
        self._waiting.refused(pod, time.monotonic())

    async def run(self) -> None:
        """Never returns."""
        for key, pod in self._pods.items():  # another replica may have refused it
            if _refused(pod) and not node_of(pod) and not ended(pod):
                self.refused(PodId(key.namespace, key.name, uid_of(pod)))
        while True:
            await asyncio.sleep(EVERY_S)
            if not self._binder.unready:
                await self._wake()

    async def _wake(self) -> None:
        for pod in self._waiting.wake(time.monotonic(), self._fits):
            log.info("a pod that waits has room now", pod=f"{pod.namespace}/{pod.name}")
            try:
                await self._binder.wake(pod)
            except MeshctlError as error:  # the scheduler tries again by itself some time
                log.warning("the scheduler is not told of room", pod=f"{pod.namespace}/{pod.name}", error=str(error))
                return

    def _fits(self, pod: PodId) -> bool | None:
        """None: it waits no more, or asks for no GPU."""
        seen = self._pods.get(ObjectKey("Pod", pod.namespace, pod.name))
        if seen is None or uid_of(seen) != pod.uid or node_of(seen) or ended(seen):
            return None
        if pod.uid in self._ledger.reserved:
            return False
        try:
            return self._ledger.decide(seen, None).placement is not None if self._ledger.asks(seen) else None
        except InputError:  # the scheduler is told so whenever it asks
            return None


def _refused(pod: KubeObject) -> bool:
    """The scheduler has tried it. Of thousands that it has not come to yet, none needs to be woken."""
    return any(map(is_refusal, (pod.get("status") or {}).get("conditions") or ()))
