"""Sockets of an aiohttp session: they find out when their peer is dead, and all of them can be closed.

A watch is a connection on which nothing may be sent for a minute; the kernel's probes tell silence from death.
"""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import suppress
from weakref import WeakSet

import aiohttp

DEAD_PEER_S = 15
"""A connection whose peer acknowledges nothing for this long is cut by the kernel."""
_PROBE_S = 5
_CLOSE_S = 1.0
_OPTIONS = {
    "TCP_KEEPIDLE": _PROBE_S,
    "TCP_KEEPINTVL": _PROBE_S,
    "TCP_KEEPCNT": DEAD_PEER_S // _PROBE_S - 1,
    "TCP_USER_TIMEOUT": DEAD_PEER_S * 1000,
}
"""Where the system has them (Linux has all); elsewhere its own defaults."""


class Sockets:
    """Give `make` to a TCPConnector as `socket_factory`, and await `close` after the session's own."""

    def __init__(self) -> None:
        self._made = WeakSet[socket.socket]()

    def make(self, address: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, _, _ = address
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _OPTIONS.items():
            if hasattr(socket, option):
                made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._made.add(made)
        return made

    async def close(self) -> None:
        """Returns when all are closed. A session's own `close` leaves some open:

        of an answer that was not read to its end, while TLS says goodbye; and of a request that was cancelled just
        before its TLS handshake (asyncio.sslproto ignores a close before `connection_made`). Their transports close
        them when they are shut down here.
        """
        ends_s = time.monotonic() + _CLOSE_S
        while (left := [made for made in self._made if made.fileno() != -1]) and time.monotonic() < ends_s:
            for made in left:
                with suppress(OSError):  # never connected, or shut down already
                    made.shutdown(socket.SHUT_RDWR)
            await asyncio.sleep(0.001)
