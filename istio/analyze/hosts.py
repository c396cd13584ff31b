"""Host names as Istio resolves and compares them. Pure."""

from __future__ import annotations

from collections.abc import Iterator

CLUSTER_DOMAIN = "cluster.local"


def full_name(host: str, namespace: str) -> str:
    """A name without dots is a Service of the namespace; any other one stands for itself."""
    if not host or "." in host or host.startswith("*"):
        return host
    return f"{host}.{namespace}.svc.{CLUSTER_DOMAIN}"


def covers(pattern: str, host: str) -> bool:
    """Every name that `host` stands for is one that `pattern` stands for; ``*`` stands for any beginning."""
    if pattern.startswith("*"):
        return host.removeprefix("*").endswith(pattern[1:])
    return pattern == host


def overlap(one: str, other: str) -> bool:
    """Some name is one of both."""
    return covers(one, other) or covers(other, one)


def patterns_of(host: str) -> Iterator[str]:
    """The host itself, then the wildcards at its dots that cover it, the most specific first."""
    yield host
    rest = host
    while "." in rest:
        rest = rest.partition(".")[2]
        if f"*.{rest}" != host:
            yield f"*.{rest}"
    yield "*"
