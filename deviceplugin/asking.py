"""Who may be asking for slots now: an Allocate does not say whose it is (docs/decisions/0006).

The pods are listed anew for each answer, since the kubelet may know more than what we watched; an Allocate right after
the advice for it goes by the same list.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from deviceplugin.node import Node
from deviceplugin.ports import World
from deviceplugin.tickets import tickets_of
from meshctl.errors import MeshctlError, UnavailableError
from meshctl.model import Problem
from meshctl.ports import KubeObject
from meshctl.sharing import Isolation, Ticket

log = structlog.get_logger(__name__)

FRESH_S = 1.0
"""Longest an Allocate waits for the API server's list of this node's pods, and how long a list is fresh."""


@dataclass(frozen=True, slots=True)
class _Advice:
    """An answer to GetPreferredAllocation. The kubelet allocates right after it, for the same container."""

    resource: str
    size: int
    tickets: Sequence[Ticket]
    """Of all pods, by which it was found."""
    at_s: float

    def fits(self, resource: str, sizes: Sequence[int], now_s: float) -> bool:
        return self.resource == resource and [self.size] == list(sizes) and now_s - self.at_s < FRESH_S


class Askers:
    """The containers of this node's pods. `ask_kubelet` looks at who holds what, by these tickets if given."""

    def __init__(
        self,
        node: Node,
        world: World,
        now_s: Callable[[], float],
        ask_kubelet: Callable[[Sequence[Ticket] | None], Awaitable[None]],
    ) -> None:
        self._node, self._world, self._now_s, self._ask_kubelet = node, world, now_s, ask_kubelet
        self._advice: _Advice | None = None

    def problems(self) -> tuple[Problem, ...]:
        """Which pods' plans can't be followed."""
        pods, resources = self._world.pods() or (), self._node.resources()
        said = [words for pod in pods for words in tickets_of(pod, resources).problems]
        return tuple(Problem("plan", words) for words in sorted(said))

    def tickets(self, pods: Sequence[KubeObject]) -> list[Ticket]:
        resources = self._node.resources()
        return [ticket for pod in pods for ticket in tickets_of(pod, resources).tickets]

    async def advised(self, resource: str, size: int) -> Sequence[Ticket]:
        """For GetPreferredAllocation of `size` slots: the tickets of all pods."""
        tickets = await self._now(resource)
        self._advice = _Advice(resource, size, tickets, self._now_s())
        return tickets

    async def asking(self, resource: str, sizes: Sequence[int]) -> Sequence[Ticket]:
        """For an Allocate of so many slots for each container: likewise."""
        advice, self._advice = self._advice, None
        if advice is not None and advice.fits(resource, sizes, self._now_s()):
            return advice.tickets
        return await self._now(resource)

    async def _now(self, resource: str) -> Sequence[Ticket]:
        """Of the pods of this node, at least of those that the kubelet knows: what we watched may be behind what it
        watched, and to steer by the plan of another pod is worse than to wait a few milliseconds. Sometimes it matters,
        too, who is on the GPUs this very moment: between tenants, and when somebody seems to hold slots whose pod the
        kubelet has not acknowledged: that may be the last pod of this name, and this one asks now (a StatefulSet's)."""
        fresh = None
        try:
            fresh = self.tickets(await self._world.fresh_pods(FRESH_S))
        except MeshctlError as error:
            log.warning("the pods of the node are as last seen", error=str(error))
        tickets = self.tickets(self._world.pods() or ()) if fresh is None else fresh
        if self._isolated(resource) or self._namesake(tickets):
            try:
                await self._ask_kubelet(fresh)
            except UnavailableError as error:
                log.warning("who holds what is as last seen", error=str(error))
        return tickets

    def _isolated(self, resource: str) -> bool:
        sharings = (card.sharing for card in self._node.cards.values())
        return any(
            one is not None and one.isolation is Isolation.TENANT and one.resource == resource for one in sharings
        )

    def _namesake(self, tickets: Sequence[Ticket]) -> bool:
        holding = frozenset(self._node.ledger.held.values())
        return any(ticket.owner in holding for ticket in tickets if not ticket.admitted)
