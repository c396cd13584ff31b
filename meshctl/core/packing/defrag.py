"""Which pods could move so that more fits: a proposal, move by move, in an order in which it can be carried out. Pure.

Two goals. Room for a demand: the fewest pods move with which it fits somewhere. Or, with nobody waiting: as long as it
pays, GPUs become whole, and pods leave nodes whose free GPUs nobody can use for want of CPU.

Each move is made before it is broken: its target has room while the pod still has what it has, so whoever carries the
moves out in their order can start each pod anew before it ends the old one. No pod moves twice, and none that the
caller calls fixed, or does not name.

Invariants: carried out in order on the fleet, every move fits when its turn comes, and in the end there is what
`Plan.after` says; the fleet that is asked stays as it is; same input, same plan.

The search is bounded by counts, not by time: nodes where the fewest pods would have to leave come first, and a pod that
finds no place elsewhere may have room made for it, once. Rejected: an integer programme for the best packing of the
whole cluster (it moves nearly every pod); evicting first and placing after (a pod may then stay without a place).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from meshctl.core.packing.fleet import Fleet
from meshctl.core.packing.measure import Measure, largest, measure, rooms_of, whole
from meshctl.core.packing.preempt import leavers
from meshctl.core.packing.vocabulary import Charge, Demand, Placement

MOST_MOVES = 10
_MOST_TRIES = 300
"""Times that it is asked who would have to leave a node, for one demand; each takes 5 to 80 ms."""
_MOST_TRIES_INSIDE = 5
"""Of these for one pod that finds no place elsewhere."""
_MOST_SPARED = 8
"""Pods of one node that find no place elsewhere before it is given up."""
_MOST_GROUPS = 300
"""Groups of pods whose move is tried before the best is taken."""
_MOST_SINGLES = 10
"""Pods of one node that are tried for its CPU, those with most of it first."""
_LEAST_GAIN = 0.1
"""GPUs per move: for less no pod is restarted."""
_GOOD_GAIN = 1.0
"""GPUs per move: nothing gains much more, so no other group is tried."""
_EXACT = 1e-9
"""Below this a difference of GPUs is one of arithmetic."""
_KEPT = "kept free for what is to come"


@dataclass(frozen=True, slots=True)
class Settled:
    """A pod where it is."""

    key: str
    """As the fleet has it."""
    demand: Demand
    """What it demands wherever it goes."""
    fixed: str = ""
    """Why it must not be moved, in words; "" when it may be."""
    nodes: frozenset[str] | None = None
    """Where it may be for reasons beyond the fleet's (node selectors, taints); None: anywhere."""


@dataclass(frozen=True, slots=True)
class Move:
    """One pod goes elsewhere."""

    key: str
    before: Charge
    placement: Placement
    after: Charge
    """What it takes there."""
    sake: str
    """Key of the pod that needs the room that this leaves; "": the goal does."""
    why: str
    """In words, without names of pods."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The moves, in order, and what they are good for."""

    moves: tuple[Move, ...]
    before: Measure
    after: Measure
    placement: Placement | None
    """Where the goal's demand fits after the moves; None: nowhere, or there is none."""
    why: str
    """In words: why nothing is to be moved, or nothing helps; "" when there are moves."""


def plan(
    fleet: Fleet,
    pods: Iterable[Settled],
    demand: Demand | None = None,
    nodes: Collection[str] | None = None,
    max_moves: int = MOST_MOVES,
) -> Plan:
    """At most `max_moves` moves with which `demand` fits on one of `nodes` (None: any); without a demand, that GPUs of
    `nodes` become whole, and fewer of them stranded. Pods move to all nodes. `fleet` is not changed."""
    search = _Search(fleet, pods)
    before = measure(search.now, demand, nodes)
    if demand is None:
        moves = search.improve(nodes, max_moves)
        why = "" if moves else f"no move that was tried gains {_LEAST_GAIN:g} GPUs or more"
        return Plan(tuple(moves), before, measure(search.now, None, nodes), None, why)
    there = search.now.choose(demand, nodes)
    if there.placement is not None:
        return Plan((), before, before, there.placement, "it fits as it is: nothing has to move")
    found = search.fewest(demand, nodes, max_moves)
    if not found:
        why = f"{there.why}; and no {max_moves} moves that were tried make room"
        return Plan((), before, before, None, why)
    placement = search.now.choose(demand, nodes).placement
    return Plan(tuple(found), before, measure(search.now, demand, nodes), placement, "")


