"""YAML text -> plain data plus the line and column of every field, and faults that name all of them.

Invariant: whatever the text is, `parse` returns documents or raises `ManifestError` with a place, in bounded time and
memory: the text is at most `MAX_BYTES`, aliases expand to at most `MAX_NODES` values, nesting is at most `MAX_DEPTH`.
Keys are always strings, as in JSON, so that ``{1: 5ms}`` and ``{"1": 5ms}`` say the same. What YAML 1.1 and 1.2 read
differently is read as kubectl does, so that a file means the same in a directory and in a cluster: ``yes`` and ``off``
are booleans, ``010`` is eight, ``8e3`` is the integer 8000.

Rejected: ruamel's round-trip objects, which know lines too, but share what an alias repeats (so nothing bounds a later
walk over them) and keep comments and styles nobody asks for here; a second parser for JSON, which is YAML already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from meshctl.errors import InputError
from meshctl.model import Problem, RouteId

MAX_BYTES = 4 << 20
"""Of one file; etcd takes at most 1.5 MiB for one object, and 4 MiB parse in about 15 s."""
MAX_NODES = 1_000_000
"""Values of one file after aliases are expanded; a 4 MiB file without aliases has fewer."""
MAX_DEPTH = 32
"""Of nesting; the deepest field of the API is at 7."""

_BOOLEANS = {word: truth for truth, words in ((True, "y yes on"), (False, "n no off")) for word in words.split()}
_EXACT = 2**53
"""Whole numbers below this are exact as floats."""

FieldPath = tuple[str | int, ...]
_TAG = "tag:yaml.org,2002:"


class Severity(StrEnum):
    ERROR = "error"
    """The object (or file) can't be used."""
    WARNING = "warning"
    """It is used, with something to know about it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands; line and column count from 1, as editors do; 0: it is not text, `file` says what."""

    file: str
    line: int = 1
    column: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with the input: where, which field, what, and what to do."""

    place: Place
    field: str
    """``spec.slo.latency``; "" when the whole document or file is meant."""
    message: str
    """Names the bad value and ends with what to do."""
    subject: str = ""
    """The object: ``ModelRoute default/resnet``; "" when it has no name that can be read."""
    severity: Severity = Severity.ERROR

    def __str__(self) -> str:
        warning = "warning" if self.severity is Severity.WARNING else ""
        return ": ".join(filter(None, (str(self.place), warning, self.field, self.message)))

    def problem(self) -> Problem:
        """The same for the loop and its status."""
        kind, _, name = self.subject.partition(" ")
        route = RouteId(name) if kind == "ModelRoute" else None
        subject = "" if self.subject == str(self.place) else self.subject
        return Problem(str(self.place), ": ".join(filter(None, (subject, self.field, self.message))), route)


class ManifestError(InputError):
    """Input that can't be used; `faults` has every reason found, in the order of the text."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        super().__init__("\n".join(map(str, faults)))
        self.faults = faults


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML document: plain data (dicts with string keys, lists, strings, numbers, bools, None)."""

    data: Any
    file: str
    marks: Mapping[FieldPath, tuple[int, int]]

    def place(self, path: FieldPath = ()) -> Place:
        """Where the field stands; its nearest parent when the field itself is missing."""
        while path not in self.marks and path:
            path = path[:-1]
        return Place(self.file, *self.marks.get(path, (1, 1)))

    def fault(self, path: FieldPath, message: str) -> Fault:
        return Fault(self.place(path), field_name(path), message)


def field_name(path: FieldPath) -> str:
    """``("spec", "classes", 0, "min")`` -> ``spec.classes[0].min``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def read_bounded(path: Path) -> bytes:
    """The file's bytes. Raises ManifestError when it can't be read or is larger than `MAX_BYTES`."""
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise _error(str(path), 1, 1, f"cannot be read: {error.strerror or error}") from error
    if len(content) > MAX_BYTES:
        raise _error(str(path), 1, 1, f"is larger than {MAX_BYTES >> 20} MiB; split it into several files")
    return content


def parse(content: bytes, file: str) -> list[Document]:
    """The documents of a file, empty ones left out. Raises ManifestError at the first thing that is not YAML."""
    try:
        nodes = YAML(typ="safe", pure=True).compose_all(content.decode("utf-8-sig"))
        budget = _Budget(file)
        return [document for node in nodes if node for document in [budget.document(node)] if document.data is not None]
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _error(file, line, 1, f"is not UTF-8 text (byte 0x{content[error.start]:02x})") from error
    except ReaderError as error:
        lines = content.decode("utf-8-sig")[: error.position].split("\n")
        raise _error(file, len(lines), len(lines[-1]) + 1, f"is not YAML: {error.reason}") from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        context = f" ({error.context})" if error.context else ""
        raise _error(file, line, column, f"is not YAML: {error.problem or error}{context}") from error
    except YAMLError as error:
        raise _error(file, 1, 1, f"is not YAML: {error}") from error
    except RecursionError as error:
        raise _error(file, 1, 1, f"is nested too deeply; at most {MAX_DEPTH} levels are read") from error


