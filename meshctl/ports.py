"""What the loop needs of the outside world. Adapters implement these; nothing in the core knows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from meshctl.model import DataPlaneStatus, DesiredRoute, Plan, Problem, RouteId, RouteSignals


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


class Clock(Protocol):
    """Monotonic seconds. The only clock of the decision."""

    def now_s(self) -> float: ...
