"""Which writes every gateway knows: istiod's word, or a settle time where istiod can't be asked.

istiod answers "has it been pushed and acknowledged" for no single object, so `Istiod` puts it together from three
debug pages, read in this order, each of every replica:
- adsz: the clusters each proxy asks endpoints of. A proxy asks for a cluster's only when it was sent the cluster.
- configz: the objects, with resourceVersion, that istiod pushes from. A later push of any kind includes them.
- syncz: what was sent and acknowledged. Envoy acknowledges clusters only when the new ones have their endpoints.

A ServiceEntry or DestinationRule is confirmed when it is in every configz, its clusters are in adsz of every gateway,
and then all that was sent of clusters and endpoints is acknowledged. For a VirtualService, whose rules have no name of
their own, and for what makes no cluster that can be seen (istiod can be told to send only those in use), it must have
been in every configz for longer than istiod's longest debounce, and then all be acknowledged. Only taking away waits
for that. A gateway that was there a moment ago (istiod restarts) is waited for.

Rejected: nonces alone. They carry the number of the push, but a proxy can be sent a push that was computed before the
write and sent after it. config_dump per proxy proves it, but costs istiod a whole configuration per proxy and look.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import orjson

from istio.names import VIRTUAL_SERVICE, key_of
from istio.steps import Written
from meshctl.model import ProxyStatus
from meshctl.ports import Clock, ObjectKey

LOOK_S, LOOK_MAX_S = 0.05, 1.0
"""Time between two looks while something is not confirmed: istiod needs 100 ms at least; then less and less often."""
LOOK_SHARE = 4
"""A look that takes long is followed by a pause of so many times its length: istiod has other things to do."""
HEARTBEAT_S = 5.0
"""Time between two looks at which gateways there are."""
TIMEOUT_S = 5.0
"""For one page."""
LONGEST_S = 12.0
"""istiod pushes at most PILOT_DEBOUNCE_MAX (10 s) after it has seen a change; and 2 s for the push itself and for
requests that had just chosen their cluster."""
AWAY_S = 30.0
"""A gateway that is gone from istiod for so long will not come back: Envoy's longest back-off."""
OFF_LOOP_BYTES = 256 * 1024
"""Pages larger than this are parsed in a thread."""
CLUSTERS, ENDPOINTS, ROUTES = ("cluster", "endpoint", "route")
_DECODER, _BETWEEN = json.JSONDecoder(), re.compile(r"[\s,]*")
EDS = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"


class Confirmation(Protocol):
    """Which writes every gateway knows. `watch` and the questions never block."""

    problem: str
    """Why nothing can be confirmed now; "" when all is well."""

    def start(self) -> None: ...
    def watch(self, wanted: Collection[Written]) -> None:
        """From now on look for these and for nothing else."""
        ...

    def confirmed(self) -> Collection[Written]:
        """Those of `watch` that every gateway knows."""
        ...

    def proxies(self) -> tuple[ProxyStatus, ...]:
        """The gateways, as far as they can be seen."""
        ...

    async def wait_changed(self) -> None:
        """Returns when `confirmed`, `proxies` or `problem` may differ."""
        ...

    async def stop(self) -> None: ...


