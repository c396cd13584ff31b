"""Desired state from Kubernetes: `ports.Source` over the watched copy of the API server's objects.

Nothing here waits for the API server after the start: `desired` is what the copy said at the last look. Rules:
- An object that is not valid (it passed an older schema, or another version of ours wrote it) keeps its last valid
  version in force, as long as it is the same object (UID). One that is being deleted is gone.
- While a kind that decides is not completely known (its CRD was taken away, access was refused), everything stays as
  it was: what is missing from such a copy was not deleted by anybody.
- Only what is read counts as a change: our own writes to the status, labels and the like wake nobody.

A look compares identities and repeats only what changed; with 1000 routes and 10,000 pods it takes a few milliseconds,
in the event loop: a thread would read a copy that changes under it.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from meshctl.adapters.kubernetes.kinds import MANDATORY, OPTIONAL, OWN_ANNOTATIONS
from meshctl.adapters.kubernetes.services import Services
from meshctl.api.document import Fault
from meshctl.api.objects import ROUTING, Declared, Key, read_object
from meshctl.api.resolve import Resolver
from meshctl.errors import MeshctlError
from meshctl.model import DesiredRoute, Problem, RouteId
from meshctl.ports import Desired, KubeObject, ObjectKey, Objects

START_S = 30.0
"""A large cluster is listed within this; who may not list is told so after it."""
OPTIONAL_S = 3.0
"""What can be done without is waited for this long, so that the first decision has it where it is to be had."""
QUIET_S = 0.02
"""A roll-out changes pods and slices in bursts; what comes within this is one change."""

Read = dict[str, Any]
"""What of an object is read."""
_IDENTITY = ("name", "namespace", "uid", "generation", "creationTimestamp")


class KubernetesSource:
    """ModelRoutes and ModelProfiles with the servers behind their Services."""

    def __init__(
        self,
        objects: Objects,
        problems: Callable[[], tuple[Problem, ...]] = tuple,
        *,
        start_s: float = START_S,
        optional_s: float = OPTIONAL_S,
    ) -> None:
        """`problems` says what is wrong with the copy: that the API server is away, that Nodes may not be listed."""
        self._objects = objects
        self._problems = problems
        self._start_s, self._optional_s = start_s, optional_s
        self._services = Services(objects)
        self._resolver = Resolver()
        self._seen: dict[ObjectKey, KubeObject] = {}
        self._read: dict[ObjectKey, _Known] = {}
        self._declared: dict[Key, Declared] = {}
        self._faults: tuple[Problem, ...] = ()
        self._outdated = False
        """What was taken in is not resolved yet."""
        self._routes: Mapping[RouteId, DesiredRoute] = {}
        self._looked = Desired({})

    async def start(self) -> None:
        """Returns when the copy is complete. Raises MeshctlError, saying what is missing, when that takes too long."""
        if missing := await self._complete(MANDATORY, self._start_s):
            raise MeshctlError(
                f"Kubernetes objects are not known after {self._start_s:g} s: {'; '.join(missing)}. Install the CRDs"
                " (crds/) and let meshctl list and watch these kinds (deploy/rbac.yaml)"
            )
        await self._complete(OPTIONAL, self._optional_s)
        self.look()

    def desired(self) -> Desired:
        """The routes as of the last look; what is wrong with the copy as of now."""
        return Desired(self._routes, (*_held(self._missing(MANDATORY)), *self._problems(), *self._faults))

    async def wait_changed(self) -> None:
        """Returns when `desired` is another than at the last return (or start)."""
        while not self.look():
            await self._objects.wait_changed()
            await asyncio.sleep(QUIET_S)

    async def stop(self) -> None:
        """Nothing runs between calls; the copy is somebody else's."""

    # ------------------------------------------------------------------------------------------------------ the parts

    async def _complete(self, kinds: tuple[str, ...], timeout_s: float) -> list[str]:
        """What is missing once nothing is, or the time is over."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._missing(kinds):
                    await self._objects.wait_changed()
        except TimeoutError:
            return [f"{kind}: {why}" for kind, why in self._missing(kinds).items()]
        return []

    def _missing(self, kinds: tuple[str, ...]) -> dict[str, str]:
        return {kind: why for kind in kinds if (why := self._objects.missing(kind))}

    def look(self) -> bool:
        """Take in the copy as it is now; True when `desired` is another than at the last look."""
        if not self._missing(MANDATORY):
            self._outdated |= self._take_objects()
            self._outdated |= self._services.look()
            if self._outdated:
                self._resolve()
        before, self._looked = self._looked, self.desired()
        return self._looked != before

    def _resolve(self) -> None:
        resolved = self._resolver.resolve(self._declared, self._services.servers)
        self._services.keep(self._resolver.services)
        faults = (*(fault for known in self._read.values() for fault in known.faults), *resolved.faults)
        self._routes, self._faults = resolved.routes, tuple(fault.problem() for fault in faults)
        self._outdated = False

    def _take_objects(self) -> bool:
        """Read the ModelRoutes and ModelProfiles that are another object now; True when there was something to it."""
        now = {key: value for kind in ROUTING for key, value in self._objects.every(kind).items()}
        if now == self._seen:
            return False
        before, seen, self._seen, self._read = self._read, self._seen, now, {}
        for key, value in sorted(now.items()):
            if (known := before.get(key)) is not None and seen.get(key) is value:
                self._read[key] = known
            elif not value["metadata"].get("deletionTimestamp"):
                self._read[key] = _known(key, value, known)
        same = len(before) == len(self._read) and all(before.get(key) is known for key, known in self._read.items())
        if not same:
            self._declared = {known.key: known.declared for known in self._read.values() if known.declared is not None}
        return not same


def _held(missing: dict[str, str]) -> list[Problem]:
    said = "every route stays as it was until all are known"
    return [Problem(f"Kubernetes {kind}", f"{why}; {said}") for kind, why in missing.items()]


@dataclass(frozen=True, slots=True)
class _Known:
    """What is in force of one object."""

    key: Key
    read: Read
    declared: Declared | None
    """None: it never was valid."""
    faults: tuple[Fault, ...]


def _known(name: ObjectKey, value: KubeObject, before: _Known | None) -> _Known:
    """`before` itself where nothing that is read changed."""
    read = _read_of(value)
    if before is not None and read == before.read:
        return before
    key = Key(*name)
    manifest = read_object(read, str(key))
    if (declared := manifest.objects.get(key)) is not None:
        return _Known(key, read, declared, manifest.faults)
    good = before.declared if before is not None and _uid(read) == _uid(before.read) else None
    still = " (its last valid version stays in force)" if good else ""
    faults = (dataclasses.replace(f, subject=str(key), message=f.message + still) for f in manifest.faults)
    return _Known(key, read, good, tuple(faults))


def _read_of(value: KubeObject) -> Read:
    metadata = value["metadata"]
    kept = {name: metadata[name] for name in _IDENTITY if name in metadata}
    annotations = metadata.get("annotations") or {}
    own = {name: text for name, text in annotations.items() if name.startswith(OWN_ANNOTATIONS)}
    identity = {name: value[name] for name in ("apiVersion", "kind") if name in value}
    return {**identity, "metadata": {**kept, "annotations": own}, "spec": value.get("spec")}


def _uid(read: Read) -> str:
    return str(read["metadata"].get("uid", ""))
