"""Signals without a Prometheus: asks every server's metrics page and every proxy's admin page itself.

For small fleets, the demo and tests; a Prometheus scales further. A page is taken whole or not at all, so that a
target that does not answer leaves its last Signals as they were, to age. Rates are over a short window of pages; a
counter that goes back has restarted, with all that have its labels, and counts on from there. (Each for itself, as in
Prometheus, a restart soon after a start doubled service times: one counter is past its last value again, another not.)
A target that answered last time is waited for, one that did not is asked in the background, so that a hanging server
delays no more than one poll.

Rejected: one long-lived loop per target (a poll would not say what was true when it was asked); pages parsed in full
(nine tenths of Triton's lines are not ours: they are skipped before parsing).
"""

from __future__ import annotations

import asyncio
import math
import re
import sys
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from istio.names import DOMAIN
from meshctl.adapters.series import (
    COUNTERS,
    FORMULAS,
    NAMINGS,
    PROXY_SERIES,
    SERVER_SERIES,
    Family,
    Measured,
    Reading,
    Subject,
    assemble,
    evaluate,
    subject_of,
)
from meshctl.errors import InputError
from meshctl.model import DesiredRoute, Problem, RouteId, RouteSignals
from meshctl.ports import Clock, Observed

DEFAULT_WINDOW_S = 5.0
DEFAULT_TIMEOUT_S = 1.0
MAX_SOCKETS = 256
MAX_PAGE_BYTES = 64 << 20

# Of a proxy's thousands of counters, by Envoy's own names (dots), which the filter matches; of an Istio gateway's, only
# those of our hosts. What our own proxies say of a cluster as a whole is not asked of its endpoints once more.
_PROXY_PATH = (
    r"/stats/prometheus?filter=^cluster\.([^|]*\.(upstream_rq_total|rq_(success|error|active))"
    rf"|outbound.*\.{re.escape(DOMAIN)};?\.(upstream_rq_total|.*\.rq_(total|success|error|active)))$"
)
_SERVER_PATH = "/metrics"
_PAGE = re.compile(r"\s*([A-Za-z_:#]|$)")
"""How text of metrics begins; a page of HTML or of binary does not."""

_Labels = Mapping[str, str]
_About = tuple[str, Subject]
"""Name of a series, and what it is about."""
_FAMILY: Mapping[str, Family] = {name: formula.family for formula in FORMULAS for name in formula.terms}
_LINE = re.compile(r"^(?P<name>[A-Za-z_:][A-Za-z0-9_:]*)[^\n]*", re.MULTILINE)
_FEW = 100
"""Series that are gone are kept up to this many, rather than copied for each that goes."""


class ScrapeSignals:
    """ports.SignalSource that asks the sources themselves.

    `exporters` are further ``host:port`` pages of the servers' kind: DCGM's, which are no endpoint's own; `gateways`
    are admin addresses of proxies that do not tell theirs (those that istiod configures). Raises InputError when a
    window or time-out is not above 0.
    """

    def __init__(
        self,
        clock: Clock,
        window_s: float = DEFAULT_WINDOW_S,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        exporters: tuple[str, ...] = (),
        gateways: tuple[str, ...] = (),
    ) -> None:
        if not (window_s > 0 and timeout_s > 0):
            raise InputError(f"scrape window {window_s:g} s and time-out {timeout_s:g} s: both must be above 0")
        self._clock, self._window_s, self._timeout_s, self._exporters = clock, window_s, timeout_s, exporters
        self._gateways = gateways
        self._targets: dict[str, Target] = {}
        self._last: Mapping[RouteId, RouteSignals] = {}
        self._session: aiohttp.ClientSession | None = None

    async def poll(
        self, routes: Mapping[RouteId, DesiredRoute], proxies: tuple[str, ...], deadline_s: float
    ) -> Observed:
        """Ask every distinct metrics address of `routes`, every one of `proxies` and of the gateways."""
        self._keep_only(routes, (*proxies, *self._gateways))
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
            evaluate(formula, series.read, measured)
        return measured


class _NotMetricsError(ValueError):
    """A page that is not what a metrics page is."""


def _floats() -> array[float]:
    return array("d")


@dataclass(frozen=True, slots=True)
class _Page:
    at_s: float
    values: array[float]
    """By column. Counters grow without end: what was lost by restarts is added again. Infinite: the page said nonsense;
    NaN: it has no such series."""

    def value(self, column: int) -> float:
        return self.values[column] if column < len(self.values) else math.nan


