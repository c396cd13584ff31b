"""The controller as `meshctl run` puts it together, while its surroundings fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from meshctl.controller.config import Config
from meshctl.controller.main import running
from meshctl.controller.state import State
from meshctl.errors import InputError
from meshctl.model import Plan, RouteId
from tests.harness import manifests
from tests.harness.controller import ANY_PORT, DEADLINE_S

RESNET, BERT = RouteId("default/resnet"), RouteId("default/bert")
GOOD = manifests.text(manifests.route(hosts=["resnet"]), manifests.profile())
MORE = manifests.text(manifests.route("bert", hosts=["bert"]))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "manifests"
    path.mkdir()
    (path / "good.yaml").write_text(GOOD)
    return path


def config(directory: Path, **changes: Any) -> Config:
    options = {"xds": ANY_PORT, "admin": ANY_PORT, "state": directory.parent / "state.json", "tick_s": 0.1, **changes}
    return Config(manifests=directory, **options)


def serves(*routes: RouteId) -> Callable[[State], bool]:
    return lambda state: state.plan.routes.keys() == set(routes)


def weights(plan: Plan) -> dict[RouteId, object]:
    return {route_id: route.weights for route_id, route in plan.routes.items()}


async def test_a_bad_manifest_keeps_the_last_good_one_and_is_reported_with_its_line(directory: Path) -> None:
    """The route stays as it was, another file's change goes through, and the place of the fault is said."""
    async with running(config(directory)) as controller:
        before = (await controller.loop.wait_for(serves(RESNET), DEADLINE_S)).plan.routes[RESNET]
        (directory / "good.yaml").write_text(GOOD.replace('"latency": "150ms"', '"latency": "150"'))
        (directory / "more.yaml").write_text(MORE)
        state = await controller.loop.wait_for(serves(RESNET, BERT), DEADLINE_S)
        state = await controller.loop.wait_for(lambda state: bool(state.desired.problems), DEADLINE_S)
        assert state.plan.routes[RESNET].weights == before.weights
        assert state.plan.routes[RESNET].route is before.route
        (problem,) = (p for p in state.desired.problems if p.route == RESNET and "latency" in p.message)
        file, line, _ = problem.where.rsplit(":", 2)
        broken = (directory / "good.yaml").read_text().splitlines()
        assert (file, '"150"' in broken[int(line) - 1]) == (str(directory / "good.yaml"), True)
        (directory / "good.yaml").write_text(GOOD)
        await controller.loop.wait_for(
            lambda state: not any(p.route == RESNET for p in state.desired.problems), DEADLINE_S
        )


@asynccontextmanager
async def silent_server() -> AsyncIterator[str]:
    """Takes connections and never says a word."""
    ended = asyncio.Event()

    async def hang(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await ended.wait()
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    try:
        yield "http://{}:{}".format(*server.sockets[0].getsockname())
    finally:
        ended.set()
        server.close()


async def test_a_prometheus_that_hangs_is_reported_and_delays_no_manifest(directory: Path) -> None:
    """Manifests take effect and routes are served; the problem names the server."""
    async with silent_server() as url, running(config(directory, prometheus=url)) as controller:
        await controller.loop.wait_for(serves(RESNET), DEADLINE_S)
        (directory / "more.yaml").write_text(MORE)
        await controller.loop.wait_for(serves(RESNET, BERT), DEADLINE_S)
        state = await controller.loop.wait_for(lambda state: bool(state.observed.problems), DEADLINE_S)
        assert any(url in f"{p.where} {p.message}" for p in state.observed.problems)
        assert not state.failures, "somebody else's fault is no failure of the controller"


async def test_a_restart_with_a_broken_manifest_serves_what_was_served(directory: Path) -> None:
    """The state file stands in for a manifest that was broken while the controller was down."""
    async with running(config(directory)) as controller:
        before = (await controller.loop.wait_for(serves(RESNET), DEADLINE_S)).plan
    (directory / "good.yaml").write_text("{{{ half a template")
    async with running(config(directory)) as controller:
        state = await controller.loop.wait_for(lambda state: state.published, DEADLINE_S)
        assert weights(state.plan) == weights(before)
        (directory / "good.yaml").unlink()
        await controller.loop.wait_for(serves(), DEADLINE_S)


async def test_ports_in_use_are_said_and_leave_nothing_behind(directory: Path) -> None:
    """The second controller stops with the option to change; the first goes on."""
    async with running(config(directory)) as controller:
        await controller.loop.wait_for(serves(RESNET), DEADLINE_S)
        for option in ("xds", "admin"):
            host, _, port = getattr(controller, option).rpartition(":")
            taken = type(ANY_PORT)(host, int(port))
            with pytest.raises(InputError, match=f"--{option}"):
                async with running(config(directory, **{option: taken})):
                    pass
        assert not controller.loop.state().failures


async def test_a_state_file_that_is_not_whole_stops_the_start_and_stays(directory: Path) -> None:
    """Nothing is overwritten; the message names the file and --state."""
    state = directory.parent / "state.json"
    state.write_text("{")
    with pytest.raises(InputError, match=r"state\.json.*--state"):
        async with running(config(directory)):
            pass
    assert state.read_text() == "{"