@dataclass(frozen=True, slots=True)
class _Bounds:
    """Of a search."""

    sake: str
    """Key of the pod that room is made for; "": what was asked for."""
    most: int
    """Moves."""
    deep: bool = False
    """Room may be made for pods that move."""
    moved: frozenset[str] = frozenset()
    """Who does not move (again)."""


class _Search:
    """The fleet as it is after the moves so far. Methods leave it with the moves made that they return."""

    def __init__(self, fleet: Fleet, pods: Iterable[Settled]) -> None:
        self.pods = {pod.key: pod for pod in sorted(pods, key=lambda pod: pod.key) if pod.key in fleet.charges}
        self.now = learned(fleet, self.pods.values())
        self._tries = _MOST_TRIES

    # --------------------------------------------------------------------------------------------- room for a demand

    def fewest(self, demand: Demand, nodes: Collection[str] | None, most: int) -> list[Move]:
        """The fewest moves that make room; [] when none do. Those for the sake of others are tried where they may be
        fewer: they are two at least."""
        direct = self._room(demand, nodes, _Bounds("", most))
        if direct and len(direct) <= 2:
            return direct
        self._undo(direct)
        deep = self._room(demand, nodes, _Bounds("", len(direct) - 1 if direct else most, deep=True))
        if deep:
            return deep
        self._redo(direct)
        return direct

    def _room(self, demand: Demand, nodes: Collection[str] | None, bounds: _Bounds) -> list[Move]:
        """The fewest moves with which `demand` fits on one of `nodes`."""
        best: list[Move] = []
        last = self._tries - _MOST_TRIES_INSIDE if bounds.sake else 0
        for least, node in self._sites(demand, nodes, bounds):
            most = len(best) - 1 if best else bounds.most
            if least > most or self._tries <= max(last, 0):
                break
            if found := self._site(demand, node, replace(bounds, most=most)):
                self._undo(found)
                best = found
        self._redo(best)
        return best

    def _sites(self, demand: Demand, nodes: Collection[str] | None, bounds: _Bounds) -> list[tuple[int, str]]:
        """Nodes that may come to have room, with how many pods have to leave them at least; the fewest first."""
        refused = self.now.choose(demand, nodes).refused
        names = [name for name in sorted(refused) if refused[name].reason.resolvable]
        return sorted((least, name) for name in names if (least := self._least(demand, name, bounds)) is not None)

    def _least(self, demand: Demand, name: str, bounds: _Bounds) -> int | None:
        """Pods that have to leave the node at least; None: it does not help when all leave that may."""
        ask, counts = largest(demand), []
        held = self._held(self._movable(name, bounds.moved))
        for device in self.now.nodes[name].devices:
            if device.closed or device.resource != ask.resource:
                continue
            if device.several:
                return 1
            slots = sorted((slots for _, slots in held.get(device.uuid, ())), reverse=True)
            room, count = self.now.free(device.uuid), 0
            while room < ask.slots and count < len(slots):
                room, count = room + slots[count], count + 1
            if room >= ask.slots:
                counts.append(max(count, 1))
        return min(counts, default=None)

    def _site(self, demand: Demand, node: str, bounds: _Bounds) -> list[Move]:
        """Moves that make room on this node; for those who find no place elsewhere others leave."""
        stuck: set[str] = set()
        for _ in range(_MOST_SPARED):
            self._tries -= 1
            candidates = [key for key in self._movable(node, bounds.moved) if key not in stuck]
            gone = leavers(self.now, demand, node, candidates)
            if gone is None or not 0 < len(gone) <= bounds.most:
                break
            found = self._vacate(demand, node, gone, bounds)
            if not isinstance(found, str):
                return found
            stuck.add(found)
        return []

    def _vacate(self, demand: Demand, node: str, gone: Sequence[str], bounds: _Bounds) -> list[Move] | str:
        """`gone` leave so that `demand` fits; or who of them finds no place elsewhere. Other GPUs of the node are
        elsewhere, too, unless its CPU is what is missing."""
        place = self._place_without(demand, node, gone)
        why = f"makes room for {_asked(demand)} on {_gpus(place)} of {node}"
        for but in ("", node):
            with self._closed(node, place.charge(demand).gpus):
                made, stuck = self._all_leave(self._by_size(gone), but, why, bounds)
            if stuck:
                return stuck
            if isinstance(self.now.fit(demand, node), Placement):
                return made
            self._undo(made)
        return self._by_size(gone)[0]

    def _all_leave(self, gone: Sequence[str], but: str, why: str, bounds: _Bounds) -> tuple[list[Move], str]:
        """The moves; or none, and who finds no place."""
        made: list[Move] = []
        for at, key in enumerate(gone):
            left = bounds.most - len(made) - (len(gone) - at)
            moved = bounds.moved | {*gone} | {move.key for move in made}
            moves = self._resettle(key, but, why, replace(bounds, most=left, moved=moved))
            if not moves:
                self._undo(made)
                return [], key
            made += moves
        return made, ""

    def _resettle(self, key: str, but: str, why: str, bounds: _Bounds) -> list[Move]:
        """The pod goes elsewhere, not to the node `but`; where need be others move before for its sake."""
        pod = self.pods[key]
        nodes = self._nodes(pod, but)
        if (move := self._move(key, nodes, bounds.sake, why)) is not None:
            return [move]
        if not bounds.deep or bounds.most <= 0:
            return []
        before = self._room(pod.demand, nodes, replace(bounds, sake=key, deep=False))
        if before and (move := self._move(key, nodes, bounds.sake, why)) is not None:
            return [*before, move]
        self._undo(before)
        return []

    def _place_without(self, demand: Demand, node: str, gone: Sequence[str]) -> Placement:
        """Where on the node it fits when these are gone, who suffice."""
        before = {key: self.now.charges[key] for key in gone}
        for key in gone:
            self.now.release(key)
        found = self.now.fit(demand, node)
        for key, charge in before.items():
            self.now.charge(key, charge)
        assert isinstance(found, Placement), f"without {gone} it fits on {node}: {found}"  # noqa: S101 - a bug of ours
        return found

    # ---------------------------------------------------------------------------------------------------- more of all

    def improve(self, nodes: Collection[str] | None, most: int) -> list[Move]:
        """The group of moves with the most gained per move of those that are tried, again and again."""
        made: list[Move] = []
        while len(made) < most:
            moved = frozenset(move.key for move in made)
            found = self._best_group(nodes, most - len(made), moved)
            if not found:
                return made
            self._redo(found)
            made += found
        return made

    def _best_group(self, nodes: Collection[str] | None, most: int, moved: frozenset[str]) -> list[Move]:
        worth = self._worth(self.now.nodes)
        best: list[Move] = []
        best_gain = _LEAST_GAIN - _EXACT
        for _, _, node, uuid, keys in sorted(self._groups(nodes, most, moved))[:_MOST_GROUPS]:
            if not (found := self._try(node, uuid, keys)):
                continue
            touched = sorted({node, *(move.after.node for move in found)})
            after = self._worth(touched)
            gain = sum(after[name] - worth[name] for name in touched) / len(found)
            self._undo(found)
            if gain > best_gain + _EXACT:
                best, best_gain = found, gain
            if best_gain >= _GOOD_GAIN - _EXACT:
                break
        return best

    def _groups(
        self, nodes: Collection[str] | None, most: int, moved: frozenset[str]
    ) -> Iterator[tuple[int, int, str, str, tuple[str, ...]]]:
        """Pods that may leave a node together: how many, with how many slots; the node; its GPU that becomes whole ("":
        none does); their keys."""
        stranded = self.now.stranded()
        for name in sorted(self.now.nodes if nodes is None else self.now.nodes.keys() & {*nodes}):
            keys = self._movable(name, moved)
            held = self._held(keys)
            for device in self.now.nodes[name].devices:
                on = held.get(device.uuid, ())
                slots = sum(count for _, count in on)
                if not device.closed and 0 < len(on) <= most and slots == self.now.used_slots(device.uuid):
                    yield len(on), slots, name, device.uuid, tuple(key for key, _ in on)
            if stranded.get(name, 0.0) >= _LEAST_GAIN:
                by_cpu = sorted(keys, key=lambda key: (-self.now.charges[key].cpu_milli, key))
                for key in by_cpu[:_MOST_SINGLES]:
                    yield 1, sum(self.now.charges[key].gpus.values()), name, "", (key,)

    def _try(self, node: str, uuid: str, keys: Sequence[str]) -> list[Move]:
        """All of them go, or nobody."""
        why = f"makes {uuid} of {node} whole" if uuid else f"leaves CPU to the free GPUs of {node}"
        with self._closed(node, {uuid}):
            made, _ = self._all_leave(self._by_size(keys), "" if uuid else node, why, _Bounds("", len(keys)))
        return made

    def _worth(self, names: Iterable[str]) -> Mapping[str, float]:
        """Node -> GPUs: whole ones that can be used, less stranded ones."""
        lost = self.now.stranded()
        return {name: whole(rooms_of(self.now, self.now.nodes[name]), lost[name]) - lost[name] for name in names}

    # ------------------------------------------------------------------------------------------------------ its parts

    def _move(self, key: str, nodes: Collection[str] | None, sake: str, why: str) -> Move | None:
        """To the best of `nodes`, with what it has still charged; None: there is no room."""
        pod, before = self.pods[key], self.now.charges[key]
        placement = self.now.choose(pod.demand, nodes).placement
        if placement is None:
            return None
        after = placement.charge(pod.demand)
        self.now.charge(key, after)
        return Move(key, before, placement, after, sake, why)

    def _redo(self, moves: Sequence[Move]) -> None:
        for move in moves:
            self.now.charge(move.key, move.after)

    def _undo(self, moves: Sequence[Move]) -> None:
        for move in reversed(moves):
            self.now.charge(move.key, move.before)

    def _movable(self, node: str, moved: frozenset[str]) -> list[str]:
        return [
            key
            for key in sorted(self.now.charged(node))
            if key in self.pods and not self.pods[key].fixed and key not in moved
        ]

    def _nodes(self, pod: Settled, but: str) -> Collection[str] | None:
        """Where it may go, but not to this one; None: anywhere."""
        return pod.nodes if not but else frozenset(self.now.nodes if pod.nodes is None else pod.nodes) - {but}

    def _by_size(self, keys: Iterable[str]) -> list[str]:
        """Those with the most slots first: they are the hardest to place."""
        return sorted(keys, key=lambda key: (-sum(self.now.charges[key].gpus.values()), key))

    def _held(self, keys: Iterable[str]) -> Mapping[str, list[tuple[str, int]]]:
        """UUID -> who of them has how many slots of it."""
        held: dict[str, list[tuple[str, int]]] = {}
        for key in keys:
            for uuid, slots in self.now.charges[key].gpus.items():
                held.setdefault(uuid, []).append((key, slots))
        return held

    @contextmanager
    def _closed(self, name: str, uuids: Collection[str]) -> Iterator[None]:
        """Nobody comes to these GPUs of the node meanwhile."""
        node = self.now.nodes[name]
        shut = tuple(replace(one, closed=one.closed or _KEPT) if one.uuid in uuids else one for one in node.devices)
        self.now.put(replace(node, devices=shut))
        yield
        self.now.put(node)


