"""Signals from a Prometheus: one query per signal for the whole fleet, within a deadline, whatever the server does.

prometheus-api-client is synchronous, has no deadline of its own and retries by itself. Here it runs in a thread,
without retries (the next poll is the retry) or redirects, and at most ONE thread exists per source: when the
deadline passes, the socket under it is shut down, and should the thread hang all the same (in a name lookup), the next
polls say so and start no other. A query that fails leaves its Signals as they were, to age; the others still count.

Ages are measured on Prometheus' own clock (its evaluation time less the sample's time) and then put on the loop's, so
that neither a difference nor a step of the wall clocks matters.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
import structlog
import urllib3
from prometheus_api_client.exceptions import PrometheusApiClientException
from prometheus_api_client.prometheus_connect import PrometheusConnect
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.response import HTTPResponse
from urllib3.util.retry import Retry

from meshctl.adapters.series import (
    FAMILIES,
    FORMULAS,
    Family,
    Formula,
    Measured,
    Subject,
    assemble,
    promql,
    promql_stamp,
)
from meshctl.errors import InputError
from meshctl.model import DesiredRoute, Problem, RouteId, RouteSignals
from meshctl.ports import Clock, Observed

DEFAULT_WINDOW_S = 10.0
"""At least two, better four, scrape intervals: a rate needs two samples in its window."""

_DOWN = "up == 0"
_GRACE_RATIO = 0.1
"""Last part of the deadline, in which an interrupted thread hands over what it has."""
_LEAST_TIMEOUT_S = 0.01
_TOO_LATE = "did not answer every query before the deadline"
_DETAIL_CHARS = 300

log = structlog.get_logger(__name__)


class PrometheusSignals:
    """ports.SignalSource over the Prometheus at `url`. Raises InputError when `url` is not an http(s) URL."""

    def __init__(self, url: str, clock: Clock, window_s: float = DEFAULT_WINDOW_S) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"Prometheus URL {url!r}: expected http://HOST:PORT or https://HOST:PORT")
        if not window_s > 0:
            raise InputError(f"Prometheus rate window of {window_s:g} s: it must be above 0")
        self._where = f"{parts.scheme}://{parts.hostname}:{parts.port or ''}{parts.path}".rstrip(":/")
        self._clock = clock
        self._window_s = window_s
        self._client = _client(url.rstrip("/"))
        self._last: Mapping[RouteId, RouteSignals] = {}
        self._flight: _Flight | None = None

    async def poll(
        self, routes: Mapping[RouteId, DesiredRoute], proxies: tuple[str, ...], deadline_s: float
    ) -> Observed:
        """Ask for everything; `proxies` are not asked (Prometheus scrapes them)."""
        measured, problems = await self._measure(deadline_s)
        # 0.2 s for 10,000 endpoints: the event loop has others to serve meanwhile
        self._last = await asyncio.to_thread(assemble, routes, measured, self._last)
        return Observed(self._last, (*problems, *measured.problems(self._where)))

    async def stop(self) -> None:
        if self._flight is not None and not self._flight.landed:
            self._flight.interrupt()
        self._client.close()

    async def _measure(self, deadline_s: float) -> tuple[Measured, tuple[Problem, ...]]:
        if self._flight is not None and not self._flight.landed:
            stuck_s = time.monotonic() - self._flight.started_s
            return Measured(), (
                Problem(self._where, f"still stuck in a query begun {stuck_s:.0f} s ago; not asked again"),
            )
        flight = self._flight = _Flight(self._client, self._clock, self._window_s, self._where, deadline_s)
        landed = asyncio.Event()
        loop = asyncio.get_running_loop()
        flight.on_landing = lambda: loop.call_soon_threadsafe(landed.set)
        flight.start()
        for wait_s in (deadline_s * (1 - _GRACE_RATIO), deadline_s * _GRACE_RATIO):
            try:
                await asyncio.wait_for(landed.wait(), wait_s)
            except TimeoutError:
                flight.interrupt()
            else:
                return flight.measured, flight.problems
        return Measured(), (Problem(self._where, f"no answer within {deadline_s:g} s; the last signals stay"),)


# ------------------------------------------------------------------------------------------------- the worker thread


class _Flight(threading.Thread):
    """One poll's queries, one after the other. A daemon, so that a hung name lookup cannot keep the program alive."""

    def __init__(self, client: PrometheusConnect, clock: Clock, window_s: float, where: str, deadline_s: float) -> None:
        super().__init__(name="prometheus-poll", daemon=True)
        self.measured = Measured()
        self.landed = False
        """It asks no more; set before `on_landing` is called, while the thread itself may live a moment longer."""
        self.on_landing: Callable[[], object] = lambda: None
        self.started_s = time.monotonic()
        self.sock: socket.socket | None = None
        self.warnings: list[str] = []
        self._client, self._clock, self._window_s, self._where = client, clock, window_s, where
        self._give_up_s = self.started_s + deadline_s * (1 - _GRACE_RATIO)
        self._interrupted = False
        self._timeouts_in_a_row = 0
        self._failed: dict[str, tuple[str, int]] = {}
        """By kind of failure: the first in full, and how many."""
        self._notes: list[str] = []

    def interrupt(self) -> None:
        """Called from outside: no more queries, and the read under way (if any) ends at once."""
        self._interrupted = True
        sock = self.sock
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError as gone:
                log.debug("prometheus socket was closed already", where=self._where, error=str(gone))

    @property
    def problems(self) -> tuple[Problem, ...]:
        """One Problem per kind of failure, however many queries met it."""
        failed = (
            f"{words}; the last signals of {len(q)} query(s) stay; first: {q[0]}" for words, q in self._failed.items()
        )
        warned = (f"answered with a warning: {words}" for words in sorted(set(self.warnings)))
        return tuple(Problem(self._where, message) for message in (*failed, *self._notes, *warned))

    def run(self) -> None:
        try:
            self._ask_all()
        except _GaveUp as gave_up:
            if not self._timeouts_in_a_row:  # those are told already
                self._notes.append(f"{gave_up}; the last signals stay")
        finally:
            self.landed = True
            try:
                self.on_landing()
            except RuntimeError as closed:  # the event loop ended before this thread did: nobody waits any more
                log.debug("prometheus poll landed after the loop", where=self._where, error=str(closed))

    def _ask_all(self) -> None:
        down = self._ask(_DOWN)
        if down is not None:
            self.measured.dark = frozenset(row.labels.get("instance", "") for row in down)
        for family in FAMILIES:
            stamps = self._stamps(family)
            for formula in FORMULAS:
                if formula.family is family and stamps is not None:
                    self._ask_formula(formula, stamps)

    def _stamps(self, family: Family) -> Mapping[Subject, float] | None:
        """When each subject was last sampled, on the loop's clock; None when that could not be asked."""
        rows = self._ask(promql_stamp(family))
        now_s = self._clock.now_s()
        if rows is None:
            return None
        return {_subject(family, row): now_s - max(0.0, row.at_s - row.value) for row in rows}

    def _ask_formula(self, formula: Formula, stamps: Mapping[Subject, float]) -> None:
        # Without stamps there is no such exporter, and nothing to ask for.
        rows = self._ask(promql(formula, self._window_s)) if stamps else []
        if rows is None:
            return
        self.measured.values[formula] = {}
        for row in rows:
            subject = _subject(formula.family, row)
            if subject in stamps:  # a rate without a present sample is a thing of the past
                self.measured.add(formula, subject, row.value, stamps[subject])
        if stamps and not rows and formula.rate and formula.plus == (formula.family.stamp,):
            what = f"{len(stamps)} series of {formula.family.stamp} have no rate over {self._window_s:g} s yet"
            self._notes.append(f"{what}: the window must hold two scrapes or more")

    def _ask(self, query: str) -> list[_Row] | None:
        """None when this query failed (and is noted); raises _GaveUp when asking further has no sense."""
        # Half of what is left: one slow query cannot take the time of all the others.
        timeout_s = (self._give_up_s - time.monotonic()) / 2
        if timeout_s < _LEAST_TIMEOUT_S or self._timeouts_in_a_row > 1 or self._interrupted:
            raise _GaveUp(_TOO_LATE)
        try:
            params = {"timeout": f"{timeout_s:.3f}"}
            answer = self._client.custom_query(query, params, timeout_s)  # type: ignore[arg-type]  # requests takes floats
            rows = [_Row.of(row) for row in answer]
        except tuple(FAILURES) as failure:
            if self._interrupted:
                raise _GaveUp(_TOO_LATE) from failure
            self._timeouts_in_a_row = self._timeouts_in_a_row + 1 if isinstance(failure, requests.Timeout) else 0
            if isinstance(failure, requests.ConnectionError):
                raise _GaveUp(explain(failure)) from failure
            first, count = self._failed.get(_said(failure), (f"{explain(failure)}, asked {query}", 0))
            self._failed[_said(failure)] = first, count + 1
            return None
        self._timeouts_in_a_row = 0
        return rows


