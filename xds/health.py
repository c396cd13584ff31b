"""grpc.health.v1.Health: whether this server has something to serve, for gRPC clients and Kubernetes' gRPC probe.

SERVING from the first snapshot until the drain. The messages are one field each, so they are bytes here as everywhere
on this server; the package grpcio-health-checking would bring Google's protobuf for them.

Source: https://github.com/grpc/grpc/blob/master/doc/health-checking.md
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any

import grpc

from xds.wire import ProtocolError, fields

SERVICE = "grpc.health.v1.Health"
SERVICES = frozenset({"", "envoy.service.discovery.v3.AggregatedDiscoveryService"})
"""What may be asked for; "" is the server as a whole."""
WATCHERS = 256
"""Watches at once. A probe checks, a client watches once per channel; who opens thousands is refused."""


class _Answer(Enum):
    """A HealthCheckResponse: field 1, an enum."""

    SERVING = b"\x08\x01"
    NOT_SERVING = b"\x08\x02"
    SERVICE_UNKNOWN = b"\x08\x03"


class Health:
    """NOT_SERVING until `set`. All methods belong to the server's event loop."""

    def __init__(self, watchers: int = WATCHERS) -> None:
        """`watchers` may watch at once."""
        self._most = watchers
        self._now = _Answer.NOT_SERVING
        self._changed = asyncio.Event()
        self._watchers = 0
        self._handlers: Mapping[str, Any] = MappingProxyType(
            {
                f"/{SERVICE}/Check": grpc.unary_unary_rpc_method_handler(self._check),
                f"/{SERVICE}/Watch": grpc.unary_stream_rpc_method_handler(self._watch),
            }
        )

    def handler(self, method: str) -> Any:
        """gRPC's handler of ``/service/method``, None for what is not of this service."""
        return self._handlers.get(method)

    def set(self, serving: bool) -> None:
        """Tells those who ask from now on, and those who watch."""
        answer = _Answer.SERVING if serving else _Answer.NOT_SERVING
        if answer is not self._now:
            self._now = answer
            self._changed.set()
            self._changed = asyncio.Event()

    async def _check(self, request: bytes, context: Any) -> bytes:
        service = await _asked(request, context)
        if service not in SERVICES:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {service!r} here")
        return self._now.value

    async def _watch(self, request: bytes, context: Any) -> None:
        """Until the client or the server's end cancels it: the state now, and each later one."""
        service = await _asked(request, context)
        if self._watchers >= self._most:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._most} watches are open; use Check")
        self._watchers += 1
        try:
            told = None
            while True:
                changed = self._changed
                answer = self._now if service in SERVICES else _Answer.SERVICE_UNKNOWN
                if answer is not told:
                    await context.write(answer.value)
                    told = answer
                    continue  # it may have changed while it was written
                await changed.wait()
        finally:
            self._watchers -= 1


async def _asked(request: bytes, context: Any) -> str:
    """The service that a HealthCheckRequest names; the call ends where it is none."""
    try:
        return _service(request)
    except ProtocolError as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not a HealthCheckRequest: {error}")
        raise  # abort has raised; it has no types that say so


def _service(request: bytes) -> str:
    """Field 1, a string. Raises ProtocolError."""
    name: bytes | int = b""
    for number, value in fields(request):
        name = value if number == 1 else name
    try:
        return bytes.decode(name)  # type: ignore[arg-type]  # a number where the string belongs is a TypeError
    except (TypeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"field 1 is no string ({error})") from error
