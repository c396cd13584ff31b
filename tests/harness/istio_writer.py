"""An `IstioWriter` over objects in memory, with gateways that know what a test says they know."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from istio.steps import Written
from istio.writer import IstioWriter
from meshctl.model import Plan, ProxyStatus, RouteId, RoutePlan
from meshctl.ports import ObjectKey
from tests.harness.istio_plans import GATEWAY
from tests.harness.objects import MemoryObjects
from tests.harness.tools import DEADLINE_S


@dataclass
class ManualClock:
    """Time stands still until a test moves it."""

    at_s: float = 1000.0

    def now_s(self) -> float:
        return self.at_s


class ToldConfirmation:
    """Confirms what it is told to, or everything (`open`)."""

    def __init__(self, *, opened: bool = True) -> None:
        self.problem = ""
        self.watched: frozenset[Written] = frozenset()
        self.open = opened
        self._told: set[Written] = set()
        self._changed = asyncio.Event()

    def start(self) -> None:
        """Nothing to do."""

    async def stop(self) -> None:
        """Nothing to do."""

    def watch(self, wanted: Collection[Written]) -> None:
        self.watched = frozenset(wanted)
        if self.open:
            self.tell(self.watched - self._told)

    def tell(self, written: Iterable[Written]) -> None:
        """From now on every gateway knows `written`."""
        new = set(written)
        self._told |= new
        if new:
            self._changed.set()
            self._changed = asyncio.Event()

    def confirmed(self) -> Collection[Written]:
        return self._told & self.watched

    def proxies(self) -> tuple[ProxyStatus, ...]:
        return ()

    async def wait_changed(self) -> None:
        await self._changed.wait()


def _with_gateway() -> MemoryObjects:
    namespace, _, name = GATEWAY.partition("/")
    metadata = {"namespace": namespace, "name": name}
    return MemoryObjects({"apiVersion": "networking.istio.io/v1", "kind": "Gateway", "metadata": metadata, "spec": {}})


@dataclass
class Writing:
    """A writer and everything around it; the Gateway of `istio_plans` is there."""

    objects: MemoryObjects = field(default_factory=_with_gateway)
    confirmation: ToldConfirmation = field(default_factory=ToldConfirmation)
    clock: ManualClock = field(default_factory=ManualClock)
    leads: bool = True
    plans: dict[RouteId, RoutePlan] = field(default_factory=dict)
    writer: IstioWriter = field(init=False)

    def __post_init__(self) -> None:
        self.writer = IstioWriter(
            self.objects,
            self.confirmation,
            self.clock,
            routes=lambda: {route: plan.route for route, plan in self.plans.items()},
            leading=lambda: self.leads,
        )

    def plan(self, *plans: RoutePlan) -> int:
        """Apply these routes and no others."""
        self.plans = {plan.route.spec.id: plan for plan in plans}
        return self.writer.apply(Plan(self.plans))

    async def until(self, holds: Callable[[], bool], what: str) -> None:
        """Wait for something that the writer does or says."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not holds():  # noqa: ASYNC110 (about objects, status and waits: no one event for all of them)
                    await asyncio.sleep(0.005)
        except TimeoutError as late:
            raise AssertionError(f"not within {DEADLINE_S:g} s: {what}; {self.writer.status()}") from late

    async def settled(self) -> None:
        """Nothing is waited for, refused, or in dispute, and the writer has looked at everything."""
        # Not before a turn after the plan was applied, which sees everything as dirty until it was looked at.
        await self.until(self.writer.idle, "the writer is idle")

    def written(self) -> list[str]:
        """The writes so far that changed something: ``apply VirtualService resnet``."""
        return [f"{w.verb} {w.key.kind} {w.key.name}" for w in self.objects.writes if w.changed]

    def spec(self, kind: str, name: str, namespace: str = "team") -> dict[str, object]:
        """Of a live object."""
        found = self.objects.find(ObjectKey(kind, namespace, name))
        assert found is not None, f"{kind} {namespace}/{name} is not there"
        return dict(found["spec"])


@asynccontextmanager
async def writing(start: Writing | None = None) -> AsyncIterator[Writing]:
    """A writer that runs, ended at the end."""
    it = start or Writing()
    it.writer.start()
    try:
        yield it
    finally:
        await it.writer.stop()
