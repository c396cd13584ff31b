"""A small HTTP server of a long-running command: health, metrics, what it knows. Loopback by default."""

from __future__ import annotations

import orjson
from aiohttp import web

from meshctl.address import Address
from meshctl.errors import InputError

SHUTDOWN_S = 1.0
"""For answers under way; there are no long ones."""


class HttpServer:
    """Serves `routes`, and /healthz, from `start` to `stop`."""

    def __init__(self, routes: list[web.RouteDef]) -> None:
        application = web.Application()
        application.add_routes([web.get("/healthz", _healthz), *routes])
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=SHUTDOWN_S)
        self.address = Address("", 0)
        """Where it listens, once started."""

    async def start(self, address: Address) -> None:
        """Bind; port 0 takes a free one. Raises InputError when it can't."""
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, address.host, address.port).start()
        except OSError as error:
            await self._runner.cleanup()
            raise InputError(
                f"the admin API can't listen on {address}: {error.strerror}; choose another --admin"
            ) from error
        self.address = Address(*self._runner.addresses[0][:2])

    async def stop(self) -> None:
        await self._runner.cleanup()


async def _healthz(_: web.Request) -> web.Response:
    """200 while the event loop runs."""
    return web.Response(text="ok\n")


def json_response(value: object, *, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value) + b"\n", status=status, content_type="application/json")
