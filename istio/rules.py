"""Which size class serves a request: the http rules of a VirtualService. Pure.

One rule per size class, named like it, and one match in it per header, named like that; Envoy's route is then called
``small.x-batch-size``. The last rule has no match: no request is refused for its size. "First present wins": the
matches of a header ask that those before it are absent. So every request is of the class that our own xDS gives it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from istio.policies import duration
from meshctl.model import DEFAULT_CLASS, Protocol, Retry, RouteSpec, SizeClass
from xds.requests import retry_on, size_pattern


def http_rules(spec: RouteSpec, destinations: Callable[[str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rules of every size class and, last, of the default one; `destinations` of a size class by name."""
    how = {"timeout": duration(spec.timeout_s), "retries": _retries(spec.retry, spec.protocol)}
    return [
        *(
            {"name": s.name, "match": _matches(spec.headers, s), "route": destinations(s.name), **how}
            for s in spec.sizes
        ),
        {"name": DEFAULT_CLASS, "route": destinations(DEFAULT_CLASS), **how},
    ]


def _matches(headers: tuple[str, ...], size: SizeClass) -> list[dict[str, Any]]:
    return [
        {
            "name": header,
            "headers": {header: {"regex": size_pattern(header, size)}},
            **({"withoutHeaders": {before: {} for before in headers[:i]}} if i else {}),
        }
        for i, header in enumerate(headers)
    ]


def _retries(retry: Retry, protocol: Protocol) -> dict[str, Any]:
    """Explicitly none where none is wanted: Istio retries by default, and more than what no server has begun."""
    if retry.attempts == 0:
        return {"attempts": 0}
    limit = {} if retry.per_try_timeout_s is None else {"perTryTimeout": duration(retry.per_try_timeout_s)}
    return {"attempts": retry.attempts, "retryOn": retry_on(retry, protocol), **limit}
