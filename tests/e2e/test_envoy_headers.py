"""Which size class a request gets from its headers, in a real Envoy. No value is ever refused."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest

from meshctl.model import DEFAULT_CLASS
from meshctl.sim.envoy import EnvoyProcess, gateway
from tests.harness.envoy import SIZES, Backends, plan, request, require_envoy, route_plan, xds_server

pytestmark = pytest.mark.envoy

X, B, NV = "x-batch-size", "batch_size", "nv-inferrequest"
CASES: list[tuple[str, list[tuple[str, str]], str]] = [
    ("smallest", [(X, "1")], "small"),
    ("upper end of a class", [(X, "7")], "small"),
    ("lower end of the next", [(X, "8")], "medium"),
    ("upper end of the last", [(X, "128")], "large"),
    ("above all", [(X, "129")], DEFAULT_CLASS),
    ("zero", [(X, "0")], DEFAULT_CLASS),
    ("negative", [(X, "-1")], DEFAULT_CLASS),
    ("exponent", [(X, "1e9")], DEFAULT_CLASS),
    ("word", [(X, "abc")], DEFAULT_CLASS),
    ("empty", [(X, "")], DEFAULT_CLASS),
    ("fraction", [(X, "8.0")], DEFAULT_CLASS),
    ("hexadecimal", [(X, "0x8")], DEFAULT_CLASS),
    ("too long for 64 bits", [(X, "9" * 30)], DEFAULT_CLASS),
    ("10 kB", [(X, "8" * 10_000)], DEFAULT_CLASS),
    ("10 kB of words", [(NV, "batch_size: " + "x" * 10_000)], DEFAULT_CLASS),
    ("leading zeros", [(X, "008")], "medium"),
    ("plus sign", [(X, "+8")], "medium"),
    ("blanks around", [(X, "  8 ")], "medium"),
    ("repeated", [(X, "8"), (X, "8")], "medium"),
    ("repeated, different sizes", [(X, "64"), (X, "8")], "medium"),
    ("repeated, one of them nonsense", [(X, "abc"), (X, "64")], "large"),
    ("repeated nonsense", [(X, "abc"), (X, "-1")], DEFAULT_CLASS),
    ("list", [(X, "8,64")], DEFAULT_CLASS),
    ("no header", [], DEFAULT_CLASS),
    ("second header", [(B, "64")], "large"),
    ("second header, nonsense", [(B, "many")], DEFAULT_CLASS),
    ("first present wins", [(X, "8"), (B, "64")], "medium"),
    ("first present wins, whatever the order", [(B, "64"), (X, "8")], "medium"),
    ("first present is nonsense", [(X, "abc"), (B, "64")], DEFAULT_CLASS),
    ("first present is empty", [(X, ""), (B, "64")], DEFAULT_CLASS),
    ("first present is out of range", [(X, "1000"), (NV, "batch_size: 1")], DEFAULT_CLASS),
    ("upper case name", [("X-Batch-Size", "33")], "large"),
    ("legacy", [(NV, "batch_size: 100")], "large"),
    ("legacy among words", [("NV-InferRequest", "request_id: 8 batch_size: 7 correlation_id: 64")], "small"),
    ("legacy with commas", [(NV, "id:1,batch_size:8,x:2")], "medium"),
    ("legacy without blank", [(NV, "batch_size:32")], "medium"),
    ("legacy, larger number", [(NV, "batch_size: 1000")], DEFAULT_CLASS),
    ("legacy, number runs on", [(NV, "batch_size: 8x")], DEFAULT_CLASS),
    ("legacy, other key", [(NV, "max_batch_size: 8")], DEFAULT_CLASS),
    ("legacy, no size", [(NV, "request_id: 8")], DEFAULT_CLASS),
    ("legacy comes last", [(B, "1"), (NV, "batch_size: 64")], "small"),
]


async def test_every_value_reaches_its_class(tmp_path: Path) -> None:
    """The routing table of sizes, sound and nonsense, through a real Envoy."""
    require_envoy()
    names = [*(s.name for s in SIZES), DEFAULT_CLASS]
    async with Backends(len(names)) as backends, xds_server() as server:
        class_of = dict(zip(backends.addresses, names, strict=True))
        tables = {size: {address: 1000} for address, size in class_of.items()}
        server.apply(plan(route_plan("default/r", tables)))
        async with EnvoyProcess(tmp_path, gateway(server.address, "gw")) as envoy, aiohttp.ClientSession() as session:
            got = {}
            for name, headers, _ in CASES:
                status, body = await request(session, envoy.url, headers)
                got[name] = class_of.get(body, f"{status}: {body}")
    assert got == {name: expected for name, _, expected in CASES}


async def test_hosts_match_with_any_port_and_once(tmp_path: Path) -> None:
    """A host matches with and without port, in any case; claimed twice, the first route by id keeps it."""
    require_envoy()
    async with Backends(2) as backends, xds_server() as server:
        a, b = backends.addresses
        first = route_plan("default/a", {a: 1000}, hosts=("Model.example", "shared.example:8080", "*.a.example"))
        second = route_plan("default/b", {b: 1000}, hosts=("shared.example", "*"))
        third = route_plan("default/c", {b: 1000}, hosts=("*",))
        server.apply(plan(first, second, third))
        assert [(p.route, "already served by" in p.message) for p in server.problems] == [
            ("default/b", True),
            ("default/c", True),
        ]
        async with EnvoyProcess(tmp_path, gateway(server.address, "gw")) as envoy, aiohttp.ClientSession() as session:
            for host in ("model.example", "MODEL.example:1234", "shared.example", "x.a.example:99"):
                assert await request(session, envoy.url, host=host) == (200, a)
            assert await request(session, envoy.url, host="other.example:80") == (200, b)
