"""Puts the controller together: the one place of this package that knows the adapters.

Used by `meshctl run`, the demo and the tests alike, so that what is tested is what runs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from meshctl.adapters.files import FileSource
from meshctl.adapters.prometheus import PrometheusSignals
from meshctl.adapters.scrape import ScrapeSignals
from meshctl.controller.actuators import Actuators, first_of
from meshctl.controller.admin import AdminServer
from meshctl.controller.checkpoint import Checkpoint, default_path
from meshctl.controller.clock import MonotonicClock
from meshctl.controller.config import Config
from meshctl.controller.loop import Loop
from meshctl.controller.metrics import Metrics
from meshctl.errors import InputError
from meshctl.ports import Clock, SignalSource
from xds.credentials import Security
from xds.limits import Limits
from xds.metrics import XdsMetrics
from xds.server import XdsServer

if TYPE_CHECKING:
    from meshctl.controller.cluster import ClusterParts

log = structlog.get_logger(__name__)

DRAIN_S = 2.0
"""Of a replica that is told to end: its proxies go to the others one after the other, well within the pod's 30 s."""


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
    async with AsyncExitStack() as stack:
        parts = None
        if config.cluster is not None:
            from meshctl.controller.cluster import cluster_parts  # 40 MB that a run without a cluster need not have

            parts = await stack.enter_async_context(cluster_parts(config.cluster, clock))
            metrics.observe_gpus(parts.gpus)
        security = None if config.xds_tls is None else Security.load(config.xds_tls, config.xds_identities)
        limits = Limits(drain_s=0.0 if parts is None else DRAIN_S)
        server = await XdsServer.start(
            config.xds.host, config.xds.port, security=security, limits=limits, metrics=XdsMetrics(metrics.registry)
        )
        stack.push_async_callback(server.stop)  # for a start that fails; harmless after the loop's own
        loop = _loop(config, clock, metrics, server, parts)
        stack.push_async_callback(loop.stop)
        admin = AdminServer(loop.state, metrics, server)
        await admin.start(config.admin)
        stack.push_async_callback(admin.stop)
        await loop.start()
        log.info("serving", xds=server.address, admin=str(admin.address))
        yield Controller(loop, server.address, str(admin.address))


def _loop(config: Config, clock: Clock, metrics: Metrics, server: XdsServer, parts: ClusterParts | None) -> Loop:
    signals = _signals(config, clock)
    if parts is None:
        if config.manifests is None:
            raise InputError("neither a directory of manifests nor a cluster was given")
        checkpoint = Checkpoint(config.state or default_path(config.manifests))
        return Loop(
            FileSource(config.manifests),
            signals,
            server,
            clock,
            tick_s=config.tick_s,
            checkpoint=checkpoint,
            metrics=metrics,
            dataplane_changed=server.wait_changed,
        )
    planes = [server] if parts.istio is None else [server, parts.istio]
    return Loop(
        parts.source,
        signals,
        Actuators(planes),
        clock,
        tick_s=config.tick_s,
        metrics=metrics,
        dataplane_changed=lambda: first_of([server.wait_changed, *parts.waits]),
        replicas=parts.replicas,
        reconciled=parts.reconciled,
    )


def _signals(config: Config, clock: Clock) -> SignalSource:
    if config.prometheus is not None:
        return PrometheusSignals(config.prometheus, clock, window_s=config.window_s)
    return ScrapeSignals(clock, window_s=config.window_s)
