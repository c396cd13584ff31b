"""A reverse proxy in front of the API server, through which tests break things for one client and nobody else.

    async with ApiProxy(cluster.kubeconfig, tmp_path) as proxy:
        proxy.answer("list pods", 503, {"Retry-After": "1"})     # the next such request
        async with connect(proxy.kubeconfig) as client: ...

It speaks plain HTTP on loopback and passes requests on with the kubeconfig's own credentials.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import orjson
from aiohttp import web

from meshctl.adapters.kubernetes.sockets import Sockets

_HOP_BY_HOP = {"transfer-encoding", "content-length", "connection", "content-encoding", "keep-alive"}


class ApiProxy:
    """An async context manager. `asked` has every request so far, as ``METHOD resource`` (``WATCH`` for a watch)."""

    def __init__(self, kubeconfig: Path, directory: Path) -> None:
        config = orjson.loads(kubeconfig.read_bytes())
        self._upstream: Mapping[str, Any] = config["clusters"][0]["cluster"]
        self._token = config["users"][0]["user"]["token"]
        self.kubeconfig = directory / "proxy.kubeconfig"
        self.asked: list[str] = []
        self.answered: list[tuple[str, int]] = []
        """Likewise, with its status, once the API server has answered."""
        self.pauses_s: dict[str, float] = {}
        """How long each request that is such a one (as in `asked`) waits before it is passed on."""
        self.gates: dict[str, asyncio.Event] = {}
        """Until when such a request waits, its client there or not, before it is passed on."""
        self.answer_gates: dict[str, asyncio.Event] = {}
        """Likewise, when it is answered: it was carried out before."""
        self._answers: list[tuple[str, int, Mapping[str, str], bytes]] = []
        self._streams: dict[asyncio.Queue[bytes | None], str] = {}
        self._deaf: set[asyncio.Queue[bytes | None]] = set()
        self._sockets = Sockets()
        self._port = 0

    async def __aenter__(self) -> Self:
        trust = ssl.create_default_context(
            cadata=base64.b64decode(self._upstream["certificate-authority-data"]).decode()
        )
        connector = aiohttp.TCPConnector(limit=0, ssl=trust, socket_factory=self._sockets.make)
        self._session = aiohttp.ClientSession(connector=connector, headers={"Authorization": f"Bearer {self._token}"})
        await self.up()
        cluster = {"name": "proxy", "cluster": {"server": f"http://127.0.0.1:{self._port}"}}
        context = {"name": "proxy", "context": {"cluster": "proxy", "user": "nobody"}}
        self.kubeconfig.write_bytes(
            orjson.dumps({"clusters": [cluster], "contexts": [context], "users": [], "current-context": "proxy"})
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.down()
        await self._session.close()
        await self._sockets.close()

    # ------------------------------------------------------------------------------------------------------- faults

    def answer(self, what: str, status: int, headers: Mapping[str, str] | None = None, body: object = None) -> None:
        """The next request that is ``what`` (as in `asked`) is answered so, and not passed on."""
        text = body if isinstance(body, bytes) else orjson.dumps(body if body is not None else {"kind": "Status"})
        self._answers.append((what, status, headers or {}, text))

    def watched(self, what: str) -> bool:
        """Somebody has such a watch open; who has listed may be about to."""
        return what in self._streams.values()

    def say(self, what: str, event: Mapping[str, Any]) -> None:
        """Every open watch of this kind is told this event."""
        for queue, asked in self._streams.items():
            if asked == what:
                queue.put_nowait(orjson.dumps(event) + b"\n")

    def cut(self, rest: bytes = b"") -> None:
        """All watches lose their connection, in the middle of a line that began with `rest`."""
        for queue in self._streams:
            if rest:
                queue.put_nowait(rest)
            queue.put_nowait(None)

    def deafen(self) -> None:
        """The watches that are open now are told nothing more, but for what is said here."""
        self._deaf |= set(self._streams)

    async def _cut(self, _: web.Application) -> None:
        self.cut()

    async def down(self) -> None:
        """Connections are cut and refused from here on."""
        await self._runner.cleanup()

    async def up(self) -> None:
        """At the same address as before."""
        application = web.Application(client_max_size=1 << 24)
        application.router.add_route("*", "/{path:.*}", self._handle)
        application.on_shutdown.append(self._cut)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=2.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        self._port = self._runner.addresses[0][1]

    # ------------------------------------------------------------------------------------------------------- passing

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        what = _what(request)
        self.asked.append(what)
        for answer in self._answers:
            if answer[0] == what:
                self._answers.remove(answer)
                return web.Response(status=answer[1], headers=answer[2], body=answer[3])
        sent = await request.read()  # now: it is passed on though its client goes away meanwhile
        await asyncio.sleep(self.pauses_s.get(what, 0.0))
        if what in self.gates:
            await self.gates[what].wait()
        headers = {name: request.headers[name] for name in ("Accept", "Content-Type") if name in request.headers}
        async with self._session.request(
            request.method,
            self._upstream["server"] + request.path_qs,
            headers=headers,
            data=sent,
            timeout=aiohttp.ClientTimeout(total=None),
        ) as upstream:
            if what.startswith("WATCH") and upstream.status == 200:
                return await self._stream(what, request, upstream)
            kept = {name: value for name, value in upstream.headers.items() if name.lower() not in _HOP_BY_HOP}
            body = await upstream.read()
            self.answered.append((what, upstream.status))
            if what in self.answer_gates:
                await self.answer_gates[what].wait()
            return web.Response(status=upstream.status, headers=kept, body=body)

    async def _stream(self, what: str, request: web.Request, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._streams[queue] = what
        pump = asyncio.create_task(self._pump(upstream, queue))
        try:
            await response.prepare(request)
            while (chunk := await queue.get()) is not None:
                await response.write(chunk)
            if request.transport is not None and not pump.done():
                request.transport.abort()
        except ConnectionError:
            pass  # the client went away: that is its right
        finally:
            del self._streams[queue]
            self._deaf.discard(queue)
            pump.cancel()
        return response

    async def _pump(self, upstream: aiohttp.ClientResponse, queue: asyncio.Queue[bytes | None]) -> None:
        async for chunk in upstream.content.iter_any():
            if queue not in self._deaf:
                queue.put_nowait(chunk)
        queue.put_nowait(None)


def _what(request: web.Request) -> str:
    """``GET pods``: the method and the collection, whichever its group and namespace."""
    parts = request.path.strip("/").split("/")
    parts = parts[3:] if parts[0] == "apis" else parts[2:]
    parts = parts[2:] if parts[:1] == ["namespaces"] and len(parts) > 2 else parts
    method = "WATCH" if request.query.get("watch") == "true" else request.method
    if method == "GET" and len(parts) == 1:
        method = "LIST"
    return f"{method} {parts[0] if parts else ''}"
