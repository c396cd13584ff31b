"""Leads the scheduler to the replica that binds: its own pod has a label, by which the Service selects.

Every replica that knows the cluster is ready, as Deployments and their updates want it; what is asked goes to the one
that binds all the same. What is wanted is compared with what was written, again and again: nobody waits for it, and
whatever was lost, late or undone by somebody else is written once more after `AGAIN_S`.

Invariant: a replica that binds nothing and whose pod may have the label says so (`problem`), and is not ready: the
container that follows one that was killed, before its first write, or one that can't reach the API server.

Rejected: readiness as the sign of who binds: one of two is ready for ever, so no update of the Deployment comes to an
end, and replicas that stand by look as if they were ill. An EndpointSlice of our own: the right to write where any
Service leads to.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

import structlog

from meshctl.adapters.kubernetes.client import Client
from meshctl.adapters.kubernetes.faults import ForbiddenError
from meshctl.errors import MeshctlError
from meshctl.ports import ObjectKey

LABEL = "meshctl.io/extender-binds"
POLL_S = 0.2
"""Between two looks at whether this replica binds: so much later the scheduler finds the next one, at most."""
SLOWEST_S = 5.0
"""Between two tries that fail."""
AGAIN_S = 10.0
"""What was written is written again after this; the API server stores nothing when nothing changed."""
WRITE_S = 4.0
"""Of a write with its retries."""
END_S = 2.0
"""For the last one: a pod that ends gets no requests anyway."""

log = structlog.get_logger(__name__)


class Announcer:
    """Labels `pod`: `run` for as long as this replica may bind, then `withdraw`."""

    def __init__(self, client: Client, pod: ObjectKey, unready: Callable[[], str]) -> None:
        """`unready` says why nothing is bound here now; "" when it is."""
        self._client, self._pod, self._unready = client, pod, unready
        self._labelled: bool | None = None
        """What is known of the label; None: nothing is."""
        self._again_s = 0.0
        self._failed = ""

    def problem(self) -> str:
        """Why the scheduler may be led here in vain; "" when it is not."""
        why = self._unready()
        if not why or self._labelled is False:
            return ""
        return f"{self._pod} may have the label {LABEL}, and {why}" + (f"; {self._failed}" if self._failed else "")

    async def run(self) -> None:
        """Never returns."""
        pause_s = POLL_S
        while True:
            binds = not self._unready()
            if binds is not self._labelled or time.monotonic() >= self._again_s:
                pause_s = POLL_S if await self._write(binds) else min(2 * pause_s, SLOWEST_S)
            await asyncio.sleep(pause_s)

    async def withdraw(self) -> None:
        """Takes the label off, if it may be there. Never raises."""
        if self._labelled is not False:
            with suppress(TimeoutError):  # whoever looks at it finds that the pod has ended
                async with asyncio.timeout(END_S):
                    await self._write(binds=False)

    async def _write(self, binds: bool) -> bool:
        """False: it failed, or nobody knows."""
        before = self._labelled
        if binds:
            self._labelled = None  # a write without an answer may be done
        patch = {"metadata": {"labels": {LABEL: "true" if binds else None}}}
        try:
            await self._client.merge_patch(self._pod, patch, deadline_s=WRITE_S)
        except MeshctlError as error:
            advice = " (grant patch on pods in this namespace)" if isinstance(error, ForbiddenError) else ""
            self._say(f"{error}{advice}")
            return False
        self._labelled, self._again_s = binds, time.monotonic() + AGAIN_S
        self._say("")
        if before is not binds:
            log.info("the scheduler is led here" if binds else "the scheduler is not led here", pod=str(self._pod))
        return True

    def _say(self, failed: str) -> None:
        """Once, however often it is tried."""
        if failed and failed != self._failed:
            log.warning("the label by which the scheduler finds who binds", label=LABEL, error=failed)
        self._failed = failed
