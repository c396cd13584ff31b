"""The openb traces' files -> nodes and pods of the placement experiment, and made-up files of the same shape.

The format is that of alibaba/clusterdata, cluster-trace-gpu-v2023: a CSV file of nodes with the columns of
`_NODE_COLUMNS`, and one of pods with those of `_POD_COLUMNS` and, optionally, ``gpu_spec`` (models that will do, with
``|`` between them); other columns are left alone. Every fault of a file is found, with line and column.

A pod of several GPUs becomes a container for each, so that each is given a device with room for it. Shares are whole
slots of a GPU, rounded up: `SLOTS` of them represent the published traces exactly.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from meshctl.api.document import Fault, ManifestError, Place, read_bounded
from meshctl.core.packing.vocabulary import Ask, Demand, Device, Node
from meshctl.errors import InputError

GPU_MILLI = 1000
"""A whole GPU."""
SLOTS = 100
"""Per GPU: all shares of the published traces are multiples of 10 milli; 10 slots would ask for 11 % more."""
MAX_GPUS = 64
"""Of one node or pod; the traces have up to 8."""
MAX_MILLI = 10**9
"""Of a node's CPU (a million cores) and memory: what is larger is a mistake."""
MAX_FAULTS = 20
"""Reported of one file: who swapped two columns need not read eight thousand."""
ENVIRONMENT = "OPENB_DIR"
DEFAULT_DIR = "../shared/openb"
"""Relative to the root of the repository."""
ORIGIN = "they come from https://github.com/alibaba/clusterdata, cluster-trace-gpu-v2023/csv"
NODES_FILE = "openb_node_list_gpu_node.csv"
TRACES = ("default", "gpushare40", "gpushare100", "multigpu20")

_NODE_COLUMNS = ("sn", "cpu_milli", "memory_mib", "gpu", "model")
_POD_COLUMNS = ("name", "cpu_milli", "memory_mib", "num_gpu", "gpu_milli")


@dataclass(frozen=True, slots=True)
class Pod:
    """One pod of a trace."""

    name: str
    demand: Demand
    gpu_milli: int
    """Of all its GPUs together, as asked for: 8000 are eight whole ones."""


class Trace(NamedTuple):
    """A cluster, and what is asked of it."""

    nodes: tuple[Node, ...]
    pods: tuple[Pod, ...]

    @property
    def gpu_milli(self) -> int:
        """All GPUs of the cluster."""
        return GPU_MILLI * sum(len(node.devices) for node in self.nodes)


def load(nodes: Path, pods: Path, slots: int = SLOTS) -> Trace:
    """The trace of two files. Raises InputError; ManifestError, which is one, has every fault of a file."""
    cluster = parse_nodes(_text(nodes), str(nodes), slots)
    return Trace(cluster, parse_pods(_text(pods), str(pods), slots))


def published(name: str, directory: Path) -> Trace:
    """One of `TRACES`. Raises ManifestError when its files are not in `directory`."""
    return load(directory / NODES_FILE, directory / f"openb_pod_list_{name}.csv")


def find(root: Path) -> Path | None:
    """Where the published traces are, if they are: $OPENB_DIR, or `DEFAULT_DIR` from `root`, the repository's.

    They are not part of the project: `ORIGIN`.
    """
    found = Path(os.environ.get(ENVIRONMENT, "") or root / DEFAULT_DIR)
    return found if (found / NODES_FILE).is_file() else None


def parse_nodes(text: str, file: str, slots: int = SLOTS) -> tuple[Node, ...]:
    """The nodes of a file's `text`; `file` is its name in messages."""
    table = _Table(text, file, _NODE_COLUMNS)
    nodes = tuple(_node(row, slots) for row in table.rows("sn"))
    if not any(node.devices for node in nodes) and not table.faults:
        table.fault(1, "gpu", "no node has a GPU: give at least one that has")
    table.finish()
    return nodes


def parse_pods(text: str, file: str, slots: int = SLOTS) -> tuple[Pod, ...]:
    """The pods of a file's `text`, in its order."""
    table = _Table(text, file, _POD_COLUMNS)
    pods = tuple(_pod(row, slots) for row in table.rows("name"))
    if not any(pod.gpu_milli for pod in pods) and not table.faults:
        table.fault(1, "num_gpu", "no pod asks for a GPU: give at least one that does")
    table.finish()
    return pods


def _node(row: _Row, slots: int) -> Node:
    name, gpus = row.text("sn"), row.number("gpu", MAX_GPUS)
    model = row.text("model") if gpus else ""
    devices = tuple(Device(f"{name}-gpu-{index:02}", slots, model) for index in range(gpus))
    return Node(name, row.number("cpu_milli", MAX_MILLI), row.number("memory_mib", MAX_MILLI), devices)


