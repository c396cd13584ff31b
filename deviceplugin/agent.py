"""The agent: hears what happens to the GPUs of its node, and keeps the kubelet, MPS, the disk and people told.

One event loop, one `Node`. Whatever happens is put into the Node at once and followed by a `turn`: policies applied,
changes begun, listeners woken. What blocks (NVML, fsync) is done elsewhere and awaited. Each watcher below is a loop
around one source; a failure of a source is a problem with words, asked again, never the end of the agent.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from deviceplugin import allocate as rules
from deviceplugin.asking import Askers
from deviceplugin.checkpoint import Checkpoint
from deviceplugin.clients import excess
from deviceplugin.containers import response
from deviceplugin.metrics import Metrics
from deviceplugin.node import Card, Node
from deviceplugin.objects import gpu_object
from deviceplugin.policies import wanted
from deviceplugin.ports import ContainerResponse, Device, GpuError, Holdings, Inventory, Mps, World
from deviceplugin.saver import Saver
from deviceplugin.tickets import candidates
from meshctl.errors import MeshctlError, UnavailableError
from meshctl.model import Problem
from meshctl.ports import Clock, KubeObject
from meshctl.sharing import Mode, Slot, Ticket

log = structlog.get_logger(__name__)

FRESH_S = 1.0
"""Longest an Allocate waits for the API server's list of this node's pods."""
CHANGE_S = 30.0
"""Longest an Allocate waits for its GPU to be shared otherwise."""
READY_S = 20.0
"""Longest a container waits for its MPS daemon before the kubelet is told to try again."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How often things are looked at; tests shorten it."""

    inventory_s: float = 5.0
    probe_s: float = 5.0
    kubelet_s: float = 1.0
    """Between two looks at who holds what; one follows each Allocate."""
    gap_s: float = 0.2
    """At least between two looks: many pods that start together are one, and keep no Allocate waiting."""
    retry_s: float = 5.0
    """Until a change of sharing that failed is tried again."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What the agent is made of."""

    name: str
    """Of the node."""
    inventory: Inventory
    mps: Mps
    holdings: Holdings
    world: World
    checkpoint: Checkpoint
    clock: Clock
    metrics: Metrics


