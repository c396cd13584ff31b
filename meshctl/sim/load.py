"""Open-loop load: requests are sent at times drawn beforehand, whatever becomes of those sent before.

Invariants: the same seed gives the same arrival times, sizes and targets; a latency counts from the SCHEDULED time, so
a server (or this generator) that falls behind can't hide its queue by being asked less; every request is waited for
until it is answered or its timeout is over, and what is not answered 200 is a failure.

How late the generator itself was is part of the result (`send_lag_p99_ms`): a starved generator shows. Timers count in
milliseconds and nothing is sent early, so a lag of 0.5 ms on average is usual and part of every latency.

At 600 requests/s aiohttp's client costs 0.2 ms of CPU per request, so a client of our own is not worth its lines.
Rejected: closed loops (N workers that wait for their answer), which slow down with the server.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import itertools
import math
import time
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
import numpy as np
from multidict import CIMultiDict
from numpy.typing import NDArray
from yarl import URL

from meshctl.errors import InputError

INFER_PATH = "/v2/models/{model}/infer"
CHUNK = 4096
"""Arrivals drawn at a time."""

_FAILURES: tuple[tuple[type[Exception], str], ...] = (
    (aiohttp.ClientConnectorError, "refused"),
    (aiohttp.ServerDisconnectedError, "disconnected"),
    (TimeoutError, "timeout"),
    (aiohttp.ClientPayloadError, "truncated"),
    (OSError, "reset"),
    (aiohttp.ClientError, "protocol"),
)
"""What a failed request is called; the first that fits. A status other than 200 is `http_<status>`."""
_OWN_LIMITS = frozenset({errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS})
"""Errors of a connection that are the generator's fault, not the server's: `own_limit`."""


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """What to send. Raises InputError when it makes no sense."""

    urls: tuple[str, ...]
    """Where to; one is drawn per request. Without a path: Triton's infer path for `model`."""
    rate_rps: float
    mix: tuple[tuple[int, float], ...]
    """(batch, share); the shares sum to 1."""
    seconds: float
    """How long to send for, after the warm-up; may be infinite (then `Load.stop` ends it)."""
    seed: int = 1
    warmup_s: float = 0.0
    """Sent before, at the same rate, and left out of the result."""
    slo_s: float = 0.15
    timeout_s: float = 30.0
    headers: tuple[str, ...] = ("x-batch-size",)
    """Those that carry the batch; `NV-InferRequest` in its own form."""
    model: str = "model"
    host: str = ""
    """The Host header, where it is not the URL's."""
    weights: tuple[float, ...] = ()
    """Of the urls; empty: alike."""
    body: Callable[[int], bytes] | None = None
    """Batch -> JSON body, for servers that read the size there; None sends none."""

    def __post_init__(self) -> None:
        for name, value in (("rate", self.rate_rps), ("seconds", self.seconds), ("timeout", self.timeout_s)):
            if not value > 0:
                raise InputError(f"load: {name} must be more than 0, not {value:g}")
        if not math.isfinite(self.rate_rps) or not (self.warmup_s >= 0 and math.isfinite(self.warmup_s)):
            raise InputError("load: rate and warm-up must be finite, and the warm-up not negative")
        if not self.mix or any(b < 1 or not s >= 0 for b, s in self.mix) or abs(sum(s for _, s in self.mix) - 1) > 1e-3:
            raise InputError(f"load: the mix needs batches of at least 1 whose shares sum to 1, not {self.mix}")
        if not self.urls or (self.weights and len(self.weights) != len(self.urls)):
            raise InputError("load: needs at least one URL, and as many weights as URLs")
        if self.weights and not (min(self.weights) >= 0 and 0 < sum(self.weights) < math.inf):
            raise InputError(f"load: weights must not be negative, nor all 0: {self.weights}")
        for url in self.urls:
            _target(url, self.model)


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What came of it. Percentiles are over the answered requests; None when none was."""

    requests: int
    failed: int
    failures: Mapping[str, int]
    """By kind: refused, disconnected, reset, timeout, truncated, protocol, own_limit, http_<status>."""
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    p999_ms: float | None
    goodput: float | None
    """Share of all requests answered 200 within the SLO, 0..1; None without requests."""
    goodput_by_size: Mapping[str, float]
    """The same by batch; batches without a request are left out."""
    rate_rps: float
    """Requests sent per second, in fact."""
    send_lag_p99_ms: float | None
    """How late the generator was: from the scheduled time to the send."""
    seconds: float
    seed: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_mix(text: str) -> tuple[tuple[int, float], ...]:
    """`1:0.8,8:0.15,64:0.05` -> ((1, 0.8), (8, 0.15), (64, 0.05)). Raises InputError."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        mix = tuple((int(batch), float(share)) for batch, share in pairs)
    except ValueError as error:
        raise InputError(f"mix {text!r} is not BATCH:SHARE,..., e.g. 1:0.8,8:0.15,64:0.05") from error
    if len({batch for batch, _ in mix}) != len(mix):
        raise InputError(f"mix {text!r} names a batch twice")
    return mix


