"""An event loop whose time passes only when nobody has anything to do, and then at once: no test waits, none is flaky.

Work for threads is done at once, in the loop's own thread: the order of everything is the same every time. Whoever
reads another clock than the loop's, or waits for another process, does not belong on it.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time` begins at `began_s`. What no task catches fails in `quiet`."""

    def __init__(self, began_s: float = 0.0) -> None:
        self._now_s = began_s
        super().__init__(_Jump(self._passed))
        self.set_default_executor(_AtOnce())
        self.unhandled: list[dict[str, Any]] = []
        self.set_exception_handler(
            lambda _, context: self.unhandled.append({key: repr(one) for key, one in context.items()})
        )

    def time(self) -> float:
        return self._now_s

    def _passed(self, seconds: float) -> None:
        self._now_s += seconds


class _Jump(selectors.SelectSelector):
    """Instead of waiting for the next timer, says that its time has come."""

    def __init__(self, passed: Callable[[float], None]) -> None:
        super().__init__()
        self._passed = passed

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if ready := super().select(0):
            return ready
        if timeout is None:
            raise RuntimeError("everybody waits, and nothing can happen any more")
        self._passed(timeout)
        return []


class _AtOnce(ThreadPoolExecutor):
    def submit(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        done: Future[T] = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 (it is whoever's who asked, as a thread's is)
            done.set_exception(error)
        return done
