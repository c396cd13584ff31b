"""How a proxy treats the servers of one route: a DestinationRule's traffic policy. Pure.

Decides nothing of where requests go: the weights do. So localities are switched off (Istio would prefer the proxy's own
zone as soon as there is outlier detection), and outlier detection only bridges the seconds until the weights follow.
It says what xds/translate says of our own clusters, as far as Istio has words for it. It has none for
`LoadBalancer.choice_count`, nor for a bias other than 0 (then: round robin, which follows the weights exactly) and 1.

Rejected: a retry budget for what no server has begun. Such retries cost the servers nothing, and a budget would lose
requests just when a pod is gone. It stands only where the route allows to repeat what may have run.
"""

from __future__ import annotations

from typing import Any

from meshctl.model import LbPolicy, LoadBalancer, RouteSpec

UNLIMITED = 2**31 - 1
"""Limits count per proxy and cluster, and what is above is answered 503. Queueing is the servers' business."""


def duration(seconds: float) -> str:
    """As both the CRDs' schema and istiod's parser read it: decimal seconds; at least 1 ms, Istio's least."""
    return f"{max(0.001, seconds):.3f}".rstrip("0").rstrip(".") + "s"


def traffic_policy(spec: RouteSpec, balancer: LoadBalancer) -> dict[str, Any]:
    """For every cluster of the route."""
    return {
        "loadBalancer": _load_balancer(spec.warm_up_s, balancer),
        "connectionPool": {
            "tcp": {
                "maxConnections": UNLIMITED,
                # A GPU server in the same cluster answers a SYN in far less; a dead one costs this once, then a retry.
                "connectTimeout": "1s",
                "tcpKeepalive": {"probes": 3, "time": "30s", "interval": "5s"},
            },
            "http": {
                "http1MaxPendingRequests": UNLIMITED,
                "http2MaxRequests": UNLIMITED,
                "maxRetries": UNLIMITED,
                # Shorter than the keep-alive of the usual servers (uvicorn 5 s): the proxy, not the server, closes an
                # idle connection, so no request is written into a closing one.
                "idleTimeout": "4s",
            },
        },
        "outlierDetection": {
            "interval": "1s",
            "baseEjectionTime": "2s",
            "maxEjectionPercent": 50,
            "minHealthPercent": 0,
            "consecutive5xxErrors": 5,
            "consecutiveGatewayErrors": 3,
            "splitExternalLocalOriginErrors": True,
            "consecutiveLocalOriginFailures": 3,
        },
        **({"retryBudget": {"percent": 20, "minRetryConcurrency": 10}} if spec.retry.idempotent else {}),
    }


def _load_balancer(warm_up_s: float, balancer: LoadBalancer) -> dict[str, Any]:
    exact = balancer.policy is LbPolicy.ROUND_ROBIN or balancer.active_request_bias == 0
    return {
        "simple": "ROUND_ROBIN" if exact else "LEAST_REQUEST",
        "localityLbSetting": {"enabled": False},
        **({"warmup": {"duration": duration(warm_up_s)}} if warm_up_s > 0 else {}),
    }
