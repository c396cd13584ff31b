r"""Is a regular expression RE2's? A reader of its syntax, without compiling anything. Pure.

istiod compiles with Go's regexp before it accepts an object, and Envoy with RE2. What only one of the two takes is
refused (``\C``, ``a**``), as is everything RE2 leaves out on purpose to match in linear time: back-references,
look-around, possessive and atomic groups. Names of Unicode scripts are not looked up: ``\p{Klingon}`` passes.

Rejected: Python's `re` as the judge, which takes look-around and refuses ``\z``, ``(?U)`` and ``\pN``; a binding to
RE2, a native dependency for a check that a few rules make.
"""

from __future__ import annotations

import re
from functools import lru_cache

MAX_BYTES = 1024
"""istiod's limit for every expression in a match."""
MAX_REPEAT = 1000
"""Of one repetition, and of nested ones multiplied (https://github.com/google/re2/wiki/Syntax)."""
MAX_NESTING = 200
"""Of groups; Go's own limit is 1000, which 1024 bytes can't use sensibly."""

_REPEAT = re.compile(r"\{(\d+)(,(\d*))?\}")
_GROUP_NAME = re.compile(r"P?<([A-Za-z0-9_]+)>")
_FLAGS = re.compile(r"([imsU]*)(-[imsU]+)?([:)])")
_UNICODE = re.compile(r"[pP](\^?[A-Z]|\{\^?[A-Z][A-Za-z_]*\})")
_HEX = re.compile(r"x([0-9A-Fa-f]{2}|\{[0-9A-Fa-f]+\})")
_OCTAL = re.compile(r"0[0-7]{0,2}|[1-7][0-7]{1,2}")
_POSIX = re.compile(r"\[:(\^?)([a-z]+):\]")
_POSIX_NAMES = re.compile(r"alnum|alpha|ascii|blank|cntrl|digit|graph|lower|print|punct|space|upper|word|xdigit")
_ESCAPES = frozenset("afnrtv")
_CLASSES = frozenset("dDsSwW")
_ASSERTIONS = frozenset("AbBz")


class _FaultError(Exception):
    """What is not RE2."""


@lru_cache(maxsize=4096)
def fault_of(text: str) -> str:
    """Why `text` is not RE2; "" when it is. The same size classes have the same expressions in every route."""
    reader = _Reader(text)
    try:
        reader.alternatives(0)
    except _FaultError as fault:
        return str(fault)
    return "a `)` closes nothing" if reader.at < len(text) else ""