class Elapsed:
    """Confirmed some time after it was written: where istiod can't be asked. It sees no proxies.

    `settle_s` for what is added, as long as istiod usually needs. `longest_s` for a VirtualService, on which only
    taking away waits: before it is pushed, clusters would be taken away from under the one in force, and requests fail.
    """

    problem = ""

    def __init__(self, clock: Clock, settle_s: float = 2.0, longest_s: float = LONGEST_S) -> None:
        self._clock, self._settle_s, self._longest_s = clock, settle_s, longest_s
        self._since: dict[Written, float] = {}
        self._told: Collection[Written] = frozenset()
        self._changed = asyncio.Event()

    def start(self) -> None:
        """Nothing to do."""

    def watch(self, wanted: Collection[Written]) -> None:
        now_s = self._clock.now_s()
        self._since = {written: self._since.get(written, now_s) for written in sorted(wanted)}
        self._changed.set()

    def confirmed(self) -> Collection[Written]:
        now_s = self._clock.now_s()
        return frozenset(w for w, since_s in self._since.items() if now_s - since_s >= self._needs_s(w))

    def proxies(self) -> tuple[ProxyStatus, ...]:
        return ()

    async def wait_changed(self) -> None:
        """Returns when one became due since the last time."""
        while (confirmed := self.confirmed()) == self._told:
            now_s = self._clock.now_s()
            due = [since_s + self._needs_s(w) - now_s for w, since_s in self._since.items() if w not in confirmed]
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), max(0.01, min(due)) if due else None)
        self._told = confirmed

    def _needs_s(self, written: Written) -> float:
        return self._longest_s if written.key.kind == VIRTUAL_SERVICE else self._settle_s

    async def stop(self) -> None:
        """Nothing to do."""


# ------------------------------------------------------------------------------------------------------------ istiod


@dataclass(frozen=True, slots=True)
class Proxy:
    """One connected proxy, by one istiod."""

    node: str
    router: bool
    """A gateway, not a pod's sidecar."""
    behind: frozenset[str]
    """Types of which it was sent something that it has not acknowledged."""
    refused: Mapping[str, str]
    """Type -> what it said against the newest of it."""
    clusters: frozenset[str] = frozenset()
    """Those that it asks the endpoints of."""
    routed: bool = True
    """It asks for HTTP routes: there is a Gateway for it."""


@dataclass(frozen=True, slots=True)
class Look:
    """What the replicas of istiod say, together."""

    proxies: tuple[Proxy, ...]
    """Ordered by node."""
    versions: tuple[Mapping[ObjectKey, str], ...] = ()
    """Of each replica: resourceVersion of every object it has; empty when that was not asked."""


@dataclass(slots=True)
class _Watched:
    stored_s: float | None = None
    """When it was first seen in every replica's store."""
    confirmed: bool = False


@dataclass(slots=True)
class Verdicts:
    """What looks at istiod say of writes. No I/O; `now_s` is any clock that does not jump."""

    longest_s: float = LONGEST_S
    _watched: dict[Written, _Watched] = field(default_factory=dict)
    _seen: dict[str, float] = field(default_factory=dict)
    """Gateway -> when it was last connected."""

    def watch(self, wanted: Collection[Written]) -> bool:
        """Whether there is something new to look for."""
        new = any(written not in self._watched for written in wanted)
        self._watched = {written: self._watched.get(written) or _Watched() for written in sorted(wanted)}
        return new

    @property
    def pending(self) -> bool:
        return not all(state.confirmed for state in self._watched.values())

    def confirmed(self) -> frozenset[Written]:
        return frozenset(written for written, state in self._watched.items() if state.confirmed)

    def observe(self, look: Look, now_s: float) -> bool:
        """Whether something more is confirmed."""
        self._seen = {node: at_s for node, at_s in self._seen.items() if now_s - at_s < AWAY_S}
        self._seen |= dict.fromkeys((proxy.node for proxy in look.proxies if proxy.router), now_s)
        away = any(at_s < now_s for at_s in self._seen.values())
        found = False
        for written, state in self._watched.items():
            if state.confirmed or not all(_stored(written, versions) for versions in look.versions):
                continue
            state.stored_s = now_s if state.stored_s is None else state.stored_s
            settled = now_s - state.stored_s >= self.longest_s
            state.confirmed = not away and all(_knows(proxy, written, settled=settled) for proxy in look.proxies)
            state.confirmed &= settled or written.key.kind != VIRTUAL_SERVICE
            found |= state.confirmed
        return found


def _stored(written: Written, versions: Mapping[ObjectKey, str]) -> bool:
    found = versions.get(written.key, "")
    if not (found and written.version):
        return found == written.version
    return found == written.version or (
        found.isdigit() and written.version.isdigit() and int(found) >= int(written.version)
    )