def _pod(row: _Row, slots: int) -> Pod:
    gpus, milli = row.number("num_gpu", MAX_GPUS), row.number("gpu_milli", GPU_MILLI)
    if bool(gpus) != bool(milli):
        row.fault("gpu_milli", f"is {milli} where num_gpu is {gpus}: both are 0, or neither")
    asks = tuple(Ask(f"gpu-{index:02}", -(-milli * slots // GPU_MILLI)) for index in range(gpus if milli else 0))
    models = frozenset(filter(None, (part.strip() for part in row.optional("gpu_spec").split("|"))))
    cpu, memory = row.number("cpu_milli", MAX_MILLI), row.number("memory_mib", MAX_MILLI)
    return Pod(row.text("name"), Demand(cpu, memory, asks, models or None), gpus * milli)


def _text(path: Path) -> str:
    content = read_bounded(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}:{line}: byte 0x{content[error.start]:02x} is not UTF-8: save the file as such"
        ) from error


class _Kind(NamedTuple):
    """Nodes or pods that are alike: how many of a thousand, and the fields of their lines after the name."""

    per_mille: int
    fields: tuple[int | str, ...]


_NODE_KINDS = (
    _Kind(450, (96_000, 786_432, 8, "G2")),
    _Kind(320, (104_000, 786_432, 2, "T4")),
    _Kind(100, (64_000, 262_144, 2, "P100")),
    _Kind(70, (32_000, 262_144, 4, "V100M16")),
    _Kind(60, (128_000, 786_432, 8, "G3")),
)
_POD_KINDS = (
    _Kind(130, (8_000, 32_768, 0, 0, "")),
    _Kind(70, (4_000, 15_258, 1, 110, "")),
    _Kind(60, (4_000, 15_258, 1, 220, "")),
    _Kind(120, (8_000, 30_517, 1, 440, "")),
    _Kind(120, (6_000, 12_288, 1, 460, "")),
    _Kind(210, (8_000, 30_517, 1, 1000, "")),
    _Kind(220, (12_000, 24_576, 1, 1000, "")),
    _Kind(40, (12_000, 32_768, 1, 1000, "T4|P100")),
    _Kind(20, (32_000, 131_072, 4, 1000, "")),
    _Kind(10, (88_000, 327_680, 8, 1000, "")),
)


def made_up(nodes: int, pods: int, seed: int) -> tuple[str, str]:
    """The texts of a node file and a pod file of the traces' shape: shares, whole GPUs, several, CPU alone, models."""
    random = np.random.default_rng(seed)
    return _file(_NODE_COLUMNS, "node", _NODE_KINDS, nodes, random), _file(
        (*_POD_COLUMNS, "gpu_spec"), "pod", _POD_KINDS, pods, random
    )


def _file(columns: Sequence[str], name: str, kinds: Sequence[_Kind], count: int, random: np.random.Generator) -> str:
    weights = np.array([kind.per_mille for kind in kinds]) / 1000
    drawn = random.choice(len(kinds), size=count, p=weights)
    lines = (",".join(map(str, (f"{name}-{number:04}", *kinds[kind].fields))) for number, kind in enumerate(drawn))
    return "\n".join((",".join(columns), *lines)) + "\n"


class _Table:
    """The lines of a CSV file with a header, and what is wrong with them."""

    def __init__(self, text: str, file: str, columns: Sequence[str]) -> None:
        self.faults: list[Fault] = []
        self._file = file
        self._reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = self._next() or []
        self._columns = {name.strip(): index for index, name in enumerate(header)}
        if missing := [name for name in columns if name not in self._columns]:
            self.fault(1, "", f"no column {', '.join(missing)}: the header must have {','.join(columns)}")
        self._usable = not self.faults

    def rows(self, key: str) -> Iterator[_Row]:
        """Every line that has a field for each column; its `key` is checked to be the only one of that name."""
        seen: set[str] = set()
        while self._usable and (fields := self._next()) is not None:
            line = self._reader.line_num
            if not fields:
                continue
            if len(fields) != len(self._columns):
                self.fault(line, "", f"{len(fields)} fields, {len(self._columns)} in the header: give one for each")
                continue
            row = _Row(self, line, fields)
            if (name := row.text(key)) in seen:
                row.fault(key, f"{name!r} is there twice: names must differ")
            seen.add(name)
            yield row

    def column(self, name: str) -> int | None:
        return self._columns.get(name)

    def fault(self, line: int, field: str, message: str) -> None:
        column = self._columns.get(field, 0) + 1
        self.faults.append(Fault(Place(self._file, line, column), field, message))

    def finish(self) -> None:
        """Raises ManifestError if anything was wrong."""
        if self.faults:
            raise ManifestError(tuple(self.faults[:MAX_FAULTS]))

    def _next(self) -> list[str] | None:
        """The fields of the next line; None at the end, and at what is no CSV."""
        try:
            return next(self._reader, None)
        except csv.Error as error:
            self.fault(self._reader.line_num, "", f"not CSV: {error}: put such a field in double quotes")
            return None


class _Row(NamedTuple):
    """One line. A bad field is reported, and read as something harmless so that the others are looked at too."""

    table: _Table
    line: int
    fields: Sequence[str]

    def fault(self, column: str, message: str) -> None:
        self.table.fault(self.line, column, message)

    def optional(self, column: str) -> str:
        index = self.table.column(column)
        return "" if index is None else self.fields[index].strip()

    def text(self, column: str) -> str:
        if not (found := self.optional(column)):
            self.fault(column, "is empty: give a name")
        return found

    def number(self, column: str, largest: int) -> int:
        text = self.optional(column)
        # isascii: str.isdigit takes a superscript two, which int() refuses; len: int() of a million digits is slow
        if text.isascii() and text.isdigit() and len(text) <= len(str(largest)) and int(text) <= largest:
            return int(text)
        self.fault(column, f"{text[:40]!r} is no whole number from 0 to {largest}: give one")
        return 0
