"""MPS without a GPU: drives the stand-in of tests/harness/mps, and records what is asked of the inventory."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from deviceplugin.mpscontrol import MpsControl
from deviceplugin.ports import GpuLostError, Xid
from meshctl.sharing import Gpu
from tests.harness.tools import DEADLINE_S

BINARY = Path(__file__).parent / "mps" / "nvidia-cuda-mps-control"


def gpu(uuid: str = "GPU-1", minor: int = 0) -> Gpu:
    return Gpu(uuid, "Tesla V100-SXM2-16GB", 16 << 30, (7, 0), minor, minor)


def alive(pid: int) -> bool:
    """Whether there is such a process, not merely its remains."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Client:
    """A real process, to be registered with a stand-in; ended with the context."""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(["sleep", "infinity"], start_new_session=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    @property
    def pid(self) -> int:
        return self.process.pid

    def end(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)


@dataclass(frozen=True)
class StandIn:
    """The stand-in's state for one GPU, below the agent's --mps-root."""

    root: Path
    uuid: str = "GPU-1"

    @property
    def pipe(self) -> Path:
        return self.root / self.uuid / "pipe"

    @property
    def control_log(self) -> Path:
        return self.root / self.uuid / "log" / "control.log"

    def fault(self, name: str) -> None:
        """From now on; see the stand-in for what there is."""
        (self.pipe / "fault").mkdir(parents=True, exist_ok=True)
        (self.pipe / "fault" / name).touch()

    def mend(self, name: str) -> None:
        (self.pipe / "fault" / name).unlink(missing_ok=True)

    async def connect(self, client: Client) -> None:
        """What the CUDA driver of a client does: a server is started where there is none, and knows it then."""
        if not await self.servers():
            await self.control().ask("start_server -uid 0", DEADLINE_S)
        (self.pipe / "clients").mkdir(exist_ok=True)
        (self.pipe / "clients" / str(client.pid)).touch()

    async def servers(self) -> tuple[int, ...]:
        return await self.control().servers(DEADLINE_S)

    def control(self) -> MpsControl:
        return MpsControl(BINARY, self.root / self.uuid, self.uuid)

    async def clear(self) -> None:
        """Ends what a test left."""
        await self.control().clear(DEADLINE_S)

    async def processes(self) -> list[int]:
        """The daemon's and its servers'."""
        return [found.pid for found in await self.control().find()]


@dataclass
class RecordedInventory:
    """An `Inventory` of GPUs that are always well: `modes` is what was set, with what `look` saw at that moment."""

    driver: str = "570.86.10"
    look: Callable[[str], object] = lambda _uuid: None
    modes: list[tuple[str, bool, object]] = field(default_factory=list)
    computing: dict[str, tuple[int, ...] | None] = field(default_factory=dict)
    """Processes by GPU; those that have ended are left out."""
    lost: set[str] = field(default_factory=set)
    """UUIDs that nothing can be set of."""

    async def gpus(self) -> tuple[Gpu, ...]:
        return tuple(gpu(uuid) for uuid in sorted(self.computing))

    async def probe(self, uuid: str) -> None:
        del uuid

    async def next_xid(self) -> Xid:
        never: asyncio.Future[Xid] = asyncio.get_running_loop().create_future()
        return await never

    async def set_exclusive(self, uuid: str, exclusive: bool) -> None:
        if uuid in self.lost:
            raise GpuLostError(f"{uuid}: NVML does not show this GPU")
        self.modes.append((uuid, exclusive, self.look(uuid)))

    async def processes(self, uuid: str) -> tuple[int, ...] | None:
        computing = self.computing.get(uuid, ())
        return computing and tuple(pid for pid in computing if alive(pid))

    async def close(self) -> None:
        """Nothing is open."""
