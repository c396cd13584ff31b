"""What is wrong with one ServiceEntry beyond its single fields. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from istio.analyze import values
from istio.analyze.finding import FieldPath
from istio.analyze.shapes import UINT32

Report = Callable[[str, FieldPath, str], None]
Spec = Mapping[str, Any]

_UNIX = "unix://"
_HTTP = frozenset({"http", "http2", "grpc", "grpc-web", "http_proxy"})
_TLS = frozenset({"https", "tls"})
PROTOCOLS = _HTTP | _TLS | {"tcp", "udp", "mongo", "redis", "mysql"}
"""In lower case, as Istio compares them; none named means that the proxies look at the traffic."""


def judge(spec: Spec, report: Report) -> None:
    """`spec` as `shape.Reader` gives it."""
    resolution = spec.get("resolution", "NONE")
    for index, host in enumerate(spec.get("hosts", [])):
        if host == "*":
            report("InvalidHost", ("spec", "hosts", index), "a ServiceEntry for `*`")
    ports = spec.get("ports", [])
    _ports(ports, spec.get("hosts", []), resolution, report)
    names = {port.get("name", "") for port in ports}
    endpoints = spec.get("endpoints", [])
    for index, endpoint in enumerate(endpoints):
        _endpoint(endpoint, resolution, names, ("spec", "endpoints", index), report)
    _together(endpoints, report)
    _resolution(spec, resolution, report)


def _ports(ports: Sequence[Spec], hosts: Sequence[str], resolution: str, report: Report) -> None:
    seen: set[object] = set()
    for index, port in enumerate(ports):
        path: FieldPath = ("spec", "ports", index)
        for field in ("name", "number"):
            if field in port and (field, port[field]) in seen:
                report("DuplicatePort", (*path, field), f"the port {field} `{port[field]}` is there twice")
            seen.add((field, port.get(field)))
        protocol = port.get("protocol", "").lower()
        if protocol and protocol not in PROTOCOLS:
            report("UnknownValue", (*path, "protocol"), f"`{port['protocol'][:40]}` is not a protocol that Istio knows")
        elif len(hosts) > 1 and resolution != "NONE" and protocol not in _HTTP | _TLS:
            report("ResolutionConflict", path, "several hosts on a port that carries neither HTTP nor TLS")


def _endpoint(endpoint: Spec, resolution: str, ports: set[str], path: FieldPath, report: Report) -> None:
    address = endpoint.get("address", "")
    if not address and not endpoint.get("network"):
        report("MissingField", (*path, "address"), "the endpoint has no address")
    elif address.startswith(_UNIX):
        if endpoint.get("ports"):
            report("ResolutionConflict", (*path, "ports"), "a Unix socket has no ports")
    elif address and not values.is_ip(address) and (resolution == "STATIC" or values.bad_name(address)):
        report("InvalidAddress", (*path, "address"), f"`{address[:80]}` is not an address for resolution {resolution}")
    for name in endpoint.get("ports", {}):
        if name not in ports:
            report("UnknownPort", (*path, "ports", name), f"the entry has no port `{name[:40]}`")
    if endpoint.get("weight") == 0:
        report("ZeroEndpointWeight", (*path, "weight"), "the weight is 0")


def _together(endpoints: Sequence[Spec], report: Report) -> None:
    seen: dict[object, int] = {}
    for index, endpoint in enumerate(endpoints):
        identity = (endpoint.get("address", ""), tuple(sorted(endpoint.get("ports", {}).items())))
        first = seen.setdefault(identity, index)
        if first != index and identity[0]:
            report("DuplicateEndpoint", ("spec", "endpoints", index), f"`{identity[0]}` is endpoint {first} already")
    if sum(endpoint.get("weight", 1) for endpoint in endpoints) > UINT32:
        report("WeightsTooLarge", ("spec", "endpoints"), f"the weights sum to more than {UINT32}")


def _resolution(spec: Spec, resolution: str, report: Report) -> None:
    path: FieldPath = ("spec", "resolution")
    count = len(spec.get("endpoints", []))
    if resolution == "NONE" and count:
        report("ResolutionConflict", path, "resolution NONE (the default) has no endpoints; write STATIC or DNS")
    if resolution == "DNS_ROUND_ROBIN" and count > 1:
        report("ResolutionConflict", path, f"DNS_ROUND_ROBIN takes one endpoint, not {count}")
    if resolution in ("DNS", "DNS_ROUND_ROBIN") and not count:
        for index, host in enumerate(spec.get("hosts", [])):
            if values.bad_name(host):
                report("InvalidHost", ("spec", "hosts", index), f"`{host[:80]}` can't be resolved and has no endpoints")
    if resolution == "DYNAMIC_DNS" and (count or spec.get("addresses")):
        report("ResolutionConflict", path, "DYNAMIC_DNS has neither endpoints nor addresses")
    if resolution == "DYNAMIC_DNS" and not all(host.startswith("*") for host in spec.get("hosts", [])):
        report("ResolutionConflict", path, "DYNAMIC_DNS takes only hosts with a wildcard")
    if any("/" in address for address in spec.get("addresses", [])) and resolution not in ("NONE", "STATIC"):
        report("ResolutionConflict", path, f"CIDR blocks do not go with {resolution}; NONE and STATIC take them")
