"""What the loop knows at one instant, as one value: the only thing that metrics, conditions and views read.

A reader never sees half a reconcile: the loop builds a new State when it is asked, from references that it replaces
whole. Rejected: letting the admin API read the loop's fields, where each new field is a new race.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshctl.model import DataPlaneStatus, Plan, Problem
from meshctl.ports import Desired, Observed


@dataclass(frozen=True, slots=True)
class State:
    """One instant of the controller. Times are on the loop's monotonic clock."""

    now_s: float
    started_s: float
    plan: Plan
    """The plan in force: the newest that was published."""
    published: bool
    """False until the first plan has gone to the data plane."""
    desired: Desired
    observed: Observed
    dataplane: DataPlaneStatus
    gateways: int
    """Proxies that the last decision counted with."""
    failures: tuple[Problem, ...]
    """What the controller itself could not do just now (decide, apply, checkpoint, ...); empty when healthy."""
    leading: bool = True
    """This replica may write to the cluster; without a Lease always."""
    reconciles: int = 0
    """How many reconciles have finished, failed ones too; a reader can wait for the next."""

    def problems(self) -> dict[str, tuple[Problem, ...]]:
        """Everything that is wrong, by where it comes from."""
        refused = sorted([*self.dataplane.quarantined.items(), *self.dataplane.conflicts.items()])
        return {
            "controller": self.failures,
            "dataplane": tuple(Problem(f"route {route}", text, route) for route, text in refused)
            + tuple(Problem(f"proxy {p.node}", p.error) for p in self.dataplane.proxies if p.error),
            "manifests": self.desired.problems,
            "signals": self.observed.problems,
        }
