"""A small HTTP server of a long-running command: health, metrics, what it knows or decides. Loopback by default."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import orjson
from aiohttp import web

from meshctl.address import Address
from meshctl.errors import InputError
from meshctl.tls import Renewing, TlsFiles

SHUTDOWN_S = 1.0
"""For answers under way where there are no long ones."""
BODY_BYTES = 1024**2
"""Of a request, at most, unless a server says otherwise: aiohttp's own limit."""


class HttpServer:
    """Serves `routes`, and /healthz, from `start` to `stop`."""

    def __init__(
        self,
        routes: list[web.RouteDef],
        *,
        what: str = "the admin API",
        option: str = "--admin",
        shutdown_s: float = SHUTDOWN_S,
        body_bytes: int = BODY_BYTES,
    ) -> None:
        """`what` and `option` say it to people; requests under way have `shutdown_s` to end in."""
        application = web.Application(client_max_size=body_bytes)
        application.add_routes([web.get("/healthz", _healthz), *routes])
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=shutdown_s)
        self._what, self._option = what, option
        self._renewal: asyncio.Task[None] | None = None
        self.address = Address("", 0)
        """Where it listens, once started."""

    async def start(self, address: Address, tls: TlsFiles | Renewing | None = None) -> None:
        """Bind; port 0 takes a free one. Raises InputError when it can't, or when `tls` can't be used."""
        certificates = Renewing(tls) if isinstance(tls, TlsFiles) else tls
        await self._runner.setup()
        try:
            context = None if certificates is None else certificates.context
            await web.TCPSite(self._runner, address.host, address.port, ssl_context=context).start()
        except OSError as error:
            await self._runner.cleanup()
            raise InputError(
                f"{self._what} can't listen on {address}: {error.strerror}; choose another {self._option}"
            ) from error
        self.address = Address(*self._runner.addresses[0][:2])
        if certificates is not None:
            self._renewal = asyncio.create_task(certificates.run(), name="renew certificates")

    async def stop(self) -> None:
        """Nothing new is accepted; what is under way is answered, for as long as it may take."""
        if self._renewal is not None:
            self._renewal.cancel()
            with suppress(asyncio.CancelledError):
                await self._renewal
        await self._runner.cleanup()


async def _healthz(_: web.Request) -> web.Response:
    """200 while the event loop runs."""
    return web.Response(text="ok\n")


def json_response(value: object, *, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value) + b"\n", status=status, content_type="application/json")
