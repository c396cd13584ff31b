"""ModelRoute: which requests, which servers, what SLO, and how carefully traffic moves.

The defaults of the guard and the time-out are the core's own (`meshctl.model`), taken from there, so that an empty
`guard: {}` and the core agree. What one object can say wrongly is refused here; what needs several objects (two routes
for one host, a product without a profile) is found in `resolve`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from istio.names import RESUMED_AT
from meshctl import model as core
from meshctl.api.backend import Backend
from meshctl.api.base import (
    API_VERSION,
    DNS_SUBDOMAIN,
    SET,
    Conditions,
    Label,
    Metadata,
    ModelName,
    Strict,
    Unread,
    cel,
    repeated,
    wrong,
)
from meshctl.api.sizes import RequestSize
from meshctl.api.units import Duration, DurationOrZero, format_duration

GUARD = core.Guard()
RETRY = core.Retry()
_SPEC = inspect.signature(core.RouteSpec).parameters
TIMEOUT_S = float(_SPEC["timeout_s"].default)
WARM_UP_S = float(_SPEC["warm_up_s"].default)
HOST = r"^(\*|(\*\.)?[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)*(:[0-9]{1,5})?)$"
ANY_HOST = "*"
GATEWAY = r"^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?/)?" + DNS_SUBDOMAIN.removeprefix("^")
MESH = "mesh"
"""Instead of a gateway: every sidecar."""
LONGEST_NAME = 63
"""Of a ModelRoute: its name becomes a part of host names, and of the names of Istio's objects."""

Host = Annotated[str, Field(pattern=HOST, max_length=253)]
Gateway = Annotated[str, Field(pattern=GATEWAY, max_length=317)]


class Slo(Strict):
    """What is promised to the callers."""

    latency: Duration
    """Time within which a request is to be answered."""
    percentile: Annotated[float, Field(gt=0, lt=100)] = 99.0
    """Percentage of the requests, of every size class, that must be answered within it; 0..100, both excluded."""


class GuardSpec(Strict):
    """What keeps a wobbling signal from moving traffic."""

    smoothing: Duration = GUARD.smoothing_s
    """Time constant of the moving averages of load, mix and service times."""
    dead_band: Annotated[float, Field(ge=0, lt=1)] = GUARD.dead_band_ratio
    """Weights move only when some endpoint's share of a size class changes by more than this; 0..1."""
    max_step: Annotated[float, Field(gt=0, le=1)] = GUARD.max_step_ratio
    """Largest share of a size class's traffic moved by one step, 0..1; draining is exempt."""
    dwell: DurationOrZero = GUARD.dwell_s
    """Least time between two steps that improve, not repair."""
    stale_after: Duration = GUARD.stale_after_s
    """A signal older than this is held."""
    decay: Duration = GUARD.decay_s
    """A stale signal gives way to the capacity prior over this time."""
    headroom: Annotated[float, Field(ge=0, le=10)] = GUARD.headroom_ratio
    """Weights are solved for (1 + headroom) times the forecast load."""
    error_ratio: Annotated[float, Field(gt=0, le=1)] = GUARD.error_ratio
    """An endpoint that fails more than this share of its requests, 0..1, is drained."""
    hang_after: Duration = GUARD.hang_after_s
    """An endpoint with requests pending and none completing for this long is drained."""
    recover_after: Duration = GUARD.recover_after_s
    """A drained endpoint is tried again, with a small weight, after this long."""

    def guard(self) -> core.Guard:
        return core.Guard(
            smoothing_s=self.smoothing,
            dead_band_ratio=self.dead_band,
            max_step_ratio=self.max_step,
            dwell_s=self.dwell,
            stale_after_s=self.stale_after,
            decay_s=self.decay,
            headroom_ratio=self.headroom,
            error_ratio=self.error_ratio,
            hang_after_s=self.hang_after,
            recover_after_s=self.recover_after,
        )


class RetrySpec(Strict):
    """What a proxy may send again, to another server."""

    attempts: Annotated[int, Field(ge=0, le=10)] = RETRY.attempts
    """Times a request is sent again at most; 0: never."""
    per_try_timeout: Duration | None = None
    """Longest one try may take; the route's own timeout when not given."""
    idempotent: bool = RETRY.idempotent
    """False: only what no server can have begun is sent again (connection refused, reset before the request)."""

    def retry(self) -> core.Retry:
        return core.Retry(self.attempts, self.per_try_timeout, self.idempotent)


