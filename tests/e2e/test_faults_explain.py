"""`meshctl explain` says why a weight is what it is: fresh, stale, absent, infeasible, quarantined.

Drained is in test_faults_endpoint.py.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from meshctl.sim.metrics import exposition
from tests.harness.ads_client import AdsStream, ads_stream
from tests.harness.controller import RunProcess, run_process
from tests.harness.pages import Bad, Pages, http
from tests.harness.served import (
    ROUTE,
    RUN,
    View,
    codes,
    endpoint,
    explain,
    explained,
    manifest_endpoint,
    served,
    weights,
    write_manifests,
)
from tests.harness.tools import free_ports
from xds.wire import TypeUrl

CDS, EDS, RDS = TypeUrl.CLUSTER, TypeUrl.ENDPOINT, TypeUrl.ROUTE


def condition(view: View, type_: str) -> tuple[str, str, str]:
    """Status, reason and message."""
    (found,) = (c for c in view["conditions"] if c["type"] == type_)
    return found["status"], found["reason"], found["message"]


def of(view: View, name: str) -> View:
    (found,) = (e for e in view["endpoints"] if e["endpoint"] == name)
    return dict(found)


def signal(view: View, name: str, signal: str) -> View:
    (found,) = (s for s in of(view, name)["signals"] if s["name"] == signal)
    return dict(found)


@pytest.mark.envoy
async def test_fresh_signals_are_explained_with_values_and_ages(tmp_path: Path) -> None:
    """The observed service time: its value, unit, age and state; the load and the mix that were solved for."""
    async with served(tmp_path) as run, run.loaded():
        await run.measured()
        view = await explain(run.controller)
    name = endpoint(run.servers[0])
    (reason,) = (r for r in of(view, name)["reasons"] if r["code"] == "ObservedServiceTime")
    found = {i["name"]: i for i in reason["inputs"]}["service time"]
    assert (found["unit"], found["state"]) == ("ms", "fresh")
    assert found["value"] >= 5.0
    assert found["age_s"] >= 0
    assert {"LoadObserved", "MixObserved"} <= codes(view)
    assert condition(view, "MetricsFresh")[0] == "True"
    assert condition(view, "SLOFeasible")[0] == "True"


@pytest.mark.envoy
async def test_stale_and_absent_signals_are_told_apart(tmp_path: Path) -> None:
    """One endpoint's metrics fall silent, another's were never there: each says so, and both keep serving."""
    async with served(tmp_path, guard={"staleAfter": "2s"}) as run, run.loaded() as load:
        fresh, stale, absent = run.servers
        sim = run.fleet.server(stale.name)
        async with Pages(lambda _: http(exposition(sim.identity, sim.gpu, time.monotonic()))) as pages:
            ports = {stale: int(pages.address.rpartition(":")[2]), absent: free_ports(1)[0]}
            endpoints = [manifest_endpoint(s) | {"metricsPort": ports.get(s, s.metrics_port)} for s in run.servers]
            write_manifests(run.driven.manifests, endpoints, guard={"staleAfter": "2s"})
            names = {server: endpoint(server) for server in run.servers}
            await run.explained(lambda view: "SignalAbsent" in codes(view, names[absent]))
            await run.explained(lambda view: signal(view, names[stale], "service_s")["state"] == "fresh")
            before = weights(await run.explained())
            pages.reply = lambda _: Bad.HANG
            await run.explained(lambda view: "SignalStale" in codes(view, names[stale]))
            view = await explain(run.controller)
        assert "SignalStale" in codes(view, names[stale])
        assert signal(view, names[stale], "service_s")["state"] == "stale"
        assert signal(view, names[stale], "service_s")["age_s"] > 2.0
        assert "SignalAbsent" in codes(view, names[absent])
        assert signal(view, names[absent], "service_s")["state"] == "absent"
        assert not codes(view, names[fresh]) & {"SignalStale", "SignalAbsent"}
        assert weights(view) == before, "held, not moved"
        assert await run.statuses(30) == [200] * 30
        assert load.window(600.0).failed == 0


async def test_an_impossible_load_is_explained_with_the_best_figure(tmp_path: Path) -> None:
    """Infeasible: which size class, what share of it at best; the route is served all the same."""
    endpoints = [{"address": "127.0.0.1", "port": port, "gpu": "V100"} for port in free_ports(2)]
    write_manifests(tmp_path / "manifests", endpoints, expectedLoad=100_000)
    async with run_process(tmp_path / "manifests", tmp_path / "state", tmp_path / "log", *RUN) as controller:
        await explained(controller)
        view = await explain(controller)
    assert not view["feasible"]
    status, reason, message = condition(view, "SLOFeasible")
    assert (status, reason) == ("False", "Infeasible")
    assert "100000" in message.replace(",", "") or "105000" in message
    assert any("Infeasible" in codes(view, s["size"]) for s in view["sizes"])
    assert all(w > 0 for w in weights(view).values())


async def test_a_refused_change_is_explained_in_the_proxys_words(tmp_path: Path) -> None:
    """Quarantined: the condition has the words of the proxy, and the route is not ready."""
    endpoints = [{"address": "127.0.0.1", "port": port, "gpu": "V100"} for port in free_ports(2)]
    write_manifests(tmp_path / "manifests", endpoints)
    async with (
        run_process(tmp_path / "manifests", tmp_path / "state", tmp_path / "log", *RUN) as controller,
        ads_stream(controller.xds, "gw") as stream,
    ):
        await _accept_all(stream, controller)
        write_manifests(tmp_path / "manifests", endpoints, policy="RoundRobin")
        refused = await stream.read()
        assert refused.type_url == CDS
        await stream.nack(refused, "round robin is not for me")
        await explained(controller, lambda view: condition(view, "Programmed")[1] == "Quarantined")
        view = await explain(controller)
        status, reason, message = condition(view, "Programmed")
        assert (status, reason) == ("False", "Quarantined")
        assert "gw" in message
        assert "round robin is not for me" in message
        assert condition(view, "Ready")[:2] == ("False", "Quarantined")


async def _accept_all(stream: AdsStream, controller: RunProcess) -> None:
    """What a proxy does when it starts; returns when the controller says that it has everything."""
    view = await explained(controller)
    clusters = [f"{ROUTE}/{size['size']}" for size in view["sizes"]]
    await stream.ask(CDS)
    first = await stream.read()
    await stream.ask(EDS, clusters)
    second = await stream.read()
    await stream.ack(first)
    await stream.ack(second, clusters)
    await stream.ask(RDS, ["meshctl"])
    await stream.ack(await stream.read(), ["meshctl"])
    await explained(controller, lambda view: condition(view, "Programmed")[0] == "True")
