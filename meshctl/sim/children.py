"""The demo's other children: a real `meshctl run`, and a real Prometheus for it where one is asked for.

Each is a process group of its own with its log in a directory of its caller, and ends with its `async with` block.
What they say when they fail is their log's end.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
import orjson
from pydantic import TypeAdapter, ValidationError
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_fixed

from meshctl.controller.views import RouteView
from meshctl.errors import InputError, MeshctlError

PROMETHEUS_BIN = "PROMETHEUS_BIN"
"""Environment variable that names a Prometheus binary; otherwise the one on PATH."""
READY_S = 30.0
STOP_S = 10.0
_POLL_S = 0.05
_ANSWER_S = 5.0
_TAIL = 2000
_VIEW = TypeAdapter(RouteView)


class Child(ABC):
    """One process; subclasses give `name` and `_ready`."""

    name = "child"

    def __init__(self, directory: Path, command: Sequence[str | Path]) -> None:
        self.log = directory / f"{self.name}.log"
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """End the process group: asked first, then killed. Harmless when it has ended."""
        if self._http is not None:
            await self._http.close()
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):  # it may have ended just now
                os.killpg(process.pid, number)
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), STOP_S)
                return

    async def ended(self) -> str:
        """Returns when it has ended: what to say of it."""
        if self._process is None:
            raise MeshctlError(f"{self.name} is not running")
        return f"{self.name} ended with status {await self._process.wait()}; its log: {self._tail()}"

    async def _start(self) -> None:
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ANSWER_S))
        with self.log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        async for attempt in AsyncRetrying(
            stop=stop_after_delay(READY_S),
            wait=wait_fixed(_POLL_S),
            retry=retry_if_exception_type(MeshctlError),
            reraise=True,
        ):
            with attempt:
                if self._process.returncode is None:
                    await self._ready()
        if self._process.returncode is not None:
            raise MeshctlError(await self.ended())

    @abstractmethod
    async def _ready(self) -> None:
        """Return once it is ready; raises MeshctlError while it is not."""

    async def _get(self, url: str) -> bytes:
        if self._http is None:
            raise MeshctlError(f"{self.name} has not been started")
        try:
            async with self._http.get(url) as response:
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise MeshctlError(f"GET {url}: {error or type(error).__name__}; log: {self._tail()}") from error
        if response.status != 200:
            raise MeshctlError(f"GET {url}: {response.status}: {body[:200]!r}")
        return body

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-_TAIL:] if self.log.exists() else "(none)"


class Controller(Child):
    """`meshctl run` with the options `source` (where routes come from), on ports that the kernel chooses."""

    name = "controller"

    def __init__(self, directory: Path, source: Sequence[str | Path], prometheus: str | None = None) -> None:
        signals = ("--prometheus", prometheus) if prometheus else ("--scrape",)
        listen = ("--xds", "127.0.0.1:0", "--admin", "127.0.0.1:0")
        super().__init__(directory, (sys.executable, "-m", "meshctl", "run", *source, *listen, *signals))
        self.xds = ""
        """``host:port``."""
        self.admin = ""
        """URL of the admin API."""

    async def route(self, namespaced: str) -> RouteView:
        """Everything about one route, its reasons included. Raises MeshctlError."""
        body = await self._get(f"{self.admin}/api/v1/explain/{namespaced}")
        try:
            return _VIEW.validate_json(body)
        except ValidationError as error:
            raise MeshctlError(f"{self.admin} says what no controller of this version says: {error}") from error

    async def _ready(self) -> None:
        """Its log says where it serves, in JSON as it is no terminal."""
        for line in self.log.read_bytes().splitlines(keepends=True):
            if line.startswith(b"{") and line.endswith(b"\n"):
                said = orjson.loads(line)
                if said.get("event") == "serving":
                    self.xds, self.admin = said["xds"], f"http://{said['admin']}"
                    return
        raise MeshctlError(f"the controller does not serve within {READY_S:g} s; log: {self._tail()}")


class Prometheus(Child):
    """Listens at `address` and scrapes `jobs` (``host:port`` by name; "envoy" at Envoy's own path) every second."""

    name = "prometheus"

    def __init__(self, directory: Path, address: str, jobs: Mapping[str, Sequence[str]]) -> None:
        config = directory / "prometheus.yml"
        config.write_bytes(orjson.dumps(_scrapes(jobs)))  # JSON is YAML
        options = (f"--config.file={config}", f"--storage.tsdb.path={directory / 'prometheus'}", "--log.level=warn")
        super().__init__(directory, (prometheus_binary(), *options, f"--web.listen-address={address}"))
        self.url = f"http://{address}"

    async def _ready(self) -> None:
        await self._get(f"{self.url}/-/ready")


def prometheus_binary() -> str:
    """Raises InputError when there is none."""
    found = shutil.which(os.environ.get(PROMETHEUS_BIN) or "prometheus")
    if found is None:
        raise InputError(f"no Prometheus here: set {PROMETHEUS_BIN} to one, or use --signals scrape")
    return found


async def unless_ended(work: Awaitable[None], *watched: Callable[[], Awaitable[str]]) -> None:
    """`work`, or MeshctlError with the words of the first of `watched` that returns before it."""
    ends = [asyncio.ensure_future(ended()) for ended in watched]
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, *ends}, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            if end.done():
                raise MeshctlError(end.result())
        task.result()
    finally:
        for future in (task, *ends):
            future.cancel()
        await asyncio.gather(task, *ends, return_exceptions=True)


async def until_signal(work: Awaitable[None]) -> signal.Signals | None:
    """`work`, or the SIGINT or SIGTERM that cancelled it; what it started is ended before this returns."""
    task = asyncio.ensure_future(work)
    received: list[int] = []

    def end(number: int) -> None:
        if not received:  # a second one must not interrupt the clean-up, each step of which is limited
            task.cancel()
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, end, number)
    try:
        await task
    except asyncio.CancelledError:
        if not received:
            raise
        return signal.Signals(received[0])
    return None


def _scrapes(jobs: Mapping[str, Sequence[str]]) -> dict[str, object]:
    return {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [
            {
                "job_name": job,
                "metrics_path": "/stats/prometheus" if job == "envoy" else "/metrics",
                "static_configs": [{"targets": list(targets)}],
            }
            for job, targets in sorted(jobs.items())
        ],
    }