class ModelRouteSpec(Strict):
    """Requests for some hosts, answered by some servers of one model within an SLO."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "duration(self.timeout) >= duration(self.slo.latency)",
                "timeout must not be shorter than slo.latency",
            ),
            (
                "!has(self.retry.perTryTimeout) || duration(self.retry.perTryTimeout) <= duration(self.timeout)",
                "retry.perTryTimeout must not be longer than timeout",
            ),
            (
                "!self.delegate || self.gateways.size() == 0",
                "delegate excludes gateways: the VirtualService that delegates to this route names them",
            ),
            (
                "!self.delegate || self.hosts == ['*']",
                "delegate excludes hosts: the VirtualService that delegates to this route names them",
            ),
            (
                "self.gateways.size() == 0 || !self.hosts.exists(host, host.contains(':'))",
                "hosts of a route with gateways have no port: the Gateway says it",
            ),
            (
                "!self.gateways.exists(gateway, gateway == 'mesh') || !self.hosts.exists(host, host == '*')",
                "gateway mesh needs hosts of its own: * would take all requests of all sidecars",
            ),
        )
    )

    hosts: Annotated[tuple[Host, ...], Field(strict=False, min_length=1, max_length=64, json_schema_extra=SET)] = ("*",)
    """Host names served; `*` is every host, `*.example.com` every host below."""
    gateways: Annotated[tuple[Gateway, ...], Field(strict=False, max_length=64, json_schema_extra=SET)] = ()
    """Istio gateways that serve the hosts: `namespace/name`, `name` in the route's namespace, or `mesh` for every
    sidecar. Empty, and not `delegate`: only the proxies of meshctl's own xDS server."""
    proxy_groups: Annotated[tuple[Label, ...], Field(strict=False, max_length=64, json_schema_extra=SET)] = (
        core.PROXY_GROUP,
    )
    """Groups of xDS clients (Envoys, gRPC programs) that meshctl's own xDS server serves the route to. A client's group
    is its node metadata `meshctl.io/group`, else its node cluster, else `meshctl`. Empty: none of them."""
    delegate: bool = False
    """True: a VirtualService that others own delegates to ours, which has the route's name and namespace."""
    backend: Backend
    """Servers that answer."""
    model: ModelName
    """Model, as the inference server and the ModelProfiles name it."""
    slo: Slo
    """What is promised."""
    request_size: RequestSize = RequestSize()
    """How sizes are read, and which are told apart."""
    expected_load: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Requests per second to plan for until arrivals are observed."""
    policy: Annotated[core.Policy, Field(strict=False)] = core.Policy.BALANCED
    """How weights are chosen."""
    mechanism: Annotated[core.Mechanism, Field(strict=False)] = core.Mechanism.ENDPOINTS
    """How weights reach the proxies: per endpoint of one cluster, or per subset."""
    timeout: Duration = TIMEOUT_S
    """Longest a request may take before it is answered 504."""
    retry: RetrySpec = RetrySpec()
    """What a proxy may send again, to another server."""
    warm_up: DurationOrZero = WARM_UP_S
    """A new server's share grows to its full size over this time; `0s`: at once."""
    guard: GuardSpec = GuardSpec()
    """What keeps a wobbling signal from moving traffic."""
    suspend: bool = False
    """True: weights stay as they are."""

    @model_validator(mode="after")
    def _consistent(self) -> ModelRouteSpec:
        for field, names in (("hosts", self.hosts), ("proxyGroups", self.proxy_groups)):
            again = repeated(names)
            if again is not None:
                wrong(f"{names[again]!r} stands twice; keep one", field, again)
        if self.timeout < self.slo.latency:
            both = f"{format_duration(self.timeout)} is shorter than slo.latency, {format_duration(self.slo.latency)}"
            wrong(f"{both}: requests would be cut off before they are late; raise it", "timeout")
        per_try = self.retry.per_try_timeout
        if per_try is not None and per_try > self.timeout:
            both = f"{format_duration(per_try)} is longer than timeout, {format_duration(self.timeout)}"
            wrong(f"{both}; lower it", "retry", "perTryTimeout")
        self._check_mesh()
        return self

    def _check_mesh(self) -> None:
        named = "the VirtualService that delegates to this route names them"
        if self.delegate and self.gateways:
            wrong(f"delegate excludes gateways: {named}; remove one of the two", "gateways")
        if self.delegate and self.hosts != (ANY_HOST,):
            wrong(f"delegate excludes hosts: {named}; remove them", "hosts")
        with_port = next((i for i, host in enumerate(self.hosts) if ":" in host), None)
        if self.gateways and with_port is not None:
            wrong(f"{self.hosts[with_port]!r} has a port, which the Gateway says; remove it", "hosts", with_port)
        if MESH in self.gateways and ANY_HOST in self.hosts:
            wrong("gateway mesh needs hosts of its own: * would take all requests of all sidecars", "hosts")


