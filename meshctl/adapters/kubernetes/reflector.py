"""Keeps a copy of the objects of one kind: a list, then a watch, for ever.

Invariants: the copy is what the API server had at one moment, or newer; when a listing shows that an object has gone
while nobody watched, it goes here, too; an API server that is away, refuses or forgets costs time, never the copy.
A kind that does not exist (its CRD comes later) or may not be listed is a state (`missing`), asked for again every
few seconds: what was held stays, as an API server that is starting knows no custom kinds for a moment.

Own, because the ready ones lose objects: kopf 1.45 does not report after 410 what was deleted meanwhile, ends on any
other ERROR event and does not say when its lists are complete; the kubernetes package's informer is a thread over
generated models. A watch is opened on a version that a list gave (never 0), which makes events ordered.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

import structlog

from meshctl.adapters.kubernetes.client import Client, Event
from meshctl.adapters.kubernetes.faults import AbsentError, BusyError, ExpiredError, ForbiddenError
from meshctl.adapters.kubernetes.kinds import Kind, Raw
from meshctl.adapters.kubernetes.mirror import Mirror
from meshctl.errors import MeshctlError, RefusedError
from meshctl.ports import KubeObject, ObjectKey

FAILURES_TO_LIST = 5
"""After so many in a row the watch is given up for a new list: the version may be one the server cannot reach."""

RESTART_S = 5.0

log = structlog.get_logger(__name__)
_random = random.SystemRandom()


@dataclass(frozen=True, slots=True)
class Pace:
    """How long things may take; tests shorten it."""

    watch_s: float = 300.0
    """A watch is ended by the server after this long, give or take a fifth, and taken up where it was."""
    silence_s: float = 90.0
    """A watch that tells nothing for this long is taken up again. Bookmarks come once a minute where etcd tells the API
    server of its progress (kubeadm: every 5 s); where it does not, a kind of which nothing changes is silent."""
    first_pause_s: float = 0.1
    longest_pause_s: float = 10.0
    """Pauses after failures double from the first to this, and are drawn from their upper half."""
    refused_s: float = 3.0
    """A kind that does not exist, or is forbidden, is asked for this often."""
    steady_s: float = 10.0
    """A watch that lasted this long was a good one: the next failure is a first one."""


class _Selectors(NamedTuple):
    """Which objects of the kind; "": all."""

    labels: str
    fields: str


class Reflector:
    """One kind, in `namespaces` (empty: all), those that the selectors say. Read `objects` from its event loop.

    `on_change` is called for every object that is another now, `on_state` when `missing` or `problem` differs; both
    while `objects` already has the news. They must not raise.
    """

    def __init__(
        self,
        client: Client,
        kind: Kind,
        *,
        namespaces: tuple[str, ...] = (),
        label_selector: str = "",
        field_selector: str = "",
        on_change: Callable[[ObjectKey], object] = lambda _: None,
        on_state: Callable[[], object] = lambda: None,
        pace: Pace | None = None,
    ) -> None:
        self.kind = kind
        held: dict[ObjectKey, KubeObject] = {}
        self.objects: Mapping[ObjectKey, KubeObject] = MappingProxyType(held)
        """Live: what it shows changes whenever the event loop runs."""
        self._on_change, self._on_state = on_change, on_state
        selectors = _Selectors(label_selector, field_selector)
        self._feeds = tuple(
            _Feed(client, kind, Mirror(kind, held, scope), scope, selectors, self._tell, pace or Pace())
            for scope in (namespaces if kind.namespaced and namespaces else ("",))
        )

    @property
    def synced(self) -> bool:
        """Everything was listed once."""
        return all(feed.mirror.version for feed in self._feeds)

    @property
    def missing(self) -> str:
        """Why not every object is known: not listed yet, no such kind, forbidden ...; "" when it is."""
        return "; ".join(feed.missing for feed in self._feeds if feed.missing)

    @property
    def absent(self) -> bool:
        """The kind does not exist, and need not."""
        return self.kind.absent_ok and all(feed.absent for feed in self._feeds)

    @property
    def problem(self) -> str:
        """Why the copy may be behind; "" when it is not."""
        return "; ".join(feed.problem for feed in self._feeds if feed.problem)

    @property
    def settled(self) -> bool:
        """Everything was listed, or refused: waiting longer is of no use."""
        return all(feed.settled for feed in self._feeds)

    async def keep(self) -> None:
        """`run`, for ever: a fault of this program in one event must not leave a kind as it was for good."""
        while True:
            try:
                await self.run()
            except* Exception:
                log.exception("watching ended by a fault; again", kind=self.kind.resource)
            await asyncio.sleep(RESTART_S)

    async def run(self) -> None:
        """Never returns. Raises only what is a fault of this program."""
        async with asyncio.TaskGroup() as tasks:
            for feed in self._feeds:
                tasks.create_task(feed.run(), name=f"watch {self.kind.resource} {feed.namespace}")

    def wrote(self, raw: Raw) -> None:
        """An object of this kind as a write of ours returned it: it is in the copy at once."""
        key = self.kind.key(raw)
        for feed in self._feeds:
            if feed.namespace in ("", key.namespace) and feed.mirror.version and feed.mirror.wrote(raw):
                self._on_change(key)

    def _tell(self, keys: tuple[ObjectKey, ...], *, state: bool) -> None:
        for key in keys:
            self._on_change(key)
        if state:
            self._on_state()


class _Tell(Protocol):
    def __call__(self, keys: tuple[ObjectKey, ...], *, state: bool) -> None: ...


class _Feed:
    """List and watch in one namespace, or in all ("")."""

    def __init__(
        self,
        client: Client,
        kind: Kind,
        mirror: Mirror,
        namespace: str,
        selectors: _Selectors,
        tell: _Tell,
        pace: Pace,
    ) -> None:
        self.mirror, self.namespace = mirror, namespace
        self._what = kind.resource + (f" in namespace {namespace}" if namespace else "")
        self.missing = f"{self._what}: not listed yet"
        self.problem = ""
        self.settled = False
        self.absent = False
        """The API server knows no such kind."""
        self._client, self._kind, self._select, self._tell, self._pace = client, kind, selectors, tell, pace
        self._failures = 0
        """In a row, since a watch went well."""
        self._must_list = True

    async def run(self) -> None:
        while True:
            try:
                if self._must_list:
                    await self._list()
                await self._watch()
            except MeshctlError as error:
                pause_s = self._failed(error)
                await asyncio.sleep(pause_s)

    async def _list(self) -> None:
        """Trims page by page, so that no more than one page is ever held whole."""
        found: list[tuple[ObjectKey, KubeObject]] = []
        version = ""
        pages = self._client.pages(
            self._kind,
            self.namespace,
            label_selector=self._select.labels,
            field_selector=self._select.fields,
            retry=False,
        )
        async with aclosing(pages):
            async for page in pages:
                found += [(self._kind.key(raw), self._kind.kept(raw)) for raw in page.items]
                version = page.resource_version
        changed = self.mirror.listed(found, version)
        self._must_list = False
        self.settled, self.absent = True, False
        self._tell(changed, state=False)
        self._say(missing="", problem=self.problem)

    async def _watch(self) -> None:
        """Returns when the server ends a watch in good order. One that was steady ends a row of failures either way:
        silence is no sign of trouble where nothing happens and the server has no bookmarks to send."""
        agreed_s = math.inf
        events = self._client.watch(
            self._kind,
            self.namespace,
            self.mirror.version,
            label_selector=self._select.labels,
            field_selector=self._select.fields,
            timeout_s=self._pace.watch_s * _random.uniform(0.8, 1.2),
            silence_s=self._pace.silence_s,
        )
        try:
            async with aclosing(events):
                async for event in events:
                    if event is None:
                        agreed_s = time.monotonic()
                        self._healthy()
                    else:
                        self._take(event)
        finally:
            if steady := time.monotonic() - agreed_s > self._pace.steady_s:
                self._failures = 0
        if not steady:  # a server that ends watches at once is not asked at once again
            self._failures += 1
            await asyncio.sleep(self._pause_s())

    def _take(self, event: Event) -> None:
        self._failures = 0
        changed = self.mirror.happened(event.what, event.value)
        if changed is not None:
            self._tell((changed,), state=False)

    def _healthy(self) -> None:
        self._say(missing=self.missing, problem="")

    def _failed(self, error: MeshctlError) -> float:
        """Takes note of a failure; seconds until the next try."""
        self._failures += 1
        if isinstance(error, RefusedError):
            self._must_list, self.settled = True, True
            self.absent = isinstance(error, AbsentError)
            self._say(missing=f"{error}{_advice(error, self._kind)}", problem="")
            return self._pace.refused_s * _random.uniform(0.8, 1.2)
        if isinstance(error, ExpiredError) or self._failures % FAILURES_TO_LIST == 0:
            self._must_list = True
        if not self.mirror.version:
            self._say(missing=f"{self._what}: not listed yet: {error}", problem="")
        elif self._failures > 1:
            self._say(missing=self.missing, problem=f"{self._what}: may be behind: {error}")
        return max(self._pause_s(), error.retry_after_s if isinstance(error, BusyError) else 0.0)

    def _pause_s(self) -> float:
        doubled_s = self._pace.first_pause_s * 2.0 ** min(self._failures - 1, 30)
        return min(doubled_s, self._pace.longest_pause_s) * _random.uniform(0.5, 1.0)

    def _say(self, *, missing: str, problem: str) -> None:
        if (missing, problem) != (self.missing, self.problem):
            if (missing or problem) and not (self.absent and self._kind.absent_ok):
                log.warning("not all objects are known", what=self._what, why=missing or problem)
            self.missing, self.problem = missing, problem
            self._tell((), state=True)


def _advice(error: RefusedError, kind: Kind) -> str:
    if isinstance(error, AbsentError):
        return f" (is the CRD of {kind.resource} installed?)" if "." in kind.group else ""
    return f" (grant get, list and watch on {kind.resource})" if isinstance(error, ForbiddenError) else ""
