"""A simulated mixed fleet: every server of a `FleetConfig`, and one control port for all of them.

In this process (`Fleet`) or in one of its own (`FleetProcess`), which is what measurements need: a load generator, a
fleet and a controller on one event loop would measure each other. The control port is apart from the servers' own
because a crashed server refuses connections, the one that would revive it included.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp
import orjson
from aiohttp import web

from meshctl.errors import InputError, MeshctlError
from meshctl.sim.config import FleetConfig, server_plans
from meshctl.sim.faults import Faults
from meshctl.sim.listener import Listener
from meshctl.sim.server import SimServer, error_response, json_response

READY_S = 30.0
"""Longest a fleet's process may take to listen; half a second is usual."""
STOP_S = 10.0
CONTROL_S = 10.0


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """Where one running server is, and what stands in a ModelRoute's endpoint."""

    name: str
    gpu: str
    gpu_uuid: str
    address: str
    port: int
    metrics_port: int
    model: str
    concurrency: int

    @property
    def url(self) -> str:
        """Where its inferences are posted."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"http://{host}:{self.port}/v2/models/{self.model}/infer"


@dataclass(frozen=True, slots=True)
class FleetInfo:
    """A running fleet, as `meshctl sim fleet -o json` prints it."""

    control: str
    """``host:port`` of the control API."""
    servers: tuple[ServerInfo, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"control": self.control, "servers": [asdict(server) for server in self.servers]}

    @staticmethod
    def from_json(text: bytes) -> FleetInfo:
        data = orjson.loads(text)
        return FleetInfo(data["control"], tuple(ServerInfo(**server) for server in data["servers"]))


class Fleet:
    """The fleet on this event loop; an async context manager.

    The control port serves `GET /sim/faults`, `POST /sim/faults/{server}` (the body is the new `Faults`; `{}` heals)
    and `POST /sim/reset/{server}` (counters start at 0).
    """

    def __init__(self, config: FleetConfig) -> None:
        self._servers = {plan.identity.name: SimServer(plan) for plan in server_plans(config)}
        self._control = Listener(self._handle, config.host, config.control_port)

    async def __aenter__(self) -> Self:
        try:
            for server in self._servers.values():
                await server.start()
            await self._control.open()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        await self._control.close()
        for server in self._servers.values():
            await server.stop()

    @property
    def info(self) -> FleetInfo:
        return FleetInfo(
            f"{self._control.host}:{self._control.port}", tuple(_info(server) for server in self._servers.values())
        )

    def server(self, name: str) -> SimServer:
        """Raises InputError when there is none of that name."""
        if name not in self._servers:
            raise InputError(f"the fleet has no server {name!r}; known: {', '.join(sorted(self._servers))}")
        return self._servers[name]

    async def set_faults(self, name: str, faults: Faults) -> None:
        """Replace what is wrong with one server; returns when it is in force."""
        await self.server(name).set_faults(faults)

    async def reset_counters(self, name: str) -> None:
        self.server(name).reset_counters()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            match request.method, request.path.split("/")[1:]:
                case "GET", ["sim", "faults"]:
                    pass
                case "POST", ["sim", "faults", name]:
                    await self.set_faults(name, Faults.parse(await request.read()))
                case "POST", ["sim", "reset", name]:
                    await self.reset_counters(name)
                case _:
                    return error_response(
                        404, "known: GET /sim/faults, POST /sim/faults/SERVER, POST /sim/reset/SERVER"
                    )
        except InputError as error:
            return error_response(400, str(error))
        return json_response({name: server.faults.model_dump() for name, server in self._servers.items()})


def _info(server: SimServer) -> ServerInfo:
    who = server.identity
    return ServerInfo(
        name=who.name,
        gpu=who.gpu,
        gpu_uuid=who.gpu_uuid,
        address=server.plan.host,
        port=server.port,
        metrics_port=server.metrics_port,
        model=who.model,
        concurrency=server.plan.concurrency,
    )


class FleetProcess:
    """The same fleet in a child process with its own process group; an async context manager."""

    def __init__(self, config: FleetConfig, command: Sequence[str] = (sys.executable, "-m", "meshctl", "sim")) -> None:
        self._config, self._command = config, command
        self._process: asyncio.subprocess.Process | None = None
        self._http: aiohttp.ClientSession | None = None
        self._info: FleetInfo | None = None

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def info(self) -> FleetInfo:
        if self._info is None:
            raise MeshctlError("the fleet has not been started")
        return self._info

    @property
    def pid(self) -> int:
        if self._process is None:
            raise MeshctlError("the fleet has not been started")
        return self._process.pid

    async def _start(self) -> None:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self._command, "fleet", "--config", "-", "-o", "json", stdin=pipe, stdout=pipe, start_new_session=True
        )
        text = self._config.model_dump_json(by_alias=True, exclude_none=True).encode()
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise MeshctlError("the fleet's process has no pipes")
        stdin.write(text)
        stdin.close()
        try:
            line = await asyncio.wait_for(stdout.readline(), READY_S)
        except TimeoutError as error:
            raise MeshctlError(f"the fleet's process {self._process.pid} was not ready in {READY_S:g} s") from error
        if not line:
            raise MeshctlError("the fleet's process ended before it was ready; its messages are on stderr")
        try:
            self._info = FleetInfo.from_json(line)
        except (ValueError, LookupError, TypeError) as error:
            raise MeshctlError(f"the fleet's process said {line[:200]!r} instead of its addresses") from error
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CONTROL_S))

    async def stop(self) -> None:
        """End the process: asked first, then killed. Harmless when it is gone."""
        if self._http is not None:
            await self._http.close()
        if self._process is None or self._process.returncode is not None:
            return
        for end, wait_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
            with suppress(ProcessLookupError):  # it may have ended just now
                os.killpg(self._process.pid, end)
            try:
                await asyncio.wait_for(self._process.wait(), wait_s)
            except TimeoutError:
                continue
            return

    async def ended(self) -> str:
        """Returns when the process has ended: what to say of it."""
        if self._process is None:
            raise MeshctlError("the fleet has not been started")
        return f"the fleet's process ended with status {await self._process.wait()}; its messages are on stderr"

    async def set_faults(self, name: str, faults: Faults) -> None:
        """Replace what is wrong with one server; returns when it is in force."""
        await self._post(f"faults/{name}", faults.model_dump_json())

    async def reset_counters(self, name: str) -> None:
        await self._post(f"reset/{name}", "")

    async def _post(self, path: str, body: str) -> None:
        url = f"http://{self.info.control}/sim/{path}"
        if self._http is None:
            raise MeshctlError("the fleet has not been started")
        try:
            async with self._http.post(url, data=body) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise MeshctlError(f"POST {url}: {error or type(error).__name__}") from error
        if response.status != 200:
            raise InputError(f"POST {url}: {response.status}: {text}")