class Agent:
    """`ports.Backend`. `start` it, `run` it until it is cancelled, then `stop` it."""

    def __init__(self, parts: Parts, node: Node, pace: Pace | None = None) -> None:
        self.node = node
        self.parts = parts
        self._pace = pace or Pace()
        self._changed = asyncio.Event()
        self._look = asyncio.Event()
        """Who holds what is to be asked now."""
        self._allocating = asyncio.Lock()
        self._asking = asyncio.Lock()
        self._askers = Askers(node, parts.world, self._now_s, self._ask_kubelet)
        self._saver = Saver(parts.checkpoint, node.saved, self._now_s)
        self._changes: dict[str, asyncio.Task[None]] = {}
        self._problems: dict[str, str] = {}
        parts.metrics.observe(node, parts.clock.now_s)

    def problems(self) -> tuple[Problem, ...]:
        """What is wrong now, by activity."""
        own = tuple(Problem(activity, message) for activity, message in sorted(self._problems.items()))
        return own + self._unshown() + self._askers.problems() + self.parts.world.problems()

    def _unshown(self) -> tuple[Problem, ...]:
        names = ", ".join(map(str, sorted(self.node.unshown or ())))
        waits = "no GPU is shared otherwise, and no MPS daemon ends, until it does or they end"
        return (Problem("kubelet", f"does not show the slots of {names}; {waits}"),) if names else ()

    def report(self, activity: str, error: Exception | None) -> None:
        """What somebody else cannot do for this agent, or (None) tries again."""
        if error is not None:
            self._failed(activity, error)
        else:
            self._problems.pop(activity, None)

    def objects(self) -> list[KubeObject]:
        """The GPU objects, in order of UUID, without times."""
        driver, uid, now_s = self.parts.inventory.driver, self.parts.world.node_uid, self._now_s()
        return [
            gpu_object(self.parts.name, uid, self.node.seen(uuid, now_s, driver), self.node.ledger)
            for uuid in sorted(self.node.cards)
        ]

    # ------------------------------------------------------------------------------------------------ for the kubelet

    def devices(self, resource: str) -> Sequence[Device]:
        return self.node.devices(resource, self._now_s())

    async def wait_changed(self, resource: str, seen: Sequence[Device]) -> Sequence[Device]:
        while (now := self.devices(resource)) == seen:
            await self.changed()
        return now

    async def changed(self) -> None:
        """Returns at the next turn."""
        await self._changed.wait()

    async def preferred(self, resource: str, available: Sequence[str], must: Sequence[str], size: int) -> list[str]:
        tickets = await self._askers.advised(resource, size)
        asking = candidates(tickets, resource, size, self.node.ledger)
        gpus = self.node.shared(self._now_s())
        return rules.prefer(resource, gpus, available, must, size, self.node.ledger, asking)

    async def allocate(self, resource: str, containers: Sequence[Sequence[str]]) -> list[ContainerResponse]:
        async with self._allocating:
            try:
                found = await self._allocate(resource, containers)
            except rules.RefusedSlotsError as refused:
                self.parts.metrics.allocations.labels(resource, refused.reason).inc(len(containers))
                raise
        self.parts.metrics.allocations.labels(resource, "Given").inc(len(containers))
        self._look.set()
        return found

    async def _allocate(self, resource: str, containers: Sequence[Sequence[str]]) -> list[ContainerResponse]:
        tickets = await self._askers.asking(resource, [len(ids) for ids in containers])
        # the last wait: a GPU that begins to change in a later one would be given as it no longer is
        await self._settled({Slot.parse(text).uuid for ids in containers for text in ids if _ours(text)})
        ledger = self.node.ledger
        asking = [one for ids in containers for one in candidates(tickets, resource, len(ids), ledger)]
        now_s = self._now_s()
        gpus = self.node.shared(now_s)
        grants = rules.check(resource, gpus, containers, ledger, asking)
        answers = [response(grant.slots, gpus, self.parts.mps.pipe_directory) for grant in grants]
        slots = [slot for grant in grants for slot in grant.slots]
        self.node.ledger = ledger.granted(grants, now_s)
        try:
            await self._saver.save(lasting=False)
        except OSError as error:
            self.node.ledger = self.node.ledger.withdrawn(slots)
            raise UnavailableError(
                f"slots are not given while they cannot be written down: {self.parts.checkpoint.path}: {error.strerror}"
            ) from error
        asyncio.get_running_loop().call_soon(self._turn)  # the container need not wait for it
        return answers

    async def pre_start(self, resource: str, ids: Sequence[str]) -> None:
        for uuid in sorted({Slot.parse(text).uuid for text in ids}):
            card = self.node.cards.get(uuid)
            if card is not None and card.by_mps:
                await self.parts.mps.ready(uuid, READY_S)

    async def _settled(self, uuids: set[str]) -> None:
        """Returns when none of these GPUs is between two ways of sharing: the kubelet chose before it heard of it."""
        try:
            async with asyncio.timeout(CHANGE_S):
                while any((card := self.node.cards.get(uuid)) is not None and card.changing for uuid in uuids):
                    await self.changed()
        except TimeoutError as late:
            raise UnavailableError(f"{', '.join(sorted(uuids))}: still being shared otherwise; try again") from late

    # ------------------------------------------------------------------------------------------------------- the life

    async def start(self) -> None:
        """The first look at everything; afterwards `devices` is right. Raises MeshctlError when there is no NVML."""
        self.node.found(await self.parts.inventory.gpus())
        try:
            await self._ask_kubelet()
        except UnavailableError as error:
            self._failed("kubelet", error)
        for card in self.node.cards.values():
            if card.by_mps:
                self.parts.mps.want(card.gpu)
        self._apply()
        try:
            await self._clear_up()
        except UnavailableError as error:
            self._failed("leftovers", error)

    async def _clear_up(self) -> None:
        """Ends MPS daemons that an earlier run left on GPUs that are shared otherwise now, or gone, once nobody can be
        using them. Raises UnavailableError that says which of these do not end."""
        stay = []
        for uuid in filter(self._abandoned, self.parts.mps.left()):
            try:
                await self._without_clients(uuid)
                if self._abandoned(uuid) and uuid in self.parts.mps.left():  # not wanted since
                    await self.parts.mps.unwant(uuid)
            except MeshctlError as error:
                stay.append(str(error))
        if stay:
            raise UnavailableError("; ".join(stay))

    def _abandoned(self, uuid: str) -> bool:
        card = self.node.cards.get(uuid)
        if card is None:
            return self.node.empty(uuid)
        asked = card.wanted.sharing
        wanted_soon = card.changing or (asked is not None and asked.mode is Mode.MPS)
        return self.node.empty(uuid) and not wanted_soon

    async def _unwant(self, uuid: str) -> None:
        try:
            await self._end_mps(uuid)
        except MeshctlError as error:
            log.warning("MPS daemon left running", gpu=uuid, error=str(error))

    async def _end_mps(self, uuid: str) -> None:
        """Only for a GPU that nobody can want meanwhile: it is changing, or the agent ends."""
        await self._without_clients(uuid)
        await self.parts.mps.unwant(uuid)

    async def _without_clients(self, uuid: str) -> None:
        """Raises UnavailableError while the daemon has clients: a pod that was deleted by force is in nobody's list any
        more, and its processes may run on."""
        if clients := await self.parts.mps.clients(uuid):
            names = ", ".join(map(str, clients))
            raise UnavailableError(f"GPU {uuid}: no pod has slots, and its MPS daemon waits for its clients: {names}")

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for activity, look, every_s in (
                ("inventory", self._look_at_gpus, self._pace.inventory_s),
                ("leftovers", self._clear_up, self._pace.inventory_s),
                ("probe", self._probe, self._pace.probe_s),
                ("kubelet", self._ask_kubelet, self._pace.kubelet_s),
            ):
                tasks.create_task(self._every(activity, look, every_s), name=activity)
            tasks.create_task(self._hear_xids(), name="xids")
            tasks.create_task(self._follow(self.parts.mps.wait_changed), name="mps")
            tasks.create_task(self._follow(self.parts.world.wait_changed), name="world")

    async def stop(self) -> None:
        """Ends what waits. MPS daemons of GPUs that nobody holds are ended too; those of others run on. Nothing is
        written afterwards: the next agent may read."""
        for task in self._changes.values():
            task.cancel()
        await asyncio.gather(*self._changes.values(), return_exceptions=True)
        for uuid, card in self.node.cards.items():
            if card.by_mps and self.node.empty(uuid):
                await self._unwant(uuid)
        await self.parts.mps.stop()
        if self.node.cards and self._saver.behind:
            await self._save()

    async def _every(self, activity: str, look: Callable[[], Awaitable[None]], every_s: float) -> None:
        wake = self._look if activity == "kubelet" else asyncio.Event()
        while True:
            try:
                async with asyncio.timeout(every_s):
                    await wake.wait()
            except TimeoutError:
                pass
            wake.clear()
            try:
                await look()
            except MeshctlError as error:
                self._failed(activity, error)
            else:
                self._problems.pop(activity, None)
            self._turn()
            await asyncio.sleep(self._pace.gap_s)

    async def _follow(self, wait_changed: Callable[[], Awaitable[None]]) -> None:
        while True:
            await wait_changed()
            self._turn()

    def _failed(self, activity: str, error: Exception) -> None:
        if self._problems.get(activity) != str(error):
            log.warning("cannot be done, trying again", activity=activity, error=str(error))
        self._problems[activity] = str(error)
        self.parts.metrics.failures.labels(activity).inc()

    # ------------------------------------------------------------------------------------------------------- watchers

    async def _look_at_gpus(self) -> None:
        self.node.found(await self.parts.inventory.gpus())

    async def _probe(self) -> None:
        await asyncio.gather(*(self._probe_one(uuid) for uuid, card in self.node.cards.items() if card.present))

    async def _probe_one(self, uuid: str) -> None:
        """Whether the GPU answers, and whether anybody has more processes on it than its limits are for."""
        error = None
        try:
            await self.parts.inventory.probe(uuid)
            running = await self.parts.inventory.processes(uuid)
        except GpuError as failed:
            error, running = failed, None
        self.node.probed(uuid, error, self._now_s())
        self.node.counted(uuid, None if running is None else self._over(uuid, running))

    def _over(self, uuid: str, running: Sequence[int]) -> str | None:
        card = self.node.cards.get(uuid)
        if card is None or card.sharing is None or not card.by_mps:
            return None
        told = [pod["metadata"] for pod in self.parts.world.pods() or ()]
        pods = {metadata["uid"]: (metadata["namespace"], metadata["name"]) for metadata in told}
        owners = self.node.ledger.holders(uuid)
        allowed, own = card.sharing.clients_per_container, cgroup_of(os.getpid())
        return "; ".join(excess(map(cgroup_of, running), pods, owners, allowed, own))

    async def _ask_kubelet(self, tickets: Sequence[Ticket] | None = None) -> None:
        """Who holds what; `tickets` where they are known better than by watching. When the kubelet does not say
        (UnavailableError), everything stays as it was."""
        async with self._asking:  # answers count in the order of the questions
            asked_at_s = self._now_s()
            held = await self.parts.holdings.held(self.node.resources())
            behind = tickets is None
            if behind and (pods := self.parts.world.pods()) is not None:
                tickets = self._askers.tickets(pods)
            before = sorted(self.node.cards)
            self.node.listed(held, asked_at_s, tickets, behind=behind)
            for uuid in before:
                if uuid not in self.node.cards:  # it was taken out while no agent ran
                    self._spawn(uuid, self._unwant(uuid))

    async def _hear_xids(self) -> None:
        while True:
            try:
                xid = await self.parts.inventory.next_xid()
            except GpuError as error:
                self._failed("xids", error)
                await asyncio.sleep(self._pace.retry_s)
                continue
            self._problems.pop("xids", None)
            hit = self.node.xid(xid.code, xid.uuid, self._now_s())
            for uuid in hit:
                ignored = self.node.cards[uuid].rules.ignores(xid.code)
                self.parts.metrics.xids.labels(uuid, xid.code, str(ignored).lower()).inc()
                log.warning("XID", gpu=uuid, xid=xid.code, ignored=ignored)
            self._turn()

    # ------------------------------------------------------------------------------------------------------ a turn

    def _turn(self) -> None:
        """After whatever happened: what follows from it."""
        self._apply()
        self._changed.set()
        self._changed = asyncio.Event()
        if not self._saver.writes and (self._saver.behind or "checkpoint" in self._problems):
            self._spawn("", self._save())

    def _apply(self) -> None:
        world, now_s = self.parts.world, self._now_s()
        for uuid in self.node.cards:
            self.node.mps(uuid, self.parts.mps.status(uuid), now_s)
        policies, labels, driver = world.policies(), world.node_labels, self.parts.inventory.driver
        self.node.asked(
            {
                uuid: wanted(card.gpu, self.parts.name, labels, policies, driver)
                for uuid, card in self.node.cards.items()
            }
        )
        for uuid in self.node.due():
            self.node.begun(uuid)
            self._spawn(uuid, self._change(self.node.cards[uuid]))

    def _spawn(self, key: str, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._changes[key] = task
        task.add_done_callback(partial(self._ended, key))

    def _ended(self, key: str, task: asyncio.Task[None]) -> None:
        if self._changes.get(key) is task:
            del self._changes[key]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("ended by a fault of this program", work=key or "save", exc_info=error)

    async def _change(self, card: Card) -> None:
        """Shares one GPU, on which nobody is, otherwise."""
        uuid, old = card.gpu.uuid, card.sharing
        done = False
        try:
            if old is not None and old.mode is Mode.MPS:
                await self._end_mps(uuid)
            done = True
        except MeshctlError as error:
            self._failed(f"change {uuid}", error)
            self.node.hindered(uuid, str(error))
            await asyncio.sleep(self._pace.retry_s)
        finally:
            self.node.finished(uuid, changed=done)
        new = self.node.cards[uuid].sharing
        if new is not None and new.mode is Mode.MPS:
            self.parts.mps.want(card.gpu)
        if done:
            self._problems.pop(f"change {uuid}", None)
        self._turn()

    async def _save(self) -> None:
        try:
            await self._saver.save()
        except OSError as error:
            self._failed("checkpoint", error)
        else:
            self._problems.pop("checkpoint", None)

    # ------------------------------------------------------------------------------------------------------- helpers

    def _now_s(self) -> float:
        return self.parts.clock.now_s()


def cgroup_of(pid: int) -> str:
    """ "" for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return ""


def _ours(text: str) -> bool:
    try:
        Slot.parse(text)
    except ValueError:
        return False
    return True
