"""ModelRoute: which requests, which servers, what SLO, and how carefully traffic moves.

The defaults of the guard and the time-out are the core's own (`meshctl.model`), taken from there, so that an empty
`guard: {}` and the core agree. What one object can say wrongly is refused here; what needs several objects (two routes
for one host, a product without a profile) is found in `resolve`.
"""

from __future__ import annotations

import inspect
import ipaddress
import itertools
import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, JsonValue, model_validator

from meshctl import model as core
from meshctl.api.base import API_VERSION, Conditions, GpuProduct, Label, Metadata, ModelName, Strict, cel, wrong
from meshctl.api.service import LARGEST_BATCH
from meshctl.api.units import Duration, DurationOrZero, Ratio, format_duration

SHARE_TOLERANCE = 1e-3
"""Shares written with three digits (0.333 three times) are meant to sum to 1; they are scaled to do so exactly."""
GUARD = core.Guard()
TIMEOUT_S = float(inspect.signature(core.RouteSpec).parameters["timeout_s"].default)
HOST = r"^(\*|(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*(:[0-9]{1,5})?)$"
HEADER = r"^[A-Za-z0-9_-]+$"
HEADERS = ("x-batch-size", "batch_size", "NV-InferRequest")
MOST_CLASSES = 16
SET: dict[str, JsonValue] = {"x-kubernetes-list-type": "set"}

Port = Annotated[int, Field(ge=1, le=65535)]
Batch = Annotated[int, Field(ge=1, le=LARGEST_BATCH)]
Host = Annotated[str, Field(pattern=HOST, max_length=253)]
Header = Annotated[str, Field(pattern=HEADER, max_length=128)]


def repeated(values: list[str]) -> int | None:
    """Index of the first value that stands earlier in the list too."""
    return next((i for i, value in enumerate(values) if value in values[:i]), None)


def check_shares(shares: list[float | None], *at: str) -> None:
    """All given and summing to 1, or none given."""
    given = [share for share in shares if share is not None]
    if given and len(given) < len(shares):
        wrong("is missing, but others have one; give every one a share, or none", *at, shares.index(None), "share")
    if given and abs(sum(given) - 1) > SHARE_TOLERANCE:
        wrong(f"the shares sum to {sum(given):g}; they must sum to 1", *at)


def normal_shares(shares: list[float | None]) -> list[float]:
    """Shares that sum to 1: the declared ones scaled, equal ones where none is declared."""
    given = [1.0 if share is None else share for share in shares]
    return [share / sum(given) for share in given]


def _ip(address: str) -> str:
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        wrong(f"{address!r} is not an IP address; proxies are given addresses, not names to resolve")


class RouteEndpoint(Strict):
    """One inference server on one GPU."""

    address: Annotated[str, Field(max_length=45), AfterValidator(_ip)]
    """IP address of the server."""
    port: Port
    """HTTP port of the server."""
    metrics_port: Port = 8002
    """Port of its metrics (Triton's default)."""
    gpu: GpuProduct
    """GPU product, as a ModelProfile names it."""
    gpu_uuid: Annotated[str, Field(alias="gpuUUID", max_length=96)] = ""
    """UUID of the GPU, as DCGM labels it; without it only the server's own utilisation metric is used."""
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 1
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


class Backend(Strict):
    """The servers that answer. Exactly one kind; today: static endpoints."""

    endpoints: Annotated[
        tuple[RouteEndpoint, ...],
        Field(
            strict=False,
            min_length=1,
            max_length=1024,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["address", "port"]},
        ),
    ]
    """Static list of servers, each with its GPU product."""

    @model_validator(mode="after")
    def _each_once(self) -> Backend:
        ids = [str(e.endpoint().id) for e in self.endpoints]
        again = repeated(ids)
        if again is not None:
            wrong(f"{ids[again]} stands twice; an address and port may stand once in a route", "endpoints", again)
        return self


class Slo(Strict):
    """What is promised to the callers."""

    latency: Duration
    """Time within which a request is to be answered."""
    percentile: Annotated[float, Field(gt=0, lt=100)] = 99.0
    """Percentage of the requests, of every size class, that must be answered within it; 0..100, both excluded."""


