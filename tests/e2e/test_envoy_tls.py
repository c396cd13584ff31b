"""A real Envoy that gets its routes over TLS, with the bootstrap and the files that `meshctl envoy bootstrap` makes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from meshctl.address import Address
from meshctl.model import Plan
from meshctl.sim.envoy import EnvoyProcess
from tests.harness.certificates import Authority, put, put_pair, tls_files
from tests.harness.envoy import Backends, load, plan, require_envoy, route_plan, xds_server
from tests.harness.tools import DEADLINE_S
from xds.credentials import Security
from xds.identity import Identities
from xds.server import XdsServer

pytestmark = pytest.mark.envoy
SYNC_S = 30.0
GATEWAYS = Identities.parse(b"[{subject: 'gw-*', groups: [edge]}]", "rules")


def edge(backend: str, weight: int) -> Plan:
    """A route for the group `edge` alone."""
    made = route_plan("default/r", {backend: weight})
    return plan(replace(made, route=replace(made.route, spec=replace(made.route.spec, proxy_groups=("edge",)))))


def printed(directory: Path, port: int, admin: Address) -> Mapping[str, Any]:
    """The bootstrap of an Envoy with its certificates in live/, found by name; printed in `directory`."""
    live = Path("live")
    files = (f"--xds-ca={live / 'ca.crt'}", f"--xds-cert={live / 'tls.crt'}", f"--xds-key={live / 'tls.key'}")
    who = ("--node-id=gw/0", "--group=edge", "--listen=127.0.0.1:0", f"--admin={admin}", "-o", "json")
    command = (sys.executable, "-m", "meshctl", "envoy", "bootstrap", f"--xds=localhost:{port}", *files, *who)
    done = subprocess.run(command, cwd=directory, capture_output=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    found: Mapping[str, Any] = orjson.loads(done.stdout)
    return found


def gateways(server: XdsServer) -> list[tuple[str, str]]:
    return [(stream.group, stream.identity) for stream in server.streams()]


async def test_an_envoy_takes_renewed_certificates(tmp_path: Path) -> None:
    """Its own and the authority that it trusts: its next connection is made with them, and no request is lost."""
    require_envoy()
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    for authority in (old, new):
        authority.issue(f"server-{authority.name}", san="DNS:localhost")
        authority.issue(f"gw-{authority.name}")

    def renew(authority: Authority) -> None:
        for place, who in (("live", "gw"), ("served", "server")):
            put_pair(tmp_path / f"{who}-{authority.name}.crt", tmp_path / place / "tls.crt")
            put(authority.ca, tmp_path / place / "ca.crt")

    for place in ("live", "served"):
        (tmp_path / place).mkdir()
    renew(old)
    security = Security(tls_files(tmp_path / "served" / "tls.crt", tmp_path / "served" / "ca.crt"), GATEWAYS)
    async with Backends(1) as backends, xds_server(security=security) as first:
        (backend,) = backends.addresses
        first.apply(edge(backend, 1))
        async with (
            EnvoyProcess(tmp_path, lambda admin: printed(tmp_path, first.port, admin)) as envoy,
            load(envoy.url, workers=2) as outcome,
        ):
            await first.wait_synced(SYNC_S)
            assert gateways(first) == [("edge", "the certificate of 'gw-old'")]
            renew(new)
            await first.stop()
            async with xds_server(first.port, security) as second:
                second.apply(edge(backend, 2))
                await second.wait_synced(SYNC_S)
                assert gateways(second) == [("edge", "the certificate of 'gw-new'")]
    assert outcome.failed == 0, outcome.statuses
    assert outcome.bodies[backend] > 0
