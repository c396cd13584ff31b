"""What `meshctl gpu plan` proposes: as data for programs, as text with commands for people. Executes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from meshctl.cli.gpu_map import short_names
from meshctl.cli.gpu_site import Site
from meshctl.core.packing.defrag import Move, Plan, plan
from meshctl.core.packing.measure import Measure
from meshctl.core.packing.vocabulary import Ask, Demand
from meshctl.errors import InputError

_NOTES_SHOWN = 5
_NO_NODES = "no node is open for it: they are cordoned, not ready, tainted, or not selected"
_FIGURES: Mapping[str, str] = {
    "usable_slots": "slots that can be used so",
    "free_slots": "free slots",
    "largest_ask": "largest ask that fits on one GPU",
    "whole_gpus": "whole GPUs",
    "stranded_gpus": "GPUs stranded for want of CPU",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the options say."""

    slots: int | None = None
    resource: str = ""
    cpu_milli: int = 0
    memory_mib: int = 0
    pod: str = ""
    """NAMESPACE/NAME; "": none."""
    nodes: frozenset[str] = frozenset()
    """None named: all."""
    max_moves: int = 10


class Proposal:
    """A plan for a site, with names of pods."""

    def __init__(self, site: Site, wanted: Wanted) -> None:
        """Raises InputError for nodes or a pod that are not there."""
        self.site = site
        self.wanted = wanted
        nodes = _nodes(site, wanted.nodes) & site.in_use
        demand: Demand | None = None
        if wanted.pod:
            if (waiting := site.waiting.get(wanted.pod)) is None:
                waits = ", ".join(sorted(site.waiting)[:20]) or "none"
                raise InputError(f"no pod {wanted.pod} waits for slots; those that do: {waits}")
            demand, nodes = waiting.demand, nodes & waiting.nodes
        elif wanted.slots is not None:
            ask = Ask("", wanted.slots, wanted.resource)
            demand = Demand(wanted.cpu_milli, wanted.memory_mib, (ask,))
        found = plan(site.fleet, site.pods, demand, nodes, wanted.max_moves)
        self.plan: Plan = found if nodes else replace(found, why=_NO_NODES)
        self.demand = demand

    @property
    def goal(self) -> str:
        if self.wanted.pod:
            return f"room for pod {self.wanted.pod}"
        if self.wanted.slots is not None:
            return f"room for {self.wanted.slots} of {self.wanted.resource} on one GPU"
        return "more GPUs whole, fewer stranded"

    def pod(self, key: str) -> str:
        return f"{self.site.seen[key].namespace}/{self.site.seen[key].name}"

    # ----------------------------------------------------------------------------------------------------------- data

    def data(self) -> dict[str, Any]:
        placement = self.plan.placement
        return {
            "goal": self.goal,
            "executed": False,
            "why": self.plan.why,
            "moves": [self._move(move) for move in self.plan.moves],
            "fits": None if placement is None else {"node": placement.node, "gpus": self._merged()},
            "before": asdict(self.plan.before),
            "after": asdict(self.plan.after),
            "commands": list(self.commands()),
            "notes": list(self.site.notes),
        }

    def _merged(self) -> dict[str, int]:
        assert self.plan.placement is not None  # noqa: S101 (for mypy)
        return dict(self.plan.placement.charge(self.demand or Demand()).gpus)

    def _move(self, move: Move) -> dict[str, Any]:
        seen = self.site.seen[move.key]
        return {
            "namespace": seen.namespace,
            "pod": seen.name,
            "owner": seen.owner,
            "from": {"node": move.before.node, "gpus": dict(move.before.gpus)},
            "to": {"node": move.after.node, "gpus": dict(move.after.gpus)},
            "for": self.pod(move.sake) if move.sake else None,
            "why": move.why,
        }

    def commands(self) -> Iterator[str]:
        """What somebody could run, in this order."""
        for move in self.plan.moves:
            seen, node = self.site.seen[move.key], move.before.node
            delete = f"kubectl delete pod --namespace={seen.namespace} {seen.name}"
            if move.after.node == node:
                yield delete
                continue
            in_use = node in self.site.in_use
            yield from (f"kubectl cordon {node}", delete, f"kubectl uncordon {node}") if in_use else (delete,)

    # ----------------------------------------------------------------------------------------------------------- text

    def text(self) -> RenderableType:
        parts: list[RenderableType] = [Text(f"{self.goal}: {self._result()}", style="bold")]
        if self.plan.moves:
            parts += ["", self._table(), "", _figures(self.plan.before, self.plan.after), "", self._how()]
        else:
            parts += ["", _figures(self.plan.before, self.plan.after)]
        notes = self.site.notes
        parts += [f"[yellow]{escape(note)}[/]" for note in notes[:_NOTES_SHOWN]]
        if len(notes) > _NOTES_SHOWN:
            parts.append(f"[yellow]and {len(notes) - _NOTES_SHOWN} more such notes; -o json shows all[/]")
        return Group(*parts)

    def _result(self) -> str:
        if not self.plan.moves:
            return self.plan.why + (f" ({self._there()})" if self.plan.placement else "")
        count = len(self.plan.moves)
        moves = f"{count} move{'s' * (count != 1)} proposed, nothing was changed"
        return f"{moves}; then it fits: {self._there()}" if self.plan.placement else moves

    def _there(self) -> str:
        assert self.plan.placement is not None  # noqa: S101 (for mypy)
        return ", ".join((self.plan.placement.node, *(f"{n} of {uuid}" for uuid, n in self._merged().items())))

    def _table(self) -> Table:
        uuids = {uuid for move in self.plan.moves for side in (move.before, move.after) for uuid in side.gpus}
        names = short_names(sorted(uuids))
        table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        for _ in range(6):
            table.add_column(overflow="fold")
        for number, move in enumerate(self.plan.moves, 1):
            sides = (
                f"{side.node} {', '.join(f'{names[u]}: {n}' for u, n in side.gpus.items())}".rstrip()
                for side in (move.before, move.after)
            )
            why = f"{move.why}{f', for {self.pod(move.sake)}' if move.sake else ''}"
            where, to = sides
            table.add_row(*map(Text, (f"{number}.", self.pod(move.key), where, "->", to, why)))
        return table

    def _how(self) -> Text:
        head = (
            "Moves are yours to make. For each in its order: keep the pod's replacement off the old node, end the pod,"
            " wait until the replacement is ready; then look again, since it may have gone elsewhere. Where its owner"
            " may have one more for a while, scale it up first and end the old pod last."
        )
        return Text("\n".join((head, *(f"  {line}" for line in self.commands()))), overflow="fold")


def _nodes(site: Site, named: Collection[str]) -> frozenset[str]:
    known = frozenset(site.fleet.nodes)
    if unknown := sorted({*named} - known):
        there = ", ".join(sorted(known)[:20]) or "none"
        raise InputError(f"no node {', '.join(unknown)}; there are: {there}")
    return frozenset(named) or known


def _figures(before: Measure, after: Measure) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_row("", "now", "then")
    for name, words in _FIGURES.items():
        then, now = getattr(after, name), getattr(before, name)
        table.add_row(words, *(f"{value:.2f}" if isinstance(value, float) else str(value) for value in (now, then)))
    return table
