"""What a process that runs for months does about its memory before it begins."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Of glibc's malloc.h."""


def share_heap(spare_bytes: int | None = None, mapped_bytes: int | None = None) -> None:
    """One heap for all threads. glibc makes one for each, and gives little of them back: 110 of 440 MB with 1000
    routes, most of it holes.

    With `spare_bytes` no more than that is kept of what was freed at its end: slower where much is made and freed
    again. With `mapped_bytes` what is at least as large has pages of its own, and takes memory only where it is
    written. Settings of the C library; others (musl, macOS) have none.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_ARENA_MAX, 1)
        if spare_bytes is not None:
            mallopt(M_TRIM_THRESHOLD, spare_bytes)
        if mapped_bytes is not None:
            mallopt(M_MMAP_THRESHOLD, mapped_bytes)


def give_back() -> None:
    """Returns to the system what was freed, also between what is still used. Takes milliseconds: for after a burst."""
    if (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        malloc_trim(0)


@contextmanager
def without(*names: str) -> Iterator[None]:
    """While it lasts, modules of these names can't be imported; those that have been stay. For what a library imports
    if it is there, and this process never uses."""
    absent = [name for name in names if name not in sys.modules]
    modules = cast("dict[str, object]", sys.modules)  # None there: an import raises ModuleNotFoundError
    modules.update(dict.fromkeys(absent))
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
