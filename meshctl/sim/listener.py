"""A TCP port that serves HTTP, can die in an instant, and comes back on the same number.

Invariant: from the first `open` to `close` the port belongs to this process: while "down" a socket is bound to it but
does not listen, so connections are refused and nobody else can be given the number by the kernel.

It is aiohttp's low-level server: the whole request goes to one coroutine. Rejected: aiohttp's Application and router,
which add about a third to the cost of a request and nothing for a handful of paths.
"""

from __future__ import annotations

import asyncio
import socket

from aiohttp import web
from aiohttp.typedefs import Handler
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_fixed

from meshctl.errors import InputError

MAX_HEADER_BYTES = 64 * 1024
"""Of one header; Envoy forwards up to 60 KiB in all, and what the proxy lets through must be answered."""
BACKLOG = 4096


class Listener:
    """One address with one handler. `open`, then any number of `drop` and `open`, then `close`."""

    def __init__(self, handler: Handler, host: str, port: int) -> None:
        self._http = web.Server(
            handler,  # type: ignore[arg-type]  # a plain Request is all these handlers use; aiohttp names a BaseRequest
            access_log=None,
            max_field_size=MAX_HEADER_BYTES,
            max_line_size=MAX_HEADER_BYTES,
        )
        self.host, self.port = host, port
        self._held: socket.socket | None = None
        self._server: asyncio.Server | None = None

    @property
    def is_open(self) -> bool:
        return self._server is not None

    async def open(self) -> None:
        """Listen. Raises InputError when the address can't be had."""
        if self._server is not None:
            return
        held = self._held or self._bind()
        self._held = None
        self._server = await asyncio.get_running_loop().create_server(self._http, sock=held, backlog=BACKLOG)

    async def drop(self) -> None:
        """Reset every connection and refuse new ones, keeping the port."""
        if self._server is None:
            return
        self._stop()
        # the loop closes the listening socket in its next turns; until then the port can't be bound again
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(InputError), stop=stop_after_delay(5), wait=wait_fixed(0.002), reraise=True
        ):
            with attempt:
                self._held = self._bind()

    async def close(self) -> None:
        self._stop()
        if self._held is not None:
            self._held.close()
            self._held = None

    def _stop(self) -> None:
        if self._server is None:
            return
        self._server.close()
        self._server = None
        for connection in self._http.connections:
            if connection.transport is not None:
                connection.transport.abort()

    def _bind(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((self.host, self.port))
        except OSError as error:
            sock.close()
            raise InputError(f"cannot listen on {self.host}:{self.port}: {error.strerror or error}") from error
        self.port = sock.getsockname()[1]
        return sock
