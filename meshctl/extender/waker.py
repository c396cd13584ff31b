"""Has the scheduler try pods again that it was refused a place for, once they have one; `waiting` says why and whom."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping
from typing import Protocol

import structlog

from meshctl.errors import InputError, MeshctlError
from meshctl.extender.books import uid_of
from meshctl.extender.ledger import Ledger
from meshctl.extender.pods import deleted, ended, node_of
from meshctl.extender.ports import PodId
from meshctl.extender.views import is_refusal
from meshctl.extender.waiting import EVERY_S, Names, Waiting
from meshctl.ports import KubeObject, ObjectKey

log = structlog.get_logger(__name__)


class Binder(Protocol):
    """What is needed of a binder here."""

    @property
    def unready(self) -> str: ...

    async def wake(self, pod: PodId) -> None: ...


class Waker:
    """`pods` is the reflector's, live."""

    def __init__(self, ledger: Ledger, binder: Binder, pods: Mapping[ObjectKey, KubeObject]) -> None:
        self._ledger, self._binder, self._pods = ledger, binder, pods
        self._waiting = Waiting()

    def refused(self, pod: PodId, names: Collection[str] | None = None) -> None:
        """The scheduler was told that it fits on none of these nodes (None: it is not known which)."""
        self._waiting.refused(pod, time.monotonic(), names)

    async def run(self) -> None:
        """Never returns."""
        bound = False
        while True:
            before, bound = bound, not self._binder.unready
            if bound and not before:
                self._take_over()
            if bound:
                await self._wake()
            await asyncio.sleep(EVERY_S)

    def _take_over(self) -> None:
        """Another replica may have refused pods up to now."""
        for key, pod in self._pods.items():
            if _refused(pod) and not node_of(pod) and not ended(pod):
                self.refused(PodId(key.namespace, key.name, uid_of(pod)))

    async def _wake(self) -> None:
        for pod in self._waiting.wake(time.monotonic(), self._fits):
            log.info("a pod that waits has room now", pod=f"{pod.namespace}/{pod.name}")
            try:
                await self._binder.wake(pod)
            except MeshctlError as error:  # the scheduler tries again by itself some time
                log.warning("the scheduler is not told of room", pod=f"{pod.namespace}/{pod.name}", error=str(error))
                return

    def _fits(self, pod: PodId, names: Names) -> bool | None:
        """None: it waits no more, or asks for no GPU."""
        seen = self._pods.get(ObjectKey("Pod", pod.namespace, pod.name))
        if seen is None or uid_of(seen) != pod.uid or node_of(seen) or ended(seen) or deleted(seen):
            return None
        if pod.uid in self._ledger.reserved:
            return False
        try:
            if not self._ledger.asks(seen):
                return None
            anywhere = self._ledger.decide(seen, None).placement is not None
            return anywhere and self._ledger.decide(seen, names()).placement is not None
        except InputError:  # the scheduler is told so whenever it asks
            return None
        except Exception:  # one pod must not end the process, and then the next one
            log.exception("a pod that waits can't be looked at", pod=f"{pod.namespace}/{pod.name}")
            return None


def _refused(pod: KubeObject) -> bool:
    """The scheduler has tried it. Of thousands that it has not come to yet, none needs to be woken."""
    return any(map(is_refusal, (pod.get("status") or {}).get("conditions") or ()))