class _GaveUp(Exception):  # noqa: N818 (control flow within this module, not an error)
    """Nothing more can be had from the server in this poll."""


@dataclass(frozen=True, slots=True)
class _Row:
    """One element of an instant vector."""

    labels: Mapping[str, str]
    at_s: float
    """Evaluation time, Unix."""
    value: float

    @staticmethod
    def of(row: Any) -> _Row:
        """Raises KeyError, TypeError or ValueError when `row` is no such element."""
        at_s, value = row["value"]
        return _Row(dict(row["metric"]), float(at_s), float(value))


def _subject(family: Family, row: _Row) -> Subject:
    return tuple(row.labels.get(name, "") for name in family.by)


# ------------------------------------------------------------------------------------------------ foreign exceptions

FAILURES: Mapping[type[Exception], str] = {
    # Every exception of the libraries below that a server can cause; the first class that fits says it.
    requests.ConnectTimeout: "did not accept a connection in time",
    requests.Timeout: "did not answer in time",
    requests.TooManyRedirects: "answered with a redirect, which is not followed: give the URL it leads to",
    requests.exceptions.SSLError: "failed the TLS handshake",
    requests.exceptions.ChunkedEncodingError: "broke off its answer",
    requests.ConnectionError: "could not be reached",
    requests.exceptions.InvalidJSONError: "answered what is not JSON: is this a Prometheus?",
    requests.RequestException: "could not be asked",
    PrometheusApiClientException: "refused the query",
    urllib3.exceptions.HTTPError: "answered what is not HTTP",
    # What JSON of another shape does to the client and to _Row.
    KeyError: "answered JSON that is not a query result: is this a Prometheus?",
    TypeError: "answered JSON that is not a query result: is this a Prometheus?",
    AttributeError: "answered JSON that is not a query result: is this a Prometheus?",
    ValueError: "answered a query result that cannot be read",
}


