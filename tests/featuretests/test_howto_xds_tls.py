"""docs/howto/xds-tls.md: its commands make certificates that work, its options are there, its words are those said."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer

from meshctl.cli.app import app
from meshctl.tls import TlsFiles
from tests.harness.ads_client import ads_stream
from tests.harness.envoy import plan, xds_server
from tests.harness.tools import DEADLINE_S
from xds.credentials import Security
from xds.identity import Identities, Identity
from xds.wire import TypeUrl

ROOT = Path(__file__).parents[2]
HOWTO = (ROOT / "docs" / "howto" / "xds-tls.md").read_text()


def block(language: str) -> str:
    """The first block of the page in a language."""
    found = re.search(rf"```{language}\n(.*?)```", HOWTO, re.DOTALL)
    assert found is not None
    return found[1]


def commands(program: str) -> list[list[str]]:
    """The arguments of each command line of the page."""
    lines = re.findall(rf"^    {program} (.*?)(?: > .*)?$", HOWTO, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def parameters(arguments: list[str]) -> dict[str, Any]:
    """What meshctl makes of a command line. It raises for options that it does not have."""
    command: Any = typer.main.get_command(app)
    while isinstance(command, typer.core.TyperGroup):
        name, *arguments = arguments
        found = command.get_command(typer.Context(command), name)
        assert found is not None, name
        command = found
    return dict(command.make_context("meshctl", arguments).params)


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """The directory in which the page's script made some."""
    made = subprocess.run(["bash", "-euc", block("sh")], cwd=tmp_path, capture_output=True, timeout=DEADLINE_S)
    assert made.returncode == 0, made.stderr
    return tmp_path


async def test_certificates_of_the_page_work(certificates: Path) -> None:
    """Given to the server and the gateway as its commands say."""
    (run,) = (parameters(arguments) for arguments in commands("meshctl") if arguments[0] == "run")
    gateway = parameters(commands("meshctl")[1])
    files = TlsFiles(*(certificates / run[name] for name in ("xds_tls_cert", "xds_tls_key", "xds_client_ca")))
    ca, cert, key = ((certificates / gateway[name]).read_bytes() for name in ("xds_ca", "xds_cert", "xds_key"))
    credentials = grpc.ssl_channel_credentials(ca, key, cert)
    async with (
        xds_server(security=Security(files)) as server,
        ads_stream(
            f"localhost:{server.port}", gateway["node_id"], cluster=gateway["group"], credentials=credentials
        ) as stream,
    ):
        server.apply(plan())
        await stream.ask(TypeUrl.CLUSTER)
        await stream.read()
        assert [(s.node, s.group, s.identity) for s in server.streams()] == [
            ("gw-1", "team-a", "the certificate of 'team-a'")
        ]


def test_options_are_there() -> None:
    """In every command of the page."""
    found = [parameters(arguments) for arguments in commands("meshctl")]
    assert len(found) == 3
    named = set(re.findall(r"--(?:xds|group)[a-z-]*", HOWTO)) - {"--xds-"}
    known = {f"--{name.replace('_', '-')}" for options in found for name in options}
    assert named <= known


@pytest.mark.parametrize(
    ("identity", "groups"),
    [
        (Identity("spiffe://cluster.local/ns/edge/sa/gw", "", True), {"team-a", "team-b"}),
        (Identity("", "gateway-7.example.org", True), {"meshctl"}),
        (Identity("", "platform", True), {"meshctl", "team-a", "team-b", "other"}),
        (Identity("", "other", True), set()),
    ],
)
def test_its_rules_say_what_it_says(identity: Identity, groups: set[str]) -> None:
    """Each of them."""
    rules = Identities.parse(block("yaml").encode(), "page").rules
    assert rules is not None
    found = {name for rule in rules if rule.matches(identity) for name in rule.groups}
    assert ({"meshctl", "team-a", "team-b", "other"} if "*" in found else found) == groups


@pytest.mark.parametrize(
    ("words", "source"),
    [
        ("can be reached by others, and nothing says who may connect", "meshctl/cli/tls.py"),
        ("no good for TLS", "meshctl/tls.py"),
        ("the old certificates stay in use", "meshctl/tls.py"),
        ("may belong to", "xds/identity.py"),
        ("meshctl.io/proxies", "deploy/network.yaml"),
        ("meshctl-xds-server", "deploy/xds-tls/kustomization.yaml"),
        ("meshctl-xds-gateway", "deploy/xds-tls/cert-manager.yaml"),
    ],
)
def test_its_words_are_those_that_are_said(words: str, source: str) -> None:
    """So that who searches for them finds the page."""
    assert words in HOWTO
    assert words in (ROOT / source).read_text()
