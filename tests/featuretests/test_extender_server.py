"""The extender's HTTP edge over real sockets: every verb, requests that make no sense, TLS, and its end."""

from __future__ import annotations

import asyncio
import gc
import io
import socket
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from structlog.testing import capture_logs

from meshctl.address import Address
from meshctl.core.packing.vocabulary import Decision, Demand, Placement, Reason, Refusal
from meshctl.errors import InputError
from meshctl.extender.metrics import Figures, Metrics
from meshctl.extender.ports import BindError, PodId, Reserved, Victims
from meshctl.extender.server import BODY_BYTES, ExtenderServer
from meshctl.ports import KubeObject, ObjectKey
from meshctl.tls import Renewing, TlsFiles
from tests.harness.certificates import put, self_signed, tls_files
from tests.harness.tools import DEADLINE_S, until

POD = {"metadata": {"name": "p", "namespace": "team", "uid": "u-1"}, "spec": {"containers": []}, "status": {}}
ASKED = {"Pod": POD, "NodeNames": ["a", "b"]}
BIND = {"PodName": "p", "PodNamespace": "team", "PodUID": "u-1", "Node": "b"}
LOOPBACK = Address("127.0.0.1", 0)


@dataclass
class Table:
    """A Ledger that knows the answer: `best`, if it is asked about; a pod with `bad` in its spec can't be read."""

    best: str = "b"
    asked: list[Sequence[str] | None] = field(default_factory=list)

    def decide(self, pod: Mapping[str, Any], names: Sequence[str] | None) -> Decision:
        self.asked.append(names)
        if "bad" in pod["spec"]:
            raise InputError("Pod team/p: hpe.com/gpus: 'x' is no number")
        if "worse" in pod["spec"]:
            raise ZeroDivisionError("a bug")
        fits = self.best in (names or ())
        other = Refusal(Reason.WORSE, "b is better") if fits else Refusal(Reason.NO_ROOM, "no GPU has 3 free")
        refused = {name: other for name in names or () if name != self.best}
        return Decision(Placement(self.best) if fits else None, "why", refused)

    def preempt(self, pod: Mapping[str, Any], victims: Mapping[str, Victims]) -> Mapping[str, Victims]:
        return {node: Victims((*found.uids, "one-more"), found.pdb_violations) for node, found in victims.items()}

    def take(self, key: ObjectKey, value: KubeObject | None) -> None: ...
    def release(self, uid: str) -> None: ...

    def reserve(self, pod: PodId, node: str) -> Reserved:
        return Reserved(pod, Demand(), Placement(node))

    def bound_to(self, pod: PodId) -> str:
        return ""

    def version(self, pod: PodId) -> str:
        return ""

    def waits_for(self, pod: PodId, node: str) -> str:
        return ""

    def awaited(self, pod: Mapping[str, Any]) -> str:
        return ""


@dataclass
class Gate:
    """A Binder that binds once it is let, and not to node `full`."""

    unready: str = ""
    bound: list[tuple[PodId, str]] = field(default_factory=list)
    began: asyncio.Event = field(default_factory=asyncio.Event)
    may: asyncio.Event = field(default_factory=asyncio.Event)
    given: list[str] = field(default_factory=list)
    """Pods that were given a place."""
    room: asyncio.Event = field(default_factory=asyncio.Event)
    """For another binding."""

    def __post_init__(self) -> None:
        self.room.set()

    async def bind(self, pod: PodId, node: str) -> None:
        self.began.set()
        await self.may.wait()
        if node == "full":
            raise BindError("no GPU of full has 3 free any more; the scheduler tries again")
        self.bound.append((pod, node))

    def placed(self, uid: str) -> None:
        self.given.append(uid)

    async def pace(self) -> None:
        await self.room.wait()


@dataclass
class Site:
    """A server, and a client of it."""

    server: ExtenderServer
    client: aiohttp.ClientSession
    ledger: Table
    binder: Gate
    metrics: Metrics

    async def post(self, verb: str, request: object) -> Any:
        """What is answered, as 200; bytes are sent as they are."""
        body = request if isinstance(request, bytes) else orjson.dumps(request)
        async with self.client.post(self.url(verb), data=io.BytesIO(body)) as response:  # bytes that large, it warns
            assert response.status == 200
            return orjson.loads(await response.read())

    async def get(self, path: str) -> tuple[int, str]:
        async with self.client.get(self.url(path)) as response:
            return response.status, await response.text()

    def url(self, path: str) -> str:
        return f"http://{self.server.address}/{path}"


