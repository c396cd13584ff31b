"""`meshctl agent` whose edges look more often and lose patience sooner: for tests that wait for what it sees.

Run as a program, with the arguments of `meshctl`. It is put together by the same code; only the paces are others.
"""

from __future__ import annotations

from functools import partial

from deviceplugin import main
from deviceplugin.agent import Pace
from deviceplugin.inventory import open_inventory
from deviceplugin.mps import MpsDaemons
from deviceplugin.mps import Pace as MpsPace
from deviceplugin.nvml import NvmlInventory
from deviceplugin.ports import Inventory
from meshctl.cli import main as meshctl

PACE = Pace(inventory_s=0.3, probe_s=0.3, kubelet_s=0.2, retry_s=0.3)
MPS_PACE = MpsPace(probe_s=0.5, first_wait_s=0.1)
NVML_S = 2.0
"""Deadline of a call: what hangs is told of by then, and what does not hang must end by then on a busy machine."""


def inventory(spec: str) -> Inventory:
    return NvmlInventory(NVML_S, event_wait_ms=50) if spec == "nvml" else open_inventory(spec)


EDGES = {
    "Config": partial(main.Config, pace=PACE),
    "MpsDaemons": partial(MpsDaemons, pace=MPS_PACE),
    "open_inventory": inventory,
}
"""What `main` puts the agent together from; the command line has no paces."""

if __name__ == "__main__":
    for name, edge in EDGES.items():
        setattr(main, name, edge)
    meshctl()
