"""Many ADS clients in one process, each with a connection of its own.

    python -m bench.adsclients ADDRESS FIRST COUNT NODE_FILE [--delta]

Told by lines (bench.lines): `open` (all at once), `close`, `forget` (the next streams are those of new processes),
`tally`. A client whose stream ends opens another one after a random while, as Envoy does.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import uvloop
from grpc import aio

from bench.adsdialogue import Dialogue, method, node
from bench.lines import serve
from meshctl.openfiles import allow_many_connections
from meshctl.sim.load import calm_gc

RETRY_S = 0.5, 5.0
"""The longest first pause before another try, and the longest of all: each is drawn below, and doubles."""
_OPTIONS = (
    # Channels of one process to one address share a connection otherwise.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", -1),
)


@dataclass(slots=True)
class Clients:
    """All of this process."""

    address: str
    dialogues: list[Dialogue]
    responses: int = 0
    response_bytes: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    """How streams ended that should not have, by status."""
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def open(self, _: Mapping[str, Any]) -> Mapping[str, Any]:
        self._tasks = [asyncio.create_task(self._stay(dialogue)) for dialogue in self.dialogues]
        return {}

    async def close(self, _: Mapping[str, Any]) -> Mapping[str, Any]:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        return {}

    async def forget(self, _: Mapping[str, Any]) -> Mapping[str, Any]:
        for dialogue in self.dialogues:
            dialogue.forget()
        return {}

    async def tally(self, _: Mapping[str, Any]) -> Mapping[str, Any]:
        """Since the last one."""
        found = {"responses": self.responses, "bytes": self.response_bytes, "ends": dict(self.ends)}
        self.responses, self.response_bytes, self.ends = 0, 0, Counter()
        return found

    async def _stay(self, dialogue: Dialogue) -> None:
        draw, pause_s = random.Random(dialogue.node[-8:]), RETRY_S[0]  # noqa: S311 (a jitter)
        async with aio.insecure_channel(self.address, options=_OPTIONS) as channel:
            while True:
                try:
                    await self._stream(channel, dialogue)
                    self.ends["ended by the server"] += 1
                except aio.AioRpcError as error:
                    self.ends[error.code().name] += 1
                await asyncio.sleep(draw.uniform(0, pause_s))
                pause_s = min(2 * pause_s, RETRY_S[1])

    async def _stream(self, channel: Any, dialogue: Dialogue) -> None:
        call = channel.stream_stream(method(delta=dialogue.delta))(wait_for_ready=True)
        for request in dialogue.opening():
            await call.write(request)
        async for data in call:
            self.responses += 1
            self.response_bytes += len(data)
            for request in dialogue.answer(data):
                await call.write(request)
        code = await call.code()
        if code is not grpc.StatusCode.OK:
            raise aio.AioRpcError(code, await call.initial_metadata(), await call.trailing_metadata())


async def main(address: str, first: int, count: int, like: bytes, *, delta: bool) -> None:
    calm_gc()
    clients = Clients(address, [Dialogue(node(number, like), delta) for number in range(first, first + count)])
    handlers = {"open": clients.open, "close": clients.close, "forget": clients.forget, "tally": clients.tally}
    await serve({"count": count}, handlers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("first", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("node", type=Path)
    parser.add_argument("--delta", action="store_true")
    args = parser.parse_args()
    allow_many_connections()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(args.address, args.first, args.count, args.node.read_bytes(), delta=args.delta))
