"""The agent's admin API: what it knows, read-only, over HTTP. Loopback by default.

| path | answer |
|------|--------|
| /healthz | 200 while the event loop runs |
| /readyz | 200 once the kubelet has said who holds what, else 503; says too what is wrong |
| /metrics | Prometheus text |
| /api/v1/gpus | list of GPU objects, as the API server has them (or would, without a cluster) |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from deviceplugin.agent import Agent
from meshctl.httpserver import HttpServer, json_response
from meshctl.model import Problem


class AdminServer(HttpServer):
    """Serves from `start` to `stop`."""

    def __init__(self, agent: Agent, told: Callable[[], Sequence[Problem]] = tuple) -> None:
        """`told` says what stands in the way of telling people."""
        self._agent, self._told = agent, told
        super().__init__(
            [
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._exposition),
                web.get("/api/v1/gpus", self._gpus),
            ]
        )

    async def _readyz(self, _: web.Request) -> web.Response:
        ready = self._agent.node.told
        body = {
            "ready": ready,
            "problems": [f"{p.where}: {p.message}" for p in (*self._agent.problems(), *self._told())],
        }
        return json_response(body, status=200 if ready else 503)

    async def _exposition(self, _: web.Request) -> web.Response:
        body = self._agent.parts.metrics.exposition()
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _gpus(self, _: web.Request) -> web.Response:
        return json_response(self._agent.objects())