def _error(file: str, line: int, column: int, message: str) -> ManifestError:
    return ManifestError((Fault(Place(file, line, column), "", message),))


@dataclass(slots=True)
class _Budget:
    """Turns one file's nodes into data, counting what aliases expand to."""

    file: str
    nodes: int = 0
    marks: dict[FieldPath, tuple[int, int]] = field(default_factory=dict)

    def document(self, node: Any) -> Document:
        self.marks = {(): _mark(node)}
        return Document(self.value(node, ()), self.file, self.marks)

    def value(self, node: Any, path: FieldPath) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise _error(self.file, *_mark(node), f"has more than {MAX_NODES} values; use fewer aliases")
        if len(path) > MAX_DEPTH:
            raise _error(self.file, *_mark(node), f"is nested too deeply; at most {MAX_DEPTH} levels are read")
        match node:
            case MappingNode():
                return self.mapping(node, path)
            case SequenceNode():
                return [self.item(child, (*path, index)) for index, child in enumerate(node.value)]
            case _:
                return self.scalar(node)

    def item(self, node: Any, path: FieldPath) -> Any:
        self.marks[path] = _mark(node)
        return self.value(node, path)

    def mapping(self, node: MappingNode, path: FieldPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        own = [(key, child) for key, child in node.value if key.tag != f"{_TAG}merge"]
        for key, child in own:
            if not isinstance(key, ScalarNode):
                raise _error(self.file, *_mark(key), "has a key that is not a plain word; write `field: value`")
            if key.value in data:
                name = field_name((*path, key.value))
                raise _error(self.file, *_mark(key), f"has the key {name} twice; keep one of them")
            self.marks[*path, key.value] = _mark(key)
            data[key.value] = self.value(child, (*path, key.value))
        for key, child in self.merged(node):
            if key.value not in data:
                self.marks[*path, key.value] = _mark(key)
                data[key.value] = self.value(child, (*path, key.value))
        return data

    def merged(self, node: MappingNode) -> Iterator[tuple[Any, Any]]:
        """What ``<<: *anchor`` brings in, nearest first (https://yaml.org/type/merge.html)."""
        for key, child in node.value:
            if key.tag != f"{_TAG}merge":
                continue
            sources = child.value if isinstance(child, SequenceNode) else [child]
            for source in sources:
                if not isinstance(source, MappingNode):
                    raise _error(self.file, *_mark(key), "merges (`<<`) something that is not a mapping")
                yield from ((k, v) for k, v in source.value if isinstance(k, ScalarNode) and k.tag != f"{_TAG}merge")
                yield from self.merged(source)

    def scalar(self, node: ScalarNode) -> Any:
        kind = str(node.tag).removeprefix(_TAG)
        try:
            match kind:
                case "null":
                    return None
                case "bool":
                    return node.value.lower() == "true"
                case "int":
                    return _integer(node.value.replace("_", ""))
                case "float":
                    return _number(node.value.lower().replace("_", ""))
                case "str" if node.style is None and node.value.lower() in _BOOLEANS:
                    return _BOOLEANS[node.value.lower()]
                case "str" | "timestamp":
                    return node.value
        except ValueError as error:  # an integer of thousands of digits, a spelling of .Inf that Python does not know
            raise _error(self.file, *_mark(node), f"has a number that cannot be read: {short(node.value)}") from error
        raise _error(self.file, *_mark(node), f"has the tag {node.tag}, which is not supported; remove it")


def _integer(text: str) -> int | float:
    digits = text.lstrip("+-")
    if digits[:1] == "0" and digits.isdigit() and len(digits) > 1:
        return int(text, 8) if not set(digits) & {"8", "9"} else _number(text)
    return int(text, 0 if digits[:1] == "0" and digits != "0" else 10)


def _number(text: str) -> int | float:
    """An integer where it is one, as in JSON, which writes 8e3 and 8000.0 as 8000."""
    value = float(text.replace(".inf", "inf").replace(".nan", "nan"))
    return int(value) if value.is_integer() and abs(value) < _EXACT else value


def _mark(node: Any) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def short(value: object) -> str:
    """The value as it is shown in a message: one line, at most 60 characters, never the inside of a structure."""
    match value:
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            return repr(value if len(value) <= 60 else value[:57] + "...")
        case _:
            return str(value)[:60]
