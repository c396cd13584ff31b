"""A packing map of GPUs for the terminal: GPU objects and a time in, something that rich draws out. Pure.

One cell is one slot: the letter of the container that holds it, or a mark for one that nobody holds. Letters count
anew on each node, and the legend below the node says for each letter which slots of which GPU it stands for, so that
the map reads the same without colour. Bars stay whole where they fit; where they don't, the product's name gives way
first, then a bar goes on in the next line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import chain, groupby, pairwise
from types import MappingProxyType

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from meshctl.api.gpu import GPU, GPUSlots, GPUStatus
from meshctl.controller.gpupolicies import SILENT_AFTER
from meshctl.sharing import Mode, MpsPhase, Owner

FREE, STARTING, UNAVAILABLE = "·", "?", "×"
_ASCII = str.maketrans({FREE: ".", UNAVAILABLE: "#"})
_LATIN = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_LETTERS = _LATIN + "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπστφχψωБДЖИЛЦЧШЩЭЮЯ"
"""One cell each, no two alike; 100 at least: a GPU has at most so many holders, each with a letter of its own there."""
_COLOURS = ("cyan", "green", "yellow", "magenta", "bright_blue", "white", "bright_cyan", "bright_green",
            "bright_yellow", "bright_magenta", "bright_red", "bright_white")  # fmt: skip
"""Black is read on each; on plain blue and red it is not."""
_LEAST_STRANDED = 0.05
"""GPUs: less would be drawn as 0.0."""
_NARROWEST_BAR = 20
_NARROWEST_PRODUCT = 8
_MARKS = {STARTING: "yellow", FREE: "dim", UNAVAILABLE: "red"}
_FAILED = {"Healthy": "unhealthy", "Shared": "not shared as wanted", "WithinLimits": "over its limits"}
"""What a condition that is False says of the GPU."""


@dataclass(frozen=True, slots=True)
class Beyond:
    """What GPU objects don't say."""

    stranded: Mapping[str, float] = field(default_factory=dict)
    """Node -> free GPUs that nobody can use for want of CPU."""
    asked: Sequence[tuple[str, int]] = ()
    """Resource and slots that each waiting container asks for."""


@dataclass(frozen=True, slots=True)
class Totals:
    """The slots of one resource on some GPUs."""

    resource: str
    total: int
    used: int
    free: int
    unavailable: int
    largest_free: int
    """Free slots of the GPU that has most: no container gets more (unless its policy allows several GPUs)."""
    least_asked: int = 0
    """Slots of the container that has or wants the fewest; 0: of none is known."""
    in_pieces: int = 0
    """Free slots of GPUs that have fewer free than that."""

    def __str__(self) -> str:
        said = f"{self.resource} {self.used} of {self.total} used, {self.free} free"
        if self.free > self.largest_free:
            said += f", but at most {self.largest_free} on one GPU"
        if self.in_pieces:
            said += f", {self.in_pieces} in pieces below {self.least_asked}"
        return said + (f", {self.unavailable} unavailable" if self.unavailable else "")


def least_asked(gpus: Iterable[GPU], asked: Iterable[tuple[str, int]] = ()) -> Mapping[str, int]:
    """Resource -> slots of the container that has the fewest, or waits for them."""
    least: dict[str, int] = {}
    held = ((_resource(gpu), len(numbers)) for gpu in gpus for numbers in _held(gpu).values())
    for resource, slots in chain(held, asked):
        least[resource] = min(slots, least.get(resource, slots))
    return least


def totals(gpus: Iterable[GPU], least: Mapping[str, int] = MappingProxyType({})) -> list[Totals]:
    """By resource, in order of its name; `least`: as `least_asked` says. GPUs without slots count nowhere."""
    by_resource: dict[str, list[GPUSlots]] = {}
    for gpu in gpus:
        if gpu.status and gpu.status.slots and gpu.status.slots.total:
            by_resource.setdefault(_resource(gpu), []).append(gpu.status.slots)
    return [
        Totals(
            resource,
            total=sum(slots.total for slots in found),
            used=sum(slots.used for slots in found),
            free=sum(slots.free for slots in found),
            unavailable=sum(slots.unavailable for slots in found),
            largest_free=max(slots.free for slots in found),
            least_asked=least.get(resource, 0),
            in_pieces=sum(slots.free for slots in found if slots.free < least.get(resource, 0)),
        )
        for resource, found in sorted(by_resource.items())
    ]


def letters(gpus: Iterable[GPU]) -> Mapping[Owner, str]:
    """Of one node's GPUs: each holder's letter, in order of the GPUs and slots."""
    owners = dict.fromkeys(owner for gpu in gpus for owner in _held(gpu))
    return {owner: _LETTERS[place % len(_LETTERS)] for place, owner in enumerate(owners)}


