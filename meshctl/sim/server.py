"""One simulated inference server: Triton's HTTP API, its metrics, and its faults, in front of a `Gpu`.

The queue is `Gpu`'s; this module gives it the clock, one timer, and the network. Answers are sent when the timer fires,
so a late event loop shows up as latency of its own, never as lost capacity. The loop's timers count in milliseconds:
one may fire up to half a millisecond early, and what is due within that time is answered then (the books keep the
exact time); this is unbiased and saves a second timer.

The batch of a request is the first dimension of its first input, if it has a body; else what a size header says
(`x-batch-size`, `batch_size`, `NV-InferRequest`), if that is a batch the model takes; else 1.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from typing import Any

import orjson
from aiohttp import web

from meshctl.core.capacity import service_s
from meshctl.errors import InputError
from meshctl.sim import metrics
from meshctl.sim.config import ServerPlan
from meshctl.sim.faults import Faults
from meshctl.sim.gpu import Counters, Gpu, Job
from meshctl.sim.listener import Listener

EARLY_S = 0.0005
"""Half of the loop's timer resolution."""
_NV_BATCH = re.compile(r"(?:^|\s)batch_size:\s*([0-9]{1,7})(?:\s|$)")
_JSON = "application/json"


class BadRequestError(Exception):
    """The client's request can't be served; becomes a 400 in Triton's form."""


