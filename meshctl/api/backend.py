"""What answers the requests of a ModelRoute: a Service whose pods are discovered, or a static list of servers."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from meshctl import model as core
from meshctl.api.base import GpuProduct, Label, Strict, cel, repeated, wrong
from meshctl.api.document import short

PORT_NAME = r"^([0-9][-0-9]*)?[a-z]([-a-z0-9]*[a-z0-9])?$"
"""A DNS-1123 label with a letter: "8000" in quotes is a port that lost its type, not a name."""
MOST_PORTS = 65535

Port = Annotated[int, Field(ge=1, le=MOST_PORTS)]
Concurrency = Annotated[int, Field(ge=1, le=1024)]


def _ip(address: str) -> str:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        wrong(f"{address!r} is not an IP address; proxies are given addresses, not names to resolve")
    if isinstance(found, ipaddress.IPv6Address) and (found.scope_id or found.ipv4_mapped):
        wrong(f"{address!r} has a zone, or an IPv4 address inside; write the plain address")
    if str(found) != address:  # else one server could stand in the list twice
        wrong(f"{address!r} is not how the address is usually written; write {found}")
    return address


class RouteEndpoint(Strict):
    """One inference server on one GPU."""

    address: Annotated[
        str,
        Field(
            max_length=45,
            json_schema_extra=cel(
                (
                    "isIP(self) && ip.isCanonical(self)",
                    "must be an IP address, written as usual (lower case, the longest run of zeros as ::)",
                )
            ),
        ),
        AfterValidator(_ip),
    ]
    """IP address of the server, in its usual form."""
    port: Port
    """Port on which the server takes requests."""
    metrics_port: Port = 8002
    """Port of its metrics (Triton's default)."""
    gpu: GpuProduct
    """GPU product, as a ModelProfile names it."""
    gpu_uuid: Annotated[str, Field(alias="gpuUUID", max_length=96)] = ""
    """UUID of the GPU, as DCGM labels it; without it only the server's own utilisation metric is used."""
    concurrency: Concurrency = 1
    """Requests served at once (instance groups, or MPS shares behind one address)."""

    def endpoint(self) -> core.Endpoint:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return core.Endpoint(
            id=core.EndpointId(f"{host}:{self.port}"),
            address=self.address,
            port=self.port,
            gpu=self.gpu,
            metrics=f"{host}:{self.metrics_port}",
            gpu_uuid=self.gpu_uuid,
            concurrency=self.concurrency,
        )


def _port_or_name(value: object) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_PORTS:
        return value
    named = isinstance(value, str) and len(value) <= 63 and re.fullmatch(PORT_NAME, value)
    if not named:
        wrong(f"{short(value)} is neither a port (1 to {MOST_PORTS}, without quotes) nor the name of one")
    return str(value)


PortOrName = Annotated[
    int | str,
    PlainValidator(_port_or_name),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "minimum": 1,
            "maximum": MOST_PORTS,
            "pattern": PORT_NAME,
            "maxLength": 63,
        }
    ),
]


class ServiceBackend(Strict):
    """The ready pods behind a Service of the route's namespace, each with the GPU found for it."""

    name: Label
    """Name of the Service."""
    port: PortOrName
    """Port of the Service for requests, by number or name; requests go to the pods' port behind it."""
    metrics_port: Port = 8002
    """Port of the pods' metrics (Triton's default)."""
    concurrency: Concurrency = 1
    """Requests each pod serves at once (instance groups, or MPS shares)."""


class Backend(Strict):
    """The servers that answer: a Service, or static endpoints."""

    model_config = ConfigDict(
        json_schema_extra=cel(("has(self.service) != has(self.endpoints)", "give either service or endpoints"))
    )

    service: ServiceBackend | None = None
    """Service whose ready pods answer."""
    endpoints: (
        Annotated[
            tuple[RouteEndpoint, ...],
            Field(
                strict=False,
                min_length=1,
                max_length=1024,
                json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["address", "port"]},
            ),
        ]
        | None
    ) = None
    """Static list of servers, each with its GPU product."""
    protocol: Annotated[core.Protocol, Field(strict=False)] = core.Protocol.HTTP
    """What the servers speak on their port: `HTTP` (HTTP/1.1), or `GRPC` (HTTP/2 without TLS). Clients with gRPC's
    `xds:` resolver are served only routes with `GRPC`."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Backend:
        if (self.service is None) == (self.endpoints is None):
            wrong("give either service (a Service of this namespace) or endpoints (a static list)")
        ids = [str(e.endpoint().id) for e in self.endpoints or ()]
        again = repeated(ids)
        if again is not None:
            wrong(f"{ids[again]} stands twice; an address and port may stand once in a route", "endpoints", again)
        return self
