"""Binds pods: a place is held in memory, then written, with its GPUs, in ONE request to pods/binding.

Invariants:
- A place is held from before its binding is written until the pod is seen there, or until it is certain that the
  binding will never be done. What nobody knows (the answer was lost) is found out (`fence`), never guessed by a clock.
- Only who has the Lease binds, and only after `fence` has made void what others may have begun before.
- The version of the pod that the binding is for is chosen before the Lease is looked at, with no wait between that
  and the request: a process that is stopped right there, and goes on when another leads, writes in vain.

There is no lock of a node: `Ledger.reserve` checks and holds in one step of the event loop, so that a binding whose
answer is late holds up nobody else on the node. docs/decisions/0008-who-may-bind.md has the whole argument.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from types import MappingProxyType

import structlog
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, stop_after_delay

from meshctl.adapters.kubernetes.client import Client
from meshctl.adapters.kubernetes.faults import AbsentError, BusyError, ChangedError
from meshctl.adapters.kubernetes.kinds import Raw
from meshctl.adapters.kubernetes.lease import Lease
from meshctl.api.allocation import ALLOCATION, Allocation, ContainerAllocation
from meshctl.core.packing.vocabulary import Placement
from meshctl.errors import MeshctlError, RefusedError, UnavailableError
from meshctl.extender.fence import Fence
from meshctl.extender.pace import Pace
from meshctl.extender.ports import BindError, Ledger, PodId, Reserved
from meshctl.ports import ObjectKey

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """How long things may take; tests shorten it."""

    bind_s: float = 4.0
    """Until a Bind is answered. kube-scheduler waits 5 s for an extender (its httpTimeout) unless told otherwise."""
    write_s: float = 3.0
    """Of one request to the API server, with its retries."""
    tenants_s: float = 3.0
    """For the kubelet to have let in the pod of another tenant; it takes a second or so."""
    poll_s: float = 0.05
    again_s: float = 0.5
    """Between two tries to find out what became of a binding, or to take over."""
    writes: int = 8
    """Bindings written at once, from which on the next pod's place is not looked for yet."""
    pace_s: float = 1.0
    """The longest that this holds up a Filter: the scheduler is told of an API server that does not answer."""
    moment_s: float = 0.02
    """For the Bind of a pod that was given a place; while none comes, this is all that a Filter waits for it."""
    stop_s: float = 8.0
    """For what is under way when the process is to end; one that is killed after 30 s has time for more."""


TRIES = 5
"""Of a binding whose pod was changed by somebody else in the meantime."""


class Outcome(StrEnum):
    """What became of a Bind."""

    BOUND = "bound"
    FAILED = "failed"
    """Certainly not bound by it."""
    CONFLICT = "conflict"
    """Somebody else wrote to the pod in between; counted besides, for each try."""
    LOST = "lost"
    """No answer to the write; counted besides: it is found out what became of it."""


