"""Reads JSON by a table of known fields: unknown ones, wrong types and bad single values become findings. Pure.

What comes out has only known fields with values of the right type, so that the rules behind it look at no type again:
a null or unknown field is left out, an array's item of a wrong type is replaced by an empty one (positions stay).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from istio.analyze.finding import FieldPath, Finding, found
from istio.analyze.values import Check
from meshctl.ports import ObjectKey

MAX_FINDINGS = 100
"""Of one object; nobody reads more, and an object of a million wrong fields must not fill the memory."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """A single value. The types are JSON Schema's: string, integer, number, boolean."""

    type: str
    check: Check | None = None


@dataclass(frozen=True, slots=True)
class Items:
    """An array."""

    of: Shape


@dataclass(frozen=True, slots=True)
class Entries:
    """An object with keys of the user's choice."""

    of: Shape
    key: Check | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """An object with known fields."""

    fields: Mapping[str, Shape]
    required: tuple[str, ...] = ()
    one_of: tuple[tuple[str, ...], ...] = ()
    """Of each group, at most one may be set."""


Shape = Scalar | Items | Entries | Message
_EMPTY: Mapping[str, Any] = {"string": "", "integer": 0, "number": 0, "boolean": False}


@dataclass(slots=True)
class Reader:
    """Reads one object, collecting findings."""

    key: ObjectKey
    findings: list[Finding] = field(default_factory=list)

    @property
    def typed(self) -> bool:
        """Nothing had a wrong type."""
        return not any(finding.code == "WrongType" for finding in self.findings)

    def read(self, value: Any, shape: Shape, path: FieldPath) -> Any:
        """`value` with only what `shape` knows; empty where the type is wrong."""
        match shape:
            case Scalar():
                return self._scalar(value, shape, path)
            case Items(of):
                if not isinstance(value, list):
                    return self._wrong(value, "an array", path, [])
                return [self.read(item, of, (*path, index)) for index, item in enumerate(value)]
            case Entries(of):
                return self._entries(value, shape, path)
            case Message():
                return self._message(value, shape, path)

    def report(self, code: str, path: FieldPath, what: str) -> None:
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(found(code, self.key, path, what))

    def _scalar(self, value: Any, shape: Scalar, path: FieldPath) -> Any:
        if not _is(value, shape.type):
            return self._wrong(
                value, f"a{'n' if shape.type == 'integer' else ''} {shape.type}", path, _EMPTY[shape.type]
            )
        if shape.check and (verdict := shape.check(value)):
            self.report(verdict[0], path, verdict[1])
        return value

    def _entries(self, value: Any, shape: Entries, path: FieldPath) -> Any:
        if not isinstance(value, Mapping):
            return self._wrong(value, "an object", path, {})
        read: dict[str, Any] = {}
        for key, child in value.items():
            if not isinstance(key, str):
                self._wrong(key, "a string as key", path, None)
                continue
            if shape.key and (verdict := shape.key(key)):
                self.report(verdict[0], (*path, key), verdict[1])
            read[key] = self.read(child, shape.of, (*path, key))
        return read

    def _message(self, value: Any, shape: Message, path: FieldPath) -> Any:
        if not isinstance(value, Mapping):
            return self._wrong(value, "an object", path, {})
        read: dict[str, Any] = {}
        for name, child in value.items():
            known = shape.fields.get(name) if isinstance(name, str) else None
            if known is None:
                self.report("UnknownField", (*path, str(name)), _unknown(str(name), shape))
            elif child is not None:
                read[name] = self.read(child, known, (*path, name))
        for name in shape.required:
            if read.get(name) in (None, "", []):
                self.report("MissingField", (*path, name), f"`{name}` is missing or empty")
        for group in shape.one_of:
            if len(several := [name for name in group if name in read]) > 1:
                self.report("SeveralAlternatives", path, f"{_listed(several)} are set")
        return read

    def _wrong(self, value: Any, wanted: str, path: FieldPath, instead: Any) -> Any:
        self.report("WrongType", path, f"{_named(value)} where {wanted} must be")
        return instead


def _is(value: Any, kind: str) -> bool:
    match kind:
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case _:
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _named(value: Any) -> str:
    match value:
        case str():
            return f"the string `{value[:40]}`"
        case None:
            return "null"
        case Mapping():
            return "an object"
        case list():
            return "an array"
        case bool():
            return f"`{str(value).lower()}`"
        case _:
            return f"`{str(value)[:40]}`" if not isinstance(value, int) or abs(value) < 1 << 80 else "a huge number"


def _unknown(name: str, shape: Message) -> str:
    close = get_close_matches(name[:60], shape.fields, n=1)
    return f"there is no field `{name[:60]}`" + (f" (`{close[0]}`?)" if close else "")


def _listed(names: list[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)