@dataclass(slots=True)
class Target:
    """One page's address and its last few contents: a column per series, 8 bytes for each page kept, and only a series
    that is new is parsed in full. (As mappings from labels to numbers, one proxy with 1000 routes took 300 MB.)"""

    url: str
    address: str
    series: frozenset[str]
    """Names worth reading on this kind of page."""
    task: asyncio.Task[None] | None = None
    problem: str = ""
    pages: deque[_Page] = field(default_factory=deque)
    columns: dict[str, int] = field(default_factory=dict)
    """By series as the page writes it, ``name{labels}``."""
    about: list[_About] = field(default_factory=list)
    """By column: the series' name, and what it is about."""
    last: array[float] = field(default_factory=_floats)
    """By column: what the page said last; NaN: nothing yet."""
    total: array[float] = field(default_factory=_floats)
    """By column: how far a counter has come through all its restarts."""

    def take(self, text: str, at_s: float, window_s: float) -> None:
        """Add a page. Raises ValueError, and changes nothing, when `text` is not metrics."""
        known, new = self._parse(text)
        for key, (about, value) in new.items():
            self.columns[key] = len(self.about)
            known[len(self.about)] = value
            self.about.append(about)
        for column in (self.last, self.total):
            column.extend([math.nan] * (len(self.about) - len(column)))
        values = array("d", [math.nan]) * len(self.about)
        restarted = self._restarted(known)
        for number, value in known.items():
            values[number] = self._grown(number, value, restarted=number in restarted)
        self.pages.append(_Page(at_s, values))
        while len(self.pages) > 2 and self.pages[1].at_s <= at_s - window_s:
            self.pages.popleft()
        if len(self.about) > 2 * len(known) + _FEW:
            self._forget()

    def present(self) -> Iterator[int]:
        """Columns of the series on the newest page."""
        if self.pages:
            yield from (i for i, value in enumerate(self.pages[-1].values) if not math.isnan(value))

    def reading(self, column: int) -> Reading | None:
        """The newest value, or the rate since the oldest page kept; None until there are two pages with it."""
        newest = self.pages[-1]
        value = newest.value(column)
        if self.about[column][0] not in COUNTERS or math.isinf(value):
            return Reading(value, newest.at_s)
        oldest = next(page for page in self.pages if math.isfinite(page.value(column)))
        span_s = newest.at_s - oldest.at_s
        return Reading((value - oldest.value(column)) / span_s, newest.at_s) if span_s > 0 else None

    def _parse(self, text: str) -> tuple[dict[int, float], dict[str, tuple[_About, float]]]:
        """Values of the columns there are, and the series that are new. Raises ValueError when `text` is not in the
        Prometheus text format."""
        if not _PAGE.match(text):
            raise _NotMetricsError(f"begins with {text[:20]!r}")
        known: dict[int, float] = {}
        new: dict[str, tuple[_About, float]] = {}
        shared: dict[_About, _About] = {}
        for match in _LINE.finditer(text):
            if match["name"] not in self.series:
                continue
            line = match[0]
            brace = line.rfind("}") + 1
            key, value = (line[:brace], line[brace:]) if brace else line.split(None, 1)
            column = self.columns.get(key)
            if column is not None and len(value.split()) == 1:
                known[column] = float(value)
                continue
            for labels, sample in _samples(line):  # a time stamp after the value comes here too
                if column is None:
                    about = match["name"], self._subject(match["name"], labels)
                    new[key] = shared.setdefault(about, about), sample
                else:
                    known[column] = sample
        return known, new

    def _subject(self, name: str, labels: _Labels) -> Subject:
        family = _FAMILY[name]
        return tuple(sys.intern(_label(self, family, labels, label)) for label in family.by)

    def _restarted(self, values: Mapping[int, float]) -> set[int]:
        """Columns of the counters that went back, and of all that count the same: those with the same labels."""
        back = {i for i, value in values.items() if 0.0 <= value < self.last[i]}
        if not back:
            return back  # nearly always
        labels = {key.removeprefix(self.about[i][0]) for key, i in self.columns.items() if i in back}
        return {i for key, i in self.columns.items() if key.removeprefix(self.about[i][0]) in labels}

    def _grown(self, column: int, value: float, *, restarted: bool) -> float:
        if not 0.0 <= value < math.inf:
            return math.inf
        if self.about[column][0] not in COUNTERS:
            return value
        last, total = self.last[column], self.total[column]
        grown = value if math.isnan(last) else total + (value if restarted else value - last)
        self.last[column], self.total[column] = value, grown
        return grown

    def _forget(self) -> None:
        """Drop the series that are not on the newest page: most are not, so these are routes and endpoints gone."""
        keep = list(self.present())
        kept = set(keep)  # `columns` is in the order of the columns, as `keep` is
        self.columns = {key: new for new, key in enumerate(k for k, old in self.columns.items() if old in kept)}
        self.about = [self.about[i] for i in keep]
        self.last, self.total = (array("d", [column[i] for i in keep]) for column in (self.last, self.total))
        self.pages = deque(_Page(p.at_s, array("d", map(p.value, keep))) for p in self.pages)


def _samples(line: str) -> Iterator[tuple[_Labels, float]]:
    for family in text_string_to_metric_families(line + "\n"):
        for sample in family.samples:
            yield sample.labels, sample.value


class _Series:
    """Readings of all targets, by series and subject, each summed once."""

    def __init__(self, targets: Iterable[Target]) -> None:
        self._by_name: dict[str, list[tuple[Target, int]]] = {}
        self._sums: dict[str, Mapping[Subject, Reading]] = {}
        for target in targets:
            for column in target.present():
                self._by_name.setdefault(target.about[column][0], []).append((target, column))

    def read(self, name: str) -> Mapping[Subject, Reading]:
        if name not in self._sums:
            self._sums[name] = self._sum(name)
        return self._sums[name]

    def _sum(self, name: str) -> Mapping[Subject, Reading]:
        total: dict[Subject, Reading] = {}
        for target, column in self._by_name.get(name, ()):
            reading = target.reading(column)
            if reading is None:
                continue
            subject = target.about[column][1]
            so_far = total.get(subject)
            if so_far is not None:
                largest = _FAMILY[name].keep_max
                value = max(so_far.value, reading.value) if largest else so_far.value + reading.value
                reading = Reading(value, min(so_far.at_s, reading.at_s))
            total[subject] = reading
        return total


def _label(target: Target, family: Family, labels: _Labels, name: str) -> str:
    if name == "instance":
        return target.address
    if name in NAMINGS:
        return subject_of(name, next((labels[named] for named in family.named_by if named in labels), ""))
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