def _said(failure: Exception) -> str:
    return next(words for kind, words in FAILURES.items() if isinstance(failure, kind))


def explain(failure: Exception) -> str:
    """What the server did, for people, with the libraries' own words cut to a line."""
    detail = " ".join(str(failure).split())
    return f"{_said(failure)} ({type(failure).__name__}: {detail[:_DETAIL_CHARS]})"


# ------------------------------------------------------------------------------------------------------- the client


def _client(url: str) -> PrometheusConnect:
    session = requests.Session()
    session.trust_env = False  # looked up for every request otherwise; a proxy has no place between us and Prometheus
    session.max_redirects = 0
    session.hooks["response"].append(_note_warnings)
    client = PrometheusConnect(url=url, session=session, retry=Retry(0, read=False))
    session.mount(url, _Adapter(max_retries=Retry(0, read=False)))  # after the client has mounted its own
    return client


def _note_warnings(response: requests.Response, **_: object) -> None:
    """Keep Prometheus' warnings (a partial result, for one), which the client drops. Rare, so looked for first."""
    flight = threading.current_thread()
    if isinstance(flight, _Flight) and b'"warnings":' in response.content:
        try:
            flight.warnings.extend(map(str, response.json().get("warnings", ())))
        except (ValueError, AttributeError) as not_ours:  # the client meets the same and reports it
            log.debug("prometheus answer could not be read for warnings", error=str(not_ours))


def _note_socket(sock: socket.socket | None) -> None:
    flight = threading.current_thread()
    if isinstance(flight, _Flight):
        flight.sock = sock


class _Connection(HTTPConnection):
    def getresponse(self) -> HTTPResponse:  # type: ignore[override]  # as in urllib3 itself
        _note_socket(self.sock)
        return super().getresponse()


class _TlsConnection(HTTPSConnection):
    def getresponse(self) -> HTTPResponse:  # type: ignore[override]  # as in urllib3 itself
        _note_socket(self.sock)
        return super().getresponse()


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class _Adapter(HTTPAdapter):
    """Lets a waiting thread's socket be found: the library's time-outs are per read, and a slow drip passes them."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