def learned(fleet: Fleet, pods: Iterable[Settled]) -> Fleet:
    """A copy that has learned what the pods demand: of the default policy, whatever the fleet's own."""
    copy = Fleet()
    charged: dict[str, int] = {}
    for key in sorted(fleet.charges):
        copy.charge(key, fleet.charges[key])
        for uuid, slots in fleet.charges[key].gpus.items():
            charged[uuid] = charged.get(uuid, 0) + slots
    for name in sorted(fleet.nodes):
        copy.put(fleet.nodes[name])
        for device in fleet.nodes[name].devices:
            copy.hold(device.uuid, fleet.used_slots(device.uuid) - charged.get(device.uuid, 0))
    for pod in sorted(pods, key=lambda pod: pod.key):
        if pod.demand.asks:
            copy.observe(pod.demand)
    return copy


def _asked(demand: Demand) -> str:
    """``5 of hpe.com/gpus``, ``2 x 10 of ...``, ``3 + 5 of ...``."""
    slots = [ask.slots for ask in demand.asks]
    same = len(slots) > 1 and len({*slots}) == 1
    return f"{f'{len(slots)} x {slots[0]}' if same else ' + '.join(map(str, slots))} of {largest(demand).resource}"


def _gpus(placement: Placement) -> str:
    return ", ".join(sorted({uuid for gpus in placement.gpus.values() for uuid in gpus})) or "no GPU"
