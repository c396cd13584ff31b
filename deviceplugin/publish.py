"""Keeps the GPU objects of this node on the API server as the agent last said: `update`, and it follows.

Invariants: what says the same is not written again, but for a heartbeat once a minute, also over a restart of the agent
(it is compared with the live object); the newest word wins; an API server that is away, slow or refuses costs the agent
nothing; an object of the same name that is another node's is left alone. That one is a problem with words, and mostly
ends by itself: of a card that moved the old node's agent deletes the object, and with a Node all its GPU objects go.

Rejected: to take over what has not been written for a while (an agent that may delete other nodes' objects is one too
many; clocks differ); one task per GPU (16 connections at once to an API server that is just coming back); reading
before each write (the watched copy is there); trusting our memory instead of the copy (who deletes an object with
kubectl gets it again).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import structlog

from deviceplugin.objects import NODE_LABEL, acted_on, node_label, notices, said, stamped
from meshctl.adapters.kubernetes.client import Client
from meshctl.adapters.kubernetes.faults import ChangedError
from meshctl.adapters.kubernetes.kinds import KINDS
from meshctl.adapters.kubernetes.reflector import Pace, Reflector
from meshctl.adapters.kubernetes.status import KubernetesStatus
from meshctl.errors import MeshctlError, RefusedError, UnavailableError
from meshctl.model import Problem
from meshctl.ports import KubeObject, ObjectKey
from meshctl.told import Budget, Notice, StatusObject

MANAGER = "meshctl-agent"
"""Field manager of the objects and, on its own, of their status."""
CONTROLLER = "meshctl.io/agent"
HEARTBEAT_S = 60.0
REQUEST_S = 3.0
"""Of one request with its retries; then the newest word is tried, not this one again."""
GAP_S = 0.5
"""Between two passes over all objects: what happens meanwhile is one write."""
NUMBERS_S = 10.0
"""Least time between two writes of one status of which only the number of MPS clients differs."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""After a failure, doubled with each: of one object where it was refused, of all where there was no answer."""
UNSENT = 200
"""Events that wait for the API server; more are dropped, the oldest first."""
GPU = KINDS["GPU"]

log = structlog.get_logger(__name__)
_Wanted = Mapping[str, Any]


@dataclass(slots=True)
class _Pause:
    """When to try again."""

    failures: int = 0
    until_s: float = -math.inf

    def failed(self, now_s: float) -> None:
        self.until_s = now_s + min(FIRST_PAUSE_S * 2.0**self.failures, LONGEST_PAUSE_S)
        self.failures += 1

    def worked(self) -> None:
        self.failures, self.until_s = 0, -math.inf


@dataclass(slots=True)
class _Known:
    """What is remembered of one object; all that matters is in the object itself."""

    pause: _Pause = field(default_factory=_Pause)
    problem: str = ""
    written_s: float = -math.inf
    budget: Budget = field(default_factory=Budget)


class _Unsent(NamedTuple):
    key: ObjectKey
    uid: str
    notice: Notice


class OtherNodeError(MeshctlError):
    """The object of this name is another node's."""


