"""Plan -> Istio objects, and back. Pure.

Mechanism Endpoints: a ServiceEntry per size class (and the default one) with the route's endpoints and their weights.
Mechanism Subsets: one ServiceEntry with all of them, a subset per GPU class, weighted destinations per size class.
Either way one DestinationRule says how to treat them and one VirtualService finds the size class.

Invariants
- The same plan gives the same bytes. A change of weights changes weights, and which endpoints stand there, only.
- `weights_of` is the inverse: `render` of a plan with what `weights_of` reads gives the same objects. Hence weights are
  scaled to WEIGHT_TOTAL over the endpoints that are there, and a GPU class's weight is dealt out over its endpoints.
- A size class never has only zeros while an endpoint is ready: one that may be late is better than a 503. With none
  ready the ServiceEntry stays, empty (which is valid): the proxy answers 503, and knows the host when one comes back.

Left out: endpoints that are not ready, and of weight 0 (Istio reads 0 as 1); with Subsets, which cannot weigh single
endpoints, those that have weight 0 for every size.
No locality is given: weights decide, and a proxy that knew the zones of all would prefer its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from istio.endpoints import endpoint_entry, gpu_classes
from istio.names import (
    DESTINATION_RULE,
    GPU,
    MANAGED_BY,
    MANAGER,
    NETWORKING,
    RESUMED_AT,
    ROUTE,
    ROUTE_API,
    SERVICE_ENTRY,
    VIRTUAL_SERVICE,
    backend_name,
    key_of,
    size_host,
    sizes_host,
    subsets_host,
)
from istio.policies import traffic_policy
from istio.rules import http_rules
from istio.tables import Dealer, Ref, Row, class_row, row_over, used
from meshctl.model import (
    DEFAULT_CLASS,
    DesiredRoute,
    EndpointId,
    Mechanism,
    Protocol,
    RouteId,
    RoutePlan,
    RouteSpec,
    Weights,
)
from meshctl.ports import KubeObject, ObjectKey
from xds.requests import bare_hosts

PORT = 80
"""Of our hosts; the servers' own ports stand at the endpoints."""
PORT_NAMES = {Protocol.HTTP: "http", Protocol.GRPC: "grpc"}
NO_ADDRESS = "networking.istio.io/enable-autoallocate-ip"
"""Label; "false" keeps istiod from writing an address into the status of a host that nobody resolves."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """The objects of one route. Every host and subset that the VirtualService names is among the backends."""

    route: RouteId
    backends: tuple[KubeObject, ...]
    """ServiceEntries, then DestinationRules."""
    virtual_service: KubeObject

    def sharing(self, live: Mapping[ObjectKey, KubeObject]) -> Rendered:
        """The same, where `live` says the same with the very objects of it."""
        return Rendered(
            self.route, tuple(_sharing(v, live) for v in self.backends), _sharing(self.virtual_service, live)
        )


def _sharing(value: KubeObject, live: Mapping[ObjectKey, KubeObject]) -> KubeObject:
    spec = live.get(key_of(value), {}).get("spec")
    return {**value, "spec": spec} if spec is not value["spec"] and spec == value["spec"] else value


def render(plan: RoutePlan) -> Rendered:
    """The objects of one route that is `meshed`."""
    return _by_subsets(plan) if plan.route.spec.mechanism is Mechanism.SUBSETS else _by_endpoints(plan)


def _by_endpoints(plan: RoutePlan) -> Rendered:
    spec, gpus = plan.route.spec, gpu_classes(plan.route.endpoints)
    ready = [e for e in plan.route.endpoints if e.ready]
    # once for all size classes, which share what is in them: of 1000 routes they are 40,000
    known = {e.id: endpoint_entry(e, gpus[e.gpu], spec, PORT_NAMES[spec.protocol], 0) for e in ready}
    entries = []
    for size in _sizes(spec):
        row = row_over(plan.weights.get(size, {}), [e.id for e in ready])
        endpoints = [{**known[e.id], "weight": row[e.id]} for e in ready if row[e.id] > 0]
        entries.append(_service_entry(spec, f"{size}.size", size_host(spec.id, size), endpoints))
    body = {"host": sizes_host(spec.id), "trafficPolicy": traffic_policy(spec, plan.load_balancer)}
    rules = http_rules(spec, lambda size: [{"destination": _destination(size_host(spec.id, size))}])
    return Rendered(spec.id, (*entries, _object(spec, DESTINATION_RULE, "size", body)), _virtual_service(spec, rules))


def _by_subsets(plan: RoutePlan) -> Rendered:
    spec, gpus, host = plan.route.spec, gpu_classes(plan.route.endpoints), subsets_host(plan.route.spec.id)
    endpoints = used(plan.weights, plan.route.endpoints)
    members = {gpu: [e.id for e in endpoints if gpus[e.gpu] == gpu] for gpu in gpus.values()}
    policy = traffic_policy(spec, plan.load_balancer)
    subsets = [{"name": gpu, "labels": {GPU: gpu}} for gpu in members]
    body = {"host": host, "trafficPolicy": policy, **({"subsets": subsets} if subsets else {})}

    def destinations(size: str) -> list[dict[str, Any]]:
        row = class_row(plan.weights.get(size, {}), members)
        weighted = [{"destination": _destination(host, gpu), "weight": weight} for gpu, weight in row.items()]
        return weighted or [{"destination": _destination(host)}]

    entries = [endpoint_entry(e, gpus[e.gpu], spec, PORT_NAMES[spec.protocol], 0) for e in endpoints]
    service = _service_entry(spec, "subsets", host, entries)
    rule = _object(spec, DESTINATION_RULE, "subsets", body)
    return Rendered(spec.id, (service, rule), _virtual_service(spec, http_rules(spec, destinations)))


def _sizes(spec: RouteSpec) -> tuple[str, ...]:
    return (*(size.name for size in spec.sizes), DEFAULT_CLASS)


# ------------------------------------------------------------------------------------------------------------- objects


def _destination(host: str, subset: str = "") -> dict[str, Any]:
    return {"host": host, "port": {"number": PORT}, **({"subset": subset} if subset else {})}


def _service_entry(spec: RouteSpec, suffix: str, host: str, endpoints: list[dict[str, Any]]) -> KubeObject:
    body = {
        "hosts": [host],
        "location": "MESH_INTERNAL",
        "resolution": "STATIC",
        "ports": [{"name": PORT_NAMES[spec.protocol], "number": PORT, "protocol": str(spec.protocol)}],
        "endpoints": endpoints,
    }
    return _object(spec, SERVICE_ENTRY, suffix, body, {NO_ADDRESS: "false"})


def _virtual_service(spec: RouteSpec, rules: list[dict[str, Any]]) -> KubeObject:
    root = {} if spec.delegate else {"hosts": list(bare_hosts(spec.hosts)), "gateways": list(spec.gateways)}
    return _object(spec, VIRTUAL_SERVICE, "", {**root, "http": rules})


def _key(spec: RouteSpec, kind: str, suffix: str = "") -> ObjectKey:
    namespace, _, name = spec.id.partition("/")
    return ObjectKey(kind, namespace, backend_name(spec.id, suffix) if suffix else name)


def _object(
    spec: RouteSpec, kind: str, suffix: str, body: dict[str, Any], labels: Mapping[str, str] = MappingProxyType({})
) -> KubeObject:
    key, origin = _key(spec, kind, suffix), spec.origin
    resumed = {RESUMED_AT: origin.resumed_at} if origin and origin.resumed_at else {}
    owner = {"apiVersion": ROUTE_API, "kind": "ModelRoute", "name": _key(spec, kind).name, "controller": True}
    return {
        "apiVersion": NETWORKING,
        "kind": kind,
        "metadata": {
            "name": key.name,
            "namespace": key.namespace,
            "labels": {MANAGED_BY: MANAGER, **labels},
            "annotations": {ROUTE: spec.id, **resumed},
            **({"ownerReferences": [{**owner, "uid": origin.uid}]} if origin else {}),
        },
        "spec": body,
    }


# ------------------------------------------------------------------------------------------------------------ and back


def weights_of(route: DesiredRoute, live: Iterable[KubeObject]) -> Weights | None:
    """The weights that the live objects of `route` stand for: every size class, every endpoint of the route, each sum
    WEIGHT_TOTAL. None when the VirtualService or a ServiceEntry that it names is not there, or when a size class goes
    to no endpoint that still is.

    The live VirtualService decides what is read, not the spec: after a change of mechanism it is the old one's objects,
    and a size class that is new has what the default rule, which serves it until then, has.
    """
    objects = list(live)
    rules = _rules(route, objects)
    if DEFAULT_CLASS not in rules:
        return None
    known = _members(route, objects)
    dealer = Dealer({subset: [e for e, _ in members] for subset, members in known.items()})
    everyone = [e.id for e in route.endpoints]
    weights: dict[str, Row] = {}
    for size in _sizes(route.spec):
        row: dict[EndpointId, int] = {}
        for destination in rules.get(size, rules[DEFAULT_CLASS]):
            to = destination.get("destination", {})
            ref = Ref(to.get("host", ""), to.get("subset", ""))
            row |= dealer.deal(ref, destination.get("weight", 0)) if ref.subset else dict(known.get(ref, ()))
        if everyone and not any(row.values()):
            return None
        weights[size] = row_over(row, everyone)
    return weights


def _rules(route: DesiredRoute, live: Iterable[KubeObject]) -> dict[str, list[Mapping[str, Any]]]:
    """Destinations by the name of the live VirtualService's rule."""
    key = _key(route.spec, VIRTUAL_SERVICE)
    rules = [rule for value in live if key_of(value) == key for rule in value.get("spec", {}).get("http", ())]
    return {rule.get("name", ""): rule.get("route", []) for rule in rules}


def _members(route: DesiredRoute, live: Iterable[KubeObject]) -> dict[Ref, list[tuple[EndpointId, int]]]:
    """The endpoints of `route` with their weights by host, and by host and subset."""
    ids = {(e.address, e.port): e.id for e in route.endpoints}
    members: dict[Ref, list[tuple[EndpointId, int]]] = defaultdict(list)
    for value in live:
        if value["kind"] != SERVICE_ENTRY:
            continue
        spec = value.get("spec", {})
        for endpoint in spec.get("endpoints", ()):
            # the only one, whatever it is called: what is live may be of another protocol
            port = next(iter(endpoint.get("ports", {}).values()), PORT)
            found = ids.get((endpoint.get("address", ""), port))
            if found is None:
                continue
            for host in spec.get("hosts", ()):
                entry = (found, endpoint.get("weight", 1))
                members[Ref(host)].append(entry)
                members[Ref(host, endpoint.get("labels", {}).get(GPU, ""))].append(entry)
    return members
