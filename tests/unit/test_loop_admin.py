"""The admin API over real HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
import pytest

from meshctl.controller.admin import AdminServer
from meshctl.controller.loop import Loop
from meshctl.errors import InputError
from meshctl.model import EndpointSignals, Problem, RouteId, RouteSignals, Signal
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
)


@dataclass
class Served:
    source: MemorySource
    signals: MemorySignals
    proxies: MemoryProxies
    clock: ManualClock
    loop: Loop
    admin: AdminServer

    async def get(self, path: str) -> tuple[int, aiohttp.ClientResponse]:
        timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            response = await session.get(f"http://{self.admin.address}{path}")
            await response.read()
            return response.status, response


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    source = MemorySource(Desired(routes(desired_route(), desired_route("demo/bert"))))
    world = (source, MemorySignals(), MemoryProxies(), ManualClock())
    loop = Loop(*world, tick_s=0.05)
    admin = AdminServer(loop.state, loop.metrics)
    await admin.start(ANY_PORT)
    try:
        yield Served(*world, loop, admin)
    finally:
        await loop.stop()
        await admin.stop()


async def test_readiness_is_the_first_published_plan(served: Served) -> None:
    """Alive at once, ready once something was published."""
    assert (await served.get("/healthz"))[0] == 200
    assert (await served.get("/readyz"))[0] == 503
    await served.loop.start()
    await served.loop.wait_for(lambda state: state.published, DEADLINE_S)
    status, response = await served.get("/readyz")
    assert status == 200
    assert await response.json() == {"ready": True, "degraded": []}


async def test_degraded_is_said_but_stays_ready(served: Served) -> None:
    """The last good plan is still served, so the controller is not taken out of service."""
    await served.loop.start()
    served.signals.error = RuntimeError("gone")
    await served.loop.wait_for(lambda state: state.published and bool(state.failures), DEADLINE_S)
    status, response = await served.get("/readyz")
    assert status == 200
    assert "gone" in (await response.json())["degraded"][0]


async def test_routes_are_listed_and_shown_with_weights_signals_and_reasons(served: Served) -> None:
    """One route's view has every size, every endpoint, every weight, and signals with value, unit, age and state."""
    first, second = desired_route().endpoints
    measured = EndpointSignals(service_s=Signal(0.006, 999.0))
    served.signals.current = Observed({desired_route().spec.id: RouteSignals(endpoints={first.id: measured})})
    await served.loop.start()
    await served.loop.wait_for(lambda state: state.published and bool(state.observed.routes), DEADLINE_S)
    _, response = await served.get("/api/v1/routes")
    assert [route["route"] for route in await response.json()] == ["demo/bert", "demo/resnet"]
    _, response = await served.get("/api/v1/explain/demo/resnet")
    view = await response.json()
    assert [size["size"] for size in view["sizes"]] == ["small", "large", "default"]
    assert [endpoint["endpoint"] for endpoint in view["endpoints"]] == [first.id, second.id]
    for size in ("small", "large", "default"):
        assert sum(endpoint["weights"][size] for endpoint in view["endpoints"]) == 1000
    signals = {signal["name"]: signal for signal in view["endpoints"][0]["signals"]}
    assert signals["service_s"] == {"name": "service_s", "value": 0.006, "unit": "s", "age_s": 1.0, "state": "fresh"}
    assert signals["completed_rps"]["state"] == "absent"
    codes = {reason["code"] for part in (view, *view["endpoints"], *view["sizes"]) for reason in part["reasons"]}
    assert codes, "no decision without reasons"
    assert view["conditions"][0]["type"] == "Ready"


async def test_an_unknown_route_names_those_there_are(served: Served) -> None:
    """404 with the list."""
    await served.loop.start()
    await served.loop.wait_for(lambda state: state.published, DEADLINE_S)
    status, response = await served.get("/api/v1/routes/demo/nope")
    assert status == 404
    assert (await response.json())["routes"] == ["demo/bert", "demo/resnet"]


async def test_status_has_problems_by_source(served: Served) -> None:
    """A bad manifest shows with its file and line; other sources are there and empty."""
    served.source.put(served.source.current.routes, Problem("a.yaml:3:1", "unknown field", desired_route().spec.id))
    await served.loop.start()
    await served.loop.wait_for(lambda state: state.published, DEADLINE_S)
    _, response = await served.get("/api/v1/status")
    view = await response.json()
    assert view["problems"] == {
        "controller": [],
        "dataplane": [],
        "manifests": [{"where": "a.yaml:3:1", "message": "unknown field", "route": "demo/resnet"}],
        "signals": [],
    }
    assert view["signals"] == {"fresh": 0, "stale": 0, "absent": 4}


async def test_metrics_follow_the_plan_and_forget_what_is_gone(served: Served) -> None:
    """Weights and ages are exported per endpoint; a removed route leaves no series behind."""
    await served.loop.start()
    await served.loop.wait_for(lambda state: state.published, DEADLINE_S)
    _, response = await served.get("/metrics")
    text = await response.text()
    assert response.content_type == "text/plain"
    weights = served.loop.state().plan.routes[RouteId("demo/bert")].weights["small"]
    for endpoint, weight in weights.items():
        assert "meshctl_leading 1.0" in text
        assert f'meshctl_weight{{endpoint="{endpoint}",route="demo/bert",size="small"}} {weight:.1f}' in text
    assert 'meshctl_decisions_total{outcome="crashed"} 0.0' in text
    served.source.put(routes(desired_route()))
    await served.loop.wait_for(lambda state: len(state.plan.routes) == 1, DEADLINE_S)
    _, response = await served.get("/metrics")
    assert "demo/bert" not in await response.text()


async def test_a_port_in_use_is_said_with_the_option(served: Served) -> None:
    """The message names the address and --admin."""
    second = AdminServer(served.loop.state, served.loop.metrics)
    with pytest.raises(InputError, match=f"{served.admin.address}: .*in use; choose another --admin"):
        await second.start(served.admin.address)
