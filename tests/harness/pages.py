"""Servers of metrics pages and of Prometheus answers on loopback, as well- or ill-behaved as a test says.

Written on bare sockets: a well-kept HTTP server would not drip, break off or answer nonsense.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import orjson

from meshctl.model import DesiredRoute, Endpoint, EndpointId, RouteId, RouteSpec, SizeClass

TEXT = "text/plain; version=0.0.4"


class Bad(Enum):
    """What is no answer at all."""

    HANG = "accepts the request, then says nothing"
    CLOSE = "closes the connection instead of an answer"


@dataclass(frozen=True, slots=True)
class Drip:
    """`answer`, one byte every `pause_s`: never idle for long, never done."""

    answer: bytes
    pause_s: float = 0.02


Reply = bytes | Drip | Bad


def http(body: str | bytes, status: int = 200, content_type: str = TEXT, **headers: str) -> bytes:
    """A whole HTTP answer."""
    data = body.encode() if isinstance(body, str) else body
    fields = {"Content-Type": content_type, "Content-Length": str(len(data)), "Connection": "close", **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + data


@dataclass
class Pages:
    """``async with Pages(lambda path: http("up 1\\n")) as pages: pages.address``; `reply` may be set at any time."""

    reply: Callable[[str], Reply]
    """From the request's path, query string included."""
    asked: list[str] = field(default_factory=list)
    open_now: int = 0
    open_most: int = 0
    sockets: int = 1
    """Addresses to answer on."""
    _servers: list[asyncio.Server] = field(default_factory=list)

    @property
    def addresses(self) -> list[str]:
        return [f"127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in self._servers]

    @property
    def address(self) -> str:
        return self.addresses[0]

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    async def __aenter__(self) -> Self:
        for _ in range(self.sockets):
            self._servers.append(await asyncio.start_server(self._serve, "127.0.0.1", 0))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open_now += 1
        self.open_most = max(self.open_most, self.open_now)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):  # the client may leave at any time
                request = await reader.readuntil(b"\r\n\r\n")
                path = request.split(b" ", 2)[1].decode()
                self.asked.append(path)
                await self._answer(self.reply(path), reader, writer)
        finally:
            self.open_now -= 1
            writer.close()

    async def _answer(self, reply: Reply, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        match reply:
            case bytes():
                writer.write(reply)
                await writer.drain()
            case Drip(answer, pause_s):
                for i in range(len(answer)):
                    writer.write(answer[i : i + 1])
                    await writer.drain()
                    await asyncio.sleep(pause_s)
            case Bad.HANG:
                await reader.read()  # until the client leaves
            case Bad.CLOSE:
                pass


# -------------------------------------------------------------------------------------------- a Prometheus' answers


def query_of(path: str) -> str:
    """The PromQL in a request's path."""
    return parse_qs(urlsplit(path).query)["query"][0]


def vector(labels: Mapping[str, str], value: float | str, **more: Any) -> bytes:
    """An instant vector of one element, evaluated now."""
    result = [{"metric": dict(labels), "value": [time.time(), str(value)]}]
    return json_answer({"status": "success", "data": {"resultType": "vector", "result": result}, **more})


def json_answer(data: Any, status: int = 200) -> bytes:
    return http(orjson.dumps(data), status, "application/json")


EMPTY = json_answer({"status": "success", "data": {"resultType": "vector", "result": []}})


def one_value(labels: Mapping[str, str], value: float = 0.5, age_s: float = 0.0) -> Callable[[str], bytes]:
    """A Prometheus that answers every query about `labels` with `value`, sampled `age_s` ago; nothing is down."""

    def reply(path: str) -> bytes:
        query = query_of(path)
        if query == "up == 0":
            return EMPTY
        return vector(labels, time.time() - age_s if "timestamp(" in query else value)

    return reply


# ----------------------------------------------------------------------------------------------------------- routes


def route(*endpoints: Endpoint, name: str = "demo/resnet", model: str = "resnet50") -> DesiredRoute:
    """A route with the sizes small (1..7) and large (8..128)."""
    sizes = (SizeClass("small", 1, 7, 1.0, 0.8), SizeClass("large", 8, 128, 64.0, 0.2))
    spec = RouteSpec(RouteId(name), ("*",), model, 0.15, 0.99, ("x-batch-size",), sizes)
    return DesiredRoute(spec, endpoints, {})


def server(metrics: str, address: str = "127.0.0.1:8000", **fields: Any) -> Endpoint:
    """An endpoint at `address` whose metrics are at `metrics`."""
    host, _, port = address.rpartition(":")
    return Endpoint(EndpointId(address), host, int(port), "T4", metrics, **fields)
