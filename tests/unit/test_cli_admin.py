"""The reading commands, as processes, against a real admin API."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass

import orjson
import pytest

from meshctl import __version__
from meshctl.cli.app import COMMANDS
from meshctl.controller.admin import AdminServer
from meshctl.controller.loop import Loop
from meshctl.model import EndpointSignals, Problem, RouteSignals, Signal
from meshctl.ports import Desired, Observed
from tests.harness.controller import (
    ANY_PORT,
    DEADLINE_S,
    ManualClock,
    MemoryProxies,
    MemorySignals,
    MemorySource,
    desired_route,
    routes,
    started,
)


@dataclass
class Outcome:
    status: int
    out: str
    err: str


async def meshctl(*arguments: str, admin: str = "") -> Outcome:
    """Run the command line as a user does, without a terminal."""
    own = {"MESHCTL_ADMIN": admin} if admin else {}
    environment = {name: value for name, value in os.environ.items() if name not in ("MESHCTL_ADMIN", "COLUMNS")} | own
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "meshctl", *arguments, stdout=pipe, stderr=pipe, env=environment
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Outcome(process.returncode, out.decode(), err.decode())


@pytest.fixture
async def admin() -> AsyncIterator[str]:
    """A loop over two routes, one measured endpoint and one bad manifest, and the URL of its admin API."""
    first = desired_route().endpoints[0]
    source = MemorySource(
        Desired(routes(desired_route(), desired_route("demo/bert")), (Problem("a.yaml:3:1", "unknown field [x]"),))
    )
    measured = {first.id: EndpointSignals(service_s=Signal(0.006, 999.0))}
    signals = MemorySignals(Observed({desired_route().spec.id: RouteSignals(endpoints=measured)}))
    loop = Loop(source, signals, MemoryProxies(), ManualClock(), tick_s=0.05)
    server = AdminServer(loop.state, loop.metrics)
    await server.start(ANY_PORT)
    try:
        async with started(loop):
            await loop.wait_for(lambda state: bool(state.observed.routes), DEADLINE_S)
            yield f"http://{server.address}"
    finally:
        await server.stop()


async def test_version_is_printed() -> None:
    """One line, and exit 0."""
    assert await meshctl("version") == Outcome(0, f"{__version__}\n", "")


async def test_version_imports_nothing_heavy() -> None:
    """`meshctl version` starts fast because it loads none of the libraries that only a controller needs."""
    heavy = ["scipy", "numpy", "grpc", "aiohttp", "betterproto2", "prometheus_client"]
    script = (
        "import sys\nsys.argv = ['meshctl', 'version']\nfrom meshctl.cli import main\n"
        f"try:\n    main()\nexcept SystemExit: print(sorted(set({heavy!r}) & sys.modules.keys()))"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    out, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    assert out.decode().splitlines()[1] == "[]"


async def test_help_names_every_command() -> None:
    """`meshctl --help` works with all modules of all commands."""
    outcome = await meshctl("--help")
    assert outcome.status == 0
    for command in COMMANDS:
        assert command in outcome.out


async def test_routes_as_json_and_as_table(admin: str) -> None:
    """The same routes for programs and for people."""
    outcome = await meshctl("routes", "-o", "json", admin=admin)
    assert [route["route"] for route in orjson.loads(outcome.out)] == ["demo/bert", "demo/resnet"]
    table = await meshctl("routes", "--admin", admin)
    assert table.status == 0
    assert "demo/resnet" in table.out
    assert "\x1b" not in table.out, "a pipe gets no colours"
    assert "…" not in table.out, "and is not as narrow as a terminal"


async def test_status_shows_problems_word_for_word(admin: str) -> None:
    """Brackets of a message are text, not markup."""
    outcome = await meshctl("status", admin=admin)
    assert outcome.status == 0
    assert "a.yaml:3:1: unknown field [x]" in outcome.out
    assert "no proxy is connected" in outcome.out


@pytest.mark.parametrize("name", ["resnet", "demo/resnet"])
async def test_explain_shows_weights_with_reasons_and_measurements(admin: str, name: str) -> None:
    """By short or full name; measurements with value, unit, age and state."""
    outcome = await meshctl("explain", name, admin=admin)
    assert outcome.status == 0
    assert "1.0 s old, fresh: service_s 0.006 s" in outcome.out
    assert "127.0.0.1:9001" in outcome.out
    yaml = await meshctl("explain", name, "-o", "yaml", admin=admin)
    assert "route: demo/resnet" in yaml.out


async def test_status_watches_until_interrupted(admin: str) -> None:
    """On a terminal, `status -w` shows the routes and goes on; Ctrl-C ends it without a word."""
    terminal, its_end = os.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "meshctl", "status", "-w", "--admin", admin, stdout=its_end, stderr=its_end
    )
    os.close(its_end)
    shown = b""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while shown.count(b"demo/resnet") < 2:
                shown += await asyncio.to_thread(os.read, terminal, 4096)
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(terminal)
    assert b"Traceback" not in shown


async def test_explain_of_an_unknown_route_names_those_there_are(admin: str) -> None:
    """Exit 2, and the list."""
    for name in ("nope", "demo/nope"):
        outcome = await meshctl("explain", name, admin=admin)
        assert outcome.status == 2
        assert f"no route {name}; the routes are: demo/bert, demo/resnet" in outcome.err


async def test_no_controller_is_a_clear_error() -> None:
    """Exit 1, the address, what to do, no traceback; with --debug the traceback."""
    outcome = await meshctl("status", "--admin", "http://127.0.0.1:1")
    assert outcome.status == 1
    assert "cannot reach the controller at http://127.0.0.1:1: Connection refused; is `meshctl run` up" in outcome.err
    assert "Traceback" not in outcome.err
    debugged = await meshctl("--debug", "status", "--admin", "http://127.0.0.1:1")
    assert debugged.status == 1
    assert "Traceback" in debugged.err


WRONG = {
    "both": (["run", "--manifests", ".", "--scrape", "--prometheus", "http://x"], "exclude each other"),
    "no host": (["run", "--manifests", ".", "--xds", "18000"], "--xds: '18000' is not HOST:PORT"),
    "port too large": (["run", "--manifests", ".", "--admin", "h:99999"], "--admin: 'h:99999' is not HOST:PORT"),
    "open to all": (["run", "--manifests", ".", "--xds", "[::]:0"], "--xds [::]:0 can be reached by others"),
    "half of TLS": (["run", "--manifests", ".", "--xds-tls-cert", "c"], "--xds-client-ca belong together"),
    "half of Envoy's TLS": (["envoy", "bootstrap", "--xds-cert", "c"], "--xds-ca, --xds-cert and --xds-key belong"),
    "no unit": (["run", "--manifests", ".", "--tick", "1"], "--tick has no unit"),
    "zero tick": (["run", "--manifests", ".", "--tick", "0s"], "--tick must be more than 0"),
    "no cluster": (["run", "--kubeconfig", "nowhere"], "nowhere: no such file; name a kubeconfig"),
    "two sources": (["run", "--manifests", ".", "--istio"], "leave out --istio, or --manifests"),
    "istiod without istio": (["run", "--istiod", "http://x"], "give --istio too"),
    "lease": (["run", "--lease", "x"], "--lease must be NAMESPACE/NAME, not 'x'"),
    "state": (["run", "--state", "x"], "--state belongs to --manifests"),
    "unknown command": (["nope"], "nope"),
    "bad URL": (["status", "--admin", "not a url"], "is no address"),
}
"""Arguments, and what is said of them."""

_ALL_OF_THEM = """
import contextlib, io, json, sys
from meshctl.cli import main

outcomes = []
for arguments in json.load(sys.stdin):
    sys.argv = ["meshctl", *arguments]
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main()
        except SystemExit as end:
            status = end.code
    outcomes.append((status, said.getvalue()))
json.dump(outcomes, sys.stdout)
"""


@pytest.fixture(scope="module")
def wrong() -> dict[str, tuple[int, str]]:
    """Exit status and words of each of `WRONG`, in one process: most of the time that they take is the import's."""
    asked = orjson.dumps([arguments for arguments, _ in WRONG.values()])
    command = (sys.executable, "-c", _ALL_OF_THEM)
    ran = subprocess.run(command, input=asked, stdout=subprocess.PIPE, check=True, timeout=4 * DEADLINE_S)
    return {name: (status, said) for name, (status, said) in zip(WRONG, orjson.loads(ran.stdout), strict=True)}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_exits_2_and_says_why(wrong: dict[str, tuple[int, str]], name: str) -> None:
    """The option and what is wrong with it, no traceback."""
    status, said = wrong[name]
    assert (status, "Traceback" in said) == (2, False)
    assert WRONG[name][1] in said