def cells(gpu: GPU, of: Mapping[Owner, str]) -> list[tuple[str, Owner | None]]:
    """One character per slot, and who holds it. Which slots are promised to starting containers nobody says: the
    first that are not held stand for them."""
    slots = gpu.status.slots if gpu.status else None
    if slots is None:
        return []
    holders = {number: owner for owner, numbers in _held(gpu).items() for number in numbers}
    starting = max(0, slots.used - len(holders))
    rest = iter(STARTING * starting + FREE * slots.free + UNAVAILABLE * slots.unavailable)
    return [
        (of[holders[number]], holders[number]) if number in holders else (next(rest, UNAVAILABLE), None)
        for number in range(max(slots.total, 1 + max(holders, default=-1)))
    ]


def spans(numbers: Sequence[int]) -> str:
    """``0-2,5`` for 0, 1, 2, 5; `numbers` ascending."""
    breaks = [0, *(i for i, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1), len(numbers)]
    runs = [numbers[a:b] for a, b in pairwise(breaks) if a < b]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def short_names(uuids: Iterable[str]) -> Mapping[str, str]:
    """UUID -> the fewest of its parts that no other begins with, two at least: GPU-5f0a1b2c."""
    parts = {uuid: uuid.split("-") for uuid in uuids}
    count = 2
    while len({tuple(p[:count]) for p in parts.values()}) < len(parts):
        count += 1
    return {uuid: "-".join(p[:count]) for uuid, p in parts.items()}


class GpuMap:
    """Draws GPU objects as they were at `now`; rich asks for it with the width there is."""

    def __init__(self, gpus: Iterable[GPU], now: datetime, beyond: Beyond | None = None) -> None:
        self._gpus = sorted(gpus, key=lambda gpu: (gpu.spec.node, gpu.spec.uuid))
        self._now = now
        self._stranded = beyond.stranded if beyond else {}
        self._least = least_asked(self._gpus, beyond.asked if beyond else ())
        self._names = short_names(gpu.spec.uuid for gpu in self._gpus)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = _Widths.of(self._gpus, self._names, options.max_width)
        nodes = [(node, list(gpus)) for node, gpus in groupby(self._gpus, key=lambda gpu: gpu.spec.node)]
        for node, gpus in nodes:
            yield Text.assemble((f"{node}  ", "bold"), self._said(gpus), overflow="fold")
            yield from self._node(gpus, widths, ascii_only=options.ascii_only)
            yield ""
        yield self._key(ascii_only=options.ascii_only)
        if len(nodes) > 1:
            yield Text(f"{len(nodes)} nodes, {len(self._gpus)} GPUs: {self._said(self._gpus)}", style="bold")

    def _said(self, gpus: Sequence[GPU]) -> str:
        said = "; ".join(map(str, totals(gpus, self._least))) or "no slots"
        stranded = sum(self._stranded.get(node, 0.0) for node in {gpu.spec.node for gpu in gpus})
        return said + (f"; {stranded:.1f} GPUs stranded for want of CPU" if stranded >= _LEAST_STRANDED else "")

    def _node(self, gpus: Sequence[GPU], widths: _Widths, *, ascii_only: bool) -> RenderResult:
        of = letters(gpus)
        if ascii_only:
            of = {owner: _LATIN[place % len(_LATIN)] for place, owner in enumerate(of)}
        styles = {owner: f"black on {_COLOURS[place % len(_COLOURS)]}" for place, owner in enumerate(of)}
        for gpu in gpus:
            yield widths.row(self._names[gpu.spec.uuid], gpu, _bar(gpu, of, styles, ascii_only=ascii_only))
            for note, style in _notes(gpu, self._now):
                yield Padding(Text(note, style=style, overflow="fold"), (0, 0, 0, 4), expand=False)
        yield self._legend(gpus, of, styles)

    def _legend(self, gpus: Sequence[GPU], of: Mapping[Owner, str], styles: Mapping[Owner, str]) -> Table:
        where: dict[Owner, list[str]] = {}
        for gpu in gpus:
            for owner, numbers in _held(gpu).items():
                where.setdefault(owner, []).append(f"{self._names[gpu.spec.uuid]}: {spans(numbers)}")
        table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column(width=4)
        table.add_column(overflow="fold")
        table.add_column(overflow="fold")
        for owner, letter in of.items():
            table.add_row(
                Text.assemble("   ", (letter, styles[owner])), Text(str(owner)), Text("; ".join(where[owner]))
            )
        return table

    def _key(self, *, ascii_only: bool) -> Text:
        """What the marks mean, those only that are there."""
        shown = {mark for gpu in self._gpus for mark, owner in cells(gpu, letters([gpu])) if owner is None}
        meanings = ((STARTING, "promised to a container that starts"), (FREE, "free"), (UNAVAILABLE, "unavailable"))
        text = ", ".join(f"{mark} {words}" for mark, words in meanings if mark in shown)
        return Text(text.translate(_ASCII) if ascii_only else text, style="dim")


