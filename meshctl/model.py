"""The vocabulary of the core: what is desired, what is observed, what is decided. Data only.

Everything here is frozen, so that a `Snapshot` is one instant and a `Plan` can be compared with the one before it.
Units stand in the names: ``_s`` seconds, ``_rps`` requests per second, ``_ratio`` 0..1. Unknown is ``None``, never 0.
Every time is on ONE monotonic clock (the loop's): a step of the wall clock changes no age.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import ClassVar, NewType

RouteId = NewType("RouteId", str)
"""``namespace/name`` of a ModelRoute."""
EndpointId = NewType("EndpointId", str)
"""``address:port`` of one inference server."""

WEIGHT_TOTAL = 1000
"""Integer weights of one size class sum to this (largest remainder, explicit zeros)."""
DEFAULT_CLASS = "default"
"""Name of the implicit class that serves requests whose size is missing, malformed or out of every range."""


def cluster_name(route: RouteId, size: str) -> str:
    """The data plane's cluster for one size class of a route; also the key of its arrival counters.

    Dots would split Envoy's stat names, so they are written as underscores; a CRD name has no underscore, so the
    result stays unique.
    """
    return f"{route}/{size}".replace(".", "_")


# ---------------------------------------------------------------------------------------------------- desired state


class Policy(StrEnum):
    """How weights are chosen (spec.policy)."""

    BALANCED = "Balanced"
    EQUAL_UTILIZATION = "EqualUtilization"
    PROPORTIONAL = "Proportional"
    MEAN_OPTIMAL = "MeanOptimal"
    LEAST_REQUEST = "LeastRequest"
    ROUND_ROBIN = "RoundRobin"


class Mechanism(StrEnum):
    """How weights reach the data plane (spec.mechanism)."""

    ENDPOINTS = "Endpoints"
    SUBSETS = "Subsets"


class Protocol(StrEnum):
    """What the servers of a route speak (spec.backend.protocol)."""

    HTTP = "HTTP"
    GRPC = "GRPC"
    """gRPC, over HTTP/2 without upgrade."""


PROXY_GROUP = "meshctl"
"""The group of an xDS client that names none, and of a route that names none."""


@dataclass(frozen=True, slots=True)
class SizeClass:
    """Requests whose batch lies in [min_batch, max_batch], both inclusive."""

    name: str
    min_batch: int
    max_batch: int
    batch: float
    """Representative batch: the one whose service time stands for the class."""
    share: float
    """Declared share of the requests, 0..1; the shares of a route sum to 1. The prior of the observed mix."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The Kubernetes pod behind an endpoint: what a mesh needs to know of whom it talks to."""

    namespace: str
    name: str
    node: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    """Ordered by key."""
    service_account: str = ""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One inference server on one GPU."""

    id: EndpointId
    address: str
    port: int
    gpu: str
    """GPU product, as its ModelProfile names it; "" when unknown."""
    metrics: str
    """``host:port`` of its metrics (Triton: port 8002); Prometheus' ``instance`` label."""
    gpu_uuid: str = ""
    """DCGM's UUID label; "" when unknown (then only the server's own utilisation metric is used)."""
    concurrency: int = 1
    """Requests served at once: instance-group count, or MPS share holders behind one address."""
    ready: bool = True
    """False: gets no new requests (not ready, or terminating)."""
    locality: str = ""
    """``region/zone``, as far as it is known."""
    workload: Workload | None = None
    """None for static endpoints."""


@dataclass(frozen=True, slots=True)
class ServiceProfile:
    """Batch -> service time of one model on one GPU product, alone on the GPU.

    `points` are (batch, seconds), batches increasing, seconds non-decreasing. One point means a constant.
    """

    points: tuple[tuple[float, float], ...]

    @staticmethod
    def affine(base_s: float, per_item_s: float) -> ServiceProfile:
        """``base_s + per_item_s * batch``: two points, which interpolation and extrapolation then follow."""
        return ServiceProfile(((1.0, base_s + per_item_s), (2.0, base_s + 2 * per_item_s)))


