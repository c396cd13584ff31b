"""Signals without a Prometheus: asks every server's metrics page and every proxy's admin page itself.

For small fleets, the demo and tests; a Prometheus scales further. A page is taken whole or not at all, so that a
target that does not answer leaves its last Signals as they were, to age. Rates are over a short window of pages; a
counter that goes back has restarted, and counts on from there, as in Prometheus. A target that answered last time is
waited for, one that did not is asked in the background, so that a hanging server delays no more than one poll.

Rejected: one long-lived loop per target (a poll would not say what was true when it was asked); pages parsed in full
(nine tenths of Triton's lines are not ours: they are skipped before parsing).
"""

from __future__ import annotations

import asyncio
import math
import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from meshctl.adapters.series import (
    COUNTERS,
    FORMULAS,
    PROXY_SERIES,
    ROUTE,
    SERVER_SERIES,
    Family,
    Measured,
    Reading,
    Subject,
    assemble,
    evaluate,
    route_label,
)
from meshctl.errors import InputError
from meshctl.model import DesiredRoute, Problem, RouteId, RouteSignals
from meshctl.ports import Clock, Observed

DEFAULT_WINDOW_S = 5.0
DEFAULT_TIMEOUT_S = 1.0
MAX_SOCKETS = 256
MAX_PAGE_BYTES = 64 << 20

# Of a proxy's thousands of counters, by Envoy's own names (dots), which the filter matches.
_PROXY_PATH = r"/stats/prometheus?filter=^cluster\..*\.(upstream_rq_total|rq_(success|error|active))$"
_SERVER_PATH = "/metrics"
_PAGE = re.compile(r"\s*([A-Za-z_:#]|$)")
"""How text of metrics begins; a page of HTML or of binary does not."""

_Labels = Mapping[str, str]
_Key = tuple[str, tuple[str, ...]]
"""Name and label values of one series of a page."""


class ScrapeSignals:
    """ports.SignalSource that asks the sources themselves.

    `exporters` are further ``host:port`` pages of the servers' kind: DCGM's, which are no endpoint's own. Raises
    InputError when a window or time-out is not above 0.
    """

    def __init__(
        self,
        clock: Clock,
        window_s: float = DEFAULT_WINDOW_S,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        exporters: tuple[str, ...] = (),
    ) -> None:
        if not (window_s > 0 and timeout_s > 0):
            raise InputError(f"scrape window {window_s:g} s and time-out {timeout_s:g} s: both must be above 0")
        self._clock, self._window_s, self._timeout_s, self._exporters = clock, window_s, timeout_s, exporters
        self._targets: dict[str, Target] = {}
        self._last: Mapping[RouteId, RouteSignals] = {}
        self._session: aiohttp.ClientSession | None = None

    async def poll(
        self, routes: Mapping[RouteId, DesiredRoute], proxies: tuple[str, ...], deadline_s: float
    ) -> Observed:
        """Ask every distinct metrics address of `routes` and every one of `proxies`."""
        self._keep_only(routes, proxies)
        for target in self._targets.values():
            if target.task is None or target.task.done():
                target.task = asyncio.create_task(self._scrape(target))
        wait_s = min(deadline_s, self._timeout_s)
        waited_for = {t.task: t for t in self._targets.values() if t.task is not None and not t.problem}
        if waited_for:
            _, late = await asyncio.wait(waited_for, timeout=wait_s)
            for task in late:
                waited_for[task].problem = f"has not answered within {wait_s:g} s; its last signals stay"
        for target in self._targets.values():
            if target.task is not None and target.task.done():
                target.task.result()  # raises what is no failure of the target but a bug of ours
        measured = self._measure()
        self._last = assemble(routes, measured, self._last)
        failing = (Problem(t.url, t.problem) for t in self._targets.values() if t.problem)
        return Observed(self._last, (*failing, *measured.problems("metrics pages")))

    async def stop(self) -> None:
        self._keep_only({}, (), exporters=())
        if self._session is not None:
            await self._session.close()

    # ------------------------------------------------------------------------------------------------------- asking

    def _keep_only(
        self, routes: Mapping[RouteId, DesiredRoute], proxies: Iterable[str], exporters: tuple[str, ...] | None = None
    ) -> None:
        """Make the targets exactly those of now; what is no longer one is forgotten."""
        servers = {e.metrics for route in routes.values() for e in route.endpoints if e.metrics}
        servers.update(self._exporters if exporters is None else exporters)
        wanted = {f"http://{a}{_SERVER_PATH}": (a, SERVER_SERIES) for a in sorted(servers)}
        wanted |= {f"http://{a}{_PROXY_PATH}": (a, PROXY_SERIES) for a in sorted(set(proxies)) if a}
        for url in [u for u in self._targets if u not in wanted]:
            task = self._targets.pop(url).task
            if task is not None:
                task.cancel()
        for url, (address, series) in wanted.items():
            if url not in self._targets:
                self._targets[url] = Target(url, address, series)

    async def _scrape(self, target: Target) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                text = await self._get(target.url)
            target.take(text, self._clock.now_s(), self._window_s)
            target.problem = ""
        except tuple(FAILURES) as failure:
            target.problem = f"{explain(failure)}; its last signals stay"

    async def _get(self, url: str) -> str:
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=MAX_SOCKETS))
        async with self._session.get(url, allow_redirects=False) as response:
            if response.status != 200:
                raise _NotMetricsError(f"status {response.status}")
            page = bytearray()
            async for chunk in response.content.iter_any():
                page += chunk
                if len(page) > MAX_PAGE_BYTES:
                    raise _NotMetricsError(f"page of more than {MAX_PAGE_BYTES >> 20} MiB")
        return page.decode()

    # ----------------------------------------------------------------------------------------------------- computing

    def _measure(self) -> Measured:
        measured = Measured()
        series = _Series(self._targets.values())
        for formula in FORMULAS:
            evaluate(formula, partial(series.read, formula.family), measured)
        return measured


