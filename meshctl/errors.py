"""The exception tree. Whose fault it is decides the exit code: the caller's input is 2, everything else is 1."""

from __future__ import annotations


class MeshctlError(Exception):
    """Something could not be done. The message says what, to which object, and what to do."""

    exit_code = 1


class InputError(MeshctlError):
    """The caller's input is wrong; nothing was changed. The message names the place (file, line, field)."""

    exit_code = 2


class FieldConflictError(MeshctlError):
    """Another field manager owns what was to be written. The message names it and the fields."""


class RefusedError(MeshctlError):
    """The API server will not take it: invalid, forbidden, or of a kind it does not know. Trying again is of no use."""


class UnavailableError(MeshctlError):
    """The API server could not answer in time (away, overloaded, 429, 5xx). Try again later."""