@dataclass(frozen=True, slots=True)
class Guard:
    """What keeps a wobbling signal from moving traffic (spec.guard)."""

    smoothing_s: float = 5.0
    """Time constant of the EWMA on load, mix and service times."""
    dead_band_ratio: float = 0.02
    """Weights move only when some endpoint's share of a size class would change by more than this."""
    max_step_ratio: float = 0.25
    """Largest part of a size class's traffic moved by one step; draining is exempt."""
    dwell_s: float = 5.0
    """Least time between two steps that are improvements, not repairs."""
    stale_after_s: float = 10.0
    """A signal older than this is stale: held ..."""
    decay_s: float = 60.0
    """... and from then on decayed to the capacity prior over this time."""
    headroom_ratio: float = 0.05
    """Weights are solved for (1 + headroom) times the forecast load."""
    error_ratio: float = 0.5
    """An endpoint that fails more than this part of its requests is drained."""
    hang_after_s: float = 3.0
    """An endpoint with requests pending and none completing for this long is drained."""
    recover_after_s: float = 10.0
    """A drained endpoint is tried again (with a small weight) after this long."""


@dataclass(frozen=True, slots=True)
class Retry:
    """What a proxy may send again, to another endpoint (spec.retry)."""

    attempts: int = 2
    """After the first try; 0: none."""
    per_try_timeout_s: float | None = None
    """None: the route's own timeout."""
    idempotent: bool = False
    """False: only what no server can have begun is sent again (connection refused, reset before the request)."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The Kubernetes object that a route comes from."""

    uid: str
    generation: int
    """metadata.generation, for observedGeneration."""
    resumed_at: str = ""
    """Annotation ``meshctl.io/resumed-at``: a new value takes back what others changed in our objects, once."""


@dataclass(frozen=True, slots=True)
class RouteSpec:
    """One ModelRoute, validated and defaulted."""

    id: RouteId
    hosts: tuple[str, ...]
    """Authorities served; ``("*",)`` is every host."""
    model: str
    slo_s: float
    percentile: float
    """Share of the requests that must meet `slo_s`, 0..1."""
    headers: tuple[str, ...]
    """Headers that may carry the batch size, lower case; the first present wins."""
    sizes: tuple[SizeClass, ...]
    """Ordered by batch, not overlapping, at least one."""
    policy: Policy = Policy.BALANCED
    mechanism: Mechanism = Mechanism.ENDPOINTS
    expected_load_rps: float | None = None
    """Declared load, the prior until arrivals are observed."""
    timeout_s: float = 30.0
    """Longest a request may take before the data plane answers 504."""
    guard: Guard = field(default_factory=Guard)
    suspend: bool = False
    generation: int = 1
    gateways: tuple[str, ...] = ()
    """Istio gateways (``namespace/name`` or ``mesh``) whose root VirtualService we write."""
    delegate: bool = False
    """Git owns the root VirtualService; ours has no hosts and no gateways, and is named by it."""
    retry: Retry = field(default_factory=Retry)
    warm_up_s: float = 10.0
    """A new endpoint's share grows to its full size over this time; 0: at once."""
    origin: Origin | None = None
    """None: not from Kubernetes."""
    protocol: Protocol = Protocol.HTTP
    proxy_groups: tuple[str, ...] = (PROXY_GROUP,)
    """Groups of our own xDS server's clients that are served the route, each once."""

    @property
    def meshed(self) -> bool:
        """Served through Istio (and not only by our own xDS server)."""
        return self.delegate or bool(self.gateways)


@dataclass(frozen=True, slots=True)
class DesiredRoute:
    """A route with the endpoints and profiles that were found for it."""

    spec: RouteSpec
    endpoints: tuple[Endpoint, ...]
    """Ordered by id."""
    profiles: Mapping[str, ServiceProfile]
    """By GPU product; a product without a profile gets a prior and a Reason."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with an input, for people: what, where, what to do. It never stops the loop."""

    where: str
    """File and line, URL, node id ..."""
    message: str
    route: RouteId | None = None


# --------------------------------------------------------------------------------------------------- observed state


class SignalState(StrEnum):
    FRESH = "fresh"
    STALE = "stale"
    ABSENT = "absent"
    NO_TRAFFIC = "no-traffic"


