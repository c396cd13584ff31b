"""The exception tree. Whose fault it is decides the exit code: the caller's input is 2, everything else is 1."""

from __future__ import annotations


class MeshctlError(Exception):
    """Something could not be done. The message says what, to which object, and what to do."""

    exit_code = 1


class InputError(MeshctlError):
    """The caller's input is wrong; nothing was changed. The message names the place (file, line, field)."""

    exit_code = 2