class SimServer:
    """`start`, `set_faults` any number of times, `stop`. All on one event loop."""

    def __init__(self, plan: ServerPlan) -> None:
        self.plan, self.identity = plan, plan.identity
        times: dict[int, float] = {}

        def cached_s(batch: int) -> float:
            if batch not in times:
                times[batch] = service_s(plan.profile, batch)
            return times[batch]

        self.gpu = Gpu(cached_s, plan.concurrency)
        self.faults = Faults()
        self._timer: asyncio.TimerHandle | None = None
        self._flapping: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()
        self._random = random.Random(plan.identity.name)
        self._answers: dict[int, bytes] = {}
        model = f"/v2/models/{self.identity.model}"
        self._model_paths = (model, f"{model}/versions/{self.identity.version}")
        self._infer_paths = frozenset(f"{path}/infer" for path in self._model_paths)
        self._listener = Listener(self._handle, plan.host, plan.port)
        self._metrics_listener = (
            None if plan.metrics_port is None else Listener(self._handle, plan.host, plan.metrics_port)
        )

    @property
    def port(self) -> int:
        return self._listener.port

    @property
    def metrics_port(self) -> int:
        return (self._metrics_listener or self._listener).port

    async def start(self) -> None:
        for listener in self._listeners():
            await listener.open()

    async def stop(self) -> None:
        await self._stop_flapping()
        for listener in self._listeners():
            await listener.close()
        self._lose_all()

    async def set_faults(self, faults: Faults) -> None:
        """Replace what is wrong with the server; returns when it is in force."""
        async with self._changing:
            await self._stop_flapping()
            self.faults = faults
            self._advance()
            self.gpu.set_faults(time.monotonic(), faults)
            self._arm()
            await (self._crash() if faults.crash or faults.flap_period_s else self.start())
            if faults.flap_period_s and not faults.crash:
                self._flapping = asyncio.create_task(self._flap(faults.flap_period_s / 2))

    def reset_counters(self) -> None:
        """Counters start at 0, as after a restart that nobody noticed."""
        self.gpu.counters = Counters()

    def _listeners(self) -> list[Listener]:
        return [self._listener, *([self._metrics_listener] if self._metrics_listener else [])]

    async def _crash(self) -> None:
        self._lose_all()
        for listener in self._listeners():
            await listener.drop()

    async def _flap(self, half_s: float) -> None:
        while True:
            await asyncio.sleep(half_s)
            await self.start()
            await asyncio.sleep(half_s)
            await self._crash()

    async def _stop_flapping(self) -> None:
        if self._flapping is not None:
            self._flapping.cancel()
            await asyncio.wait([self._flapping])
            self._flapping = None

    def _lose_all(self) -> None:
        for job in self.gpu.lose_all(time.monotonic()):
            job.done(False)
        self._arm()

    # ------------------------------------------------------------------------------------------------- the queue

    async def _serve(self, batch: int) -> bool:
        """Queue one request and wait for it; False when the server was lost under it."""
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[bool] = loop.create_future()

        def done(ok: bool) -> None:
            if not answered.done():  # the client may have gone
                answered.set_result(ok)

        self._advance()
        self.gpu.submit(Job(batch, time.monotonic(), done))
        self._arm()
        return await answered

    def _advance(self, early_s: float = 0.0) -> None:
        for job in self.gpu.advance(time.monotonic() + early_s):
            job.done(True)

    def _arm(self) -> None:
        """One timer, at the next completion."""
        next_s = self.gpu.next_s()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if next_s is not None:
            delay_s = max(0.0, next_s - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._advance(EARLY_S)
        self._arm()

    # -------------------------------------------------------------------------------------------------- the HTTP API

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            if request.path in self._infer_paths:
                return await self._infer(request)
            if request.path.startswith("/sim/"):
                return await self._control(request)
            return self._describe(request)
        except (BadRequestError, InputError) as error:
            return error_response(400, str(error))

    async def _infer(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method != "POST":
            return error_response(405, f"{request.method} is not how to infer; use POST")
        body = await request.read() if request.body_exists else b""
        batch = self._batch_of_body(body) if body else self._batch_of_headers(request)
        if self.faults.error_ratio and self._random.random() < self.faults.error_ratio:
            self.gpu.counters.failed += 1
            return error_response(500, f"{self.identity.model}: simulated failure")
        if not await self._serve(batch):
            return error_response(503, "the server is gone")  # nobody reads it: the connection was reset
        return web.Response(body=self._answer(batch), content_type=_JSON)

    def _batch_of_body(self, body: bytes) -> int:
        try:
            batch = orjson.loads(body)["inputs"][0]["shape"][0]
        except (ValueError, LookupError, TypeError) as error:
            raise BadRequestError("the body is not a KServe v2 request with inputs[0].shape[0]") from error
        if type(batch) is not int or not 1 <= batch <= self.plan.max_batch:
            raise BadRequestError(f"batch {batch!r} is not between 1 and {self.plan.max_batch}, as the model takes it")
        return batch

    def _batch_of_headers(self, request: web.BaseRequest) -> int:
        headers = request.headers
        text = headers.get("x-batch-size") or headers.get("batch_size")
        if text is None and (legacy := headers.get("NV-InferRequest")):
            found = _NV_BATCH.search(legacy[:256])
            text = found[1] if found else None
        if text is None or len(text) > 7 or not (text.isascii() and text.isdigit()):
            return 1
        return int(text) if 1 <= int(text) <= self.plan.max_batch else 1

    def _answer(self, batch: int) -> bytes:
        """The same bytes for every request of a batch: what is inferred does not matter here."""
        if batch not in self._answers:
            output = {"name": "OUTPUT0", "datatype": "FP32", "shape": [batch, 1], "data": [0.0] * batch}
            self._answers[batch] = orjson.dumps(
                {"model_name": self.identity.model, "model_version": self.identity.version, "outputs": [output]}
            )
        return self._answers[batch]

    def _describe(self, request: web.BaseRequest) -> web.StreamResponse:
        path, model = request.path.rstrip("/"), self._model_paths
        self._advance()
        self._arm()
        if path == "/metrics":
            text = metrics.exposition(self.identity, self.gpu, time.monotonic())
            return web.Response(body=text.encode(), headers={"Content-Type": metrics.CONTENT_TYPE})
        if path in ("/v2/health/live", "/v2/health/ready", *(f"{p}/ready" for p in model)):
            return web.Response()
        if path == "/v2":
            return json_response({"name": "meshctl-sim", "version": "2.51.0", "extensions": ["statistics"]})
        if path in model:
            return json_response(self._metadata())
        if path in (f"{p}/stats" for p in model):
            return json_response(metrics.statistics(self.identity, self.gpu))
        if path.startswith("/v2/models/"):
            return error_response(404, f"Request for unknown model: '{path.split('/')[3]}' is not found")
        return error_response(404, f"{path} is not served here")

    def _metadata(self) -> dict[str, Any]:
        def tensor(name: str) -> dict[str, Any]:
            return {"name": name, "datatype": "FP32", "shape": [-1, 1]}

        return {
            "name": self.identity.model,
            "versions": [self.identity.version],
            "platform": "simulated",
            "inputs": [tensor("INPUT0")],
            "outputs": [tensor("OUTPUT0")],
        }

    async def _control(self, request: web.BaseRequest) -> web.StreamResponse:
        match request.method, request.path:
            case "GET", "/sim/faults":
                return json_response(self.faults.model_dump())
            case "POST", "/sim/faults":
                faults = Faults.parse(await request.read())
                answer = json_response(faults.model_dump())
                # a crash resets this very connection, so the answer goes out first
                await answer.prepare(request)
                await answer.write_eof()
                await asyncio.sleep(0)
                await self.set_faults(faults)
                return answer
            case "POST", "/sim/reset":
                self.reset_counters()
                return json_response({})
            case _:
                return error_response(404, "known: GET and POST /sim/faults, POST /sim/reset")


def json_response(value: Any) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type=_JSON)


def error_response(status: int, message: str) -> web.Response:
    """An error in Triton's form."""
    return web.Response(status=status, body=orjson.dumps({"error": message}), content_type=_JSON)