class SizeClassSpec(Strict):
    """Requests whose batch size lies in [min, max], both included."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("self.name != 'default'", "the name default is reserved"),
            ("self.min <= self.max", "min must not exceed max"),
            (
                "!has(self.batch) || (double(self.min) <= self.batch && self.batch <= double(self.max))",
                "batch must lie in [min, max]",
            ),
        )
    )

    name: Label
    """Name of the class; `default` is reserved for requests without a usable size."""
    min: Batch
    """Smallest batch of the class."""
    max: Batch
    """Largest batch of the class."""
    batch: Annotated[float, Field(ge=1, le=LARGEST_BATCH)] | None = None
    """Batch whose service time stands for the class; the geometric mean of min and max when not given."""
    share: Ratio | None = None
    """Share of the requests, 0..1: the prior until the mix is observed. Give every class one (they sum to 1), or none
    (then all are equal)."""

    @model_validator(mode="after")
    def _consistent(self) -> SizeClassSpec:
        if self.name == core.DEFAULT_CLASS:
            wrong(f"{self.name!r} is reserved for requests without a usable size; choose another name", "name")
        if self.min > self.max:
            wrong(f"{self.max} is less than min, {self.min}; swap them", "max")
        if self.batch is not None and not self.min <= self.batch <= self.max:
            wrong(f"{self.batch:g} is outside [{self.min}, {self.max}]; choose a batch of the class", "batch")
        return self


ALL_SIZES = SizeClassSpec(name="all", min=1, max=LARGEST_BATCH, batch=1.0)
"""The only class when none is declared. It stands for batch 1, the commonest size, until sizes are observed."""


class RequestSize(Strict):
    """How a request's size is read, and which sizes are told apart."""

    headers: Annotated[tuple[Header, ...], Field(strict=False, min_length=1, max_length=8, json_schema_extra=SET)] = (
        HEADERS
    )
    """Headers that may carry the batch size; the first present wins. `NV-InferRequest` is read as
    `batch_size: N` inside its value, the others as a whole number."""
    classes: Annotated[
        tuple[SizeClassSpec, ...],
        Field(
            strict=False,
            min_length=1,
            max_length=MOST_CLASSES,
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
                **cel(
                    (
                        "self.all(a, self.exists_one(b, a.min <= b.max && b.min <= a.max))",
                        "classes must not overlap",
                    ),
                    (
                        "self.all(c, has(c.share)) || !self.exists(c, has(c.share))",
                        "give every class a share, or none",
                    ),
                    (
                        (
                            "!self.all(c, has(c.share)) || (0.999 <= self.map(c, c.share).sum()"
                            " && self.map(c, c.share).sum() <= 1.001)"
                        ),
                        "shares must sum to 1",
                    ),
                ),
            },
        ),
    ] = (ALL_SIZES,)
    """Size classes, not overlapping. Sizes in a gap between them take the default route."""

    @model_validator(mode="after")
    def _consistent(self) -> RequestSize:
        again = repeated([header.lower() for header in self.headers])
        if again is not None:
            wrong(f"{self.headers[again]} stands twice (case does not count); keep one", "headers", again)
        again = repeated([c.name for c in self.classes])
        if again is not None:
            wrong(f"{self.classes[again].name!r} stands twice; names of classes are unique", "classes", again, "name")
        order = sorted(range(len(self.classes)), key=lambda i: (self.classes[i].min, i))
        for lower, upper in itertools.pairwise(order):
            a, b = self.classes[lower], self.classes[upper]
            if b.min <= a.max:
                both = f"[{b.min}, {b.max}] overlaps [{a.min}, {a.max}] of class {a.name}"
                wrong(f"{both}; make one end before the other begins", "classes", upper)
        check_shares([c.share for c in self.classes], "classes")
        return self

    def sizes(self) -> tuple[core.SizeClass, ...]:
        shares = normal_shares([c.share for c in self.classes])
        both = sorted(zip(self.classes, shares, strict=True), key=lambda pair: pair[0].min)
        return tuple(
            core.SizeClass(c.name, c.min, c.max, c.batch if c.batch is not None else math.sqrt(c.min * c.max), share)
            for c, share in both
        )


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


class ModelRouteSpec(Strict):
    """Requests for some hosts, answered by some servers of one model within an SLO."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "!has(self.timeout) || duration(self.timeout) >= duration(self.slo.latency)",
                "timeout must not be shorter than slo.latency",
            )
        )
    )

    hosts: Annotated[tuple[Host, ...], Field(strict=False, min_length=1, max_length=64, json_schema_extra=SET)] = ("*",)
    """Host names served; `*` is every host, `*.example.com` every host below."""
    gateways: Annotated[tuple[str, ...], Field(strict=False, max_length=64, json_schema_extra=SET)] = ()
    """Istio gateways that serve the hosts; empty: the proxies of meshctl's own xDS server."""
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
    guard: GuardSpec = GuardSpec()
    """What keeps a wobbling signal from moving traffic."""
    suspend: bool = False
    """True: weights stay as they are."""

    @model_validator(mode="after")
    def _consistent(self) -> ModelRouteSpec:
        again = repeated(list(self.hosts))
        if again is not None:
            wrong(f"{self.hosts[again]!r} stands twice; keep one", "hosts", again)
        if self.timeout < self.slo.latency:
            both = f"{format_duration(self.timeout)} is shorter than slo.latency, {format_duration(self.slo.latency)}"
            wrong(f"{both}: requests would be cut off before they are late; raise it", "timeout")
        return self


class ModelRouteStatus(Strict):
    """What the controller says of the route."""

    observed_generation: Annotated[int, Field(ge=0)] | None = None
    """metadata.generation the plan in force was made for."""
    conditions: Conditions | None = None
    """Accepted: the spec is used. Programmed: proxies acknowledged the weights. Attainable: every size class is
    expected to meet its percentile."""


class ModelRoute(Strict):
    """Sends the requests for one model, by their size, to the GPUs that answer within the SLO."""

    api_version: Literal["meshctl.io/v1alpha1"] = API_VERSION
    kind: Literal["ModelRoute"] = "ModelRoute"
    metadata: Metadata
    spec: ModelRouteSpec
    status: Any = None

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
        )

    def endpoints(self) -> tuple[core.Endpoint, ...]:
        """Ordered by id."""
        return tuple(sorted((e.endpoint() for e in self.spec.backend.endpoints), key=lambda e: e.id))
