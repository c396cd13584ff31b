"""How tests are dealt out to the workers of pytest-xdist; and none fails because the machine is slow."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# A busy machine is no failure: neither an example's 200 ms nor how long drawing takes.
settings.register_profile("meshctl", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("meshctl")
for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):  # the terminal of whoever runs the tests is none of theirs
    os.environ.pop(name, None)


GPU_NODE = ("gpu_kubelet", "gpu_hour", "gpu_together", "extender_kubelet")
"""Tests of tests/cluster (beginnings of their files' names, after ``test_``) that share a node with GPUs."""


class Dealt(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist has no types
    """One worker has all tests that share the cluster, one those that share the node with GPUs (which is on a cluster
    of its own); any other test goes to whoever is free.

    Not `--dist loadgroup`: pytest-xdist 3.8 writes the group where pytest 9 does not read it, and ignores it silently.
    """

    def _split_scope(self, nodeid: str) -> str:
        if not nodeid.startswith("tests/cluster/"):
            return nodeid
        name = nodeid.removeprefix("tests/cluster/test_")
        return "node" if name.startswith(GPU_NODE) else "cluster"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling | None:
    """With `--dist loadscope`; the other ways are pytest-xdist's own."""
    return Dealt(config, log) if config.getoption("dist") == "loadscope" else None