class KubernetesBinder:
    """`ports.Binder` on a real API server, while `lease` is ours. Consumes `Lease.wait_changed`, and stops it.

    `run` for as long as it binds, then `stop`.
    """

    def __init__(
        self,
        client: Client,
        ledger: Ledger,
        lease: Lease,
        *,
        wrote: Callable[[Raw], object],
        limits: Limits | None = None,
    ) -> None:
        """`wrote` takes a pod as the API server showed it, and tells the ledger: `Reflector.wrote` of the pods that the
        ledger is told of. `run` begins when they were listed once."""
        self._client, self._ledger, self._lease, self._wrote = client, ledger, lease, wrote
        self._fence = Fence(client, lease.identity, wrote)
        self._limits = limits or Limits()
        self._pace = Pace(writes=self._limits.writes, longest_s=self._limits.pace_s, moment_s=self._limits.moment_s)
        self._fenced_term = 0
        """In which time of leading nobody else's bindings can come any more."""
        self._problem = ""
        self._stopping = False
        self._under_way: dict[str, asyncio.Task[None]] = {}
        """By the pod's UID."""
        self._counts: Counter[Outcome] = Counter(dict.fromkeys(Outcome, 0))
        self.counts: Mapping[Outcome, int] = MappingProxyType(self._counts)
        """Live."""

    @property
    def under_way(self) -> int:
        """Bindings that are neither done nor certain not to be."""
        return len(self._under_way)

    @property
    def unready(self) -> str:
        return "this replica of the extender is about to end" if self._stopping else self._not_ours

    @property
    def _not_ours(self) -> str:
        """Why nothing may be written; "" when it may."""
        if not self._lease.leading:
            holder = self._lease.holder
            another = holder not in ("", self._lease.identity)
            return f"another replica of the extender binds: {holder}" if another else "no replica of the extender leads"
        if self._fenced_term != self._lease.term:
            return "this replica takes over from another" + (f": {self._problem}" if self._problem else "")
        return ""

    # -------------------------------------------------------------------------------------------------- leadership

    async def run(self) -> None:
        """Takes over whenever the Lease becomes ours. Never returns; raises only what is a fault of this program."""
        while True:
            await self._lease.wait_changed()
            while self._lease.leading and self._fenced_term != self._lease.term:
                await self._take_over()

    async def _take_over(self) -> None:
        term = self._lease.term
        try:
            fenced = await self._fence.take_over(released=self._lease.released)
        except MeshctlError as error:
            self._problem = str(error)
            log.warning("nothing is bound until taken over", error=self._problem)
            await asyncio.sleep(self._limits.again_s)
        else:
            self._fenced_term, self._problem = term, ""
            log.info("binds from now on", pods_fenced=fenced, released=self._lease.released)

    async def stop(self) -> None:
        """Begins nothing more, waits for what is under way, gives the Lease back. What is then still under way, or
        was never fenced, the next leader must fence: the Lease expires instead. Never raises."""
        self._stopping = True
        if self._under_way:
            await asyncio.wait(self._under_way.values(), timeout=self._limits.stop_s)
        left = tuple(self._under_way.values())
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._lease.stop(give_back=lambda: not left and self._fenced_term == self._lease.term)

    # ----------------------------------------------------------------------------------------------------- binding

    async def bind(self, pod: PodId, node: str) -> None:
        if self.unready:
            raise BindError(self.unready)
        if pod.uid in self._under_way:
            raise BindError(f"{_name(pod)}: an earlier binding is under way; what became of it shows on the pod")
        task = asyncio.create_task(self._bind(pod, node), name=f"bind {_name(pod)} to {node}")
        self._under_way[pod.uid] = task
        task.add_done_callback(partial(self._ended, pod))
        await asyncio.wait({task}, timeout=self._limits.bind_s)
        if not task.done() or task.cancelled():
            raise BindError(
                f"{_name(pod)}: not known in time whether it is bound to {node}; its place is kept until that is"
                " certain"
            )
        task.result()

    async def pace(self) -> None:
        await self._pace.next()

    def placed(self, uid: str) -> None:
        if uid not in self._under_way:
            self._pace.placed(uid)

    async def wake(self, pod: PodId) -> None:
        """The scheduler tries the pod again, at once: a write to its status is something that it watches. Raises
        RefusedError or UnavailableError when that can't be written."""
        if not self.unready and pod.uid not in self._under_way:
            await self._fence.void(pod)

    def _ended(self, pod: PodId, task: asyncio.Task[None]) -> None:
        del self._under_way[pod.uid]
        self._pace.taken(pod.uid)
        if task.cancelled():
            return
        error = task.exception()
        self._counts[Outcome.FAILED if error else Outcome.BOUND] += 1
        if error is not None and not isinstance(error, BindError):
            log.error("binding failed by a fault", pod=_name(pod), exc_info=error)

    async def _bind(self, pod: PodId, node: str) -> None:
        """Raises BindError when the pod is certainly not bound by this."""
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(ChangedError),
                stop=stop_after_attempt(TRIES) | stop_after_delay(self._limits.bind_s),
                reraise=True,
            ):
                with attempt:
                    await self._try(pod, node)
        except BindError:
            raise
        except MeshctlError as error:
            raise BindError(f"{_name(pod)}: not bound to {node}: {error}") from error

    async def _try(self, pod: PodId, node: str) -> None:
        """Raises ChangedError when it may go well the next time."""
        if not self._ledger.version(pod):  # the scheduler's watch was quicker than ours
            await self._look(pod)
        if there := self._ledger.bound_to(pod):
            if there == node:
                return
            raise BindError(f"{_name(pod)} is on node {there} already, not on {node}")
        await self._tenants(pod, node)
        reserved = self._ledger.reserve(pod, node)
        self._pace.taken(pod.uid)
        try:
            with self._pace.writing():
                await self._write(reserved)
        except Exception:  # a fault of ours, too: what nobody knows the outcome of never comes here
            self._ledger.release(pod.uid)
            raise

    async def _tenants(self, pod: PodId, node: str) -> None:
        """Returns when the pod may be before the kubelet; nothing happens between that and its reservation."""
        try:
            async with asyncio.timeout(self._limits.tenants_s):
                while self._ledger.waits_for(pod, node):  # noqa: ASYNC110  # whatever the ledger is told may end it
                    await asyncio.sleep(self._limits.poll_s)
        except TimeoutError as late:
            whom = self._ledger.waits_for(pod, node)
            raise BindError(f"{_name(pod)}: not bound to {node} yet: it waits for {whom}") from late

    async def _write(self, reserved: Reserved) -> None:
        """Returns when the pod is bound; raises when that will not happen by this."""
        pod, placement = reserved.pod, reserved.placement
        version = self._ledger.version(pod)
        if not version:
            raise ChangedError(f"{_name(pod)}: its resourceVersion is not known")
        if self._not_ours:  # after the version was chosen, and nothing waits in between: see the module
            raise BindError(self._not_ours)
        try:
            await self._client.bind(
                _key(pod),
                placement.node,
                uid=pod.uid,
                resource_version=version,
                annotations=told(placement),
                deadline_s=self._limits.write_s,
            )
        except (ChangedError, AbsentError):
            self._counts[Outcome.CONFLICT] += 1
            await self._look(pod)
            raise
        except (RefusedError, BusyError):
            raise
        except Exception as error:  # no answer, or a fault of ours: nobody knows how far it came
            self._counts[Outcome.LOST] += 1
            fault = not isinstance(error, UnavailableError)
            log.warning("no answer to a binding", pod=_name(pod), node=placement.node, error=str(error), exc_info=fault)
            await self._found_out(reserved, error)

    async def _found_out(self, reserved: Reserved, lost: Exception) -> None:
        """What became of a write without an answer: returns when it is done, raises when it never will be."""
        pod = reserved.pod
        while True:
            try:
                there = await self._fence.void(pod)
                break
            except Exception as error:
                fault = not isinstance(error, MeshctlError)
                why = "not known whether a pod is bound; its place is kept"
                log.warning(why, pod=_name(pod), error=str(error), exc_info=fault)
            await asyncio.sleep(self._limits.again_s)
        if not there:
            raise BindError(f"{_name(pod)} is gone") from lost
        if self._ledger.bound_to(pod) != reserved.placement.node:
            raise ChangedError(f"{lost}; it was not done") from lost

    async def _look(self, pod: PodId) -> None:
        """The ledger knows the pod as it is now, in a version that this may be written over."""
        raw = await self._client.get(_key(pod), deadline_s=self._limits.write_s)
        if raw is None:
            raise BindError(f"{_name(pod)} is gone")
        self._wrote(raw)


def told(placement: Placement) -> Mapping[str, str]:
    """What the pod is told of its GPUs; nothing for one that has none."""
    if not placement.gpus:
        return {}
    containers = tuple(ContainerAllocation(name=name, gpus=dict(gpus)) for name, gpus in sorted(placement.gpus.items()))
    return {ALLOCATION: Allocation(containers=containers).text()}


def _key(pod: PodId) -> ObjectKey:
    return ObjectKey("Pod", pod.namespace, pod.name)


def _name(pod: PodId) -> str:
    return f"pod {pod.namespace}/{pod.name}"
