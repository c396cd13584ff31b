"""What the loop needs of the outside world. Adapters implement these; nothing in the core knows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from meshctl.model import DataPlaneStatus, DesiredRoute, Plan, Problem, RouteId, RouteSignals, Weights


@dataclass(frozen=True, slots=True)
class Desired:
    """What people asked for: the last good state of every object, and what is wrong with newer input."""

    routes: Mapping[RouteId, DesiredRoute]
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class Observed:
    """What was measured. A route or endpoint that could not be asked keeps its last Signals, which age."""

    routes: Mapping[RouteId, RouteSignals]
    problems: tuple[Problem, ...] = ()


class Source(Protocol):
    """Desired state. `desired` never blocks and never fails; `wait_changed` returns when it may differ."""

    async def start(self) -> None: ...
    def desired(self) -> Desired: ...
    async def wait_changed(self) -> None: ...
    async def stop(self) -> None: ...


class SignalSource(Protocol):
    """Observed state. `poll` returns within `deadline_s` whatever happens; failures become Problems."""

    async def poll(
        self, routes: Mapping[RouteId, DesiredRoute], proxies: tuple[str, ...], deadline_s: float
    ) -> Observed:
        """`proxies` are the ``host:port`` admin addresses of the connected Envoys (direct scrape only)."""
        ...

    async def stop(self) -> None: ...


class Actuator(Protocol):
    """The data plane. `apply` is idempotent and does not wait; acknowledgements show in `status`."""

    def apply(self, plan: Plan) -> int:
        """Publish; returns how many resources changed (0: nothing was written)."""
        ...

    def status(self) -> DataPlaneStatus: ...
    async def stop(self) -> None: ...


class Replicas(Protocol):
    """This replica among others that do the same."""

    def leading(self) -> bool:
        """Whether this one writes; the others follow what is in force."""
        ...

    def in_force(self) -> Mapping[RouteId, Weights]:
        """What the mesh serves now, by route; one without an entry is not there, or not whole."""
        ...


class ObjectKey(NamedTuple):
    """A Kubernetes object of a kind that meshctl knows."""

    kind: str
    """``VirtualService``; each kind stands for one API group and version."""
    namespace: str
    """"" for cluster-scoped kinds."""
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


KubeObject = Mapping[str, Any]
"""An object as its JSON says it: apiVersion, kind, metadata, spec, status. Never changed in place."""


class Objects(Protocol):
    """Kubernetes objects: a watched copy to read from, the API server to write to.

    The copy may be behind; what `apply` returned is at once in it. Writing raises `FieldConflictError`, `RefusedError`
    or `UnavailableError` (meshctl.errors), and has then changed nothing (or, when the answer was lost, all of it).
    """

    def find(self, key: ObjectKey) -> KubeObject | None: ...
    def every(self, kind: str) -> Mapping[ObjectKey, KubeObject]:
        """All that are watched of one kind."""
        ...

    def missing(self, kind: str) -> str:
        """Why not every object of the kind is known (not listed yet, no such kind ...); "" when it is."""
        ...

    async def apply(self, wanted: KubeObject, *, force: bool = False) -> KubeObject:
        """Server-side apply with field manager ``meshctl``; the object as it then is."""
        ...

    async def delete(self, key: ObjectKey, uid: str) -> None:
        """Delete the object with this UID; one that is gone, or is another one by now, is no error."""
        ...

    async def wait_changed(self) -> None:
        """Returns at the next change of any watched object, or of `missing`."""
        ...


class ObjectStatus(Protocol):
    """What meshctl tells people on Kubernetes objects. Both raise `RefusedError` or `UnavailableError`."""

    async def apply_status(self, wanted: KubeObject) -> KubeObject:
        """Server-side apply of the status subresource, forced, field manager ``meshctl-status``; the object it then is.

        `wanted` has apiVersion, kind, metadata {namespace, name, uid} and the whole status: what it leaves out of what
        was applied before is removed. An object that is gone is a `RefusedError`: none is created.
        """
        ...

    async def post_event(self, about: ObjectKey, uid: str, type_: str, reason: str, message: str, action: str) -> None:
        """Create an Event (events.k8s.io/v1) `regarding` this object, reportingController ``meshctl.io/controller``.

        `type_` is Normal or Warning; `reason` and `action` are CamelCase, 128 characters at most, `message` 1024.
        """
        ...


class Clock(Protocol):
    """Monotonic seconds. The only clock of the decision."""

    def now_s(self) -> float: ...
