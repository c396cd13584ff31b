"""One agent per node: two would promise the same slots.

Locked is the plugin directory itself (the kubelet empties it when it starts, but does not replace it) and a file beside
the state file. The kernel releases both when the agent ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from meshctl.errors import InputError


@contextmanager
def sole_agent(plugin_dir: Path, state: Path) -> Iterator[None]:
    """Raises InputError when another agent has either, or a directory is not there or not writable."""
    with ExitStack() as stack:
        _writable(plugin_dir, "--plugin-dir")
        stack.enter_context(_locked(plugin_dir, os.O_RDONLY, f"the plugin directory {plugin_dir} (--plugin-dir)"))
        try:
            state.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot make the directory of the state file {state} (--state): {error.strerror}"
            ) from error
        _writable(state.parent, "--state")
        beside = state.with_name(state.name + ".lock")
        stack.enter_context(_locked(beside, os.O_RDWR | os.O_CREAT, f"the state file {state} (--state)"))
        yield


def _writable(directory: Path, option: str) -> None:
    if not directory.is_dir():
        raise InputError(f"{option}: {directory} is not a directory; on a node with a kubelet, mount it from the host")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise InputError(f"{option}: {directory} is not writable for uid {os.geteuid()}; run the agent as root")


@contextmanager
def _locked(path: Path, flags: int, what: str) -> Iterator[None]:
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InputError(f"cannot lock {what}: {path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(f"another agent uses {what}: there is one agent per node; end it first") from error
    try:
        yield
    finally:
        os.close(descriptor)
