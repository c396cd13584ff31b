"""Tells people how far each GPUSharingPolicy is, and the admission policy what a container may ask for.

It gives the nodes' agents no orders: they watch the same policies and take what those say (docs/decisions/0005). What
is said is decided in `gpupolicies` and `gpuclaims`; here is only the edge: when, by whom, and what happens when the API
server does not answer. Invariants: only the leader writes; nothing is written while a kind that decides is not
completely known; a status is compared with the live one, so that neither a restart nor a fail-over writes anything; at
most one write of each object in `PASS_S`.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

import structlog

from deviceplugin.policies import Policy
from meshctl.api import gpuresources
from meshctl.controller.gpuclaims import (
    KIND,
    Claim,
    GpuTotals,
    Read,
    cards_of,
    claims_of,
    labels_of,
    limits,
    read_policy,
    totals,
)
from meshctl.controller.gpupolicies import notices, statuses
from meshctl.errors import MeshctlError, UnavailableError
from meshctl.model import Problem
from meshctl.ports import Clock, KubeObject, ObjectKey, Objects, ObjectStatus
from meshctl.told import Budget, Notice, StatusObject, conditions_of, dated

log = structlog.get_logger(__name__)

WATCHED = (KIND, "GPU", "Node")
"""What is said is made of these."""
PASS_S = 1.0
"""Least time between two looks: agents of a whole cluster write at the same time when a policy changes."""
LOOK_S = 5.0
"""Most time between two: agents may have fallen silent."""
LEAD_S = 0.25
"""Whoever has come to lead looks within this: at its first look it mostly did not yet."""
CHECK_S = 60.0
"""How often the ConfigMap is read: somebody may have changed or deleted it."""
REFUSED_S = 30.0
"""How long an object is left alone that the API server refused to take."""
DEADLINE_S = 10.0
"""Of one request, whatever the client below does."""
UNSENT = 200
"""Events that wait for an API server that does not answer; more are dropped, the oldest first."""
RESOURCES = f"ConfigMap {gpuresources.NAME}"
_AWAY = "away"

ReadObject = Callable[[ObjectKey], Awaitable[KubeObject | None]]
"""The object as the API server has it now. Raises MeshctlError."""


@dataclass(slots=True)
class _Known:
    """What is remembered of one policy."""

    uid: str
    seen: str = ""
    """The resourceVersion over which `status` was written: while the watched copy shows it, the copy is behind."""
    status: StatusObject = field(default_factory=dict)
    refused_s: float = -math.inf
    budget: Budget = field(default_factory=Budget)


class _Unsent(NamedTuple):
    name: str
    uid: str
    notice: Notice


@dataclass(frozen=True, slots=True)
class _Found:
    """What one copy of the objects comes to."""

    reads: Mapping[ObjectKey, Read]
    valid: Mapping[str, Policy]
    claims: Sequence[Claim]
    statuses: Mapping[str, Mapping[str, Any]]
    totals: GpuTotals

    def limits(self, before: Mapping[str, int]) -> dict[str, int]:
        return limits(self.claims, self.valid, before)


def _found(
    copy: Mapping[str, Mapping[ObjectKey, KubeObject]], before: Mapping[ObjectKey, Read], now: datetime
) -> _Found:
    """In a thread: objects are never changed in place."""
    reads = {key: read_policy(value, before.get(key)) for key, value in sorted(copy[KIND].items())}
    valid = {read.name: read.policy for read in reads.values() if read.policy is not None}
    nodes = labels_of(copy["Node"])
    cards = cards_of(copy["GPU"].values())
    claims = claims_of(cards, nodes, valid.values())
    said = statuses(reads.values(), claims, nodes, now)
    return _Found(reads, valid, claims, said, totals(cards, said.values()))


class GpuOperator:
    """`start` and `stop` as a part of the controller; `totals` and `problems` at any time."""

    def __init__(
        self,
        objects: Objects,
        api: ObjectStatus,
        read: ReadObject,
        leading: Callable[[], bool],
        clock: Clock,
        *,
        namespace: str = gpuresources.NAMESPACE,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`objects`: woken by `WATCHED`. `namespace`: of the ConfigMap."""
        self._objects, self._api, self._leading, self._clock, self._wall = objects, api, leading, clock, wall
        self._resources = _Resources(objects, read, namespace, clock)
        self._reads: Mapping[ObjectKey, Read] = {}
        self._known: dict[str, _Known] = {}
        self._unsent: deque[_Unsent] = deque(maxlen=UNSENT)
        self._failures: dict[str, Problem] = {}
        self._totals = GpuTotals()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="gpu operator")

    async def stop(self) -> None:
        """At once: what is not written now is written by whoever leads next."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None

    def totals(self) -> GpuTotals:
        """As of the last look. From any thread."""
        return self._totals

    def problems(self) -> tuple[Problem, ...]:
        return tuple(self._failures[name] for name in sorted(self._failures))

    async def look(self) -> None:
        """Once: take in what the copy says and, when leading, write what differs."""
        if any(self._objects.missing(kind) for kind in WATCHED):
            return
        copy = {kind: dict(self._objects.every(kind)) for kind in WATCHED}
        found = await asyncio.to_thread(_found, copy, self._reads, self._wall())  # 40 ms with 2000 GPUs, 20 policies
        self._reads, self._totals = found.reads, found.totals
        if not self._leading():
            self._unsent.clear()
            self._failures.clear()
            self._resources.forget()
            return
        try:
            await self._tell(tuple(found.reads.values()), found.statuses)
            if self._leading():
                await self._send(RESOURCES, self._resources.keep(found.limits))
            self._failures.pop(_AWAY, None)
        except (UnavailableError, TimeoutError) as away:
            message = f"what is said of GPUSharingPolicies waits: {away or 'no answer in time'}"
            self._failures[_AWAY] = Problem("GPU operator", message)

    async def _run(self) -> None:
        while True:
            led = self._leading()
            try:
                await self.look()
            except Exception as error:  # whatever it is: the next change must find us here
                log.exception("failed", activity="gpu operator")
                self._failures[""] = Problem("GPU operator", f"failed: {type(error).__name__}: {error}")
            await asyncio.sleep(PASS_S)
            await self._woken(led)

    async def _woken(self, led: bool) -> None:
        """Returns when an object has changed, who leads has, or `LOOK_S` have passed."""
        for _ in range(int(LOOK_S / LEAD_S)):
            if self._leading() != led:
                break
            with suppress(TimeoutError):
                async with asyncio.timeout(LEAD_S):
                    await self._objects.wait_changed()
                    break

    # ------------------------------------------------------------------------------------------------------- policies

    async def _tell(self, reads: Sequence[Read], said: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the statuses that differ from the live ones, and the Events that this makes. Raises UnavailableError or
        TimeoutError; what was not sent then is sent by the next look."""
        self._known = {read.name: self._remembered(read) for read in reads}
        kept = {_AWAY, RESOURCES, *(f"{KIND} {name}" for name in self._known)}
        self._failures = {what: problem for what, problem in self._failures.items() if what in kept}
        for read in reads:
            if self._leading():
                await self._write(read, said[read.name])
        while self._unsent and self._leading():
            name, uid, notice = self._unsent[0]
            about = (ObjectKey(KIND, "", name), uid, notice.type, notice.reason, notice.message, notice.action)
            if name in self._known:
                await self._send(f"{KIND} {name}", self._api.post_event(*about))
            self._unsent.popleft()

    def _remembered(self, read: Read) -> _Known:
        uid, known = str(read.raw["metadata"].get("uid", "")), self._known.get(read.name)
        return known if known is not None and known.uid == uid else _Known(uid)

    async def _write(self, read: Read, said: Mapping[str, Any]) -> None:
        known, metadata = self._known[read.name], read.raw["metadata"]
        behind = known.seen == metadata.get("resourceVersion")
        old: StatusObject = known.status if behind else read.raw.get("status") or {}
        new = dated(said, old, self._wall().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
        now_s = self._clock.now_s()
        if _same(old, new) or now_s - known.refused_s < REFUSED_S:
            return
        wanted = {
            "apiVersion": read.raw["apiVersion"],
            "kind": KIND,
            "metadata": {"name": read.name, "uid": known.uid},
            "status": new,
        }
        if not await self._send(f"{KIND} {read.name}", self._api.apply_status(wanted)):
            known.refused_s = now_s
            return
        known.seen, known.status = str(metadata.get("resourceVersion", "")), new
        told = [notice for notice in notices(old, new) if known.budget.allows(notice, now_s)]
        self._unsent.extend(_Unsent(read.name, known.uid, notice) for notice in told)

    async def _send(self, what: str, request: Awaitable[object]) -> bool:
        """Whether it was taken: a refusal is a problem. Raises UnavailableError or TimeoutError without an answer."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                await request
        except UnavailableError:
            raise
        except MeshctlError as refused:
            self._failures[what] = Problem(what, f"not written: {refused}")
            return False
        self._failures.pop(what, None)
        return True


def _same(old: StatusObject, new: StatusObject) -> bool:
    """Whoever else wrote a condition: only ours are compared."""
    if any(old.get(name) != value for name, value in new.items() if name != "conditions"):
        return False
    live = conditions_of(old)
    return all(live.get(type_) == condition for type_, condition in conditions_of(new).items())


class _Resources:
    """The ConfigMap of `meshctl.api.gpuresources`, kept as it should be."""

    def __init__(self, objects: Objects, read: ReadObject, namespace: str, clock: Clock) -> None:
        self._objects, self._read, self._clock = objects, read, clock
        self._key = ObjectKey("ConfigMap", namespace, gpuresources.NAME)
        self._live: Mapping[str, str] | None = None
        """As it was seen last."""
        self._asked: Mapping[str, str] | None = None
        """What was applied last, and is in `_live` if the API server took it so."""
        self._looked_s = -math.inf

    def forget(self) -> None:
        """Another replica writes now."""
        self._looked_s, self._asked, self._live = -math.inf, None, None

    async def keep(self, wanted: Callable[[Mapping[str, int]], Mapping[str, int]]) -> None:
        """Write what `wanted` makes of what it says now, where that differs; one that would say nothing is not created.
        Raises MeshctlError."""
        if self._clock.now_s() - self._looked_s >= CHECK_S:
            await self._look()
        data = gpuresources.data(wanted(self._told()))
        if data in (self._live, self._asked) or (not data and self._live is None):
            return
        metadata = {"namespace": self._key.namespace, "name": self._key.name}
        taken = await self._objects.apply(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}, force=True
        )
        self._live, self._asked = dict(taken.get("data") or {}), data

    async def _look(self) -> None:
        live = await self._read(self._key)
        before, self._live = self._live, None if live is None else dict(live.get("data") or {})
        if self._live != before:
            self._asked = None
        self._looked_s = self._clock.now_s()

    def _told(self) -> dict[str, int]:
        """Resource -> limit, as it was seen last; what is none of ours is left out."""
        found = {}
        for key, value in (self._live or {}).items():
            with suppress(ValueError):
                found[gpuresources.resource(key)] = int(value)
        return found
