"""Puts the cluster's half of the controller together: Kubernetes as the source, Istio as a data plane, the Lease.

Every replica watches, decides and serves; only the holder of the Lease writes. The order of the end matters: writers
first, then the Lease is given back, then the watches end.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from istio.confirm import Confirmation, Elapsed, Istiod
from istio.writer import IstioWriter
from meshctl.adapters.kubernetes.client import Client, connect
from meshctl.adapters.kubernetes.kinds import ISTIO, MANDATORY, OPTIONAL
from meshctl.adapters.kubernetes.lease import Lease
from meshctl.adapters.kubernetes.source import KubernetesSource
from meshctl.adapters.kubernetes.status import KubernetesStatus
from meshctl.adapters.kubernetes.store import ClusterObjects
from meshctl.api import gpuresources
from meshctl.controller.config import ClusterConfig
from meshctl.controller.gpuclaims import GpuTotals
from meshctl.controller.gpuoperator import WATCHED, GpuOperator
from meshctl.controller.objectstatus import StatusWriter
from meshctl.controller.state import State
from meshctl.core.weights import load_solver
from meshctl.model import Problem, RouteId, Weights
from meshctl.ports import Actuator, Clock, Source

START_S = 60.0
"""10,000 pods are listed in a few seconds; an API server that is starting too gets its time."""
ISTIO_TOKEN = Path("/var/run/secrets/tokens/istio-token")
"""Where deploy/ mounts the token that istiod's debug pages ask for (Istio's own path for it)."""


class ClusterReplicas:
    """`ports.Replicas`: the Lease says who leads, Istio's objects what is in force."""

    def __init__(self, lease: Lease | None, writer: IstioWriter | None) -> None:
        self._lease, self._writer = lease, writer

    def leading(self) -> bool:
        return self._lease is None or self._lease.leading

    def in_force(self) -> Mapping[RouteId, Weights]:
        return {} if self._writer is None else self._writer.in_force()


@dataclass(frozen=True, slots=True)
class ClusterParts:
    """What the loop is made of in a cluster."""

    source: Source
    replicas: ClusterReplicas
    istio: Actuator | None
    reconciled: Callable[[State], None]
    waits: tuple[Callable[[], Awaitable[None]], ...]
    """Changes of the mesh's status, and of who leads."""
    gpus: Callable[[], GpuTotals]
    """As of now, from any thread."""


@asynccontextmanager
async def cluster_parts(config: ClusterConfig, clock: Clock) -> AsyncIterator[ClusterParts]:
    """Everything started but the source. Raises InputError or MeshctlError, with nothing left behind."""
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(connect(config.kubeconfig))
        loading = asyncio.create_task(asyncio.to_thread(load_solver))  # the first route would have to wait for it
        store = await ClusterObjects(client, namespaces=config.namespaces, istio=config.istio).start(START_S)
        stack.push_async_callback(store.stop)
        await loading
        lease = await _lease(stack, client, config.lease)
        told: list[Callable[[], tuple[Problem, ...]]] = [store.problems]
        source = KubernetesSource(
            store.reader(*MANDATORY, *OPTIONAL, "GPU"), lambda: tuple(p for problems in told for p in problems())
        )
        writer = None
        if config.istio:
            writer = _writer(config, store, clock, lease, source)
            writer.start()
        replicas = ClusterReplicas(lease, writer)
        instance = lease.identity if lease is not None else socket.gethostname()
        api = KubernetesStatus(client, instance)
        status = StatusWriter(store.reader(), api, replicas.leading, clock)
        status.start()
        stack.push_async_callback(status.stop)
        namespace = config.lease.split("/", 1)[0] if config.lease is not None else gpuresources.NAMESPACE
        gpus = GpuOperator(store.reader(*WATCHED), api, client.get, replicas.leading, clock, namespace=namespace)
        gpus.start()
        stack.push_async_callback(gpus.stop)
        told += [part.problems for part in (lease, status, gpus) if part is not None]
        waits = tuple(part.wait_changed for part in (lease, writer) if part is not None)
        yield ClusterParts(source, replicas, writer, status.update, waits, gpus.totals)


async def _lease(stack: AsyncExitStack, client: Client, name: str | None) -> Lease | None:
    if name is None:
        return None
    lease = Lease(client, *name.split("/", 1))
    await lease.start()
    stack.push_async_callback(lease.stop)
    return lease


def _writer(
    config: ClusterConfig, store: ClusterObjects, clock: Clock, lease: Lease | None, source: KubernetesSource
) -> IstioWriter:
    token = ISTIO_TOKEN if ISTIO_TOKEN.exists() else None
    confirmation: Confirmation = Istiod(config.istiod, clock, token=token) if config.istiod else Elapsed(clock)
    return IstioWriter(
        store.reader(*ISTIO, "ModelRoute"),
        confirmation,
        clock,
        routes=lambda: source.desired().routes,
        leading=lambda: lease is None or lease.leading,
        namespaces=config.namespaces,
    )
