"""What our Istio objects are called, and how to tell that one is ours. Pure.

Names are unique whatever routes and size classes are called: a route's name may have dots, a size class's has none, and
the last label says what it is. The hosts below `meshctl.internal` exist in the mesh only; nothing resolves them.
"""

from __future__ import annotations

from hashlib import blake2b

from meshctl.model import RouteId
from meshctl.ports import KubeObject, ObjectKey

NETWORKING = "networking.istio.io/v1"
VIRTUAL_SERVICE = "VirtualService"
DESTINATION_RULE = "DestinationRule"
SERVICE_ENTRY = "ServiceEntry"
GATEWAY = "Gateway"
OURS = (SERVICE_ENTRY, DESTINATION_RULE, VIRTUAL_SERVICE)
"""The kinds we write, in the order of make-before-break."""

MANAGER = "meshctl"
"""Field manager, and value of `MANAGED_BY`."""
MANAGED_BY = "app.kubernetes.io/managed-by"
ROUTE = "meshctl.io/route"
"""Annotation: ``namespace/name`` of the ModelRoute."""
RESUMED_AT = "meshctl.io/resumed-at"
ROUTE_API = "meshctl.io/v1alpha1"
"""apiVersion of a ModelRoute, for owner references."""
GPU = "meshctl.io/gpu"
"""Label of a ServiceEntry's endpoint: the GPU class, as a subset selects it."""
DOMAIN = "meshctl.internal"
_LONGEST = 100
"""Characters of a route's name in a host: a size class and a namespace take up to 63 each beside it."""


def size_host(route: RouteId, size: str) -> str:
    """The ServiceEntry host of one size class (mechanism Endpoints)."""
    return f"{size}.{_reversed(route)}.sizes.{DOMAIN}"


def sizes_host(route: RouteId) -> str:
    """The wildcard host of all size classes, which one DestinationRule covers."""
    return f"*.{_reversed(route)}.sizes.{DOMAIN}"


def subsets_host(route: RouteId) -> str:
    """The ServiceEntry host whose subsets are GPU classes (mechanism Subsets)."""
    return f"{_reversed(route)}.subsets.{DOMAIN}"


def backend_name(route: RouteId, suffix: str) -> str:
    """metadata.name of a ServiceEntry or DestinationRule; the VirtualService is named like the route."""
    return f"{_short(route.partition('/')[2])}.{suffix}"


def _reversed(route: RouteId) -> str:
    namespace, _, name = route.partition("/")
    return f"{_short(name)}.{namespace}"


def _short(name: str) -> str:
    """`name`, or a hash where a host of 253 characters, labels of 63, has no room for it."""
    fits = len(name) <= _LONGEST and all(len(label) <= 63 for label in name.split("."))
    return name if fits else f"long-{blake2b(name.encode(), digest_size=12).hexdigest()}"


def key_of(value: KubeObject) -> ObjectKey:
    metadata = value["metadata"]
    return ObjectKey(str(value["kind"]), str(metadata.get("namespace", "")), str(metadata["name"]))


def route_of(value: KubeObject) -> RouteId | None:
    """The route whose object this is; None when it is not ours."""
    metadata = value["metadata"]
    if (metadata.get("labels") or {}).get(MANAGED_BY) != MANAGER:
        return None
    route = (metadata.get("annotations") or {}).get(ROUTE)
    return None if route is None else RouteId(str(route))
