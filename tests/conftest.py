"""How tests are dealt out to the workers of pytest-xdist; and none fails because the machine is slow."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# A busy machine is no failure: neither an example's 200 ms nor how long drawing takes.
settings.register_profile("meshctl", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("meshctl")


class Dealt(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist has no types
    """One worker has all of tests/cluster, so that they share one cluster; any other test goes to whoever is free.

    Not `--dist loadgroup`: pytest-xdist 3.8 writes the group where pytest 9 does not read it, and ignores it silently.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "cluster" if nodeid.startswith("tests/cluster/") else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling | None:
    """With `--dist loadscope`; the other ways are pytest-xdist's own."""
    return Dealt(config, log) if config.getoption("dist") == "loadscope" else None
