"""A child process that is told what to do: one JSON line in, one JSON line out, in turn.

For benches whose parts must not share an interpreter. The child ends when its standard input does, so that it never
outlives its parent; what it has to say of its own goes to standard error.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Self

import orjson

from meshctl.errors import MeshctlError

ANSWER_S = 300.0
"""For one answer. Generous: on a busy machine a thousand connections take their time."""
_LONGEST_LINE = 2**24

Handler = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]


class Child:
    """The parent's end: ``async with Child("bench.adsserver", "--bare") as child: await child.ask("synced")``."""

    def __init__(self, module: str, *arguments: str) -> None:
        self.module = module
        self.hello: Mapping[str, Any] = {}
        """What it said when it was ready."""
        self._arguments = arguments
        self._process: asyncio.subprocess.Process | None = None

    @property
    def process(self) -> asyncio.subprocess.Process:
        """While it runs; raises MeshctlError otherwise."""
        if self._process is None:
            raise MeshctlError(f"{self.module} was not started")
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    async def __aenter__(self) -> Self:
        pipe = asyncio.subprocess.PIPE
        command = (sys.executable, "-m", self.module, *self._arguments)
        self._process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=_LONGEST_LINE)
        try:
            self.hello = await self._answer()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def ask(self, what: str, **arguments: object) -> Mapping[str, Any]:
        """What it answers to `what`. Raises MeshctlError when it ends instead, or takes longer than `ANSWER_S`."""
        writer = self.process.stdin
        if writer is None:
            raise MeshctlError(f"{self.module} has no standard input")
        writer.write(orjson.dumps({"do": what, **arguments}) + b"\n")
        return await self._answer()

    async def stop(self) -> None:
        """Harmless when it has ended."""
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        process.kill()  # nothing of it is needed any more, and no clean-up of its own
        await process.wait()

    async def _answer(self) -> Mapping[str, Any]:
        reader = self.process.stdout
        if reader is None:
            raise MeshctlError(f"{self.module} has no standard output")
        try:
            line = await asyncio.wait_for(reader.readline(), ANSWER_S)
        except TimeoutError as late:
            raise MeshctlError(f"{self.module} has not answered for {ANSWER_S:g} s") from late
        if not line:
            raise MeshctlError(f"{self.module} ended instead of answering: see its standard error above")
        answer: Mapping[str, Any] = orjson.loads(line)
        return answer


async def serve(hello: Mapping[str, Any], handlers: Mapping[str, Handler]) -> None:
    """The child's end: answers until standard input ends."""
    reader = asyncio.StreamReader(_LONGEST_LINE)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    _say(hello)
    while line := await reader.readline():
        asked = orjson.loads(line)
        _say(await handlers[asked.pop("do")](asked))


def _say(answer: Mapping[str, Any]) -> None:
    sys.stdout.write(orjson.dumps(answer).decode() + "\n")
    sys.stdout.flush()
