"""Whether a VirtualService can be served at all: the Gateways that it names are there. Pure.

What we write is no use before somebody else has made the Gateway; istiod takes the VirtualService all the same, and a
gateway acknowledges the rest. So nothing but this tells that no request will ever come.
"""

from __future__ import annotations

from collections.abc import Collection

from istio.analyze.known import gateway_key
from istio.analyze.virtualservice import MESH
from istio.names import GATEWAY
from meshctl.ports import KubeObject, Objects


def absent(virtual_service: KubeObject, objects: Objects, namespaces: Collection[str] = ()) -> str:
    """The Gateways that a VirtualService of ours names and that do not exist, and what to do; "" when all are there.

    One that is not seen may be there while not every Gateway is known, and outside `namespaces` (empty: all are seen).
    """
    named = [name for name in virtual_service["spec"].get("gateways") or () if name != MESH]
    if not named or objects.missing(GATEWAY):
        return ""
    namespace = str(virtual_service["metadata"]["namespace"])
    keys = [gateway_key(name, namespace) for name in named]
    seen = [key for key in keys if not namespaces or key.namespace in namespaces]
    gone = [f"{key.namespace}/{key.name}" for key in seen if objects.find(key) is None]
    if not gone:
        return ""
    return f"waits for Gateway {', '.join(gone)}, which does not exist: create it, or correct spec.gateways"
