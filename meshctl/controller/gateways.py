"""How many proxies take part in balancing, without the dips of a reconnect. Pure.

The decision depends on this number (with more proxies each sees less), so a proxy that reconnects, or a controller that
restarts and waits for its proxies, must not move weights twice. Hence the largest count of the last `HOLD_S`.
"""

from __future__ import annotations

from dataclasses import dataclass

HOLD_S = 15.0
"""Longer than a proxy takes to come back: Envoy's back-off to its control plane is jittered, 30 s at most by default,
and under 10 s for the first attempts."""


@dataclass(frozen=True, slots=True)
class GatewayCount:
    """The count in force and when it was last seen true."""

    count: int
    at_s: float

    def observe(self, connected: int, now_s: float) -> GatewayCount:
        """Growth counts at once, a loss only after it has lasted `HOLD_S`; never below 1."""
        if connected >= self.count or now_s - self.at_s > HOLD_S:
            return GatewayCount(max(1, connected), now_s)
        return self
