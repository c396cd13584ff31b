"""Puts the controller together: the one place of this package that knows the adapters.

Used by `meshctl run`, the demo and the tests alike, so that what is tested is what runs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from meshctl.adapters.files import FileSource
from meshctl.adapters.prometheus import PrometheusSignals
from meshctl.adapters.scrape import ScrapeSignals
from meshctl.controller.admin import AdminServer
from meshctl.controller.checkpoint import Checkpoint, default_path
from meshctl.controller.clock import MonotonicClock
from meshctl.controller.loop import Loop
from meshctl.controller.metrics import Metrics
from meshctl.ports import Clock, SignalSource
from xds.bootstrap import Address
from xds.server import XdsServer

log = structlog.get_logger(__name__)

DEFAULT_XDS = Address("127.0.0.1", 18000)
DEFAULT_ADMIN = Address("127.0.0.1", 18001)


@dataclass(frozen=True, slots=True)
class Config:
    """What `meshctl run` can be told."""

    manifests: Path
    prometheus: str | None = None
    """URL; None scrapes the endpoints and proxies directly."""
    xds: Address = DEFAULT_XDS
    """Port 0 takes a free one, here and for `admin`."""
    admin: Address = DEFAULT_ADMIN
    state: Path | None = None
    """State file; None takes the one that belongs to `manifests`."""
    tick_s: float = 1.0
    window_s: float = 5.0
    """Rates are means over this time."""


@dataclass(frozen=True, slots=True)
class Controller:
    """A running controller, and the ``host:port`` where it listens."""

    loop: Loop
    xds: str
    admin: str


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
            dataplane_changed=server.wait_changed,
        )
        stack.push_async_callback(loop.stop)
        admin = AdminServer(loop.state, metrics)
        await admin.start(config.admin)
        stack.push_async_callback(admin.stop)
        await loop.start()
        log.info("serving", xds=server.address, admin=str(admin.address), state=str(checkpoint.path))
        yield Controller(loop, server.address, str(admin.address))


def _signals(config: Config, clock: Clock) -> SignalSource:
    if config.prometheus is not None:
        return PrometheusSignals(config.prometheus, clock, window_s=config.window_s)
    return ScrapeSignals(clock, window_s=config.window_s)
