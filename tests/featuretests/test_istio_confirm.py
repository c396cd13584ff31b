"""When a write counts as known to every gateway: istiod's pages in, verdicts out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
from aiohttp import web

from istio.confirm import EDS, LONGEST_S, Elapsed, Istiod, Look, Proxy, Verdicts, versions_of
from istio.names import SERVICE_ENTRY, VIRTUAL_SERVICE
from istio.steps import Written
from meshctl.ports import ObjectKey
from tests.harness.istio_writer import ManualClock
from tests.harness.tools import DEADLINE_S

CLUSTER = "outbound|80||small.resnet.team.sizes.meshctl.internal"
ENTRY = Written(ObjectKey(SERVICE_ENTRY, "team", "resnet.small.size"), "7", (CLUSTER,))
ROOT = Written(ObjectKey(VIRTUAL_SERVICE, "team", "resnet"), "9")
GONE = Written(ROOT.key, "")


def proxy(node: str = "gw-0", *, behind: str = "", clusters: str = CLUSTER, refused: str = "") -> Proxy:
    words = dict.fromkeys(refused.split(), "no such thing")
    return Proxy(node, router=True, behind=frozenset(behind.split()), refused=words, clusters=frozenset({clusters}))


def seen(*proxies: Proxy, entry: str = "7", root: str = "9", replicas: int = 1) -> Look:
    versions = {key: version for key, version in ((ENTRY.key, entry), (ROOT.key, root)) if version}
    return Look(tuple(proxies), (versions,) * replicas)


def verdicts(*looks: tuple[float, Look]) -> set[Written]:
    """What is confirmed after `looks`, each at its time in seconds."""
    asked = Verdicts()
    asked.watch((ENTRY, ROOT, GONE))
    for at_s, look in looks:
        asked.observe(look, at_s)
    return set(asked.confirmed())


def test_a_backend_is_known_when_stored_asked_for_and_acknowledged() -> None:
    """All three, at every gateway; a later version counts as well."""
    assert verdicts((0, seen(proxy(), proxy("gw-1")))) == {ENTRY}
    assert verdicts((0, seen(proxy(), entry="12"))) == {ENTRY}
    assert verdicts((0, seen(proxy(), entry="6"))) == set()
    assert verdicts((0, seen(proxy(), entry=""))) == set()
    assert verdicts((0, seen(proxy(), proxy("gw-1", clusters="outbound|80||other")))) == set()
    assert verdicts((0, seen(proxy(), proxy("gw-1", behind="cluster")))) == set()
    assert verdicts((0, Look((proxy(),), ({ENTRY.key: "7"}, {})))) == set()  # one replica has not seen it


def test_a_virtual_service_is_known_after_istiods_longest_debounce() -> None:
    """Its routes have no names to look for: time, and then everything acknowledged."""
    assert verdicts((0, seen(proxy())), (LONGEST_S - 1, seen(proxy()))) == {ENTRY}
    assert verdicts((0, seen(proxy())), (LONGEST_S, seen(proxy()))) == {ENTRY, ROOT}
    assert verdicts((0, seen(proxy())), (LONGEST_S, seen(proxy(behind="route")))) == {ENTRY}
    assert verdicts((0, seen(proxy(), root="")), (LONGEST_S, seen(proxy(), root=""))) == {ENTRY, GONE}


def test_a_gateway_that_went_a_moment_ago_is_waited_for() -> None:
    """istiod restarts: for a while it has no proxies, and that confirms nothing. One that stays away is forgotten."""
    assert verdicts((0, seen(proxy(), entry="")), (1, seen())) == set()
    assert verdicts((0, seen(proxy(), entry="")), (1, seen()), (2, seen(proxy()))) == {ENTRY}
    assert verdicts((0, seen(proxy(), entry="", root="")), (1, seen()), (40, seen())) == {ENTRY, ROOT}


def test_a_gateway_that_refuses_others_clusters_holds_up_for_a_while_only() -> None:
    """What is good of a refused response is in force; refused routes leave the old ones in force."""
    stuck = proxy(behind="cluster", refused="cluster")
    assert verdicts((0, seen(stuck)), (LONGEST_S, seen(stuck))) == {ENTRY, ROOT}
    refusing = proxy(behind="route", refused="route")
    assert verdicts((0, seen(refusing)), (LONGEST_S, seen(refusing))) == {ENTRY}


def test_clusters_that_istiod_does_not_send_before_use_are_known_in_the_end() -> None:
    """istiod may be told to send gateways only the clusters in use; then time must do."""
    without = proxy(clusters="outbound|80||other")
    assert verdicts((0, seen(without)), (LONGEST_S, seen(without))) == {ENTRY, ROOT}


async def test_without_istiod_time_must_do() -> None:
    """Each write is confirmed so long after it was first asked about, also when others are asked about meanwhile."""
    clock = ManualClock()
    elapsed = Elapsed(clock, 2.0, 2.0)
    elapsed.watch([ENTRY])
    clock.at_s += 1.5
    elapsed.watch([ENTRY, ROOT])
    assert set(elapsed.confirmed()) == set()
    clock.at_s += 0.5
    assert set(elapsed.confirmed()) == {ENTRY}
    elapsed.watch([ROOT])
    assert set(elapsed.confirmed()) == set()
    waits = asyncio.create_task(elapsed.wait_changed())
    clock.at_s += 1.5
    async with asyncio.timeout(DEADLINE_S):
        await waits
    assert set(elapsed.confirmed()) == {ROOT}


def test_without_istiod_taking_away_waits_for_its_longest_debounce() -> None:
    """Removed before the VirtualService that no longer names it is pushed, a cluster would be missed."""
    clock = ManualClock()
    elapsed = Elapsed(clock)
    elapsed.watch([ENTRY, ROOT, GONE])
    clock.at_s += LONGEST_S - 0.1
    assert set(elapsed.confirmed()) == {ENTRY}
    clock.at_s += 0.1
    assert set(elapsed.confirmed()) == {ENTRY, ROOT, GONE}


@dataclass
class FakeIstiod:
    """The three debug pages, as the real one writes them."""

    stored: list[tuple[str, str, str]] = field(default_factory=list)
    """Kind, name and resourceVersion of what is in the store."""
    clusters: list[str] = field(default_factory=list)
    acknowledged: bool = True
    away: bool = False
    asked: list[str] = field(default_factory=list)

    async def page(self, request: web.Request) -> web.Response:
        name = request.match_info["page"]
        self.asked.append(name)
        if self.away:
            return web.Response(status=503)
        return web.json_response(getattr(self, name)())

    def syncz(self) -> Any:
        acked = "2026-11-23T02:16:56Z/2" if self.acknowledged else "2026-11-23T02:16:56Z/1"
        kinds = ("cluster", "endpoint", "listener", "route")
        states = {f"{kind}_sent": "2026-11-23T02:16:56Z/2" for kind in kinds} | {
            f"{kind}_acked": acked for kind in kinds
        }
        sidecar = {"proxy": "pod.team", "proxy_type": "sidecar"}
        return [{"proxy": "gw-0.istio-system", "proxy_type": "router", **states, "resources": {}}, sidecar]

    def adsz(self) -> Any:
        return {
            "totalClients": 1,
            "clients": [{"connectionId": "gw-0.istio-system-12", "watches": {EDS: self.clusters}}],
        }

    def configz(self) -> Any:
        names = [{"namespace": "team", "name": name, "resourceVersion": version} for _, name, version in self.stored]
        return [{"kind": kind, "metadata": name} for (kind, _, _), name in zip(self.stored, names, strict=True)]


@asynccontextmanager
async def asking(fake: FakeIstiod) -> AsyncIterator[Istiod]:
    app = web.Application()
    app.router.add_get("/debug/{page}", fake.page)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    clock = ManualClock()
    istiod = Istiod([f"http://127.0.0.1:{runner.addresses[0][1]}"], clock)
    istiod.start()
    try:
        yield istiod
    finally:
        await istiod.stop()
        await runner.cleanup()


async def until(istiod: Istiod, holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not holds():
            await istiod.wait_changed()


async def test_istiod_is_asked_only_while_something_is_not_known() -> None:
    """Otherwise only, and seldom, for the gateways there are."""
    fake = FakeIstiod()
    async with asking(fake) as istiod:
        await until(istiod, lambda: bool(istiod.proxies()))
        (gateway,) = istiod.proxies()
        assert (gateway.node, gateway.synced) == ("gw-0.istio-system", True)
        assert set(fake.asked) == {"syncz"}
        fake.stored, fake.clusters = [(SERVICE_ENTRY, "resnet.small.size", "7")], [CLUSTER]
        istiod.watch([ENTRY])
        await until(istiod, lambda: ENTRY in istiod.confirmed())
        assert set(fake.asked) == {"syncz", "adsz", "configz"}


async def test_nothing_is_confirmed_while_istiod_is_away_and_nothing_is_lost() -> None:
    """It says what is wrong; the gateways it knew are kept; when istiod is back it goes on."""
    fake = FakeIstiod(stored=[(SERVICE_ENTRY, "resnet.small.size", "7")], clusters=[CLUSTER])
    async with asking(fake) as istiod:
        await until(istiod, lambda: bool(istiod.proxies()))
        fake.away = True
        istiod.watch([ENTRY])
        await until(istiod, lambda: bool(istiod.problem))
        assert "answered 503" in istiod.problem
        assert (len(istiod.proxies()), set(istiod.confirmed())) == (1, set())
        fake.away, fake.acknowledged = False, False
        await until(istiod, lambda: not istiod.problem)
        assert set(istiod.confirmed()) == set()
        fake.acknowledged = True
        await until(istiod, lambda: ENTRY in istiod.confirmed())


def test_the_page_of_all_objects_is_read_one_by_one() -> None:
    """Key and version of each, whatever stands between and inside them."""
    page = [
        {
            "kind": "VirtualService",
            "metadata": {"name": "a", "namespace": "n", "resourceVersion": "7"},
            "spec": {"x": "],["},
        },
        {"kind": "Gateway", "metadata": {"name": "b", "namespace": "n"}},
    ]
    expected = {ObjectKey("VirtualService", "n", "a"): "7", ObjectKey("Gateway", "n", "b"): ""}
    for text in (orjson.dumps(page), orjson.dumps(page, option=orjson.OPT_INDENT_2) + b"\n"):
        assert versions_of(text) == expected
    assert versions_of(b"null") == versions_of(b"[ ]") == {}


@pytest.mark.parametrize("page", [b"", b"{}", b"[1]", b"[{}]", b'[{"kind": "a"', b"<html>", b"\xff"])
def test_a_page_that_is_none_is_an_error_that_is_told(page: bytes) -> None:
    """Not an empty cluster: then nothing would ever be confirmed, without a word."""
    with pytest.raises((ValueError, KeyError, TypeError)):
        versions_of(page)
