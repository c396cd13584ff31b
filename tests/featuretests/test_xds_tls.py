"""The xDS server over TLS: who gets in, which group it may name, and files that change while streams are open."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from envoy_data_plane.envoy.config.cluster.v3 import Cluster
from grpc import aio
from structlog.testing import capture_logs

from meshctl.address import Address
from meshctl.controller.config import Config
from meshctl.controller.main import running
from meshctl.errors import InputError
from meshctl.model import Plan, RoutePlan
from meshctl.tls import TlsFiles
from tests.harness.ads_client import AdsStream, ads_stream
from tests.harness.certificates import Authority, put, put_pair, tls_files
from tests.harness.envoy import plan, route_plan, xds_server
from tests.harness.tools import until
from xds.credentials import Security
from xds.identity import Identities
from xds.server import XdsServer
from xds.wire import TypeUrl

CDS, EDS = TypeUrl.CLUSTER, TypeUrl.ENDPOINT
TEAM_A = "spiffe://mesh.test/ns/edge/sa/team-a"


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority with what it issued to a server and to proxies; `proxy` is named after the group of all."""
    authority = Authority(tmp_path_factory.mktemp("pki"))
    for name in ("server", "renewed"):
        authority.issue(name, san="IP:127.0.0.1")
    authority.issue("proxy", subject="/CN=meshctl")
    authority.issue("team-a", san=f"URI:{TEAM_A},DNS:gw.example", subject="/CN=meshctl")
    authority.issue("nameless", subject="/O=Example")
    authority.issue("expired", subject="/CN=meshctl", days=-1)
    Authority(authority.directory, "other").issue("stranger", subject="/CN=meshctl")
    return authority


def of(pki: Authority, name: str) -> Path:
    return pki.directory / f"{name}.crt"


def credentials(pki: Authority, name: str = "", ca: Path | None = None) -> grpc.ChannelCredentials:
    """What a client trusts (the server's authority unless told otherwise), and what it shows, if anything."""
    trusted = (ca or pki.ca).read_bytes()
    if not name:
        return grpc.ssl_channel_credentials(trusted)
    certificate = of(pki, name)
    return grpc.ssl_channel_credentials(trusted, certificate.with_suffix(".key").read_bytes(), certificate.read_bytes())


def both(weight: int) -> Plan:
    """A route for the group of all, and one for the group team-a."""
    return plan(route("all", weight, "meshctl"), route("a", weight, "team-a"))


def route(name: str, weight: int, group: str) -> RoutePlan:
    made = route_plan(f"n/{name}", {"127.0.0.1:9001": weight, "127.0.0.1:9002": 1}, hosts=(name,))
    return replace(made, route=replace(made.route, spec=replace(made.route.spec, proxy_groups=(group,))))


@asynccontextmanager
async def served(security: Security) -> AsyncIterator[XdsServer]:
    async with xds_server(security=security) as server:
        server.apply(both(500))
        yield server


async def clusters(stream: AdsStream) -> set[str]:
    """The routes whose clusters the stream is sent first."""
    await stream.ask(CDS)
    response = await stream.read()
    return {Cluster.parse(resource.value).name.split("/")[1] for resource in response.resources}


async def refused(stream: AdsStream) -> tuple[grpc.StatusCode, str]:
    """How a stream ended that was sent nothing."""
    with pytest.raises(aio.AioRpcError) as ended:
        await clusters(stream)
    return ended.value.code(), str(ended.value.details())


async def gets_in(pki: Authority, address: str, name: str) -> bool:
    """Whether a new connection that shows this certificate is served."""
    async with ads_stream(address, credentials=credentials(pki, name)) as stream:
        try:
            return await clusters(stream) == {"all"}
        except (aio.AioRpcError, AssertionError):
            return False


async def shown(pki: Authority, server: XdsServer) -> str:
    """The common name in the certificate that a new connection is shown."""
    context = ssl.create_default_context(cafile=pki.ca)
    context.load_cert_chain(of(pki, "proxy"), of(pki, "proxy").with_suffix(".key"))
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection(server.host, server.port, ssl=context)
    try:
        subject = writer.get_extra_info("peercert")["subject"]
        return str(dict(pair for relative in subject for pair in relative)["commonName"])
    finally:
        writer.transport.abort()


@pytest.fixture
def live(pki: Authority, tmp_path: Path) -> TlsFiles:
    """The server's files, to be replaced while it runs."""
    put_pair(of(pki, "server"), tmp_path / "live.crt")
    put(pki.ca, tmp_path / "clients.crt")
    return tls_files(tmp_path / "live.crt", client_ca=tmp_path / "clients.crt")


# --------------------------------------------------------------------------------------------------------- who gets in


async def test_a_proxy_with_a_certificate_is_served(pki: Authority) -> None:
    """And seen under the name that it proved."""
    async with served(Security(tls_files(of(pki, "server"), pki.ca))) as server:
        async with ads_stream(server.address, "gw", credentials=credentials(pki, "proxy")) as stream:
            assert await clusters(stream) == {"all"}
            assert [(s.node, s.identity) for s in server.streams()] == [("gw", "the certificate of 'meshctl'")]
        async with ads_stream(server.address, cluster="team-a", credentials=credentials(pki, "team-a")) as stream:
            assert await clusters(stream) == {"a"}
            assert [s.identity for s in server.streams() if s.group == "team-a"] == [TEAM_A]


