"""One inference server as an endpoint of a ServiceEntry. Pure.

What a mesh needs to know of a pod to talk to it as it would through its Service is kept: how it takes TLS, who it is,
what telemetry calls it. Labels that nobody in the mesh reads are not copied: each would be a reason to write again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

from istio.names import GPU
from meshctl.model import Endpoint, RouteSpec, Workload

TLS_MODE = "security.istio.io/tlsMode"
KEPT_LABELS = frozenset(
    {
        "app",
        "app.kubernetes.io/name",
        "app.kubernetes.io/version",
        "networking.istio.io/tunnel",
        TLS_MODE,
        "service.istio.io/canonical-name",
        "service.istio.io/canonical-revision",
        "service.istio.io/workload-name",
        "topology.istio.io/network",
        "version",
    }
)
"""Labels of a pod that istiod or a proxy reads: TLS, tunnels, networks, names in telemetry."""
_LONGEST = 63
"""Characters of a label's value, and of a subset's name."""


def gpu_classes(endpoints: Iterable[Endpoint]) -> dict[str, str]:
    """GPU product -> its name as a label and as a subset, ordered by product.

    Subsets are DNS labels: lower case, letters, digits and hyphens ("Tesla V100/SXM2" is tesla-v100-sxm2). Products
    that come out the same have a hash behind it.
    """
    products = sorted({e.gpu for e in endpoints})
    names = {product: _dns_label(product) for product in products}
    count = Counter(names.values())
    return {product: _told_apart(product, name) if count[name] > 1 else name for product, name in names.items()}


def _dns_label(product: str) -> str:
    return re.sub("[^a-z0-9]+", "-", product.lower()).strip("-")[:_LONGEST].strip("-") or "unknown"


def _told_apart(product: str, name: str) -> str:
    tail = "-" + blake2b(product.encode(), digest_size=4).hexdigest()
    return name[: _LONGEST - len(tail)].strip("-") + tail


def endpoint_entry(endpoint: Endpoint, gpu: str, spec: RouteSpec, port_name: str, weight: int) -> dict[str, Any]:
    """`endpoint` of GPU class `gpu`; weight 0: not said, all are equal."""
    namespace = spec.id.partition("/")[0]
    workload = endpoint.workload
    entry: dict[str, Any] = {
        "address": endpoint.address,
        "ports": {port_name: endpoint.port},
        "labels": {GPU: gpu, **(_labels(workload) if workload else {})},
    }
    # istiod reads the account as one of the ServiceEntry's own namespace; a wrong identity would refuse every handshake
    if workload is not None and workload.service_account and workload.namespace == namespace:
        entry["serviceAccount"] = workload.service_account
    if weight > 0:
        entry["weight"] = weight
    return entry


def _labels(workload: Workload) -> Mapping[str, str]:
    """A pod that says nothing takes no TLS; without the label istiod would conclude from its account that it does."""
    return {TLS_MODE: "disabled", **{key: value for key, value in workload.labels if key in KEPT_LABELS}}