@dataclass(frozen=True, slots=True)
class Signal:
    """One measurement, with the time it was true at its source.

    A source that stops answering leaves the last Signal in place, which then ages into STALE; a source that answers
    without the series yields ABSENT; 0/0 (no requests in the window) yields NO_TRAFFIC.
    """

    value: float | None
    at_s: float | None
    """On the loop's monotonic clock."""
    ABSENT: ClassVar[Signal]

    def __post_init__(self) -> None:
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"a signal must be finite, not {self.value}; map 0/0 to Signal.no_traffic()")
        if self.value is not None and self.at_s is None:
            raise ValueError("a signal with a value needs the time of its measurement")

    @staticmethod
    def no_traffic(at_s: float) -> Signal:
        return Signal(None, at_s)

    def age_s(self, now_s: float) -> float | None:
        """Age at `now_s`, never negative; None when absent."""
        return None if self.at_s is None else max(0.0, now_s - self.at_s)

    def state(self, now_s: float, stale_after_s: float) -> SignalState:
        if self.at_s is None:
            return SignalState.ABSENT
        if now_s - self.at_s > stale_after_s:
            return SignalState.STALE
        return SignalState.NO_TRAFFIC if self.value is None else SignalState.FRESH


Signal.ABSENT = Signal(None, None)


@dataclass(frozen=True, slots=True)
class EndpointSignals:
    """What is measured of one endpoint. Rates are means over the adapter's window."""

    gpu_utilization_ratio: Signal = Signal.ABSENT
    """Of the whole GPU, all tenants, 0..1 (DCGM, or Triton's nv_gpu_utilization)."""
    busy_ratio: Signal = Signal.ABSENT
    """Our own busy share of the GPU, 0..1 (Triton: compute_infer time per second and instance)."""
    service_s: Signal = Signal.ABSENT
    """Mean service time of a request, without its queueing."""
    batch: Signal = Signal.ABSENT
    """Mean batch of the requests behind `service_s`."""
    queue_s: Signal = Signal.ABSENT
    """Mean time a request waited."""
    pending: Signal = Signal.ABSENT
    """Requests at the server, waiting or running."""
    completed_rps: Signal = Signal.ABSENT
    """Requests answered successfully; a fresh 0 is a value, not no-traffic."""
    failed_rps: Signal = Signal.ABSENT
    """Requests the server failed."""
    proxy_rps: Signal = Signal.ABSENT
    """Requests that ended at the proxies, successes and failures (Envoy's per-endpoint counters, all size classes)."""
    proxy_failed_rps: Signal = Signal.ABSENT
    """Requests that failed at the proxies: 5xx, time-outs, refused and reset connections."""
    proxy_active: Signal = Signal.ABSENT
    """Requests in flight at the proxies."""


@dataclass(frozen=True, slots=True)
class RouteSignals:
    """What is measured of one route."""

    arrivals_rps: Mapping[str, Signal] = field(default_factory=lambda: MappingProxyType({}))
    """By size class name, `DEFAULT_CLASS` included; summed over the proxies."""
    endpoints: Mapping[EndpointId, EndpointSignals] = field(default_factory=lambda: MappingProxyType({}))


NO_SIGNALS = RouteSignals()


Weights = Mapping[str, Mapping[EndpointId, int]]
"""Size class -> endpoint -> integer weight."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One instant of everything that a decision may depend on."""

    routes: Mapping[RouteId, DesiredRoute]
    signals: Mapping[RouteId, RouteSignals]
    gateways: int = 1
    """Proxies that take part in balancing, each seeing only its own requests; at least 1."""
    in_force: Mapping[RouteId, Weights] = field(default_factory=lambda: MappingProxyType({}))
    """What the mesh serves now, as read back from it; a route without an entry is not there yet."""
    leading: bool = True
    """False: another replica decides; what is in force is taken over as it is."""


# ---------------------------------------------------------------------------------------------------------- decision


class LbPolicy(StrEnum):
    LEAST_REQUEST = "LEAST_REQUEST"
    ROUND_ROBIN = "ROUND_ROBIN"


@dataclass(frozen=True, slots=True)
class LoadBalancer:
    """How a proxy picks among the weighted endpoints of one cluster."""

    policy: LbPolicy = LbPolicy.LEAST_REQUEST
    active_request_bias: float = 1.0
    """Exponent b in weight / (active + 1)**b; 0 follows the table exactly."""
    choice_count: int = 2
    """Candidates drawn when all weights are equal."""