class ClassShare(Strict):
    """Share of one size class that one GPU class gets."""

    size: Annotated[str, Field(max_length=63)]
    """Size class; `default` for requests without a usable size."""
    gpu: Annotated[str, Field(max_length=128)]
    """GPU product; empty when it is unknown."""
    share: Annotated[str, Field(max_length=16)]
    """Share of the requests of that size, e.g. `62.5%`."""


class ModelRouteStatus(Strict):
    """What the controller says of the route."""

    observed_generation: Annotated[int, Field(ge=0)] | None = None
    """metadata.generation the plan in force was made for."""
    attainment: Annotated[str, Field(max_length=16)] | None = None
    """Share of the worst size class that is expected to be answered within the SLO, e.g. `99.4%`."""
    worst_class: Annotated[str, Field(max_length=63)] | None = None
    """The size class whose requests are expected to be late most often."""
    endpoints: Annotated[int, Field(ge=0)] | None = None
    """Servers found."""
    ready_endpoints: Annotated[int, Field(ge=0)] | None = None
    """Servers that may get requests."""
    weights: (
        Annotated[
            tuple[ClassShare, ...],
            Field(max_length=1024, json_schema_extra={"x-kubernetes-list-type": "atomic"}),
        ]
        | None
    ) = None
    """How the requests of each size class are shared between the GPU classes."""
    conditions: Conditions | None = None
    """Ready: served as decided. Resolved: endpoints and profiles found, the spec is used. MetricsFresh: every endpoint
    was measured lately. SLOFeasible: every size class is expected to meet its percentile. Programmed: the weights are
    in force. Conflict: somebody else owns or changed an object of the route, which is left alone."""


class ModelRoute(Strict):
    """Sends the requests for one model, by their size, to the GPUs that answer within the SLO."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                f"self.metadata.name.size() <= {LONGEST_NAME}",
                f"metadata.name must have at most {LONGEST_NAME} characters: it becomes part of host names",
            )
        )
    )

    api_version: Literal["meshctl.io/v1alpha1"] = API_VERSION
    kind: Literal["ModelRoute"] = "ModelRoute"
    metadata: Metadata
    spec: ModelRouteSpec
    status: Unread = None

    @model_validator(mode="after")
    def _short_name(self) -> ModelRoute:
        if len(self.metadata.name) > LONGEST_NAME:
            wrong(f"has more than {LONGEST_NAME} characters; it becomes part of host names", "metadata", "name")
        return self

    @property
    def id(self) -> core.RouteId:
        return core.RouteId(f"{self.metadata.namespace}/{self.metadata.name}")

    def route_spec(self, generation: int = 1) -> core.RouteSpec:
        spec = self.spec
        return core.RouteSpec(
            id=self.id,
            hosts=spec.hosts,
            model=spec.model,
            slo_s=spec.slo.latency,
            percentile=spec.slo.percentile / 100,
            headers=tuple(header.lower() for header in spec.request_size.headers),
            sizes=spec.request_size.sizes(),
            policy=spec.policy,
            mechanism=spec.mechanism,
            expected_load_rps=spec.expected_load,
            timeout_s=spec.timeout,
            guard=spec.guard.guard(),
            suspend=spec.suspend,
            generation=generation,
            gateways=tuple(dict.fromkeys(self._gateways())),
            delegate=spec.delegate,
            retry=spec.retry.retry(),
            warm_up_s=spec.warm_up,
            origin=self._origin(),
            protocol=spec.backend.protocol,
            proxy_groups=spec.proxy_groups,
        )

    def _gateways(self) -> Iterator[str]:
        """``namespace/name``, or ``mesh``."""
        for name in self.spec.gateways:
            yield name if name == MESH or "/" in name else f"{self.metadata.namespace}/{name}"

    def _origin(self) -> core.Origin | None:
        metadata = self.metadata
        if not metadata.uid or not metadata.generation:
            return None
        return core.Origin(metadata.uid, metadata.generation, metadata.annotations.get(RESUMED_AT, ""))

    def endpoints(self) -> tuple[core.Endpoint, ...]:
        """The static ones, ordered by id; none for a Service."""
        return tuple(sorted((e.endpoint() for e in self.spec.backend.endpoints or ()), key=lambda e: e.id))
