"""A node, its kubelet and its cluster, in memory, for a whole agent: every edge that it has, honest and breakable.

The truth is in `Site`; what an agent knows of it comes through the edges, late, or not at all while something is away.
An `AgentRun` is one process of the agent: a crash ends its tasks wherever they are, keeps nothing but what is on the
disk, and another run follows. The kubelet is the model's: what it gave away it remembers; a new one has devices when it
is told of them, and shows its pods when the API server has told it of them.

Bound to a `VirtualLoop`. What must never happen is written to `Site.violations`: an exception of an edge's could be
swallowed.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
from collections.abc import Callable, Collection, Coroutine, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, ParamSpec, TypeVar

from deviceplugin.agent import Agent, Pace, Parts
from deviceplugin.checkpoint import Checkpoint
from deviceplugin.metrics import Metrics
from deviceplugin.node import Node, Saved
from deviceplugin.policies import Policy
from deviceplugin.ports import ContainerResponse, Device, GpuLostError, GpuTimeoutError, Xid
from meshctl.errors import MeshctlError, UnavailableError
from meshctl.model import Problem
from meshctl.ports import KubeObject
from meshctl.sharing import Gpu, MpsPhase, MpsStatus, Owner, Sharing, Slot
from tests.harness.model_kubelet import Allocate, Call, Container, Kind, ModelKubelet, Pod, Preferred, answered_later

P = ParamSpec("P")
T = TypeVar("T")
TICK_S = 1 / 64
"""All times are sums of binary fractions, so that they are exact on every clock."""
WALL_S = float(2**30)
YOUNG_S = 10.0
"""So long a kubelet that shows less than it gave away is not believed (`deviceplugin.podresources`)."""
PACE = Pace(inventory_s=8.0, probe_s=8.0, kubelet_s=4.0, gap_s=0.25)
"""Of an agent here: slower than the real one, since a test that lets an hour pass pays for each look."""
START_S = 0.5
"""Of an MPS daemon, and of a kubelet until it has heard of its pods."""
LONG_S = 3600.0
MOST_ROUNDS = 50
"""Of cancelling: a task that is cancelled may have begun another."""
FIRST_PID = 1 << 30
"""No process of the machine has such an id."""
_RUN: contextvars.ContextVar[AgentRun | None] = contextvars.ContextVar("run", default=None)


class MpsStuckError(MeshctlError):
    """A daemon that does not end."""


@dataclass
class Site:
    """Everything as it is. `loop` must be the running one; `dice` decides what a test does not."""

    loop: asyncio.AbstractEventLoop
    directory: Path
    gpus: Mapping[str, Gpu]
    dice: Random
    latencies_s: Sequence[float] = (0.0,)
    """Of a call, one way."""
    counts_processes: bool = True
    """Whether somebody can say which processes compute on a GPU."""
    kubelet: ModelKubelet = field(default_factory=ModelKubelet)
    pods: dict[Pod, KubeObject] = field(default_factory=dict)
    """As the API server has them."""
    policies: dict[str, Policy] = field(default_factory=dict)
    waiting: list[Pod] = field(default_factory=list)
    """Bound, known to the kubelet, not admitted yet."""
    lost: set[str] = field(default_factory=set)
    daemons: set[str] = field(default_factory=set)
    """GPUs whose MPS daemon runs."""
    violations: list[str] = field(default_factory=list)
    nvml_hangs: bool = False
    disk_full: bool = False
    mps_stuck: bool = False
    cluster_away: bool = False
    watch_lags: bool = False
    """The agent's watch of the pods is behind, by `lag_s`; lists are not."""
    lag_s: float = 4.0
    """Less than the ledger's GONE_S."""
    kubelet_up: bool = True
    knows_pods: bool = True
    born_s: float = 0.0
    """When the kubelet started."""
    believed_s: float = -1.0
    """`born_s` of the kubelet that was believed last."""
    crash_in: int | None = None
    """The agent crashes so many steps of the loop into its next call."""
    run: AgentRun | None = None
    saved: Saved | None = None
    """What the disk has."""
    deaths: dict[str, int] = field(default_factory=dict)
    """Of MPS daemons, by GPU."""

    def __post_init__(self) -> None:
        self.promised: dict[str, tuple[ContainerResponse, Mapping[str, Sharing | None]]] = {}
        """Device ID -> what its container was told, and how its GPUs were shared."""
        self.running: list[tuple[Pod, Container]] = []
        self.admission: asyncio.Task[None] | None = None
        self._admitting: Pod | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self.loop.set_task_factory(_of_its_run)

    async def delay(self) -> None:
        await asyncio.sleep(self.dice.choice(self.latencies_s))

    async def _once(self, holds: Callable[[], bool]) -> None:
        while not holds():  # noqa: ASYNC110 (whatever a test sets makes it hold; time costs nothing)
            await asyncio.sleep(0.25)

    def later(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Something that goes on by itself; it is the site's, not the agent's."""
        task = contextvars.Context().run(self.loop.create_task, work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.violations.append(f"{error!r}")

    async def end(self) -> None:
        """Everything, agent and all."""
        await self.crash(again=False)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -------------------------------------------------------------------------------------------------------- agents

    def start_agent(self) -> None:
        self.run = AgentRun(self)

    async def crash(self, *, again: bool = True, down_s: float = 1.0) -> None:
        """kill -9, and a new run after `down_s`."""
        run, self.run, self.crash_in = self.run, None, None
        if run is not None:
            await run.killed()
            if again:
                self.later(self._revived(down_s))

    async def stop_agent(self, down_s: float) -> None:
        """SIGTERM, likewise."""
        run = self.run
        if run is not None and run.agent is not None:
            await run.stopped()
            await self.crash(down_s=down_s)

    async def _revived(self, down_s: float) -> None:
        await asyncio.sleep(down_s)
        if self.run is None:
            self.start_agent()

    # ------------------------------------------------------------------------------------------------------- kubelet

    def begin(self, pod: Pod, *, falls: bool) -> None:
        """The kubelet admits it, next."""
        self.waiting.remove(pod)
        self._admitting = pod
        self.admission = self.later(self._admitted(pod, falls=falls))

    @property
    def admitting(self) -> bool:
        return self.admission is not None and not self.admission.done()

    async def until_up(self) -> None:
        """Returns when agent and kubelet know everything that they can know, and no pod is being admitted; not while
        NVML hangs or the API server is away."""
        deadline_s = self.loop.time() + LONG_S
        while not (self.nvml_hangs or self.cluster_away):
            assert self.loop.time() < deadline_s, (self.run, self.knows_pods, self.admission)
            if self.knows_pods and self.run is not None and self.run.agent is not None and not self.admitting:
                return
            await asyncio.sleep(0.25)

    async def idle(self) -> None:
        """Returns when no pod is being admitted."""
        if self.admission is not None:
            await asyncio.wait([self.admission])

    def settled_pods(self) -> list[Pod]:
        """Those that have been admitted."""
        return [pod for pod in self.kubelet.pods if pod not in self.waiting and not self._admits(pod)]

    def _admits(self, pod: Pod) -> bool:
        return self.admitting and pod is self._admitting

    def holders(self) -> Iterator[tuple[Pod, Container, frozenset[str]]]:
        """Who has which slots, by the kubelet's account."""
        for pod, given in self.kubelet.pods.items():
            yield from ((pod, container, ids) for container, ids in given.items() if ids)

    async def _admitted(self, pod: Pod, *, falls: bool) -> None:
        """`falls`: something else than slots refuses it, afterwards."""
        try:
            refused = await answered_later(self.kubelet.admit(pod), self._asked)
        except asyncio.CancelledError:
            self.waiting.insert(0, pod)
            raise
        if falls and not refused:
            self.kubelet.ended(pod)
        self.told_of(pod, "Failed" if refused or falls else "Running")
        for container, ids in self.kubelet.pods.get(pod, {}).items():
            if container.kind is not Kind.INIT and ids:
                self.later(self._begun(pod, container, ids))

    async def _asked(self, call: Call) -> list[str]:
        await self.delay()
        run = self.run
        if run is None or run.agent is None or call.resource not in run.telling:
            raise UnavailableError("no plugin is registered")
        if isinstance(call, Preferred):
            return await run.call(run.agent.preferred, call.resource, call.available, call.must, call.size)
        await run.call(self._allocated, run.agent, call)
        return []

    async def _allocated(self, agent: Agent, call: Allocate) -> None:
        (answer,) = await agent.allocate(call.resource, [call.ids])
        shared = {uuid: agent.node.cards[uuid].sharing for uuid in {Slot.parse(text).uuid for text in call.ids}}
        self.promised |= dict.fromkeys(call.ids, (answer, shared))
        await self.delay()

    async def _begun(self, pod: Pod, container: Container, ids: Collection[str]) -> None:
        """Starts the container, as often as it takes."""
        while pod in self.kubelet.pods:
            run = self.run
            if self.kubelet_up and run is not None and run.agent is not None:
                uuids = {Slot.parse(text).uuid for text in ids}
                before = {uuid: self.deaths.get(uuid, 0) for uuid in uuids}
                try:
                    await run.call(run.agent.pre_start, container.resource, sorted(ids))
                except MeshctlError:
                    pass
                else:
                    self._started(pod, container, before)
                    return
            await asyncio.sleep(1.0)

    def _started(self, pod: Pod, container: Container, deaths: Mapping[str, int]) -> None:
        ids = self.kubelet.pods.get(pod, {}).get(container)
        if not ids:
            return
        by_mps = "CUDA_MPS_PIPE_DIRECTORY" in self.promised[min(ids)][0].envs
        for uuid, count in deaths.items():
            if by_mps and uuid not in self.daemons and self.deaths.get(uuid, 0) == count:
                self.violations.append(f"{pod.name} started without an MPS daemon on {uuid}")
        self.running.append((pod, container))

    def end_pod(self, pod: Pod, phase: str = "Succeeded") -> None:
        self.kubelet.ended(pod)
        self.running = [one for one in self.running if one[0] != pod]
        self.told_of(pod, phase)

    def told_of(self, pod: Pod, phase: str) -> None:
        """The kubelet writes the pod's status; while the API server is away, later."""
        self.later(self._written(pod, phase))

    async def _written(self, pod: Pod, phase: str) -> None:
        await self._once(lambda: self.kubelet_up and not self.cluster_away)
        if pod in self.pods and self.pods[pod]["status"]["phase"] in {"Pending", "Running"}:
            self.pods[pod] = pod.object(phase=phase, started=True)
            self.hear()

    async def kill_kubelet(self, down_s: float) -> None:
        """Its account is on its disk; its admission ends in the middle."""
        self.kubelet_up = self.knows_pods = False
        self.kubelet.healthy = {}
        if self.admission is not None:
            self.admission.cancel()
            await asyncio.wait([self.admission])
        self.later(self._kubelet_back(down_s))

    async def _kubelet_back(self, down_s: float) -> None:
        await asyncio.sleep(down_s)
        self.born_s, self.kubelet_up = self.loop.time(), True
        if self.run is not None:
            self.run.register()
        await asyncio.sleep(START_S)
        await self._once(lambda: not self.cluster_away)
        self.knows_pods = True

    # ---------------------------------------------------------------------------------------------------- everything

    def hear(self) -> None:
        """The agent's watches come up to the truth, where they can."""
        if self.run is not None:
            self.run.view.hear()

    def users(self, uuid: str) -> frozenset[Pod]:
        return self.kubelet.users(uuid)

    def computing(self, uuid: str) -> tuple[int, ...]:
        return tuple(FIRST_PID + number for number, _ in enumerate(self._running_on(uuid)))

    def _running_on(self, uuid: str) -> list[tuple[Pod, Container]]:
        return [
            one
            for one in self.running
            if any(Slot.parse(text).uuid == uuid for text in self.kubelet.pods.get(one[0], {}).get(one[1], ()))
        ]

    def kill_daemon(self, uuid: str) -> None:
        """Its clients end with it, and their containers start again."""
        self.daemons.discard(uuid)
        self.deaths[uuid] = self.deaths.get(uuid, 0) + 1
        for pod, container in self._running_on(uuid):
            self.running.remove((pod, container))
            self.later(self._begun(pod, container, self.kubelet.pods[pod][container]))
        if self.run is not None:
            self.run.mps.died.set()

    def xid(self, code: int, uuid: str | None) -> None:
        """Nobody hears of it while no agent runs."""
        if self.run is not None:
            self.run.xids.put_nowait(Xid(code, uuid))


def _of_its_run(
    loop: asyncio.AbstractEventLoop,
    work: Coroutine[Any, Any, Any] | Generator[Any, None, Any],
    context: contextvars.Context | None = None,
) -> asyncio.Task[Any]:
    """A task factory: a run knows the tasks that it has to end with."""
    task = asyncio.Task(work, loop=loop) if context is None else asyncio.Task(work, loop=loop, context=context)
    if (run := (context.get(_RUN) if context is not None else _RUN.get())) is not None:
        run.tasks.add(task)
        task.add_done_callback(run.tasks.discard)
    return task


class AgentRun:
    """One process of the agent."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.tasks: set[asyncio.Task[Any]] = set()
        self.xids: asyncio.Queue[Xid] = asyncio.Queue()
        self.began_s = site.loop.time()
        self._offset_s = float(site.dice.randrange(1000))
        self.view = View(site)
        self.disk = Disk(site)
        self.agent: Agent | None = None
        """None until it has started."""
        self.telling: dict[str, Sequence[Device]] = {}
        """Resource -> what the kubelet was told."""
        self._context = contextvars.copy_context()
        self._context.run(_RUN.set, self)
        self.mps = Daemons(self)
        self.main = self.spawn(self._main())
        self.main.add_done_callback(self._over)

    def _over(self, main: asyncio.Task[None]) -> None:
        """It could not start (somebody starts it again), or it has a bug."""
        if main.cancelled() or (error := main.exception()) is None:
            return
        if isinstance(error, MeshctlError) and self.agent is None and self.site.run is self:
            self.site.later(self.site.crash(down_s=1.0))
        else:
            self.site.violations.append(f"the agent ended: {error!r}")

    def now_s(self) -> float:
        """`Clock`: of this run alone."""
        return self.site.loop.time() + self._offset_s

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        return self._context.run(self.site.loop.create_task, work)

    async def call(self, method: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Over the plugin's socket: UnavailableError when the run ends meanwhile; who hangs up cancels the call."""

        async def answered() -> T:
            return await method(*args, **kwargs)

        task = self.spawn(answered())
        if (steps := self.site.crash_in) is not None:
            self.site.crash_in = None
            self.site.later(self._crashed_in(steps))
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            task.cancel()
            raise
        if task.cancelled():
            raise UnavailableError("the plugin's socket was closed")
        return task.result()

    async def _crashed_in(self, steps: int) -> None:
        for _ in range(steps):
            await asyncio.sleep(0)
        if self.site.run is self:
            await self.site.crash()

    async def killed(self) -> None:
        for _ in range(MOST_ROUNDS):
            if not (ending := list(self.tasks)):
                break
            for task in ending:
                task.cancel()
            await asyncio.wait(ending)
        else:
            self.site.violations.append(f"tasks that do not end: {sorted(map(str, self.tasks))}")
        self._unregistered(*list(self.telling))

    async def stopped(self) -> None:
        """What main.py does at the end: nobody asks any more, then the agent stops."""
        agent = self.agent
        assert agent is not None
        self.main.cancel()
        await asyncio.wait([self.main])
        await asyncio.wait([self.spawn(agent.stop())])

    # ------------------------------------------------------------------------------------------- what main.py puts up

    async def _main(self) -> None:
        site = self.site
        node = Node.restored(await asyncio.to_thread(self.disk.load, self.now_s()))
        await self.view.start()
        listing = Listing(site)
        parts = Parts("node-1", Cards(self), self.mps, listing, self.view, self.disk, self, Metrics())
        self.mps.busy = node.busy
        agent = Agent(parts, node, PACE)
        await agent.start()
        self.agent = agent
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(agent.run())
            tasks.create_task(self._plugins(agent, tasks))

    async def _plugins(self, agent: Agent, tasks: asyncio.TaskGroup) -> None:
        running: dict[str, asyncio.Task[None]] = {}
        while True:
            offered = agent.node.offered()
            for resource in sorted(offered - running.keys()):
                running[resource] = tasks.create_task(self._listed(agent, resource))
            for resource in sorted(running.keys() - offered):
                running.pop(resource).cancel()
            await agent.changed()

    async def _listed(self, agent: Agent, resource: str) -> None:
        """ListAndWatch."""
        slots = agent.devices(resource)
        try:
            while True:
                self.telling[resource] = slots
                self.register()
                slots = await agent.wait_changed(resource, slots)
        finally:
            self._unregistered(resource)

    def register(self) -> None:
        """The kubelet, if there is one, has all that it was told."""
        if self.site.kubelet_up:
            for resource, slots in self.telling.items():
                self.site.kubelet.healthy[resource] = frozenset(one.id for one in slots if one.healthy)

    def _unregistered(self, *resources: str) -> None:
        for resource in resources:
            self.telling.pop(resource, None)
            self.site.kubelet.healthy.pop(resource, None)


# ------------------------------------------------------------------------------------------------------------ the edges


class Disk(Checkpoint):
    """The real one, which may be full."""

    def __init__(self, site: Site) -> None:
        super().__init__(site.directory / "agent.json", lambda: WALL_S + site.loop.time())
        self._site = site

    def save(self, saved: Saved, now_s: float, *, lasting: bool = True) -> None:
        if self._site.disk_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().save(saved, now_s, lasting=lasting)
        self._site.saved = saved


class Cards:
    """`ports.Inventory`."""

    driver = "580.65.06"

    def __init__(self, run: AgentRun) -> None:
        self._run, self._site = run, run.site

    async def gpus(self) -> tuple[Gpu, ...]:
        await self._answers("the GPUs")
        return tuple(gpu for uuid, gpu in sorted(self._site.gpus.items()) if uuid not in self._site.lost)

    async def probe(self, uuid: str) -> None:
        await self._answers(uuid)
        if uuid in self._site.lost:
            raise GpuLostError(f"{uuid}: it has fallen off the bus")

    async def next_xid(self) -> Xid:
        return await self._run.xids.get()

    async def set_exclusive(self, uuid: str, exclusive: bool) -> None:
        """Nobody looks."""

    async def processes(self, uuid: str) -> tuple[int, ...] | None:
        await self._answers(uuid)
        return self._site.computing(uuid) if self._site.counts_processes else None

    async def close(self) -> None:
        """Nothing is open."""

    async def _answers(self, what: str) -> None:
        await self._site.delay()
        if self._site.nvml_hangs:
            await asyncio.sleep(1.0)
            raise GpuTimeoutError(f"{what}: no answer within 1 s")


class Listing:
    """`agent.Holdings`, as careful as `PodResources` is with a young kubelet."""

    def __init__(self, site: Site) -> None:
        self._site = site

    async def held(self, resources: frozenset[str]) -> Mapping[Slot, Owner]:
        site = self._site
        await site.delay()
        if not site.kubelet_up:
            raise UnavailableError("the kubelet does not answer")
        held = site.kubelet.listing() if site.knows_pods else {}
        if site.born_s != site.believed_s:
            if site.kubelet.used - {str(slot) for slot in held} and site.loop.time() - site.born_s < YOUNG_S:
                raise UnavailableError("the kubelet started a moment ago and does not show its pods yet")
            site.believed_s = site.born_s
        await site.delay()
        return held


class View:
    """`agent.World` of a cluster: what was known stays known, what never was is None."""

    node_uid = "1"

    def __init__(self, site: Site) -> None:
        self._site = site
        self._changed = asyncio.Event()
        self._policies: Sequence[Policy] | None = None
        self._pods: Sequence[KubeObject] | None = None
        self._news = self._heard = 0
        self.node_labels: Mapping[str, str] | None = None

    def hear(self) -> None:
        if self._site.cluster_away:
            return
        self._policies = tuple(self._site.policies.values())
        self.node_labels = {}
        self._news += 1
        now = tuple(self._site.pods.values())
        if self._pods is None or not self._site.watch_lags:
            self._told(now, self._news)
        else:
            self._site.later(self._told_late(now, self._news))
        self._changed.set()

    async def _told_late(self, pods: Sequence[KubeObject], number: int) -> None:
        await asyncio.sleep(self._site.lag_s)
        self._told(pods, number)

    def _told(self, pods: Sequence[KubeObject], number: int) -> None:
        if number > self._heard:  # a watch never goes back
            self._pods, self._heard = pods, number
            self._changed.set()

    async def start(self) -> None:
        await self._site.delay()
        self.hear()
        if self._pods is None:
            await asyncio.sleep(10.0)

    def policies(self) -> Sequence[Policy] | None:
        return self._policies

    def pods(self) -> Sequence[KubeObject] | None:
        return self._pods

    async def fresh_pods(self, deadline_s: float) -> Sequence[KubeObject]:
        await self._site.delay()
        if self._site.cluster_away:
            raise UnavailableError("the API server does not answer")
        found = tuple(self._site.pods.values())
        await self._site.delay()
        return found

    def problems(self) -> tuple[Problem, ...]:
        return ()

    async def wait_changed(self) -> None:
        await self._changed.wait()
        self._changed.clear()


class Daemons:
    """`ports.Mps`; daemons are the site's, and outlive a run."""

    def __init__(self, run: AgentRun) -> None:
        self._run, self._site = run, run.site
        self._status: dict[str, MpsStatus] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._turns: dict[str, asyncio.Lock] = {}
        self._changed = asyncio.Event()
        self._moved = asyncio.Event()
        self.died = asyncio.Event()
        """Some daemon."""
        self.busy: Callable[[str], bool] = lambda uuid: False

    def status(self, uuid: str) -> MpsStatus:
        return self._status.get(uuid, MpsStatus())

    def want(self, gpu: Gpu) -> None:
        if gpu.uuid not in self._tasks:
            self._say(gpu.uuid, MpsPhase.STARTING)
            self._tasks[gpu.uuid] = self._run.spawn(self._supervised(gpu.uuid))

    async def _supervised(self, uuid: str) -> None:
        while True:
            async with self._turns.setdefault(uuid, asyncio.Lock()):
                if uuid not in self._site.daemons and not self._in_use(uuid):
                    await asyncio.sleep(START_S)
                    self._site.daemons.add(uuid)
            if uuid in self._site.daemons:
                self._say(uuid, MpsPhase.RUNNING)
                while uuid in self._site.daemons:
                    await self.died.wait()
                    self.died.clear()
                    await asyncio.sleep(0)
            self._say(uuid, MpsPhase.FAILED)
            await asyncio.sleep(1.0)

    def _in_use(self, uuid: str) -> bool:
        return bool(self._site.computing(uuid)) if self._site.counts_processes else self.busy(uuid)

    def _say(self, uuid: str, phase: MpsPhase) -> None:
        if self._status.get(uuid, MpsStatus()).phase is not phase:
            self._status[uuid] = MpsStatus(phase)
            self._changed.set()
            self._moved.set()
            self._moved = asyncio.Event()

    async def unwant(self, uuid: str) -> None:
        if (task := self._tasks.pop(uuid, None)) is not None:
            task.cancel()
            del self._status[uuid]
        async with self._turns.setdefault(uuid, asyncio.Lock()):
            if self._site.mps_stuck:
                raise MpsStuckError(f"the MPS daemon of {uuid} does not end")
            if uuid in self._site.daemons and (users := self._site.users(uuid)):
                self._site.violations.append(f"MPS of {uuid} ended under {sorted(pod.name for pod in users)}")
            self._site.daemons.discard(uuid)
            await self._site.delay()
        self._changed.set()

    async def ready(self, uuid: str, deadline_s: float) -> None:
        try:
            async with asyncio.timeout(deadline_s):
                while self.status(uuid).phase is not MpsPhase.RUNNING:
                    await self._moved.wait()
        except TimeoutError as late:
            raise MpsStuckError(f"the MPS daemon of {uuid} is not ready") from late
        if uuid not in self._site.daemons:
            raise MpsStuckError(f"the MPS daemon of {uuid} does not answer")

    async def clients(self, uuid: str) -> tuple[int, ...] | None:
        return None

    def pipe_directory(self, uuid: str) -> str:
        return f"/run/mps/{uuid}/pipe"

    def left(self) -> tuple[str, ...]:
        return tuple(sorted(self._site.daemons - self._tasks.keys()))

    async def wait_changed(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    async def stop(self) -> None:
        for task in self._tasks.values():
            task.cancel()