@pytest.mark.parametrize("name", ["", "stranger", "expired", "plain text"])
async def test_who_has_no_good_certificate_does_not_get_in(pki: Authority, name: str) -> None:
    """None, that of another authority, an old one, no TLS: it is told nothing, and disturbs nobody."""
    async with (
        served(Security(tls_files(of(pki, "server"), pki.ca))) as server,
        ads_stream(server.address, "good", credentials=credentials(pki, "proxy")) as good,
    ):
        assert await clusters(good) == {"all"}
        bad = None if name == "plain text" else credentials(pki, name)
        async with ads_stream(server.address, credentials=bad) as stream:
            code, _ = await refused(stream)
            assert code is grpc.StatusCode.UNAVAILABLE
        assert [proxy.node for proxy in server.status().proxies] == ["good"]
        assert await gets_in(pki, server.address, "proxy")


async def test_a_proxy_finds_out_that_the_server_is_another_one(pki: Authority) -> None:
    """It does not talk to it."""
    async with served(Security(tls_files(of(pki, "server"), pki.ca))) as server:
        trusting = credentials(pki, "proxy", ca=pki.directory / "other.crt")
        async with ads_stream(server.address, credentials=trusting) as stream:
            assert (await refused(stream))[0] is grpc.StatusCode.UNAVAILABLE
        assert server.status().proxies == ()


async def test_without_a_client_ca_nobody_is_asked(pki: Authority) -> None:
    """TLS proves who the server is, and everyone may name any group."""
    async with (
        served(Security(tls_files(of(pki, "server")))) as server,
        ads_stream(server.address, cluster="team-a", credentials=credentials(pki)) as stream,
    ):
        assert await clusters(stream) == {"a"}
        assert [s.identity for s in server.streams()] == ["a peer without a certificate"]


async def test_the_controller_serves_proxies_with_the_files_it_was_told_of(pki: Authority, tmp_path: Path) -> None:
    """And the rules: as `meshctl run` starts it."""
    rules = tmp_path / "rules.yaml"
    rules.write_text("- {subject: meshctl, groups: [any]}")
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    config = Config(
        manifests=manifests,
        state=tmp_path / "state.json",
        xds=Address("127.0.0.1", 0),
        admin=Address("127.0.0.1", 0),
        xds_tls=tls_files(of(pki, "server"), pki.ca),
        xds_identities=rules,
    )
    async with running(config) as controller:
        async with ads_stream(controller.xds, cluster="any", credentials=credentials(pki, "proxy")) as stream:
            assert await clusters(stream) == set()
        async with ads_stream(controller.xds, credentials=credentials(pki, "proxy")) as stream:
            assert (await refused(stream))[0] is grpc.StatusCode.PERMISSION_DENIED
        async with ads_stream(controller.xds, cluster="any") as stream:
            assert (await refused(stream))[0] is grpc.StatusCode.UNAVAILABLE


# --------------------------------------------------------------------------------------------------- which group it is


@pytest.mark.parametrize(
    ("name", "group", "said"),
    [
        ("team-a", "meshctl", f"{TEAM_A} may belong to 'team-a', not to 'meshctl': name that in the node's metadata"),
        ("proxy", "team-a", "the certificate of 'meshctl' may belong to 'meshctl', not to 'team-a'"),
        ("nameless", "meshctl", "a certificate without a name may belong to no group, not to 'meshctl'"),
    ],
)
async def test_another_group_is_refused(pki: Authority, name: str, group: str, said: str) -> None:
    """The proxy learns why and what to do, nothing else, and nobody notices."""
    async with (
        served(Security(tls_files(of(pki, "server"), pki.ca))) as server,
        ads_stream(server.address, "good", credentials=credentials(pki, "proxy")) as good,
    ):
        assert await clusters(good) == {"all"}
        async with ads_stream(server.address, "bad", cluster=group, credentials=credentials(pki, name)) as stream:
            code, details = await refused(stream)
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert said in details
        assert "meshctl.io/group" in details or "--xds-identities" in details
        assert [proxy.node for proxy in server.status().proxies] == ["good"]


async def test_rules_say_who_may_belong_where(pki: Authority) -> None:
    """Instead of the certificates' own names."""
    rules = b"[{spiffe: 'spiffe://mesh.test/ns/edge/sa/*', groups: [meshctl]}, {subject: meshctl, groups: [team-a]}]"
    identities = Identities.parse(rules, "rules")
    async with served(Security(tls_files(of(pki, "server"), pki.ca), identities)) as server:
        async with ads_stream(server.address, cluster="team-a", credentials=credentials(pki, "proxy")) as stream:
            assert await clusters(stream) == {"a"}
        async with ads_stream(server.address, credentials=credentials(pki, "team-a")) as stream:
            assert await clusters(stream) == {"all"}
        async with ads_stream(server.address, credentials=credentials(pki, "proxy")) as stream:
            assert (await refused(stream))[0] is grpc.StatusCode.PERMISSION_DENIED


