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
    """The looks of the last `HOLD_S` that still matter: (time, proxies), each with fewer proxies than the last."""

    looks: tuple[tuple[float, int], ...] = ()

    @property
    def count(self) -> int:
        """Proxies to count with; at least 1."""
        return max(1, self.looks[0][1]) if self.looks else 1

    def observe(self, connected: int, now_s: float) -> GatewayCount:
        """Growth counts at once, a loss only once nothing larger was seen for `HOLD_S`."""
        larger = ((at_s, count) for at_s, count in self.looks if now_s - at_s <= HOLD_S and count > connected)
        return GatewayCount((*larger, (now_s, connected)))
