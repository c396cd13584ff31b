"""A cluster as the extender sees it, read once: who has what of which GPU, who may move, and who waits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from meshctl.adapters.kubernetes.client import Client
from meshctl.adapters.kubernetes.faults import AbsentError, ForbiddenError
from meshctl.adapters.kubernetes.kinds import KINDS
from meshctl.cli.gpu_map import Beyond
from meshctl.core.packing.defrag import Settled, learned
from meshctl.core.packing.fleet import Fleet
from meshctl.core.packing.vocabulary import Demand
from meshctl.errors import InputError
from meshctl.extender import models
from meshctl.extender.ledger import Ledger
from meshctl.extender.movable import Host, Hosts, owner_of, why_fixed
from meshctl.extender.pods import demand_of, ended, labels_of, node_of
from meshctl.extender.views import VIEWS
from meshctl.ports import KubeObject
from meshctl.sharing import RESOURCE


@dataclass(frozen=True, slots=True)
class Waiting:
    """A pod that asks for slots and is on no node."""

    demand: Demand
    nodes: frozenset[str]
    """That let it in."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A pod on a node."""

    namespace: str
    name: str
    owner: str
    """``ReplicaSet/web-5c8f7b9d4``; "" for nobody."""


@dataclass(slots=True)
class Site:
    """What `read_site` found, and `take` made of it."""

    ledger: Ledger = field(default_factory=Ledger)
    pods: list[Settled] = field(default_factory=list)
    seen: dict[str, Seen] = field(default_factory=dict)
    """By UID."""
    waiting: dict[str, Waiting] = field(default_factory=dict)
    """By ``namespace/name``."""
    in_use: frozenset[str] = frozenset()
    """Nodes that are not cordoned, nor closed by Kubernetes itself (not ready, out of disk)."""
    notes: list[str] = field(default_factory=list)
    """What could not be read, and what that means."""

    @property
    def fleet(self) -> Fleet:
        """To read from."""
        return self.ledger.fleet

    def beyond(self) -> Beyond:
        """What the map shows of it."""
        asks = [(ask.resource, ask.slots) for waiting in self.waiting.values() for ask in waiting.demand.asks]
        return Beyond(learned(self.fleet, self.pods).stranded(), tuple(sorted(asks)))


class Reader:
    """Objects as the API server has them in: nodes, GPUs and models first, then pods."""

    def __init__(self, nodes: Iterable[KubeObject], gpus: Iterable[KubeObject], others: Iterable[KubeObject]) -> None:
        self.site = Site()
        nodes = list(nodes)
        hosts = [Host.of(node) for node in nodes]
        self._hosts = Hosts(hosts)
        self._models = models.Models()
        for value in others:
            self._models.take(KINDS[value["kind"]].key(value), value)
        for kind, values in (("Node", nodes), ("GPU", gpus)):
            for value in values:
                self.site.ledger.take(VIEWS[kind].key(value), VIEWS[kind].kept(dict(value)))
        every = self.site.fleet.nodes.values()
        self._resources = {device.resource for node in every for device in node.devices} | {RESOURCE}
        self.site.in_use = frozenset(host.name for host in hosts if host.in_use)

    def take(self, pod: KubeObject) -> None:
        """One pod. What can't be read of it is noted."""
        self.site.ledger.take(VIEWS["Pod"].key(pod), VIEWS["Pod"].kept(dict(pod)))
        if ended(pod):
            return
        metadata = pod["metadata"]
        name = f"{metadata['namespace']}/{metadata['name']}"
        try:
            unfit = self._models.unfit(metadata["namespace"], labels_of(pod))
            demand = demand_of(pod, self._resources, unfit)
        except InputError as error:
            self.site.notes.append(f"{error}; it stays where it is")
            return
        if node_of(pod):
            nodes = self._hosts.open_to(pod)
            self.site.pods.append(Settled(metadata["uid"], demand, why_fixed(pod), nodes))
            self.site.seen[metadata["uid"]] = Seen(metadata["namespace"], metadata["name"], owner_of(pod))
        elif demand.asks:
            self.site.waiting[name] = Waiting(demand, self._hosts.open_to(pod))


async def read_site(client: Client, gpus: Sequence[KubeObject]) -> Site:
    """Of the cluster, whose GPU objects are `gpus`. Raises RefusedError where nodes or pods may not be read, and
    UnavailableError."""
    nodes = (await client.list("Node", retry=False)).items
    others: list[KubeObject] = []
    notes = []
    for kind in models.KINDS:
        try:
            listing = await client.list(kind, retry=False)
            others += (VIEWS[kind].kept(item) for item in listing.items)
        except (ForbiddenError, AbsentError) as error:
            notes.append(f"no GPU counts as too slow for a model: {error}")
    reader = Reader(nodes, gpus, others)
    async for page in client.pages(KINDS["Pod"], retry=False):
        for pod in page.items:
            reader.take(pod)
    reader.site.notes[:0] = notes[:1]
    return reader.site
