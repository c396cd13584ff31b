"""The loop's clock outside of tests."""

from __future__ import annotations

import time


class MonotonicClock:
    """Seconds since some fixed moment; never jumps, whatever happens to the wall clock."""

    def now_s(self) -> float:
        return time.monotonic()
