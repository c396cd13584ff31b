"""A device plugin that answers at once, always the same: what a call costs where nothing is decided.

    python -m bench.instant SOCKET

The server, the event loop and the size of the answers are those of the agent. Runs until it is terminated.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from grpc import aio

from deviceplugin import kubeletapi as api
from deviceplugin.podresources import address
from deviceplugin.ports import ContainerResponse
from meshctl.sharing import Slot
from tests.harness.fake_kubelet import Handlers

UUID = "GPU-00000000-0000-0000-0000-000000000000"
PREFERRED = bytes(api.ContainersDeviceIds([api.DeviceIds([str(Slot(UUID, number)) for number in range(4)])]))
ALLOCATED = bytes(api.allocated([ContainerResponse(envs={"NVIDIA_VISIBLE_DEVICES": UUID})]))


async def preferred(_: bytes, context: Any) -> bytes:
    return PREFERRED


async def allocate(_: bytes, context: Any) -> bytes:
    return ALLOCATED


async def main(socket: Path) -> None:
    server = aio.server()
    server.add_generic_rpc_handlers((Handlers({api.PREFERRED: preferred, api.ALLOCATE: allocate}),))
    server.add_insecure_port(address(socket))
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
