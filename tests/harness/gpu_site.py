"""A node with GPUs and no cluster: a driver, a kubelet's protocol, a policy file, and the agents that run there.

Everything that its agents leave behind (MPS daemons outlive them) ends with it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshctl.sharing import RESOURCE, Owner, Slot
from tests.harness.agent import AgentProcess, policies
from tests.harness.fake_kubelet import FakeKubelet
from tests.harness.mps_control import BINARY, StandIn
from tests.harness.nvml_stub import NvmlStub, v100
from tests.harness.tools import until

ONE, TWO = v100(0), v100(1)
SLICED: Mapping[str, Any] = {"mode": "TimeSlicing", "replicas": 4, "health": {"recoverAfter": "300ms"}}
SPACED: Mapping[str, Any] = {**SLICED, "mode": "MPS"}


@dataclass
class GpuSite:
    """`root` has a short name: the path of an MPS daemon's socket is below it, and has 107 bytes at most."""

    root: Path
    kubelet: FakeKubelet
    driver: NvmlStub

    @property
    def state(self) -> Path:
        return self.root / "agent" / "agent.json"

    def policies(self, **specs: Mapping[str, Any]) -> Path:
        return policies(self.root, **specs)

    def agent(self, *options: str | Path, hasty: bool = True) -> AgentProcess:
        """Each is the next run of the one before: it has its state."""
        return AgentProcess(
            self.root / "agent",
            self.kubelet.plugin_dir,
            self.kubelet.pod_resources,
            f"--mps-root={self.root / 'm'}",
            f"--mps-control={BINARY}",
            f"--policy={self.root / 'policies.yaml'}",
            *options,
            environment=self.driver.environment,
            hasty=hasty,
        )

    def mps(self, uuid: str = ONE.uuid) -> StandIn:
        return StandIn(self.root / "m", uuid)

    async def given(self, owner: Owner, count: int = 1) -> str:
        """The container gets so many slots; the UUID of their GPU."""
        await self.kubelet.admit(owner, RESOURCE, count)
        return Slot.parse(self.kubelet.held[owner, RESOURCE][0]).uuid


@asynccontextmanager
async def gpu_site(root: Path) -> AsyncIterator[GpuSite]:
    """With two V100, shared in time until another policy is written."""
    driver = NvmlStub(root / "nvml", [ONE, TWO])
    async with FakeKubelet(root / "kubelet") as kubelet:
        site = GpuSite(root, kubelet, driver)
        site.policies(default=SLICED)
        try:
            yield site
        finally:
            for gpu in (ONE, TWO):
                await site.mps(gpu.uuid).clear()


async def told(agent: AgentProcess, uuid: str, type_: str, reason: str) -> str:
    """Waits until the condition of the GPU has this reason; its message."""

    async def holds() -> bool:
        return bool(agent.condition(uuid, type_).get("reason") == reason)

    try:
        await until(holds, f"{type_} of {uuid} is {reason}")
    except AssertionError as late:
        raise AssertionError(f"{late}; but {agent.condition(uuid, type_)}") from None
    return str(agent.condition(uuid, type_)["message"])


async def holders(agent: AgentProcess, *owners: Owner) -> None:
    """Waits until these containers, and no others, are told to hold slots."""

    async def holds() -> bool:
        found = [one for status in agent.gpus().values() for one in status.get("holders", ())]
        return sorted((one["namespace"], one["pod"], one["container"]) for one in found) == sorted(owners)

    await until(holds, f"holders are {', '.join(map(str, owners)) or 'none'}")