class _Reader:
    """Reads from left to right. Each method takes one thing and returns how often it repeats, at most (0: no thing)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.names: set[str] = set()

    def alternatives(self, depth: int) -> int:
        if depth > MAX_NESTING:
            raise _FaultError("it is nested too deeply")
        most = 1
        while self.at < len(self.text) and self.text[self.at] != ")":
            if self.text[self.at] == "|":
                self.at += 1
                continue
            most = max(most, self.repeated(depth))
        return most

    def repeated(self, depth: int) -> int:
        """One atom with the repetition after it."""
        if self.operator():
            raise _FaultError(f"`{self.text[self.at]}` repeats nothing")
        most = self.atom(depth)
        if not (operator := self.operator()):
            return max(most, 1)
        if most == 0:
            raise _FaultError(f"`{operator}` repeats nothing")
        times = 1
        if found := _REPEAT.fullmatch(operator):
            low, high = int(found[1]), int(found[3] or found[1])
            if low > MAX_REPEAT or high > MAX_REPEAT or low > high:
                raise _FaultError(f"`{operator}` is no repetition that RE2 takes")
            times = max(1, high)
        if most * times > MAX_REPEAT:
            raise _FaultError(f"nested repetitions make more than {MAX_REPEAT}")
        self.at += len(operator)
        if self.text.startswith("?", self.at):
            self.at += 1  # as few as possible
        if second := self.operator():
            raise _FaultError(f"`{operator}{second}` repeats a repetition (RE2 has no possessive ones)")
        return most * times

    def operator(self) -> str:
        """The repetition at this place: ``*``, ``{2,3}`` ...; a ``{`` that is none stands for itself."""
        if self.at >= len(self.text):
            return ""
        if self.text[self.at] in "*+?":
            return self.text[self.at]
        found = _REPEAT.match(self.text, self.at)
        return found[0] if found else ""

    def atom(self, depth: int) -> int:
        match self.text[self.at]:
            case "(":
                return self.group(depth)
            case "[":
                self.bracket()
            case "\\":
                self.escape(in_bracket=False)
            case _:
                self.at += 1
        return 1

    def group(self, depth: int) -> int:
        self.at += 1
        if self.text.startswith("?", self.at):
            self.at += 1
            if self.flags_only():
                return 0
        most = self.alternatives(depth + 1)
        if not self.text.startswith(")", self.at):
            raise _FaultError("a `(` is not closed")
        self.at += 1
        return most

    def flags_only(self) -> bool:
        """What follows ``(?``; True when the group ends with it, as ``(?i)`` does."""
        if named := _GROUP_NAME.match(self.text, self.at):
            if named[1] in self.names:
                raise _FaultError(f"two groups are called `{named[1]}`")
            self.names.add(named[1])
            self.at = named.end()
            return False
        found = _FLAGS.match(self.text, self.at)
        if not found or (found[0] == ")"):
            raise _FaultError(f"`(?{self.text[self.at : self.at + 2]}` is not in RE2 (it has no look-around)")
        self.at = found.end()
        return found[3] == ")"

    def bracket(self) -> None:
        self.at += 1
        if self.text.startswith("^", self.at):
            self.at += 1
        first = True
        while first or not self.text.startswith("]", self.at):
            if self.at >= len(self.text):
                raise _FaultError("a `[` is not closed")
            first = False
            self.bracket_item()
        self.at += 1

    def bracket_item(self) -> None:
        if found := _POSIX.match(self.text, self.at):
            if not _POSIX_NAMES.fullmatch(found[2]):
                raise _FaultError(f"`{found[0]}` is not a class of characters")
            self.at = found.end()
            return
        low = self.bracket_char()
        if low is None or not self.text.startswith("-", self.at) or self.text.startswith("-]", self.at):
            return
        self.at += 1
        if self.at >= len(self.text):
            raise _FaultError("a `[` is not closed")
        high = self.bracket_char()
        if high is None or high < low:
            raise _FaultError("a range in `[]` ends before it begins")

    def bracket_char(self) -> int | None:
        """The code point at this place; None for a whole class as ``\\d``."""
        char = self.text[self.at]
        if char == "\\":
            return self.escape(in_bracket=True)
        self.at += 1
        return ord(char)

    def escape(self, *, in_bracket: bool) -> int | None:
        """What follows a backslash: the code point it stands for, or None."""
        self.at += 1
        rest = self.text[self.at : self.at + 1]
        if not rest:
            raise _FaultError("it ends with a backslash")
        if rest == "Q" and not in_bracket:
            end = self.text.find("\\E", self.at)
            self.at = len(self.text) if end < 0 else end + 2
            return None
        if rest in _CLASSES or (rest in _ASSERTIONS and not in_bracket):
            self.at += 1
            return None
        if found := _UNICODE.match(self.text, self.at):
            self.at = found.end()
            return None
        return self.escaped_char(rest)

    def escaped_char(self, char: str) -> int:
        if found := _HEX.match(self.text, self.at):
            code = int(found[1].strip("{}"), 16)
            if code > 0x10FFFF:
                raise _FaultError(f"`\\{found[0]}` is beyond Unicode")
        elif found := _OCTAL.match(self.text, self.at):
            code = int(found[0], 8)
        elif char in _ESCAPES or (char.isascii() and not char.isalnum()):
            self.at += 1
            return {"a": 7, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11}.get(char, ord(char))
        elif char.isdigit():
            raise _FaultError(f"`\\{char}` refers back, which RE2 can't")
        else:
            raise _FaultError(f"`\\{char}` is not in RE2")
        self.at = found.end()
        return code
