"""Puts the extender together: the one place of this package that knows all its edges.

The order of the start: what is known of the cluster, complete; then the scheduler is listened to; then the Lease is
competed for. The end goes the other way: bindings under way are finished and the Lease is given back while the
scheduler can still be answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from meshctl.adapters.kubernetes.client import Client, connect
from meshctl.adapters.kubernetes.lease import Lease
from meshctl.adapters.kubernetes.reflector import Pace, Reflector
from meshctl.address import Address
from meshctl.core.packing.vocabulary import Policy
from meshctl.errors import UnavailableError
from meshctl.extender.announce import Announcer
from meshctl.extender.binder import KubernetesBinder
from meshctl.extender.ledger import Ledger
from meshctl.extender.metrics import Figures, Metrics
from meshctl.extender.server import ExtenderServer
from meshctl.extender.views import VIEWS
from meshctl.extender.waker import Waker
from meshctl.ports import KubeObject, ObjectKey
from meshctl.tls import Renewing, TlsFiles

log = structlog.get_logger(__name__)

START_S = 150.0
"""20,000 pods and 40,000 GPUs are listed and taken in within a minute where nothing else runs; deploy/ waits longer."""
MANDATORY = ("Pod", "Node", "GPU")
"""Without these nothing can be placed; without the others no product is too slow."""


Forever = dict[str, Callable[[], Coroutine[None, None, None]]]
"""What runs until the end, by name."""


@dataclass(frozen=True, slots=True)
class Config:
    """What `meshctl extender` is told."""

    lease: str
    """NAMESPACE/NAME: who holds it binds."""
    kubeconfig: Path | None = None
    """None: the pod's service account, or $KUBECONFIG."""
    listen: Address = field(default_factory=lambda: Address("127.0.0.1", 18003))
    tls: TlsFiles | None = None
    """None: plain HTTP."""
    policy: Policy = Policy.STRANDING
    pod: ObjectKey | None = None
    """That this runs in: it is labelled while this replica binds. None: it is ready only then."""


async def serve(config: Config, ended: asyncio.Event, listed: Callable[[], object] = lambda: None) -> None:
    """Until `ended`; `listed` is called once everything is known. Raises InputError or MeshctlError when it can't
    start, with nothing left behind."""
    async with _running(config) as (address, forever):
        listed()
        log.info("serving", address=str(address), tls=config.tls is not None, policy=str(config.policy))
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(work(), name=name) for name, work in forever.items()]
            await ended.wait()
            for task in running:
                task.cancel()


@asynccontextmanager
async def _running(config: Config) -> AsyncIterator[tuple[Address, Forever]]:
    """Where it is asked, and what runs for as long."""
    certificates = Renewing(config.tls) if config.tls is not None else None  # files that are no good are told at once
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(connect(config.kubeconfig))
        ledger, metrics = Ledger(config.policy), Metrics()
        watched = Watched(client, ledger)
        stack.push_async_callback(watched.stop)
        await watched.start(START_S)
        ledger.warm_up()
        lease = Lease(client, *config.lease.split("/", 1))
        binder = KubernetesBinder(client, ledger, lease, wrote=watched.pods.wrote)
        metrics.observe(lambda: figures(ledger, binder))
        waker = Waker(ledger, binder, watched.pods.objects)
        forever: Forever = {"lead": binder.run, "wake pods that have room now": waker.run}
        announcer = Announcer(client, config.pod, lambda: binder.unready) if config.pod is not None else None
        if announcer is not None:
            forever["announce who binds"] = announcer.run
            stack.push_async_callback(announcer.withdraw)
        unready = announcer.problem if announcer is not None else None
        server = ExtenderServer(ledger, binder, metrics, refused=waker.refused, unready=unready)
        await server.start(config.listen, certificates)
        stack.push_async_callback(server.stop)
        stack.push_async_callback(binder.stop)
        await lease.start()
        yield server.address, forever


class Watched:
    """Tells the ledger of every object that it wants to know of, from `start` to `stop`."""

    def __init__(self, client: Client, ledger: Ledger, pace: Pace | None = None) -> None:
        self._server, self._ledger = client.server, ledger
        self._changed = asyncio.Event()
        self._reflectors = {
            name: Reflector(client, kind, on_change=self._tell, on_state=self._changed.set, pace=pace)
            for name, kind in VIEWS.items()
        }
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def pods(self) -> Reflector:
        return self._reflectors["Pod"]

    async def start(self, deadline_s: float) -> None:
        """Returns when every kind was listed or, but for `MANDATORY`, refused. Raises UnavailableError when that takes
        longer than `deadline_s`."""
        self._tasks += [
            asyncio.create_task(reflector.keep(), name=f"reflect {name}")
            for name, reflector in self._reflectors.items()
        ]
        try:
            async with asyncio.timeout(deadline_s):
                while not self._ready():
                    await self._changed.wait()
                    self._changed.clear()
        except TimeoutError as late:
            missing = "; ".join(one.missing for one in self._reflectors.values() if one.missing)
            raise UnavailableError(
                f"{self._server}: after {deadline_s:g} s not all objects are known: {missing}"
            ) from late

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ready(self) -> bool:
        return all(one.synced if name in MANDATORY else one.settled for name, one in self._reflectors.items())

    def _tell(self, key: ObjectKey) -> None:
        take(self._ledger, key, self._reflectors[key.kind].objects.get(key))
        self._changed.set()


def take(ledger: Ledger, key: ObjectKey, value: KubeObject | None) -> None:
    """Tells the ledger of one object. One that can't be read is told to people, and must not keep those that come after
    it in a listing from being told of: nothing would tell of them again."""
    try:
        ledger.take(key, value)
    except Exception:  # whatever is wrong with it
        log.exception("an object can't be read; what was known of it stays", object=str(key))


def figures(ledger: Ledger, binder: KubernetesBinder) -> Figures:
    """What the metrics say of the cluster now."""
    return Figures(
        slots=ledger.slots(),
        stranded_gpus=sum(ledger.fleet.stranded().values()),
        reservations=len(ledger.reserved),
        bindings={outcome.value: count for outcome, count in binder.counts.items()},
        bindings_under_way=binder.under_way,
        binds=not binder.unready,
    )