def _knows(proxy: Proxy, written: Written, *, settled: bool) -> bool:
    """A refusal of clusters or endpoints is no obstacle when `settled`: what is good of a refused response is in force,
    and a proxy that goes on refusing somebody else's must not hold up all. Refused routes leave the old ones in force.
    """
    if written.key.kind == VIRTUAL_SERVICE:
        return ROUTES not in proxy.behind
    if not (proxy.behind & {CLUSTERS, ENDPOINTS}) <= (proxy.refused.keys() if settled else frozenset()):
        return False
    return settled or not proxy.router or proxy.clusters.issuperset(written.clusters)


class Istiod:
    """Asks istiod's debug pages: at its monitoring port, at each address that its name stands for."""

    def __init__(
        self, urls: Iterable[str], clock: Clock, *, token: Path | None = None, longest_s: float = LONGEST_S
    ) -> None:
        """`urls` name the monitoring (15014) or debug (8080) port, one per replica or one headless name for all.
        `token`: a service account token for audience ``istio-ca``; istiod asks for one unless it is on this machine.
        """
        self.problem = ""
        self._urls, self._clock, self._token = tuple(urls), clock, token
        if not self._urls:
            raise ValueError("no URL of istiod to ask")
        self._verdicts = Verdicts(longest_s)
        self._proxies: tuple[ProxyStatus, ...] = ()
        self._wanted, self._changed = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="istiod")

    def watch(self, wanted: Collection[Written]) -> None:
        if self._verdicts.watch(wanted):
            self._wanted.set()

    def confirmed(self) -> Collection[Written]:
        return self._verdicts.confirmed()

    def proxies(self) -> tuple[ProxyStatus, ...]:
        return self._proxies

    async def wait_changed(self) -> None:
        await self._changed.wait()

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _run(self) -> None:
        pause_s = LOOK_S
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as session:
            while True:
                self._wanted.clear()
                began_s, pending = self._clock.now_s(), self._verdicts.pending
                await self._look(session, everything=pending)
                took_s = self._clock.now_s() - began_s
                pause_s = max(pause_s, LOOK_SHARE * took_s) if pending else HEARTBEAT_S
                try:
                    await asyncio.wait_for(self._wanted.wait(), pause_s)
                    pause_s = LOOK_S
                except TimeoutError:
                    pause_s = min(pause_s * 1.5, LOOK_MAX_S)

    async def _look(self, session: aiohttp.ClientSession, *, everything: bool) -> None:
        before = (self._proxies, self.problem)
        confirmed = False
        try:
            replicas = await asyncio.gather(*[_addresses(url) for url in self._urls])
            urls = sorted({url for found in replicas for url in found})
            headers = {} if self._token is None else {"Authorization": f"Bearer {self._token.read_text().strip()}"}
            looks = await asyncio.gather(*[_ask(session, url, headers, everything=everything) for url in urls])
        except (OSError, aiohttp.ClientError, ValueError, LookupError, TypeError, AttributeError) as error:
            self.problem = (
                f"istiod ({', '.join(self._urls)}) can't be asked what the gateways know: "
                f"{error or type(error).__name__}; weights go on changing, all else waits"
            )
        else:
            self.problem = ""
            proxies = tuple(sorted((p for look in looks for p in look.proxies), key=lambda p: p.node))
            self._proxies = tuple(_status(proxy) for proxy in proxies if proxy.router and proxy.routed)
            if everything:
                merged = Look(proxies, tuple(versions for look in looks for versions in look.versions))
                confirmed = self._verdicts.observe(merged, self._clock.now_s())
        if confirmed or before != (self._proxies, self.problem):
            self._changed.set()
            self._changed = asyncio.Event()


def _status(proxy: Proxy) -> ProxyStatus:
    said = [f"{kind}s: {words}" for kind, words in sorted(proxy.refused.items())]
    return ProxyStatus(proxy.node, "", not proxy.behind, "; ".join(said), mesh=True)


