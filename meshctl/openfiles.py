"""How many files a process may have open, which every connection is one of."""

from __future__ import annotations

import resource


def allow_many_connections() -> None:
    """Raise this process's limit of open files to what the system allows. It usually starts at 1024, for programs that
    use select(): a server of a thousand clients could then not even read its own files any more."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