# ------------------------------------------------------------------------------------------------- files that change


async def test_renewed_certificates_are_used_while_streams_stay(pki: Authority, live: TlsFiles) -> None:
    """All that comes during the change gets in, no stream ends, and all of them are sent what comes next."""
    came = 0

    async def newcomers(server: XdsServer, done: asyncio.Event) -> None:
        nonlocal came
        while not done.is_set():
            assert await gets_in(pki, server.address, "proxy")
            came += 1

    async with served(Security(live)) as server, AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(
                ads_stream(server.address, f"gw-{i}", credentials=credentials(pki, "proxy"))
            )
            for i in range(20)
        ]
        for stream in streams:
            assert await clusters(stream) == {"all"}
            await stream.ask(EDS, ["n/all/small"])
            await stream.ack(await stream.read(), ["n/all/small"])
        assert await shown(pki, server) == "server"
        done = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(newcomers(server, done))
            put_pair(of(pki, "renewed"), live.cert)

            async def renewed() -> bool:
                return await shown(pki, server) == "renewed"

            await until(renewed, "the new certificate is shown")
            done.set()
        assert came > 0
        server.apply(both(700))
        for stream in streams:
            assert (await stream.read()).type_url == EDS


async def test_a_key_that_does_not_match_changes_nothing(pki: Authority, live: TlsFiles) -> None:
    """A warning says so; once it matches, the new pair is used."""
    async with served(Security(live)) as server:
        with capture_logs() as logs:
            put(of(pki, "renewed"), live.cert)

            async def warned() -> bool:
                assert await shown(pki, server) == "server"
                return any(line["event"] == "the old certificates stay in use" for line in logs)

            await until(warned, "the files were looked at")
        assert str(live.cert) in next(line["error"] for line in logs if "error" in line)
        assert await gets_in(pki, server.address, "proxy")
        put(of(pki, "renewed").with_suffix(".key"), live.key)

        async def renewed() -> bool:
            return await shown(pki, server) == "renewed"

        await until(renewed, "the new certificate is shown")


async def test_files_that_go_away_change_nothing(pki: Authority, live: TlsFiles) -> None:
    """As while a volume is mounted anew."""
    async with served(Security(live)) as server:
        for path in (live.cert, live.key, live.client_ca):
            assert path is not None
            path.unlink()
        with capture_logs() as logs:

            async def warned() -> bool:
                assert await gets_in(pki, server.address, "proxy")
                return any("stay in use" in line["event"] for line in logs)

            await until(warned, "the files were looked at")
        assert not await gets_in(pki, server.address, "stranger")


async def test_another_client_ca_is_used_for_who_comes_next(pki: Authority, live: TlsFiles) -> None:
    """Who is connected stays; who has a certificate of the old authority does not come back."""
    assert live.client_ca is not None
    async with (
        served(Security(live)) as server,
        ads_stream(server.address, "old", credentials=credentials(pki, "proxy")) as old,
    ):
        assert await clusters(old) == {"all"}
        assert not await gets_in(pki, server.address, "stranger")
        put(pki.directory / "other.crt", live.client_ca)

        async def changed() -> bool:
            return await gets_in(pki, server.address, "stranger")

        await until(changed, "the new authority's clients get in")
        assert not await gets_in(pki, server.address, "proxy")
        assert "old" in [proxy.node for proxy in server.status().proxies]


@pytest.mark.parametrize("broken", ["no such file", "no PEM", "another's key", "no CA"])
async def test_certificates_that_cannot_be_used_are_told_at_the_start(
    pki: Authority, tmp_path: Path, broken: str
) -> None:
    """Which files, and nothing listens."""
    server = of(pki, "server")
    (tmp_path / "text.crt").write_text("a certificate, one day")
    files = {
        "no such file": tls_files(tmp_path / "none.crt"),
        "no PEM": TlsFiles(tmp_path / "text.crt", server.with_suffix(".key")),
        "another's key": TlsFiles(server, of(pki, "proxy").with_suffix(".key")),
        "no CA": tls_files(server, client_ca=tmp_path / "text.crt"),
    }[broken]
    with pytest.raises(InputError, match=str(files.cert)):
        await XdsServer.start(security=Security(files))


def test_rules_are_read_from_a_file_and_need_proof(pki: Authority, tmp_path: Path) -> None:
    """What is wrong in it is told with its place."""
    rules = tmp_path / "rules.yaml"
    rules.write_text("- {subject: a, groups: [b]}")
    server = of(pki, "server")
    assert Security.load(tls_files(server, pki.ca), rules).identities == Identities.parse(rules.read_bytes(), "any")
    with pytest.raises(InputError, match="--xds-client-ca must prove who is who"):
        Security.load(tls_files(server), rules)
    rules.write_text("- {subject: a}")
    with pytest.raises(InputError, match=r"rules.yaml:1:3: \[0\].groups: must be a list of names"):
        Security.load(tls_files(server, pki.ca), rules)