@dataclass(frozen=True, slots=True)
class _Widths:
    """Of the columns, the same on every node."""

    name: int
    bar: int
    summary: int
    product: int
    memory: int
    state: int

    @classmethod
    def of(cls, gpus: Sequence[GPU], names: Mapping[str, str], width: int) -> _Widths:
        name = max((len(text) for text in names.values()), default=0)
        summary = max((len(_summary(gpu)) for gpu in gpus), default=0)
        product = max((cell_len(_product(gpu)) for gpu in gpus), default=0)
        memory = max((len(_memory(gpu)) for gpu in gpus), default=0)
        state = max((len(_state(gpu)) for gpu in gpus), default=0)
        bar = max((len(cells(gpu, letters([gpu]))) for gpu in gpus), default=0) or len("-")
        left = width - (2 + name + summary + memory + state + 5 * 2)  # for the bar and the product
        narrow = min(product, _NARROWEST_PRODUCT)
        bar = min(bar, max(left - (product if bar > left - narrow else narrow), _NARROWEST_BAR))
        return cls(name, bar, summary, max(min(product, left - bar), narrow), memory, state)

    def row(self, name: str, gpu: GPU, bar: Text) -> Table:
        table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column(width=self.name + 2, no_wrap=True)
        table.add_column(width=self.bar, overflow="fold")
        table.add_column(width=self.summary, justify="right", no_wrap=True)
        table.add_column(width=self.product, no_wrap=True, overflow="ellipsis")
        table.add_column(width=self.memory, justify="right", no_wrap=True)
        table.add_column(no_wrap=True)
        style = "red" if _condition(gpu, "Healthy") == "False" else ""
        table.add_row(f"  {name}", bar, _summary(gpu), escape(_product(gpu)), _memory(gpu), Text(_state(gpu), style))
        return table


def _bar(gpu: GPU, of: Mapping[Owner, str], styles: Mapping[Owner, str], *, ascii_only: bool) -> Text:
    drawn = ((mark, styles[owner] if owner else _MARKS[mark]) for mark, owner in cells(gpu, of))
    parts = [(mark.translate(_ASCII) if ascii_only and mark in _MARKS else mark, style) for mark, style in drawn]
    return Text.assemble(*parts) if parts else Text("-", style="dim")


def _held(gpu: GPU) -> Mapping[Owner, tuple[int, ...]]:
    """Slots of each holder, in order of the slots."""
    found: dict[Owner, set[int]] = {}
    for holder in (gpu.status.holders if gpu.status else None) or ():
        found.setdefault(Owner(holder.namespace, holder.pod, holder.container), set()).update(holder.slots)
    return dict(sorted(((o, tuple(sorted(numbers))) for o, numbers in found.items()), key=lambda held: held[::-1]))


def _resource(gpu: GPU) -> str:
    return (gpu.status.resource_name if gpu.status else None) or "slots"


def _summary(gpu: GPU) -> str:
    slots = gpu.status.slots if gpu.status else None
    return f"{slots.used}/{slots.total}" if slots else "-"


def _product(gpu: GPU) -> str:
    return ((gpu.status.product if gpu.status else None) or "-").removeprefix("NVIDIA ").removeprefix("NVIDIA-")


def _memory(gpu: GPU) -> str:
    return (gpu.status.memory if gpu.status else None) or "-"


def _state(gpu: GPU) -> str:
    """How it is shared, and by what, in a word or three."""
    status = gpu.status
    if status is None or status.mode is None:
        return "not shared"
    said = str(status.mode)
    if _condition(gpu, "Healthy") == "False":
        return f"{said}, unhealthy"
    if status.mode is Mode.MPS and status.mps is not None:
        return f"{said}, {_clients(status)}" if status.mps.state is MpsPhase.RUNNING else f"{said} {status.mps.state}"
    return said


def _clients(status: GPUStatus) -> str:
    clients = status.mps.clients if status.mps else None
    return "running" if clients is None else f"{clients} client{'s' * (clients != 1)}"


def _condition(gpu: GPU, name: str) -> str:
    """True, False or Unknown."""
    conditions = (gpu.status.conditions if gpu.status else None) or ()
    return next((condition.status for condition in conditions if condition.type == name), "Unknown")


def _notes(gpu: GPU, now: datetime) -> Iterator[tuple[str, str]]:
    """What there is to know of it beyond its line, with a style."""
    status = gpu.status
    if status is None:
        yield "its agent has said nothing of it yet", "yellow"
        return
    failed = [one for one in status.conditions or () if one.status == "False" and one.type in _FAILED]
    for place, one in enumerate(failed):
        if one.reason in (before.reason for before in failed[:place]):
            continue  # not shared as wanted for want of MPS, of which it is ill
        words = f": {one.message}" if one.message else ""
        yield f"{_FAILED[one.type]} ({one.reason}){words}", "red" if one.type == "Healthy" else ""
    if status.mps and status.mps.message and not any(status.mps.message in one.message for one in failed):
        yield f"MPS {status.mps.state}: {status.mps.message}", "yellow"
    if status.tenant:
        yield f"only for namespace {status.tenant}, as long as its pods are on it", "dim"
    if status.heartbeat and (silent := _age(status.heartbeat, now)) > SILENT_AFTER:
        yield (
            f"its agent has said nothing for {silent.total_seconds() / 60:.0f} minutes: all of this may be old",
            "yellow",
        )


def _age(time: str, now: datetime) -> timedelta:
    """0 for what is no time: nothing is concluded from it."""
    try:
        return now - datetime.fromisoformat(time)
    except (ValueError, TypeError):  # a time without a zone can't be compared
        return timedelta()