def arrivals(config: LoadConfig) -> Iterator[tuple[float, int, int]]:
    """(seconds from the start, index into the mix, index into the urls), until warm-up and `seconds` are over."""
    rng = np.random.default_rng(config.seed)
    sizes = np.cumsum([share for _, share in config.mix])[:-1]
    weights = np.array(config.weights or [1.0] * len(config.urls))
    targets = np.cumsum(weights / weights.sum())[:-1]
    now_s, end_s = 0.0, config.warmup_s + config.seconds
    while True:
        times = now_s + np.cumsum(rng.exponential(1 / config.rate_rps, CHUNK))
        size = np.searchsorted(sizes, rng.random(CHUNK), side="right")
        target = np.searchsorted(targets, rng.random(CHUNK), side="right")
        yield from itertools.takewhile(
            lambda a: a[0] < end_s, zip(times.tolist(), size.tolist(), target.tolist(), strict=True)
        )
        now_s = float(times[-1])
        if now_s >= end_s:
            return


class Load:
    """One run: `run` it in a task, look at `window` meanwhile."""

    def __init__(self, config: LoadConfig) -> None:
        self.config = config
        self._urls = [_target(url, config.model) for url in config.urls]
        self._headers = [_headers(config, batch) for batch, _ in config.mix]
        self._bodies = [config.body(batch) if config.body else None for batch, _ in config.mix]
        self._stopped = False
        self._start_s, self._sending_s = 0.0, 0.0
        # one row per ended request, in the order of their ends
        self._ended_s, self._scheduled_s = array("d"), array("d")
        self._sent_s, self._size, self._failure = array("d"), array("H"), array("H")
        self._kinds = [""]

    def stop(self) -> None:
        """Send nothing more; `run` returns when what is under way has ended."""
        self._stopped = True

    async def run(self) -> LoadResult:
        connector = aiohttp.TCPConnector(limit=0, use_dns_cache=True)
        async with aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=self.config.timeout_s, connect=self.config.timeout_s),
        ) as session:
            await self._send_all(session)
        sending_s = self._sending_s - self.config.warmup_s
        # an early last arrival is no shorter run, a late last send is a longer one
        return self._result(
            0, self.config.warmup_s, sending_s if self._stopped else max(sending_s, self.config.seconds)
        )

    def window(self, seconds: float) -> LoadResult:
        """Of the requests that ended within the last `seconds`."""
        now_s = self._elapsed_s()
        first = bisect_left(self._ended_s, now_s - seconds)
        return self._result(first, -math.inf, min(seconds, now_s))

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._start_s

    async def _send_all(self, session: aiohttp.ClientSession) -> None:
        self._start_s = time.monotonic()
        under_way: set[asyncio.Task[None]] = set()
        for number, (at_s, size, target) in enumerate(arrivals(self.config)):
            delay_s = at_s - self._elapsed_s()
            if delay_s > 0:
                await asyncio.sleep(delay_s + 0.0005)  # timers round to a millisecond; none may be early
            elif number % 16 == 0:
                await asyncio.sleep(0)  # behind: what was created must run all the same
            if self._stopped:
                break
            task = asyncio.create_task(self._send(session, at_s, size, target))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        self._sending_s = self._elapsed_s()
        if under_way:
            # each ends by its own timeout; the margin is for the loop to notice
            await asyncio.wait(under_way, timeout=self.config.timeout_s + 5)
        for task in under_way:
            task.cancel()

    async def _send(self, session: aiohttp.ClientSession, at_s: float, size: int, target: int) -> None:
        sent_s, failure = self._elapsed_s(), "cancelled"
        try:
            async with session.post(
                self._urls[target], data=self._bodies[size], headers=self._headers[size], allow_redirects=False
            ) as response:
                await response.read()
                failure = "" if response.status == 200 else f"http_{response.status}"
        except tuple(kind for kind, _ in _FAILURES) as error:
            failure = failure_kind(error)
        finally:
            self._record(at_s, sent_s, size, failure)

    def _record(self, at_s: float, sent_s: float, size: int, failure: str) -> None:
        if failure not in self._kinds:
            self._kinds.append(failure)
        self._ended_s.append(self._elapsed_s())
        self._scheduled_s.append(at_s)
        self._sent_s.append(sent_s)
        self._size.append(size)
        self._failure.append(self._kinds.index(failure))

    def _result(self, first: int, since_s: float, seconds: float) -> LoadResult:
        """Of the rows from `first` on that were scheduled at `since_s` or later, observed for `seconds`."""
        scheduled, ended, sent, size, failure = (
            np.array(column[first:])
            for column in (self._scheduled_s, self._ended_s, self._sent_s, self._size, self._failure)
        )
        keep = scheduled >= since_s
        answered = failure[keep] == 0
        latency_s = np.where(answered, (ended - scheduled)[keep], np.inf)
        good = latency_s <= self.config.slo_s
        kinds = Counter(self._kinds[kind] for kind in failure[keep] if kind)
        by_size = {
            str(batch): float(np.mean(good[size[keep] == index]))
            for index, (batch, _) in enumerate(self.config.mix)
            if np.any(size[keep] == index)
        }
        return LoadResult(
            requests=len(good),
            failed=len(good) - int(answered.sum()),
            failures=dict(sorted(kinds.items())),
            p50_ms=_percentile_ms(latency_s[answered], 50),
            p90_ms=_percentile_ms(latency_s[answered], 90),
            p99_ms=_percentile_ms(latency_s[answered], 99),
            p999_ms=_percentile_ms(latency_s[answered], 99.9),
            goodput=float(np.mean(good)) if len(good) else None,
            goodput_by_size=by_size,
            rate_rps=len(good) / seconds if seconds > 0 else 0.0,
            send_lag_p99_ms=_percentile_ms((sent - scheduled)[keep], 99),
            seconds=seconds,
            seed=self.config.seed,
        )


