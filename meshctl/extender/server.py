"""The extender's HTTP edge: reads a request of kube-scheduler's, has it decided, and answers.

| path | answer |
|------|--------|
| POST /filter, /prioritize, /bind, /preempt | 200 always, with `Error` for what is wrong (`meshctl.extender.wire`) |
| /healthz | 200 while the event loop runs |
| /readyz | 200 while pods may be bound here, or nobody is led here in vain (`announce`), else 503 and why |
| /metrics | Prometheus text |

With a client CA the POSTs are for its clients; the rest is for kubelets and Prometheus too, which have no certificate.
Only one replica binds. The others answer `Error` to everything, and close the connection: the scheduler keeps its
connections open, so without that it would ask the same replica for as long as that one lives, whoever leads.
A decision takes less than the next one's arrival: they are made in the event loop, one after the other, and so each
sees what those before it came to. Rejected: threads, which Python would run one at a time as well.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from meshctl.errors import InputError
from meshctl.extender import wire
from meshctl.extender.metrics import Metrics
from meshctl.extender.pods import identity
from meshctl.extender.ports import Binder, BindError, Ledger, PodId
from meshctl.httpserver import HttpServer, json_response
from meshctl.tls import stranger

log = structlog.get_logger(__name__)

BODY_BYTES = 128 * 1024**2
"""Whole Node objects of 5000 nodes are about 50 MB."""
LARGE_BYTES = 1024**2
"""Whole Node objects of some 200 nodes; a request by names alone is smaller."""
FREED_S = 0.005
"""A large request is freed after this: when its answer has been written."""
SHUTDOWN_S = 30.0
"""For bindings under way."""


Asked = TypeVar("Asked", wire.Candidates, wire.Preemption)


class ExtenderServer(HttpServer):
    """Serves from `start` to `stop`."""

    def __init__(
        self,
        ledger: Ledger,
        binder: Binder,
        metrics: Metrics,
        *,
        refused: Callable[[PodId, Sequence[str]], object] = lambda _, __: None,
        unready: Callable[[], str] | None = None,
        body_bytes: int = BODY_BYTES,
    ) -> None:
        """`refused` is told of each pod that fits nowhere, and which nodes it was asked for. `unready` is why nobody
        should ask here ("": they may); None: the binder's."""
        self._ledger, self._binder, self._metrics, self._body_bytes = ledger, binder, metrics, body_bytes
        self._refused = refused
        self._unready = unready or (lambda: binder.unready)
        self._large: list[object] = []
        """What was parsed of large requests that were just answered."""
        super().__init__(
            [
                web.post("/filter", self._filter),
                web.post("/prioritize", self._prioritize),
                web.post("/bind", self._bind),
                web.post("/preempt", self._preempt),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._exposition),
            ],
            what="the extender",
            option="--listen",
            shutdown_s=SHUTDOWN_S,
            body_bytes=body_bytes,
        )

    async def _filter(self, request: web.Request) -> web.Response:
        return await self._answered("filter", request, self._filtered)

    async def _prioritize(self, request: web.Request) -> web.Response:
        return await self._answered("prioritize", request, self._prioritized)

    async def _bind(self, request: web.Request) -> web.Response:
        return await self._answered("bind", request, self._bound)

    async def _preempt(self, request: web.Request) -> web.Response:
        return await self._answered("preempt", request, self._preempted)

    async def _filtered(self, body: bytes | bytearray) -> wire.Answer:
        await self._binder.pace()
        asked = self._parsed(body, wire.read_candidates)
        decision = self._ledger.decide(asked.pod, asked.names)
        answer = wire.filtered(asked, decision, self._ledger.awaited(asked.pod))
        if answer.outcome == "unplaced":
            self._metrics.refused({refusal.reason for refusal in decision.refused.values()})
            self._refused(identity(asked.pod), asked.names)
        elif answer.outcome == "placed":
            self._binder.placed(identity(asked.pod).uid)
        return answer

    async def _prioritized(self, body: bytes | bytearray) -> wire.Answer:
        asked = self._parsed(body, wire.read_candidates)
        return wire.prioritized(asked, self._ledger.decide(asked.pod, asked.names))

    async def _bound(self, body: bytes | bytearray) -> wire.Answer:
        await self._binder.bind(*wire.read_binding(body))
        return wire.bound()

    async def _preempted(self, body: bytes | bytearray) -> wire.Answer:
        asked = self._parsed(body, wire.read_preemption)
        return wire.preempted(self._ledger.preempt(asked.pod, asked.victims))

    def _parsed(self, body: bytes | bytearray, read: Callable[[bytes | bytearray], Asked]) -> Asked:
        """A large one is kept until its answer is out, and the garbage collector does not look through it: with whole
        Node objects to free them is a seventh of the time, and to look through them once a third."""
        if len(body) < LARGE_BYTES:
            return read(body)
        gc.disable()
        asyncio.get_running_loop().call_later(FREED_S, self._free)
        asked = read(body)
        self._large.append(asked)
        return asked

    def _free(self) -> None:
        self._large.clear()
        gc.enable()

    async def _answered(
        self, verb: str, request: web.Request, answer: Callable[[bytes | bytearray], Awaitable[wire.Answer]]
    ) -> web.Response:
        """200, whatever happens; the scheduler shows nobody what stands in any other answer."""
        began_s = time.perf_counter()
        unready = self._binder.unready
        try:
            _known(request)
            found = wire.failed(verb, unready, "unready") if unready else await answer(await self._body(request))
        except InputError as error:
            log.warning("a request that can't be answered", verb=verb, error=str(error))
            found = wire.failed(verb, str(error), "invalid")
        except BindError as error:
            found = wire.failed(verb, str(error), "not bound")
        except Exception as error:  # the scheduler would try again for ever, and nobody would know why
            log.exception("a request failed", verb=verb)
            found = wire.failed(verb, f"the extender failed: {type(error).__name__}: {error}", "failed")
        self._metrics.answered(verb, time.perf_counter() - began_s, found.outcome)
        response = web.Response(body=found.body, content_type="application/json")
        if unready:
            response.force_close()
        return response

    async def _body(self, request: web.Request) -> bytes | bytearray:
        """Raises InputError when it is too large."""
        length = request.content_length or 0
        if length > self._body_bytes:
            raise self._too_large()
        if length >= LARGE_BYTES:
            return await _received(request, length)
        try:
            return await request.read()
        except web.HTTPRequestEntityTooLarge as error:
            raise self._too_large() from error

    def _too_large(self) -> InputError:
        return InputError(
            f"the request has more than {self._body_bytes >> 20} MiB; set nodeCacheCapable: true in the scheduler's"
            " configuration, so that it sends the nodes' names alone"
        )

    async def _readyz(self, _: web.Request) -> web.Response:
        why, binds = self._unready(), not self._binder.unready
        return json_response(
            {"ready": not why, "binds": binds, "problems": [why] if why else []}, status=503 if why else 200
        )

    async def _exposition(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _known(request: web.Request) -> None:
    """Raises InputError for a client that should have a certificate and has none."""
    if stranger(request.transport):
        raise InputError("the client shows no certificate: set tlsConfig in the scheduler's configuration")


async def _received(request: web.Request, length: int) -> bytearray:
    """Into one buffer; `request.read` copies it all once more."""
    body, end = bytearray(length), 0
    async for part in request.content.iter_any():
        body[end : end + len(part)] = part
        end += len(part)
    return body
