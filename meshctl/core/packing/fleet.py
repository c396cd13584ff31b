"""All nodes, who has what on them, and the choice of a place for a pod.

A place is a node and physical GPUs of it. Of those where the pod fits `choose` takes the cheapest, as the policy
(`scoring.Scorer`) counts; `fit` does it for one node. Both change nothing.

Many pods ask for the same. For each different demand the cost of every node is kept, and asked for again only where the
node has changed since (`State.stamp`); then the choice is one look for the least number. Rejected: heaps per demand (a
change would touch each of them), a search tree over free slots (serves one policy only, and loses to numpy up to about
10,000 nodes).

Invariants: what is chosen fits; `choose` finds nothing exactly when `fit` refuses every node; the order in which nodes
and charges came does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, ItemsView, Iterator, KeysView, Mapping, ValuesView
from itertools import repeat
from types import MappingProxyType

import numpy as np

from meshctl.core.packing.fit import arrange, dealt, usable, want_of
from meshctl.core.packing.peers import peer
from meshctl.core.packing.reasons import BRIEF, REASONS, UNKNOWN, Speaker
from meshctl.core.packing.scoring import Floats, Ints, Item, Scorer, Want
from meshctl.core.packing.shape import NO_COLUMN, Shape
from meshctl.core.packing.state import State
from meshctl.core.packing.stranding import Stranding
from meshctl.core.packing.vocabulary import Charge, Decision, Demand, Node, Placement, Policy, Reason, Refusal

_KEPT_BYTES = 60_000_000
"""For what is kept of different demands, at most 80 bytes each for each node: 150 demands on 5000 nodes."""
_FEWEST_KEPT = 16


class Fleet:
    """The state and the choice."""

    def __init__(self, policy: Policy = Policy.STRANDING, *, seed: int = 0, scorer: Scorer | None = None) -> None:
        self._state = State()
        default = scorer is None and policy is Policy.STRANDING
        self._stranding = Stranding(self._state if default else None)
        self._scorer = self._stranding if default else scorer or peer(policy, seed)
        self._shapes: dict[Want, Shape] = {}
        """By when they were used last."""
        self._layout = 0
        self._asked: tuple[Collection[str] | None, Ints | None] = (None, None)
        """Names that were asked about last, and their rows."""
        self.charges: Mapping[str, Charge] = MappingProxyType(self._state.charges)
        self.nodes: Mapping[str, Node] = MappingProxyType(self._state.nodes)

    # ------------------------------------------------------------------------------------------------- what happens

    def put(self, node: Node) -> None:
        """New, or as it is now. Charges stay."""
        self._state.put(node)

    def drop(self, name: str) -> None:
        """Gone. Its charges are remembered until they are released."""
        self._state.drop(name)

    def charge(self, key: str, charge: Charge) -> None:
        """The pod takes this, instead of what it had."""
        self._state.charge(key, charge)

    def release(self, key: str) -> None:
        """The pod takes nothing. One that is not known: nothing happens."""
        self._state.release(key)

    def hold(self, uuid: str, slots: int) -> None:
        """So many slots of the GPU are in use by nobody known (0: none), besides those that are charged."""
        self._state.hold(uuid, slots)

    def observe(self, demand: Demand) -> None:
        """A pod arrived: what the policy learns from. Once for each pod."""
        want = self._want(demand)
        gpus = [item.slots / self._state.mean_slots(item.resource) for item in want.items]
        self._scorer.learn(want, gpus)
        if self._scorer is not self._stranding:
            self._stranding.learn(want, gpus)

    # ------------------------------------------------------------------------------------------------- what is so

    def free(self, uuid: str) -> int:
        """Slots of the GPU that are nobody's; 0 for one that no node has."""
        return self._state.free(uuid)

    def used_slots(self, uuid: str) -> int:
        """Charged and held; may be more than there are."""
        return self._state.used_slots(uuid)

    def tenants(self, uuid: str) -> frozenset[str]:
        """Namespaces of the pods on the GPU."""
        return self._state.tenants(uuid)

    def charged(self, node: str) -> frozenset[str]:
        """Keys of the pods on the node."""
        return self._state.charged(node)

    def stranded(self) -> Mapping[str, float]:
        """Node -> free GPUs that nobody can use for want of CPU, going by what pods have asked for so far."""
        state = self._state
        state.settle()
        amounts = self._stranding.stranded(state.gpus_free, state.cpu_free)
        return dict(zip(state.names, amounts.tolist(), strict=True))

    # -------------------------------------------------------------------------------------------------- the choice

    def choose(self, demand: Demand, names: Collection[str] | None = None) -> Decision:
        """The best place on any of the nodes `names` (None: all). Read `refused` before anything is changed."""
        shape = self._shape(self._want(demand))
        costs = shape.costs(self._state, self._scorer)
        rows = None if names is None else self._rows(names)
        if rows is None:
            names = None
        else:
            costs = _only(costs, rows)
        best = int(costs.argmin()) if costs.size else -1
        placement = self._place(shape, best, shape.column(best), demand) if best >= 0 and costs[best] < np.inf else None
        refused = _Refused(lambda: self._refused(shape, names, placement))
        return Decision(placement, self._why(demand, placement) if placement else self._why_not(shape, rows), refused)

    def fit(self, demand: Demand, name: str) -> Placement | Refusal:
        """The best GPUs of this node, or why not."""
        want, state = self._want(demand), self._state
        if (row := state.row.get(name)) is None:
            return UNKNOWN
        shape, rows = Shape(want), np.array([row])
        costs, columns = shape.look(state, self._scorer, rows)
        if costs[0] < np.inf:
            return self._place(shape, row, int(columns[0]), demand)
        return Speaker(want, shape.needs).refusals(state, rows)[0]

    # ----------------------------------------------------------------------------------------------------- its parts

    def _want(self, demand: Demand) -> Want:
        self._state.settle()
        return want_of(demand, isolation=self._state.isolation)

    def _shape(self, want: Want) -> Shape:
        """What is kept for such demands; of those used least lately, nothing."""
        if self._layout != self._state.layout:
            self._layout = self._state.layout
            self._shapes.clear()
            self._asked = (None, None)
        shape = self._shapes.pop(want, None) or Shape(want)
        self._shapes[want] = shape
        if len(self._shapes) > max(_KEPT_BYTES // (80 * len(self._state.names) + 1), _FEWEST_KEPT):
            del self._shapes[next(iter(self._shapes))]
        return shape

    def _rows(self, names: Collection[str]) -> Ints | None:
        """(len(names),) -1: not known. None: they are all that there are. The same names again cost a comparison, a
        fifth of the looking up."""
        if names != self._asked[0]:
            rows = np.fromiter(map(self._state.row.get, names, repeat(-1)), np.int64, len(names))
            self._asked = (list(names), None if _all(rows, len(self._state.names)) else rows)
        return self._asked[1]

    def _place(self, shape: Shape, row: int, column: int, demand: Demand) -> Placement:
        """On a node where it fits."""
        name = self._state.names[row]
        if column != NO_COLUMN and not (self._scorer.spread and self._state.division):
            uuid = self._state.devices(row)[column].uuid
            return Placement(name, {ask.container: {uuid: ask.slots} for ask in demand.asks})
        gpus: dict[str, dict[str, int]] = {}
        for item, parts in self._laid(shape, row):
            for position, given in dealt(item, demand.asks, parts).items():
                gpus.setdefault(demand.asks[position].container, {}).update(given)
        return Placement(name, {ask.container: gpus[ask.container] for ask in demand.asks})

    def _laid(self, shape: Shape, row: int) -> Iterator[tuple[Item, list[tuple[str, int]]]]:
        """Each item, and which slots it gets of which GPUs."""
        state, rows = self._state, np.array([row])
        devices, several = state.devices(row), tuple(state.several[row].tolist())
        for need in shape.needs:
            room = tuple(usable(shape.want, need, state, rows)[0].tolist())
            laid = arrange(need.sizes, room, several, self._scorer.spread) or arrange(need.sizes, room, several)
            if laid is None:
                raise AssertionError(f"{need} is not where it was found to fit: {room} on {state.names[row]}")
            mine = sorted((item for item in shape.want.items if item.resource == need.resource), key=_largest_first)
            for item, parts in zip(mine, laid, strict=True):
                yield item, [(devices[column].uuid, slots) for column, slots in parts]

    def _why(self, demand: Demand, placement: Placement) -> str:
        taken = placement.charge(demand).gpus
        if not taken:
            return "CPU and memory are free there, and GPUs lose the least by it"
        free = self._state.free
        return "; ".join(f"{slots} of the {free(uuid)} free slots of {uuid}" for uuid, slots in taken.items())

    def _why_not(self, shape: Shape, rows: Ints | None) -> str:
        codes = shape.codes(self._state, self._scorer)
        asked = codes if rows is None else codes[rows[rows >= 0]]
        counts = np.bincount(asked, minlength=len(REASONS))
        counts[REASONS.index(Reason.UNKNOWN_NODE)] += 0 if rows is None else int((rows < 0).sum())
        listed = ", ".join(f"{counts[code]} {BRIEF[REASONS[code]]}" for code in np.flatnonzero(counts))
        return f"none of {int(counts.sum())} nodes: {listed}" if listed else "there are no nodes"

    def _refused(self, shape: Shape, names: Collection[str] | None, placement: Placement | None) -> dict[str, Refusal]:
        state = self._state
        state.settle()
        shape = self._shape(shape.want)
        words = shape.words(state, self._scorer)
        refused = (
            words.copy() if names is None else dict(zip(names, map(words.get, names, repeat(UNKNOWN)), strict=True))
        )
        if placement is not None:
            refused.pop(placement.node, None)
        return refused


def _largest_first(item: Item) -> int:
    return -item.slots


def _all(rows: Ints, count: int) -> bool:
    """These are all rows, each once."""
    if len(rows) != count or rows.min(initial=0) < 0:
        return False
    seen = np.zeros(count, np.bool_)
    seen[rows] = True
    return bool(seen.all())


def _only(costs: Floats, rows: Ints) -> Floats:
    """The costs of these rows, inf of others."""
    known = rows[rows >= 0]
    only = np.full(len(costs), np.inf)
    only[known] = costs[known]
    return only


class _Refused(Mapping[str, Refusal]):
    """A dict that is made when it is first read."""

    __slots__ = ("_made", "_make")

    def __init__(self, make: Callable[[], dict[str, Refusal]]) -> None:
        self._make = make
        self._made: dict[str, Refusal] | None = None

    def _read(self) -> dict[str, Refusal]:
        if self._made is None:
            self._made = self._make()
        return self._made

    def __getitem__(self, name: str) -> Refusal:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def keys(self) -> KeysView[str]:
        return self._read().keys()

    def values(self) -> ValuesView[Refusal]:
        return self._read().values()

    def items(self) -> ItemsView[str, Refusal]:
        return self._read().items()