class ReasonCode(StrEnum):
    """Why a weight is what it is; CamelCase as in Kubernetes conditions."""

    SOLVED = "Solved"
    CLOSED_FORM = "ClosedForm"
    INFEASIBLE = "Infeasible"
    NO_ENDPOINTS = "NoEndpoints"
    NO_PROFILE = "NoProfile"
    PROFILE = "Profile"
    OBSERVED_SERVICE_TIME = "ObservedServiceTime"
    FOREIGN_UTILIZATION = "ForeignUtilization"
    LOAD_OBSERVED = "LoadObserved"
    LOAD_DECLARED = "LoadDeclared"
    MIX_OBSERVED = "MixObserved"
    MIX_DECLARED = "MixDeclared"
    SIGNAL_STALE = "SignalStale"
    SIGNAL_ABSENT = "SignalAbsent"
    NO_TRAFFIC = "NoTraffic"
    FROZEN = "Frozen"
    DECAYED = "DecayedToPrior"
    DRAINED_ERRORS = "DrainedErrors"
    DRAINED_HANG = "DrainedHang"
    NOT_READY = "NotReady"
    PROBATION = "Probation"
    ALL_DRAINED = "AllDrained"
    DEAD_BAND = "DeadBand"
    DWELL = "Dwell"
    STEP_LIMITED = "StepLimited"
    SUSPENDED = "Suspended"
    FOLLOWING = "Following"
    QUARANTINED = "Quarantined"


@dataclass(frozen=True, slots=True)
class Input:
    """One number (or word) a Reason rests on."""

    name: str
    value: float | str | None
    unit: str = ""
    at_s: float | None = None
    """When it was measured, on the loop's clock; None for what is declared or derived."""
    state: SignalState | None = None


@dataclass(frozen=True, slots=True)
class Reason:
    """One step of the argument for a weight, as data."""

    code: ReasonCode
    subject: str
    """A route id, a size class, a GPU product or an endpoint id."""
    message: str
    inputs: tuple[Input, ...] = ()


@dataclass(frozen=True, slots=True)
class RoutePlan:
    """What is decided for one route. `weights` has every size class and `DEFAULT_CLASS`; each sums to WEIGHT_TOTAL
    (or is all zero when there is no endpoint at all), with every endpoint of the route named."""

    route: DesiredRoute
    weights: Weights
    load_balancer: LoadBalancer
    attainment: Mapping[str, float]
    """Expected share of each size class answered within the SLO, 0..1."""
    utilization: Mapping[EndpointId, float]
    """Expected utilisation of each endpoint at the load solved for."""
    load_rps: float
    """The load solved for."""
    feasible: bool
    """Every size class is expected to meet its percentile."""
    drained: frozenset[EndpointId]
    reasons: tuple[Reason, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is decided for all routes. A RoutePlan that did not change is the SAME object as in the plan before."""

    routes: Mapping[RouteId, RoutePlan]


# ------------------------------------------------------------------------------------------------- data plane's view


@dataclass(frozen=True, slots=True)
class ProxyStatus:
    """One connected proxy."""

    node: str
    admin: str
    """``host:port`` of its admin interface, "" when it does not say."""
    synced: bool
    """It acknowledged everything that was published."""
    error: str = ""
    """The text of its last NACK, "" when none is outstanding."""
    mesh: bool = False
    """Configured by istiod: it serves the meshed routes, and no others."""
    group: str = PROXY_GROUP
    """Whose routes it is served by our xDS server."""
    proxyless: bool = False
    """A gRPC client that routes for itself: it is served the routes that speak gRPC."""

    def serves(self, spec: RouteSpec) -> bool:
        """Whether requests for `spec` come by here."""
        if self.mesh or spec.meshed:
            return self.mesh and spec.meshed
        return self.group in spec.proxy_groups and (not self.proxyless or spec.protocol is Protocol.GRPC)


@dataclass(frozen=True, slots=True)
class DataPlaneStatus:
    """What the proxies said of what was published."""

    proxies: tuple[ProxyStatus, ...] = ()
    version: str = ""
    """Content hash of the newest published state."""
    quarantined: Mapping[RouteId, str] = field(default_factory=lambda: MappingProxyType({}))
    """Routes whose newest resources were refused, with the proxy's words; their last good ones stay."""
    waiting: Mapping[RouteId, str] = field(default_factory=lambda: MappingProxyType({}))
    """Routes whose newest state is not in force yet, and what it waits for."""
    conflicts: Mapping[RouteId, str] = field(default_factory=lambda: MappingProxyType({}))
    """Routes of which somebody else owns or changed an object: who, which, and what to do. Nothing of it is written."""
