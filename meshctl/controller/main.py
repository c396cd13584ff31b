"""Puts the controller together: the one place of this package that knows the adapters.

Used by `meshctl run`, the demo and the tests alike, so that what is tested is what runs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from xds.server import XdsServer

from meshctl.adapters.files import FileSource
from meshctl.adapters.prometheus import PrometheusSignals
from meshctl.adapters.scrape import ScrapeSignals
from meshctl.controller.admin import AdminServer
from meshctl.controller.checkpoint import Checkpoint, default_path
from meshctl.controller.clock import MonotonicClock
from meshctl.controller.loop import Loop
from meshctl.controller.metrics import Metrics
from meshctl.ports import Clock, SignalSource

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen; port 0 takes a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Config:
    """What `meshctl run` can be told."""

    manifests: Path
    prometheus: str | None = None
    """URL; None scrapes the endpoints and proxies directly."""
    xds: Address = field(default_factory=lambda: Address("127.0.0.1", 18000))
    admin: Address = field(default_factory=lambda: Address("127.0.0.1", 18001))
    state: Path | None = None
    """State file; None takes the one that belongs to `manifests`."""
    tick_s: float = 1.0
    window_s: float = 5.0
    """Rates are means over this time."""


@dataclass(frozen=True, slots=True)
class Controller:
    """A running controller and where it listens."""

    loop: Loop
    xds: Address
    admin: Address


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[Controller]:
    """A controller, started; stopped on leaving. Raises InputError or MeshctlError, with nothing left behind."""
    clock = MonotonicClock()
    metrics = Metrics()
    checkpoint = Checkpoint(config.state or default_path(config.manifests))
    async with AsyncExitStack() as stack:
        server = await XdsServer.start(config.xds.host, config.xds.port)
        loop = Loop(
            FileSource(config.manifests),
            _signals(config, clock),
            server,
            clock,
            tick_s=config.tick_s,
            checkpoint=checkpoint,
            metrics=metrics,
        )
        stack.push_async_callback(loop.stop)
        admin = AdminServer(loop.state, metrics)
        await admin.start(config.admin.host, config.admin.port)
        stack.push_async_callback(admin.stop)
        await loop.start()
        xds_address = Address(config.xds.host, server.port)
        admin_address = Address(admin.host, admin.port)
        log.info("serving", xds=str(xds_address), admin=str(admin_address), state=str(checkpoint.path))
        yield Controller(loop, xds_address, admin_address)


def _signals(config: Config, clock: Clock) -> SignalSource:
    if config.prometheus is not None:
        return PrometheusSignals(config.prometheus, clock, window_s=config.window_s)
    return ScrapeSignals(clock, window_s=config.window_s)