@asynccontextmanager
async def serving(body_bytes: int = BODY_BYTES) -> AsyncIterator[Site]:
    ledger, binder, metrics = Table(), Gate(), Metrics()
    binder.may.set()
    server = ExtenderServer(ledger, binder, metrics, body_bytes=body_bytes)
    await server.start(LOOPBACK)
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as client:
            yield Site(server, client, ledger, binder, metrics)
    finally:
        await server.stop()


async def test_each_verb_is_answered() -> None:
    """Filter chooses, Prioritize scores, Bind binds, Preempt says who has to go."""
    async with serving() as site:
        chosen = await site.post("filter", ASKED)
        assert (chosen["NodeNames"], chosen["FailedNodes"]) == (["b"], {"a": "b is better"})
        assert await site.post("prioritize", ASKED) == [{"Host": "a", "Score": 1}, {"Host": "b", "Score": 10}]
        assert await site.post("bind", BIND) == {"Error": ""}
        assert site.binder.bound == [(PodId("team", "p", "u-1"), "b")]
        victims = {"a": {"Pods": [{"UID": "v"}], "NumPDBViolations": 0}}
        asked = {"Pod": POD, "NodeNameToMetaVictims": victims}
        expected = {"a": {"Pods": [{"UID": "v"}, {"UID": "one-more"}], "NumPDBViolations": 0}}
        assert await site.post("preempt", asked) == {"NodeNameToMetaVictims": expected}
        assert site.ledger.asked == [["a", "b"], ["a", "b"]]


async def test_the_next_pod_waits_while_too_many_bindings_are_being_written() -> None:
    """The scheduler asks for the next place at once; nothing else slows it to what the API server can write."""
    async with serving() as site:
        site.binder.room.clear()
        asked = asyncio.create_task(site.post("filter", ASKED))
        assert await site.post("bind", BIND) == {"Error": ""}
        assert not asked.done()
        assert site.ledger.asked == []
        site.binder.room.set()
        assert (await asked)["NodeNames"] == ["b"]
        assert site.binder.given == ["u-1"]


async def test_a_binding_that_fails_says_why() -> None:
    """The scheduler makes an Event of it."""
    async with serving() as site:
        assert "any more" in (await site.post("bind", BIND | {"Node": "full"}))["Error"]
        assert site.binder.bound == []


@pytest.mark.parametrize("verb", ["filter", "prioritize", "bind", "preempt"])
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"\x00\xff", b"{}", b'{"Pod": {"metadata": {}}, "NodeNames": null}']
)
async def test_what_makes_no_sense_changes_nothing(verb: str, body: bytes) -> None:
    """It is answered as the scheduler wants it, and the next request is served."""
    async with serving() as site:
        answer = await site.post(verb, body)
        assert answer == [] or answer["Error"]
        assert (site.ledger.asked, site.binder.bound) == ([], [])
        assert (await site.post("filter", ASKED))["NodeNames"] == ["b"]


async def test_a_large_request_that_makes_no_sense_leaves_no_trace() -> None:
    """The next one is served, and garbage is collected."""
    async with serving() as site:
        assert "is no JSON" in (await site.post("filter", b"[" + b"1," * 2**20))["Error"]
        assert (await site.post("filter", ASKED))["NodeNames"] == ["b"]
        await until(_collecting, "garbage is collected")


async def _collecting() -> bool:
    return gc.isenabled()


async def test_a_pod_that_cannot_be_read_says_so() -> None:
    """What the ledger says of it is the pod's Event."""
    async with serving() as site:
        found = await site.post("filter", ASKED | {"Pod": POD | {"spec": {"bad": True}}})
        assert found == {"Error": "Pod team/p: hpe.com/gpus: 'x' is no number"}


async def test_a_bug_is_told_and_the_next_request_is_served() -> None:
    """The scheduler shows nobody what stands in an answer that is not 200."""
    async with serving() as site:
        found = await site.post("filter", ASKED | {"Pod": POD | {"spec": {"worse": True}}})
        assert found == {"Error": "the extender failed: ZeroDivisionError: a bug"}
        assert (await site.post("filter", ASKED))["NodeNames"] == ["b"]


