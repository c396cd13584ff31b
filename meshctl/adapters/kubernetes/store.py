"""`ports.Objects` on a real API server: a reflector per kind to read from, server-side apply to write.

What is written is at once in the copy, and an older event of the watch does not undo it (`mirror`). The copy is read
from the event loop that fills it, without waiting; whoever must not miss a change has a `Reader` of his own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Self

from meshctl.adapters.kubernetes.client import Client
from meshctl.adapters.kubernetes.kinds import GPUS, ISTIO, KINDS, MANDATORY, OPTIONAL
from meshctl.adapters.kubernetes.reflector import Pace, Reflector
from meshctl.errors import UnavailableError
from meshctl.model import Problem
from meshctl.ports import KubeObject, ObjectKey

WRITE_S = 4.0
"""Longest a write may take. What the leader begins must be over before another replica can lead (`lease.Terms`)."""
_NONE: Mapping[ObjectKey, KubeObject] = MappingProxyType({})


class ClusterObjects:
    """The kinds that meshctl watches in `namespaces` (empty: all), those of Istio when `istio`."""

    def __init__(
        self, client: Client, *, namespaces: tuple[str, ...] = (), istio: bool = False, pace: Pace | None = None
    ) -> None:
        self.client = client
        self._listeners: list[Callable[[ObjectKey | None], object]] = []
        self._reflectors = {
            name: Reflector(
                client, KINDS[name], namespaces=namespaces, on_change=self._tell, on_state=self._tell_state, pace=pace
            )
            for name in (*MANDATORY, *OPTIONAL, *GPUS, *(ISTIO if istio else ()))
        }
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._own = Reader(self)

    async def start(self, deadline_s: float) -> Self:
        """Returns when every kind was listed or, where it is optional, refused.

        Raises UnavailableError, having ended what it began, when that takes longer than `deadline_s`.
        """
        for name, reflector in self._reflectors.items():
            self._tasks[name] = asyncio.create_task(reflector.keep(), name=f"reflect {name}")
        try:
            async with asyncio.timeout(deadline_s):
                while not self._ready():
                    await self.wait_changed()
        except TimeoutError as late:
            await self.stop()
            raise UnavailableError(f"after {deadline_s:g} s not all objects are known: {self._unready()}") from late
        return self

    async def stop(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _ready(self) -> bool:
        mandatory = all(self._reflectors[name].synced for name in MANDATORY)
        return mandatory and all(reflector.settled for reflector in self._reflectors.values())

    def _unready(self) -> str:
        return "; ".join(r.missing for r in self._reflectors.values() if r.missing)

    # ------------------------------------------------------------------------------------------------------ reading

    def find(self, key: ObjectKey) -> KubeObject | None:
        return self.every(key.kind).get(key)

    def every(self, kind: str) -> Mapping[ObjectKey, KubeObject]:
        """Live: it changes whenever the event loop runs; copy it to keep it over an ``await``."""
        return self._reflectors[kind].objects if kind in self._reflectors else _NONE

    def missing(self, kind: str) -> str:
        if kind not in self._reflectors:
            return f"{KINDS[kind].resource}: not watched{' (start with --istio)' if kind in ISTIO else ''}"
        return self._reflectors[kind].missing

    def problems(self) -> tuple[Problem, ...]:
        """What is not known, and what may be behind, in the API server's words."""
        return tuple(
            Problem(f"{self.client.server} {reflector.kind.resource}", message)
            for reflector in self._reflectors.values()
            for message in ("" if reflector.absent else reflector.missing, reflector.problem)
            if message
        )

    async def wait_changed(self) -> None:
        """For ONE consumer; others take a `reader`."""
        await self._own.wait_changed()

    def reader(self, *kinds: str) -> Reader:
        """The same objects with a `wait_changed` of its own, which objects of other `kinds` (if given) do not end."""
        return Reader(self, kinds)

    def listen(self, heard: Callable[[ObjectKey | None], object]) -> None:
        """`heard` is called at once with the key of each object that is another now; with None when `missing` is."""
        self._listeners.append(heard)

    # ------------------------------------------------------------------------------------------------------ writing

    async def apply(self, wanted: KubeObject, *, force: bool = False) -> KubeObject:
        raw = await self.client.apply(wanted, force=force, deadline_s=WRITE_S)
        kind = KINDS[wanted["kind"]]
        if kind.name in self._reflectors:
            self._reflectors[kind.name].wrote(raw)
        return kind.kept(raw)

    async def delete(self, key: ObjectKey, uid: str) -> None:
        await self.client.delete(key, uid=uid, deadline_s=WRITE_S)

    # ------------------------------------------------------------------------------------------------------- change

    def _tell(self, key: ObjectKey) -> None:
        for heard in self._listeners:
            heard(key)

    def _tell_state(self) -> None:
        for heard in self._listeners:
            heard(None)


class Reader:
    """`ports.Objects`: the store's objects, and the changes since this reader last waited for one."""

    def __init__(self, store: ClusterObjects, kinds: tuple[str, ...] = ()) -> None:
        """Woken by objects of `kinds` (empty: all), and whenever `missing` is another."""
        self._store = store
        self._kinds = frozenset(kinds)
        self._changed = asyncio.Event()
        store.listen(self._hear)
        self.find, self.every, self.missing = store.find, store.every, store.missing
        self.apply, self.delete, self.problems = store.apply, store.delete, store.problems

    def _hear(self, key: ObjectKey | None) -> None:
        if key is None or not self._kinds or key.kind in self._kinds:
            self._changed.set()

    async def wait_changed(self) -> None:
        """Returns when something changed since the last return: many changes are one."""
        await self._changed.wait()
        self._changed.clear()