class _NotMetricsError(ValueError):
    """A page that is not what a metrics page is."""


@dataclass(frozen=True, slots=True)
class _Page:
    at_s: float
    values: Mapping[_Key, float]
    """Counters grow without end: what was lost by restarts is added again. Infinite: the page said nonsense."""


@dataclass(slots=True)
class Target:
    """One page's address and its last few contents."""

    url: str
    address: str
    series: frozenset[str]
    """Names worth reading on this kind of page."""
    task: asyncio.Task[None] | None = None
    problem: str = ""
    pages: deque[_Page] = field(default_factory=deque)
    labels: Mapping[_Key, _Labels] = field(default_factory=dict)
    """Of the series on the newest page."""
    counters: dict[_Key, tuple[float, float]] = field(default_factory=dict)
    """What each counter said last, and how far it has come through all its restarts."""

    def take(self, text: str, at_s: float, window_s: float) -> None:
        """Add a page. Raises ValueError, and changes nothing, when `text` is not metrics."""
        found = _parse(text, self.series)
        self.labels = {key: labels for key, (labels, _) in found.items()}
        self.pages.append(_Page(at_s, {key: self._grown(key, value) for key, (_, value) in found.items()}))
        while len(self.pages) > 2 and self.pages[1].at_s <= at_s - window_s:
            self.pages.popleft()
        if len(self.counters) > len(found):  # a series that is gone, for good once no page kept has it
            kept = frozenset().union(*(page.values for page in self.pages))
            self.counters = {key: counter for key, counter in self.counters.items() if key in kept}

    def _grown(self, key: _Key, value: float) -> float:
        if not 0.0 <= value < math.inf:
            return math.inf
        if key[0] not in COUNTERS:
            return value
        last, total = self.counters.get(key, (value, value))
        total += value - last if value >= last else value
        self.counters[key] = value, total
        return total

    def reading(self, key: _Key) -> Reading | None:
        """The newest value, or the rate since the oldest page kept; None until there are two pages with it."""
        newest = self.pages[-1]
        value = newest.values[key]
        if key[0] not in COUNTERS or math.isinf(value):
            return Reading(value, newest.at_s)
        oldest = next(page for page in self.pages if math.isfinite(page.values.get(key, math.inf)))
        span_s = newest.at_s - oldest.at_s
        return Reading((value - oldest.values[key]) / span_s, newest.at_s) if span_s > 0 else None


def _parse(text: str, names: frozenset[str]) -> dict[_Key, tuple[_Labels, float]]:
    """The samples of `names`. Raises ValueError when `text` is not in the Prometheus text format."""
    if not _PAGE.match(text):
        raise _NotMetricsError(f"begins with {text[:20]!r}")
    lines = (line for line in text.splitlines() if line.partition("{")[0].partition(" ")[0] in names)
    found: dict[_Key, tuple[_Labels, float]] = {}
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            key = (sample.name, tuple(f"{k}={v}" for k, v in sorted(sample.labels.items())))
            found[key] = (sample.labels, sample.value)
    return found


class _Series:
    """Readings of all targets, by series and subject, each summed once."""

    def __init__(self, targets: Iterable[Target]) -> None:
        self._by_name: dict[str, list[tuple[Target, _Key]]] = {}
        self._sums: dict[tuple[Family, str], Mapping[Subject, Reading]] = {}
        for target in targets:
            for key in target.labels:
                self._by_name.setdefault(key[0], []).append((target, key))

    def read(self, family: Family, name: str) -> Mapping[Subject, Reading]:
        if (family, name) not in self._sums:
            self._sums[family, name] = self._sum(family, name)
        return self._sums[family, name]

    def _sum(self, family: Family, name: str) -> Mapping[Subject, Reading]:
        total: dict[Subject, Reading] = {}
        for target, key in self._by_name.get(name, ()):
            reading = target.reading(key)
            if reading is None:
                continue
            subject = tuple(_label(target, target.labels[key], label) for label in family.by)
            so_far = total.get(subject)
            if so_far is not None:
                value = max(so_far.value, reading.value) if family.keep_max else so_far.value + reading.value
                reading = Reading(value, min(so_far.at_s, reading.at_s))
            total[subject] = reading
        return total


def _label(target: Target, labels: _Labels, name: str) -> str:
    if name == "instance":
        return target.address
    if name == ROUTE:
        return route_label(labels.get("envoy_cluster_name", ""))
    return labels.get(name, "")


# ------------------------------------------------------------------------------------------------ foreign exceptions

FAILURES: Mapping[type[Exception], str] = {
    # Every exception that a target can cause; the first class that fits says it.
    TimeoutError: "did not answer in time",
    aiohttp.ClientSSLError: "failed the TLS handshake",
    aiohttp.ClientConnectorError: "could not be reached",
    aiohttp.ServerDisconnectedError: "closed the connection without an answer",
    aiohttp.InvalidURL: "is not an address",
    aiohttp.ClientResponseError: "answered what is not HTTP",
    aiohttp.ClientPayloadError: "broke off its answer",
    aiohttp.ClientError: "could not be asked",
    OSError: "could not be reached",
    ValueError: "answered what is not metrics",
}


def explain(failure: Exception) -> str:
    """What the target did, for people."""
    said = next(words for kind, words in FAILURES.items() if isinstance(failure, kind))
    detail = " ".join(str(failure).split())
    return f"{said} ({type(failure).__name__}{f': {detail[:300]}' if detail else ''})"