async def test_a_request_that_ends_in_the_middle_is_nobodys_loss() -> None:
    """A scheduler that dies while it sends."""
    async with serving() as site:
        _, writer = await asyncio.open_connection(site.server.address.host, site.server.address.port)
        writer.write(b"POST /bind HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + orjson.dumps(BIND))
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        assert (await site.post("filter", ASKED))["NodeNames"] == ["b"]
        assert site.binder.bound == []


async def test_a_request_of_50_megabytes_is_read() -> None:
    """Whole Node objects of a large cluster; what was left to the garbage collector then is looked at again."""
    async with serving() as site:
        nodes = [{"metadata": {"name": name, "annotations": {"x": "y" * 25_000_000}}} for name in "ab"]
        found = await site.post("filter", {"Pod": POD, "Nodes": {"items": nodes}})
        assert [node["metadata"]["name"] for node in found["Nodes"]["items"]] == ["b"]
        await until(_collecting, "garbage is collected")


@pytest.mark.parametrize("announced", [True, False])
async def test_a_request_beyond_the_limit_says_what_to_do(announced: bool) -> None:
    """Names alone are small. Whether its length is said before or not."""
    async with serving(body_bytes=2**20) as site:
        body = b" " * (2**20 + 1)

        async def parts() -> AsyncIterator[bytes]:
            yield body[:-9]
            yield body[-9:]

        async with site.client.post(site.url("filter"), data=io.BytesIO(body) if announced else parts()) as response:
            found = orjson.loads(await response.read())
        assert "more than 1 MiB" in found["Error"]
        assert "nodeCacheCapable" in found["Error"]
        assert (await site.post("filter", ASKED))["NodeNames"] == ["b"]


async def test_a_replica_that_may_not_bind_sends_the_scheduler_away() -> None:
    """It decides nothing, is not ready, and closes the connection, so that the next one goes to the leader."""
    async with serving() as site:
        assert (await site.get("readyz"))[0] == 200
        site.binder.unready = "the Lease is another replica's"
        status, why = await site.get("readyz")
        assert (status, "another replica's" in why) == (503, True)
        assert (await site.get("healthz"))[0] == 200
        async with site.client.post(site.url("filter"), data=orjson.dumps(ASKED)) as response:
            assert response.headers["Connection"] == "close"
            assert orjson.loads(await response.read()) == {"Error": "the Lease is another replica's"}
        assert "another replica's" in (await site.post("bind", BIND))["Error"]
        assert (site.ledger.asked, site.binder.bound) == ([], [])


async def test_a_binding_under_way_is_finished_before_the_end() -> None:
    """A rolling update loses none, and takes no new ones."""
    async with serving() as site:
        site.binder.may.clear()
        binding = asyncio.create_task(site.post("bind", BIND))
        await site.binder.began.wait()
        ending = asyncio.create_task(site.server.stop())
        await until(lambda: _refuses(site.server.address), "nobody listens any more")
        assert not binding.done()
        site.binder.may.set()
        assert await binding == {"Error": ""}
        await ending
        assert len(site.binder.bound) == 1


async def _refuses(address: Address) -> bool:
    with socket.socket() as probe:
        return await asyncio.to_thread(probe.connect_ex, (address.host, address.port)) != 0


async def test_metrics_count_what_came_of_requests() -> None:
    """By verb and outcome; refusals once for a pod, by reason; gauges as the ledger has them."""
    async with serving() as site:
        site.metrics.observe(lambda: Figures({"used": 3, "free": 7}, 1.5, 2))
        await site.post("filter", ASKED)
        await site.post("filter", ASKED | {"NodeNames": ["x", "y"]})
        await site.post("filter", b"{")
        await site.post("bind", BIND)
        lines = (await site.get("metrics"))[1].splitlines()
    for line in (
        'meshctl_extender_requests_total{outcome="placed",verb="filter"} 1.0',
        'meshctl_extender_requests_total{outcome="unplaced",verb="filter"} 1.0',
        'meshctl_extender_requests_total{outcome="invalid",verb="filter"} 1.0',
        'meshctl_extender_requests_total{outcome="bound",verb="bind"} 1.0',
        'meshctl_extender_request_seconds_count{verb="filter"} 3.0',
        'meshctl_extender_refusals_total{reason="NoRoom"} 1.0',
        'meshctl_extender_slots{state="used"} 3.0',
        "meshctl_extender_stranded_gpus 1.5",
        "meshctl_extender_reservations 2.0",
    ):
        assert line in lines, line


# ---------------------------------------------------------------------------------------------------------------- TLS


def client_of(trusted: Path, own: Path | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(trusted))
    if own is not None:
        context.load_cert_chain(own, own.with_suffix(".key"))
    return context


async def healthy(address: Address, context: ssl.SSLContext) -> bool:
    """Whether /healthz is answered over a new connection."""
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    async with aiohttp.ClientSession(timeout=timeout) as client:
        try:
            async with client.get(f"https://{address}/healthz", ssl=context) as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False


@asynccontextmanager
async def secured(tls: TlsFiles | Renewing) -> AsyncIterator[Address]:
    server = ExtenderServer(Table(), Gate(), Metrics())
    await server.start(LOOPBACK, tls)
    try:
        yield server.address
    finally:
        await server.stop()


async def test_tls_proves_who_the_server_is(tmp_path: Path) -> None:
    """And asks nobody else for a certificate unless it was told to."""
    server, other = self_signed(tmp_path, "server"), self_signed(tmp_path, "other")
    async with secured(tls_files(server)) as address:
        assert await healthy(address, client_of(server))
        assert not await healthy(address, client_of(other))


async def test_with_a_client_ca_only_its_clients_are_answered(tmp_path: Path) -> None:
    """Whoever can reach the port could bind pods otherwise. A kubelet that looks at its health has no certificate."""
    server, client, other = (self_signed(tmp_path, name) for name in ("server", "client", "other"))
    async with secured(tls_files(server, client_ca=client)) as address, aiohttp.ClientSession() as session:

        async def asked(context: ssl.SSLContext) -> str:
            async with session.post(f"https://{address}/filter", data=orjson.dumps(ASKED), ssl=context) as response:
                return str((await response.json())["Error"])

        assert await healthy(address, client_of(server, client))
        assert await healthy(address, client_of(server))
        assert not await healthy(address, client_of(server, other))
        assert not await asked(client_of(server, client))
        assert "shows no certificate" in await asked(client_of(server))


async def test_renewed_certificates_are_served_without_a_restart(tmp_path: Path) -> None:
    """The server's own and its clients' CA; what can't be used leaves the old ones in force."""
    old, new, client, next_client = (self_signed(tmp_path, name) for name in ("old", "new", "client", "next-client"))
    live = tmp_path / "live.crt"
    ca = tmp_path / "ca.crt"
    put(old, live)
    put(old.with_suffix(".key"), live.with_suffix(".key"))
    put(client, ca)
    renewing = Renewing(tls_files(live, client_ca=ca), every_s=0.02)
    async with secured(renewing) as address:
        assert await healthy(address, client_of(old, client))
        with capture_logs() as logs:
            put(new, live)  # its key does not belong to it yet
            await until(lambda: _said(logs, "the old certificates stay in use"), "the files were looked at")
        assert await healthy(address, client_of(old, client))
        put(new.with_suffix(".key"), live.with_suffix(".key"))
        await until(lambda: healthy(address, client_of(new, client)), "the new certificate is served")
        put(next_client, ca)
        await until(lambda: healthy(address, client_of(new, next_client)), "clients of the new CA are answered")
        assert not await healthy(address, client_of(new, client))


async def _said(logs: Sequence[Mapping[str, Any]], event: str) -> bool:
    return any(line["event"] == event for line in logs)


@pytest.mark.parametrize("broken", ["no such file", "no PEM", "another's key"])
async def test_certificates_that_cannot_be_used_are_told_at_the_start(tmp_path: Path, broken: str) -> None:
    """Nothing listens then."""
    server, other = self_signed(tmp_path, "server"), self_signed(tmp_path, "other")
    wrong = {
        "no such file": TlsFiles(tmp_path / "none.crt", tmp_path / "none.key"),
        "no PEM": TlsFiles(_text(tmp_path / "text.crt"), server.with_suffix(".key")),
        "another's key": TlsFiles(server, other.with_suffix(".key")),
    }[broken]
    with pytest.raises(InputError, match=str(wrong.cert)):
        async with secured(wrong):
            pass


def _text(path: Path) -> Path:
    path.write_text("a certificate, one day")
    return path
