"""The admin API: what the controller knows, read-only, over HTTP. Loopback by default.

| path | answer |
|------|--------|
| /healthz | 200 while the event loop runs |
| /readyz | 200 once the first plan is published, else 503; says too what is degraded |
| /metrics | Prometheus text |
| /api/v1/status | StatusView |
| /api/v1/routes | list of RouteSummary |
| /api/v1/routes/{namespace}/{name} | RouteView; 404 names the routes there are |
| /api/v1/explain/{namespace}/{name} | the same RouteView: every weight with its reasons |
| /api/v1/proxies | list of StreamView: the clients of our xDS server, and how far each is |
| /api/v1/proxies/{node}/config | ConfigView: what it holds; 404 names the nodes there are |

The last one takes a query: type (cds, eds, lds, rds), name (``*`` for any characters), full=1 for their bytes.

Degraded is not unready: a controller that can't decide just now still serves its last good plan to proxies that
reconnect, and taking it out of service would make that worse.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from aiohttp import web

from meshctl import __version__
from meshctl.controller.metrics import CONTENT_TYPE, Metrics
from meshctl.controller.proxies import Inspected, Wanted, config_view, stream_views
from meshctl.controller.state import State
from meshctl.controller.views import route_summaries, route_view, status_view
from meshctl.httpserver import HttpServer, json_response
from meshctl.model import RouteId
from xds.inspect import SHORT


class AdminServer(HttpServer):
    """Serves from `start` to `stop`."""

    def __init__(self, state: Callable[[], State], metrics: Metrics, proxies: Inspected | None = None) -> None:
        """`proxies` is our xDS server, where there is one."""
        self._state = state
        self._metrics = metrics
        self._proxies = proxies
        super().__init__(
            [
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._exposition),
                web.get("/api/v1/status", self._status),
                web.get("/api/v1/routes", self._routes),
                web.get("/api/v1/routes/{namespace}/{name}", self._route),
                web.get("/api/v1/explain/{namespace}/{name}", self._route),
                web.get("/api/v1/proxies", self._streams),
                web.get("/api/v1/proxies/{node}/config", self._config),
            ]
        )

    async def _readyz(self, _: web.Request) -> web.Response:
        state = self._state()
        body = {"ready": state.published, "degraded": [f"{p.where}: {p.message}" for p in state.failures]}
        return json_response(body, status=200 if state.published else 503)

    async def _exposition(self, _: web.Request) -> web.Response:
        # in a thread: 1000 routes are 10^5 lines, and the ADS streams share this event loop
        body = await asyncio.to_thread(self._metrics.exposition)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    async def _status(self, _: web.Request) -> web.Response:
        state = self._state()
        return json_response(await asyncio.to_thread(status_view, state, __version__))

    async def _routes(self, _: web.Request) -> web.Response:
        return json_response(await asyncio.to_thread(route_summaries, self._state()))

    async def _route(self, request: web.Request) -> web.Response:
        state = self._state()
        route_id = RouteId(f"{request.match_info['namespace']}/{request.match_info['name']}")
        if route_id not in state.plan.routes:
            return json_response({"error": f"no route {route_id}", "routes": sorted(state.plan.routes)}, status=404)
        return json_response(route_view(state, route_id))

    async def _streams(self, _: web.Request) -> web.Response:
        streams = self._proxies.streams() if self._proxies else ()
        return json_response(await asyncio.to_thread(stream_views, streams, time.monotonic()))

    async def _config(self, request: web.Request) -> web.Response:
        node = request.match_info["node"]
        wanted = Wanted(
            request.query.get("type", "").upper(), request.query.get("name", "*"), request.query.get("full") == "1"
        )
        if wanted.type not in ("", *SHORT.values()):
            return json_response(
                {"error": f"no type {wanted.type}; write one of {', '.join(SHORT.values())}"}, status=400
            )
        streams = self._proxies.streams() if self._proxies else ()
        held = self._proxies.config(node) if self._proxies else None
        if held is None:
            return json_response(
                {"error": f"no proxy {node}", "proxies": sorted({stream.node for stream in streams})}, status=404
            )
        return json_response(await asyncio.to_thread(config_view, node, streams, held, wanted, time.monotonic()))