async def run_load(config: LoadConfig) -> LoadResult:
    """Send it all, wait for it all."""
    return await Load(config).run()


def calm_gc() -> None:
    """Collections would show as latency: leave what start-up made out of them, and make them rare."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def failure_kind(error: Exception) -> str:
    """What a request that ended with `error` is called."""
    if isinstance(error, OSError) and error.errno in _OWN_LIMITS:
        return "own_limit"
    return next(name for kind, name in _FAILURES if isinstance(error, kind))


def _percentile_ms(values_s: NDArray[np.float64], q: float) -> float | None:
    return round(float(np.percentile(values_s, q)) * 1e3, 3) if len(values_s) else None


def _target(url: str, model: str) -> URL:
    """Where to post. Raises InputError when `url` can't be asked."""
    try:
        target = URL(url)
    except ValueError as error:
        raise InputError(f"load: {url!r} is not a URL: {error}") from error
    if target.scheme != "http" or not target.host:
        raise InputError(f"load: {url!r} is not a URL of the form http://HOST:PORT[/PATH]")
    return target.with_path(INFER_PATH.format(model=model)) if target.path in ("", "/") else target


def _headers(config: LoadConfig, batch: int) -> CIMultiDict[str]:
    headers = CIMultiDict({"Host": config.host} if config.host else {})
    for name in config.headers:
        headers[name] = f"batch_size: {batch}" if name.lower() == "nv-inferrequest" else str(batch)
    if config.body:
        headers["Content-Type"] = "application/json"
    return headers