class GpuPublisher:
    """`update` whenever something may have changed; `start` and `stop` as a part of the agent."""

    def __init__(
        self,
        client: Client,
        node: str,
        *,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
        now_s: Callable[[], float] = time.monotonic,
        pace: Pace | None = None,
    ) -> None:
        self._client, self._node, self._wall, self._now_s = client, node, wall, now_s
        self._api = KubernetesStatus(client, node, controller=CONTROLLER)
        self._changed = asyncio.Event()
        self._live = Reflector(
            client,
            GPU,
            label_selector=f"{NODE_LABEL}={node_label(node)}",
            on_change=lambda _: self._changed.set(),
            on_state=self._changed.set,
            pace=pace,
        )
        self._wanted: Mapping[str, _Wanted] | None = None
        self._complete = False
        self._known: dict[ObjectKey, _Known] = {}
        self._away = _Pause()
        self._problem = ""
        self._unsent: deque[_Unsent] = deque(maxlen=UNSENT)
        self._tasks: list[asyncio.Task[None]] = []

    def update(self, objects: Mapping[str, KubeObject], *, complete: bool = True) -> None:
        """What the GPU objects of this node are to be (`objects.gpu_object`), all of them. Never blocks, never fails.

        Objects of this node that are not among them are deleted: a card that somebody holds belongs there, though it
        may be lost. `complete` False: the inventory is not known (yet), so nothing is deleted. Nothing is to be
        said before the kubelet has told who holds what: routes of pods go by the holders.
        """
        if (objects, complete) != (self._wanted, self._complete):
            self._wanted, self._complete = dict(objects), complete
            self._changed.set()

    def problems(self) -> tuple[Problem, ...]:
        """What could not be written, and why."""
        where = f"{self._client.server} {GPU.resource}"
        whole = (self._live.missing, self._live.problem, self._problem)
        single = (Problem(str(key), one.problem) for key, one in sorted(self._known.items()) if one.problem)
        return (*(Problem(where, message) for message in whole if message), *single)

    async def start(self) -> None:
        """Returns at once."""
        self._tasks = [
            asyncio.create_task(self._live.keep(), name=f"reflect {GPU.resource}"),
            asyncio.create_task(self._run(), name=f"publish {GPU.resource}"),
        ]

    async def stop(self) -> None:
        """At once: what is not written now is written by the agent's next run."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -------------------------------------------------------------------------------------------------------- the loop

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            try:
                due_s = await self._pass()
            except Exception as error:  # whatever it is: the next word of the agent must find us here
                log.exception("failed", activity="publish")
                self._problem, due_s = f"publishing failed: {type(error).__name__}: {error}", LONGEST_PAUSE_S
            await self._wait(due_s)

    async def _wait(self, longest_s: float) -> None:
        """Until something changed, or for so long; at least for a moment, and while the API server is away."""
        try:
            async with asyncio.timeout(max(0.0, longest_s)):
                await self._changed.wait()
        except TimeoutError:
            pass
        await asyncio.sleep(max(GAP_S, self._away.until_s - self._now_s()))

    async def _pass(self) -> float:
        """Writes whatever is due; seconds until something will be, if nothing happens."""
        wanted = self._wanted
        if wanted is None or not self._live.synced:
            return LONGEST_PAUSE_S
        targets = {GPU.key(value): value for value in wanted.values()}
        gone = self._live.objects.keys() - targets.keys() if self._complete else set()
        self._known = {key: one for key, one in self._known.items() if key in targets or key in gone}
        due_s = LONGEST_PAUSE_S
        try:
            for key in sorted(targets.keys() | gone):
                due_s = min(due_s, await self._one(key, targets.get(key)))
            await self._tell()
        except UnavailableError as away:
            if not self._away.failures:
                log.warning("GPU objects are not written, trying again", error=str(away))
            self._away.failed(self._now_s())
            self._problem = f"GPU objects are not written: {away}"
        else:
            self._away.worked()
            self._problem = ""
        return due_s

    async def _one(self, key: ObjectKey, wanted: _Wanted | None) -> float:
        """Brings one object up to date; seconds until it is due again. Raises UnavailableError."""
        known = self._known.setdefault(key, _Known())
        if (left_s := known.pause.until_s - self._now_s()) > 0:
            return left_s
        try:
            due_s = await (self._delete(key) if wanted is None else self._write(key, wanted, known))
        except (RefusedError, ChangedError, OtherNodeError) as refused:
            known.pause.failed(self._now_s())
            if known.problem != (problem := f"is not written: {refused}"):
                log.warning("GPU object is not written, trying again", gpu=key.name, error=str(refused))
            known.problem = problem
            return known.pause.until_s - self._now_s()
        known.pause.worked()
        known.problem = ""
        return due_s

    # ------------------------------------------------------------------------------------------------------ one object

    async def _delete(self, key: ObjectKey) -> float:
        uid = str(self._live.objects[key]["metadata"]["uid"])
        await self._client.delete(key, uid=uid, deadline_s=REQUEST_S)
        log.info("GPU object deleted: the GPU is gone", gpu=key.name)
        return math.inf

    async def _write(self, key: ObjectKey, wanted: _Wanted, known: _Known) -> float:
        live = self._live.objects.get(key)
        if live is None:
            await self._claim(key)
        if live is None or not _same_object(live, wanted):
            live = await self._apply({name: value for name, value in wanted.items() if name != "status"})
        old: StatusObject = live.get("status") or {}
        if (left_s := self._left_s(old, wanted["status"], known)) > 0:
            return left_s
        now = self._wall().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        status = stamped(wanted, old, now)["status"]
        uid = str(live["metadata"]["uid"])
        identity = {"name": key.name, "uid": uid}  # of another one by this name nothing is written
        body = {"apiVersion": GPU.api_version, "kind": GPU.name, "metadata": identity, "status": status}
        await self._apply(body, "status")
        known.written_s = self._now_s()
        self._unsent += (_Unsent(key, uid, n) for n in _allowed(known.budget, old, status, known.written_s))
        return HEARTBEAT_S

    async def _claim(self, key: ObjectKey) -> None:
        """Returns when the name is free or ours. Raises OtherNodeError when the object is another node's."""
        found = await self._client.get(key, deadline_s=REQUEST_S)
        if found is None or (node := found["spec"]["node"]) == self._node:
            return
        age_s = _age_s((found.get("status") or {}).get("heartbeat"), self._wall())
        when = f"{age_s:.0f} s ago" if math.isfinite(age_s) else "never"
        raise OtherNodeError(
            f"it is of node {node}, whose agent wrote it last {when}; if the card has moved here, delete the object:"
            f" kubectl delete gpu {key.name}"
        )

    async def _apply(self, wanted: _Wanted, subresource: str = "") -> KubeObject:
        raw = await self._client.apply(
            wanted, force=True, subresource=subresource, manager=MANAGER, deadline_s=REQUEST_S
        )
        self._live.wrote(raw)
        return raw

    def _left_s(self, old: StatusObject, new: StatusObject, known: _Known) -> float:
        """Seconds for which `old` is as good as `new`."""
        if acted_on(old) != acted_on(new):
            return 0.0
        age_s = _age_s(old.get("heartbeat"), self._wall())
        heartbeat_s = HEARTBEAT_S - age_s if age_s >= 0 else 0.0
        if said(old) != said(new):
            return min(heartbeat_s, known.written_s + NUMBERS_S - self._now_s())
        return heartbeat_s

    # ---------------------------------------------------------------------------------------------------------- Events

    async def _tell(self) -> None:
        """Raises UnavailableError; the Event is then still unsent."""
        while self._unsent:
            key, uid, notice = self._unsent[0]
            try:
                await self._api.post_event(key, uid, notice.type, notice.reason, notice.message, notice.action)
            except RefusedError as refused:
                log.warning("Event refused", gpu=key.name, reason=notice.reason, error=str(refused))
            self._unsent.popleft()


def _allowed(budget: Budget, old: StatusObject, new: StatusObject, now_s: float) -> Iterator[Notice]:
    return (notice for notice in notices(old, new) if budget.allows(notice, now_s))


def _same_object(live: KubeObject, wanted: _Wanted) -> bool:
    """Spec, and of the metadata what is ours; others may add to it."""
    has, asked = live["metadata"], wanted["metadata"]
    labels = has.get("labels") or {}
    owners = [(owner["kind"], owner["uid"]) for owner in has.get("ownerReferences") or ()]
    ours = [(owner["kind"], owner["uid"]) for owner in asked.get("ownerReferences") or ()]
    same = all(labels.get(name) == value for name, value in asked["labels"].items())
    return same and live.get("spec") == wanted["spec"] and all(owner in owners for owner in ours)


def _age_s(heartbeat: object, now: datetime) -> float:
    """Seconds since `heartbeat` (less than 0: by another clock); infinite when it says nothing."""
    if not isinstance(heartbeat, str):
        return math.inf
    try:
        then = datetime.fromisoformat(heartbeat)
    except ValueError:
        return math.inf
    return (now - (then if then.tzinfo else then.replace(tzinfo=UTC))) / timedelta(seconds=1)