async def _addresses(url: str) -> list[str]:
    """`url` once for each address that its host name stands for (a headless Service: one per replica)."""
    parts = urlsplit(url)
    port = parts.port or 80
    found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    hosts = {f"[{address[0]}]" if ":" in str(address[0]) else str(address[0]) for *_, address in found}
    return [urlunsplit(parts._replace(netloc=f"{host}:{port}")) for host in sorted(hosts)]


async def _ask(session: aiohttp.ClientSession, url: str, headers: Mapping[str, str], *, everything: bool) -> Look:
    """One replica's word. The order of the pages is part of the proof, see the module."""
    watches: dict[str, set[str]] = defaultdict(set)
    versions: tuple[Mapping[ObjectKey, str], ...] = ()
    if everything:
        for client in (await _page(session, url, headers, "adsz")).get("clients") or ():
            node = str(client["connectionId"]).rpartition("-")[0]
            watches[node].update((client.get("watches") or {}).get(EDS) or ())
        versions = (await asyncio.to_thread(versions_of, await _body(session, url, headers, "configz")),)
    entries = await _page(session, url, headers, "syncz")
    return Look(tuple(_proxy(entry, frozenset(watches[str(entry["proxy"])])) for entry in entries), versions)


def versions_of(configz: bytes) -> dict[ObjectKey, str]:
    """resourceVersion of every object of istiod's page. Raises ValueError, KeyError or TypeError on any other.

    One object after the other, as of 6000 at once (15 MB of text) only this is wanted: they would be 70 MB, and orjson
    lets no other thread run until it has made them.
    """
    text = configz.decode().strip()
    found: dict[ObjectKey, str] = {}
    if text == "null":  # an empty list in Go
        return found
    if not text.startswith("["):
        raise ValueError(f"/debug/configz is no list: {text[:40]!r}")
    at = _next(text, 1)
    while text[at : at + 1] != "]":
        value, at = _DECODER.raw_decode(text, at)
        found[key_of(value)] = str(value["metadata"].get("resourceVersion", ""))
        at = _next(text, at)
    return found


def _next(text: str, at: int) -> int:
    """Where the next value of a list begins, or the list ends."""
    between = _BETWEEN.match(text, at)
    return at if between is None else between.end()


async def _page(session: aiohttp.ClientSession, url: str, headers: Mapping[str, str], page: str) -> Any:
    body = await _body(session, url, headers, page)
    return await asyncio.to_thread(orjson.loads, body) if len(body) > OFF_LOOP_BYTES else orjson.loads(body)


async def _body(session: aiohttp.ClientSession, url: str, headers: Mapping[str, str], page: str) -> bytes:
    async with session.get(f"{url.rstrip('/')}/debug/{page}", headers=headers) as response:
        if response.status != 200:
            raise ValueError(f"/debug/{page} answered {response.status}")
        return await response.read()


def _proxy(entry: Mapping[str, Any], clusters: frozenset[str]) -> Proxy:
    kinds = (CLUSTERS, ENDPOINTS, "listener", ROUTES)
    words = {
        kind: str(resource["lastError"])
        for kind in kinds
        for name, resource in (entry.get("resources") or {}).items()
        if name == _TYPES[kind] and resource.get("lastError")
    }
    return Proxy(
        node=str(entry["proxy"]),
        router=entry.get("proxy_type") == "router",
        behind=frozenset(k for k in kinds if entry.get(f"{k}_sent", "") != entry.get(f"{k}_acked", "")),
        refused=words,
        clusters=clusters,
        routed=bool(entry.get("route_sent")),
    )


_TYPES = {
    CLUSTERS: "type.googleapis.com/envoy.config.cluster.v3.Cluster",
    ENDPOINTS: EDS,
    "listener": "type.googleapis.com/envoy.config.listener.v3.Listener",
    ROUTES: "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
}
