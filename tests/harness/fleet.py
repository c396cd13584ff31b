"""Small simulated fleets for tests, and requests to them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
from prometheus_client.parser import text_string_to_metric_families

from meshctl.sim.config import FleetConfig
from meshctl.sim.fleet import Fleet, ServerInfo

MODEL = "resnet50"
ANSWER_S = 30.0
"""A request that takes longer has hung, on any machine."""


def config(*servers: dict[str, Any], **fields: Any) -> FleetConfig:
    """A fleet of `servers` (by default one V100 that needs a millisecond), on ports that the kernel chooses."""
    fast = {"gpu": "V100", "service": {"base": "1ms", "perItem": "0s"}}
    return FleetConfig.model_validate({"model": MODEL, "servers": list(servers) or [fast], **fields})


@dataclass(frozen=True, slots=True)
class Client:
    """What a test asks one server."""

    session: aiohttp.ClientSession
    server: ServerInfo

    @property
    def base(self) -> str:
        return f"http://{self.server.address}:{self.server.port}"

    async def get(self, path: str) -> tuple[int, bytes]:
        async with self.session.get(self.base + path) as response:
            return response.status, await response.read()

    async def post(self, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> tuple[int, Any]:
        async with self.session.post(self.base + path, data=body, headers=headers) as response:
            return response.status, orjson.loads(await response.read())

    async def infer(self, body: bytes = b"", headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """(status, JSON of the answer) of one inference."""
        return await self.post(f"/v2/models/{MODEL}/infer", body, headers)

    async def metrics(self) -> dict[str, float]:
        """Series name -> sum over its labels."""
        async with self.session.get(f"http://{self.server.address}:{self.server.metrics_port}/metrics") as response:
            text = await response.text()
        return series(text)


def series(text: str) -> dict[str, float]:
    """Series name -> sum over its labels, as Prometheus' own parser reads the page."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removesuffix("_total")  # the parser adds it to the names of counters
            sums[name] = sums.get(name, 0.0) + sample.value
    return sums


@asynccontextmanager
async def running(found: FleetConfig) -> AsyncIterator[tuple[Fleet, list[Client]]]:
    """The fleet in this process, and a client for each of its servers."""
    timeout = aiohttp.ClientTimeout(total=ANSWER_S)
    async with Fleet(found) as fleet, aiohttp.ClientSession(timeout=timeout) as session:
        yield fleet, [Client(session, server) for server in fleet.info.servers]
