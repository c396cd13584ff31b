"""Arbitrary clients against the protocol's rules: state of the world and delta, aggregated and by type, Envoy and gRPC.

A model client says what it likes (names, nonces, refusals, versions of earlier streams) while plans change. After each
step the rules hold that docs/xds.md gives; and as soon as the client behaves it has what it asked for, the server knows
that, and is silent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from meshctl.model import LoadBalancer, Plan, Protocol, RouteId, RoutePlan, SizeClass
from tests.harness.envoy import route_plan
from xds.cache import Cache
from xds.channel import ANY, WHOLE
from xds.snapshot import Snapshot
from xds.subscription import Subscription
from xds.table import version_text
from xds.translate import ROUTE_CONFIGURATION, Resource
from xds.wire import DeltaRequest, Flavour, Node, Request, TypeUrl, fields, names_of
from xds.wire import field as encoded

CDS, EDS, LDS, RDS = TypeUrl.CLUSTER, TypeUrl.ENDPOINT, TypeUrl.LISTENER, TypeUrl.ROUTE
GROUPS = ("meshctl", "edge")
NAMES = {
    CDS: ["n/a/one", "n/b/default", "n/a/one/V100", "n/b/one/V100", "nothing"],
    EDS: ["n/a/one", "n/a/default", "n/b/one", "n/b/default/V100", "nothing"],
    LDS: ["host-1", "host-2", "nothing"],
    RDS: [ROUTE_CONFIGURATION, "n/a", "n/b", "nothing"],
}
BAD_VERSION = "of an earlier life"


@lru_cache(maxsize=512)
def made(
    name: str, weight: int, sizes: int, timeout_s: float, host: str, groups: tuple[str, ...], *, grpc: bool
) -> RoutePlan:
    """A route with little in it, of which each argument changes another kind of resource."""
    classes = (SizeClass("one", 1, 1, 1, 0.5), SizeClass("rest", 2, 64, 8, 0.5))[:sizes]
    found = route_plan(
        f"n/{name}",
        {"10.0.0.1:80": weight, "10.0.0.2:80": 1000 - weight},
        hosts=(host, f"{name}.example"),
        headers=("x-batch-size",),
        sizes=classes,
        balancer=LoadBalancer(active_request_bias=sizes / 2),
        timeout_s=timeout_s,
    )
    spec = replace(found.route.spec, proxy_groups=groups, protocol=Protocol.GRPC if grpc else Protocol.HTTP)
    return replace(found, route=replace(found.route, spec=spec))


PLANS = st.dictionaries(
    st.sampled_from("abc"),
    st.tuples(
        st.sampled_from([1, 500, 999]),
        st.sampled_from([1, 2]),
        st.sampled_from([1.0, 30.0]),
        st.sampled_from(["host-1", "host-2"]),
        st.sampled_from([GROUPS[:1], GROUPS[1:], GROUPS]),
    ),
    max_size=3,
)


@dataclass(frozen=True)
class Response:
    """What the client reads in one."""

    kind: TypeUrl
    version: str
    nonce: str
    resources: Mapping[str, bytes]
    """By name: as they stand in a state-of-the-world response."""
    versions: Mapping[str, str]
    """Of each resource: delta."""
    removed: tuple[str, ...]


def read(data: bytes, *, delta: bool) -> Response:
    texts, resources, versions, removed = {1: "", 4: "", 5: ""}, {}, {}, []
    for number, value in fields(data):
        assert isinstance(value, bytes)
        if number in texts:
            texts[number] = value.decode()
        elif number == 6:
            removed.append(value.decode())
        else:
            parts = dict(fields(value)) if delta else {2: value}
            message = dict(fields(_bytes(parts[2])))
            name = _bytes(dict(fields(_bytes(message[2])))[1]).decode()  # field 1 is the name in all four types
            assert name not in resources, f"{name} twice in one response"
            resources[name] = encoded(2, _bytes(parts[2]))
            if delta:
                assert _bytes(parts[3]).decode() == name
                versions[name] = _bytes(parts[1]).decode()
    return Response(TypeUrl(texts[4]), texts[1], texts[5], resources, versions, tuple(removed))


def _bytes(value: bytes | int) -> bytes:
    assert isinstance(value, bytes)
    return value


@dataclass
class Kind:
    """One type of one stream, as the client sees it."""

    asked: bool = False
    wildcard: bool = False
    legacy: bool = False
    names: frozenset[str] = frozenset()
    nonce: str = ""
    """Of the newest response that it read."""
    sent_nonce: str = ""
    """Of the newest that the server wrote."""
    unread: Response | None = None
    pending: Response | None = None
    """Read and not answered."""
    told: dict[str, str] = field(default_factory=dict)
    """Delta: what the server may take for granted that the client has: name -> version."""
    unanswered: set[str] = field(default_factory=set)
    """Delta: names subscribed to, of which nothing was said since."""
    dropped: set[str] = field(default_factory=set)
    """Delta: names unsubscribed from or subscribed to since the newest response was written."""
    refused: set[object] = field(default_factory=set)
    """Versions; in delta (name, version)."""
    kept: set[str] = field(default_factory=set)
    """Delta: what it refused to let go."""
    claimed: bool = False
    """It had something of an earlier stream."""
    moved: bool = False
    """Its names changed since the newest response was written."""

    def wants(self, name: str) -> bool:
        return self.wildcard or name in self.names


class Dialogues(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache()
        self.plan: Plan | None = None
        self.seen: dict[bytes, Resource] = {}
        """Every resource that was ever published, by its bytes."""
        self.contents: dict[tuple[TypeUrl, str], frozenset[tuple[str, int]]] = {}
        """What a version of the state of the world stands for, over all streams and servers."""
        self.held: dict[TypeUrl, dict[str, int]] = {kind: {} for kind in TypeUrl}
        """What the client has: name -> digest."""

    # ------------------------------------------------------------------------------------------------ the world's side

    @initialize(
        delta=st.booleans(),
        only=st.sampled_from([None, None, *TypeUrl]),
        flavour=st.sampled_from(list(Flavour)),
        group=st.sampled_from([*GROUPS, "nobody"]),
    )
    def begin(self, delta: bool, only: TypeUrl | None, flavour: Flavour, group: str) -> None:
        self.delta, self.only, self.flavour = delta, only, flavour
        self.node = Node("client", group, agent="gRPC Python" if flavour is Flavour.GRPC else "envoy")
        self.kinds_served = list(TypeUrl) if only is None else [only]
        self.open()

    def open(self) -> None:
        self.subscription = Subscription(delta=self.delta, only=self.only)
        self.kinds = {kind: Kind() for kind in TypeUrl}
        self.introduced = False
        self.returned = False
        """It has clusters of an earlier stream, and perhaps routes to them."""
        self.nonces: set[str] = set()

    @property
    def snapshot(self) -> Snapshot | None:
        return self.cache.snapshot_of(self.node.group, self.node.flavour)

    @property
    def gateway(self) -> bool:
        return self.flavour is Flavour.ENVOY and self.only is None

    @rule(routes=PLANS)
    def decide(self, routes: Mapping[str, tuple[int, int, float, str, tuple[str, ...]]]) -> None:
        """A plan."""
        self.publish(Plan({RouteId(f"n/{n}"): made(n, *what, grpc=n != "c") for n, what in routes.items()}))

    def publish(self, plan: Plan) -> None:
        self.plan = plan
        self.cache.apply(plan)
        self.note()

    def note(self) -> None:
        snapshot = self.snapshot
        if snapshot is not None:
            for table in (snapshot.every_cluster, snapshot.every_assignment, snapshot.listeners, snapshot.routes):
                self.seen.update({r.packed: r for r in table.values()})

    @precondition(lambda self: self.plan is not None)
    @rule()
    def restart(self) -> None:
        """Another server takes over; all streams are lost."""
        self.cache = Cache()
        self.publish(self.plan or Plan({}))
        self.reconnect("right", list(TypeUrl))

    # ----------------------------------------------------------------------------------------------- the client's side

    @rule(data=st.data(), kind=st.sampled_from(list(TypeUrl)), how=st.sampled_from(["nonce", "no nonce", "made up"]))
    def ask(self, data: st.DataObject, kind: TypeUrl, how: str) -> None:
        """Other names, with or without a nonce; one that names the newest response accepts that."""
        if kind not in self.kinds_served:
            return
        names = data.draw(st.lists(st.sampled_from([*NAMES[kind], ANY]), max_size=4))
        drop = data.draw(st.lists(st.sampled_from([*NAMES[kind], ANY]), max_size=2)) if self.delta else []
        nonce = {"nonce": self.kinds[kind].nonce, "no nonce": "", "made up": "never given"}[how]
        self.say(kind, names, drop, nonce=nonce)

    @rule(
        kind=st.sampled_from(list(TypeUrl)), refuse=st.sampled_from(["", "", "no", "n/a/one is odd", "all of n/b n/a"])
    )
    def answer(self, kind: TypeUrl, refuse: str) -> None:
        """Accepts what it read, or refuses it."""
        if self.kinds[kind].pending is not None:
            self.repeat(kind, error=refuse or None)

    @rule()
    def say_what_nobody_knows(self) -> None:
        """A type that is not served. On a stream for one type it is an error, which ends it: not here."""
        if self.only is None:
            unknown = (
                DeltaRequest("type.example/Secret", "1") if self.delta else Request("type.example/Secret", "", "1")
            )
            assert self.subscription.receive(replace(unknown, node=self.node)) is None

    @rule()
    def listen(self) -> None:
        """Reads all that was written."""
        for kind in self.kinds.values():
            if kind.unread is not None:
                kind.pending, kind.unread = kind.unread, None
                kind.nonce = kind.pending.nonce

    @rule(claim=st.sampled_from(["right", "right", "partial", "wrong", "none"]), order=st.permutations(list(TypeUrl)))
    def reconnect(self, claim: str, order: Sequence[TypeUrl]) -> None:
        """With what it had asked for before, and the versions that it says it has."""
        before = {kind: state for kind, state in self.kinds.items() if state.asked}
        self.open()
        for kind in order:
            if kind in before:
                self.come_back(kind, before[kind], claim)

    def come_back(self, kind: TypeUrl, before: Kind, claim: str) -> None:
        names = sorted(before.names | ({ANY} if before.wildcard and not before.legacy else set()))
        held = self.held[kind] = {n: d for n, d in self.held[kind].items() if before.wants(n) and claim != "none"}
        if not self.delta:
            version = next((v for (k, v), c in self.contents.items() if k is kind and c == frozenset(held.items())), "")
            claims = version if claim in ("right", "partial") and held else ""
            self.say(kind, names, version=BAD_VERSION if claim == "wrong" else claims)
            self.returned |= kind is CDS and bool(claims or claim == "wrong") and self.only is None
            return
        if claim == "partial":
            held = self.held[kind] = dict(sorted(held.items())[::2])
        if claim == "wrong":
            held = self.held[kind] = dict.fromkeys([*held, "gone"] if before.wildcard else held, -2)
        self.say(kind, names, versions={n: version_text(d) if d >= 0 else BAD_VERSION for n, d in held.items()})
        self.returned |= kind is CDS and bool(held) and self.only is None

    def repeat(self, kind: TypeUrl, *, error: str | None = None, names: Iterable[str] | None = None) -> None:
        """Says again what it wants, as the answer to the newest response."""
        state = self.kinds[kind]
        wanted = sorted(state.names | ({ANY} if state.wildcard and not state.legacy else set()))
        self.say(kind, [] if self.delta else wanted if names is None else list(names), nonce=state.nonce, error=error)

    def say(
        self,
        kind: TypeUrl,
        names: Sequence[str] = (),
        drop: Sequence[str] = (),
        *,
        nonce: str = "",
        error: str | None = None,
        version: str = "",
        versions: Mapping[str, str] | None = None,
    ) -> None:
        """One request, and what it means."""
        state = self.kinds[kind]
        state.claimed = state.claimed or (not state.asked and bool(self.held[kind]))
        node = None if self.introduced else self.node
        self.introduced = True
        request: Request | DeltaRequest
        if self.delta:
            request = DeltaRequest(kind, nonce, tuple(names), tuple(drop), versions or {}, node, error)
            self.subscribe(kind, frozenset(names), frozenset(drop), versions or {})
            taken = True
        else:
            request = Request(kind, version, nonce, names_of(names), node, error)
            taken = not (nonce and state.sent_nonce) or nonce == state.sent_nonce
            if taken:
                self.name(kind, frozenset(names))
        answers = taken and state.pending is not None and nonce == state.pending.nonce
        answer = self.subscription.receive(request)
        assert (answer is not None) == answers
        if answer is None:
            return
        response, state.pending = state.pending, None
        assert response is not None
        assert answer.error == error
        if error is None:
            self.accepted(kind, response)
        else:
            self.refused(kind, response, error)
            if self.subscription.gateway and self.cache.refuse(self.subscription.nack(answer)):
                self.note()

    def name(self, kind: TypeUrl, names: frozenset[str]) -> None:
        """State of the world: the whole list each time."""
        state = self.kinds[kind]
        before = (state.wildcard, state.names)
        state.legacy = kind in WHOLE and not names and (state.legacy or not state.asked)
        state.wildcard, state.names, state.asked = state.legacy or ANY in names, names - {ANY}, True
        self.held[kind] = {n: d for n, d in self.held[kind].items() if state.wants(n)}
        state.moved = state.moved or before != (state.wildcard, state.names)

    def subscribe(
        self, kind: TypeUrl, names: frozenset[str], drop: frozenset[str], versions: Mapping[str, str]
    ) -> None:
        """Delta: by difference."""
        state = self.kinds[kind]
        if not state.asked:
            state.legacy = kind in WHOLE and not names
            state.wildcard, state.asked = state.legacy, True
            snapshot = self.snapshot
            now = {} if snapshot is None else self.target(kind, state, snapshot)
            state.told = {n: v for n, v in versions.items() if n in now and version_text(now[n].digest) == v}
            # what it does not claim is lost to it: there is no way to learn that it is gone
            self.held[kind] = {n: d for n, d in self.held[kind].items() if n in versions}
        drop -= names
        state.wildcard = (state.wildcard and ANY not in drop) or ANY in names
        state.legacy = state.legacy and state.wildcard
        gone = drop - {ANY}
        state.names = (state.names | names) - gone - {ANY}
        if ANY in drop:
            gone |= self.held[kind].keys() - state.names
            state.told = {n: v for n, v in state.told.items() if n in state.names}
            state.unanswered &= state.names
        self.held[kind] = {n: d for n, d in self.held[kind].items() if n not in gone and state.wants(n)}
        asked = names - {ANY} - versions.keys()
        for name in gone | asked:
            state.told.pop(name, None)
        state.unanswered = (state.unanswered - gone) | asked
        state.dropped |= gone | asked
        state.moved = state.moved or bool(names or drop)

    def accepted(self, kind: TypeUrl, response: Response) -> None:
        state, held = self.kinds[kind], self.held[kind]
        new = {n: self.seen[packed].digest for n, packed in response.resources.items() if state.wants(n)}
        if kind in WHOLE and not self.delta:
            held.clear()
        held.update(new)
        for name in response.removed:
            held.pop(name, None)
        state.kept -= new.keys() | set(response.removed)
        if self.delta:
            state.told.update({n: response.versions[n] for n in new if n not in state.dropped})
        elif not (state.moved or state.refused or state.claimed):
            content = frozenset(held.items())
            assert self.contents.setdefault((kind, response.version), content) == content
            known = {v for (k, v), c in self.contents.items() if k is kind and c == content}
            assert known == {response.version}, "one content, one version"
        if self.gateway and self.snapshot is not None and self.subscription.synced(self.snapshot):
            self.cache.accept(self.snapshot)

    def refused(self, kind: TypeUrl, response: Response, error: str) -> None:
        state = self.kinds[kind]
        if not self.delta:
            state.refused.add(response.version)
            return
        named = [n for n in response.resources if n in error] or list(response.resources)
        state.refused |= {(n, response.versions[n]) for n in named}
        state.kept |= set(response.removed) & self.held[kind].keys()
        for name in (*response.resources, *response.removed):
            state.told.pop(name, None)

    # ----------------------------------------------------------------------------------------------- the server's side

    @rule()
    def respond(self) -> None:
        """Writes all that is due; each response is what the rules allow."""
        while (snapshot := self.snapshot) is not None and (data := self.subscription.respond(snapshot)) is not None:
            response = read(data, delta=self.delta)
            state = self.kinds[response.kind]
            assert state.asked, f"{response.kind} was not asked for"
            assert state.unread is None, "two responses of a type in flight"
            assert state.pending is None, "two responses of a type in flight"
            assert response.nonce not in self.nonces
            self.nonces.add(response.nonce)
            assert len(response.version) == 32
            for name, packed in response.resources.items():
                assert state.wants(name), f"{name} was not asked for"
                assert self.seen[packed].name == name
            if self.delta:
                self.check_delta(response, state)
            else:
                assert response.version not in state.refused, "a refused version was sent again"
            state.unread, state.sent_nonce, state.moved = response, response.nonce, False

    def check_delta(self, response: Response, state: Kind) -> None:
        for name, packed in response.resources.items():
            version = response.versions[name]
            assert version == version_text(self.seen[packed].digest)
            assert len(version) == 32
            assert (name, version) not in state.refused, f"{name} was refused and sent again"
            # An Envoy's changed cluster warms only on a fresh load assignment.
            warms = self.gateway and response.kind is EDS
            assert warms or state.told.get(name) != version, f"{name} was sent again"
        for name in response.removed:
            assert name in state.told or name in state.unanswered or state.wants(name)
            assert name not in response.resources
            state.told.pop(name, None)
        state.unanswered -= response.resources.keys() | set(response.removed)
        state.dropped.clear()

    @invariant()
    def in_sync_means_that_it_has_all(self) -> None:
        snapshot = self.snapshot if hasattr(self, "subscription") else None
        if snapshot is not None and self.subscription.synced(snapshot):
            assert any(state.asked for state in self.kinds.values())
            for kind, state in self.kinds.items():
                if state.asked:
                    self.has_all(kind, state, snapshot)

    def has_all(self, kind: TypeUrl, state: Kind, snapshot: Snapshot) -> None:
        """It has what there is of what it asked for, and nothing else that it could know to be gone."""
        held = self.held[kind]
        target = {n: r.digest for n, r in self.target(kind, state, snapshot).items()}
        assert {n: held.get(n) for n in target} == target
        more = held.keys() - target.keys() - state.kept
        if self.delta or kind in WHOLE:
            needed = {n for r in self.seen.values() if self.held[RDS].get(r.name) == r.digest for n in r.needs}
            unsure = self.returned and not self.kinds[RDS].nonce
            assert not more or (kind is CDS and not self.gateway and (unsure or more <= needed))
        else:
            assert more <= state.names or state.wildcard, "state of the world: what is gone stays until it is let go"

    def target(self, kind: TypeUrl, state: Kind, snapshot: Snapshot) -> dict[str, Resource]:
        tables = {
            CDS: snapshot.every_cluster,
            EDS: snapshot.every_assignment,
            LDS: snapshot.listeners,
            RDS: snapshot.routes,
        }
        everything = snapshot.clusters if kind is CDS and state.wildcard and self.only is None else tables[kind]
        return {n: r for n, r in everything.items() if state.wants(n)}

    # --------------------------------------------------------------------------------------------------------- the end

    @precondition(lambda self: self.snapshot is not None)
    @rule()
    def behave(self) -> None:
        """The client accepts everything: it gets all, the server knows, and then nothing more is said. What it refused
        before it is not sent again; so it comes back first."""
        self.exhaust()
        if any(state.refused or state.kept for state in self.kinds.values()):
            self.reconnect("right", list(TypeUrl))
            self.exhaust()
        snapshot = self.snapshot
        assert snapshot is not None
        assert self.subscription.respond(snapshot) is None
        asked = [kind for kind, state in self.kinds.items() if state.asked]
        assert self.subscription.synced(snapshot) == bool(asked)
        for kind in asked:
            self.has_all(kind, self.kinds[kind], snapshot)
            assert not self.kinds[kind].unanswered, "every name that is subscribed to is answered"

    def exhaust(self) -> None:
        """Reads and accepts until nothing more comes."""
        if self.gateway:
            self.become_an_envoy()
        for _ in range(50):
            self.respond()
            self.listen()
            pending = [kind for kind, state in self.kinds.items() if state.pending is not None]
            if not pending:
                return
            for kind in pending:
                self.repeat(kind)
                if kind is CDS and self.gateway:
                    self.follow_clusters()
        raise AssertionError("the server does not come to an end")

    def become_an_envoy(self) -> None:
        """All clusters, their load assignments, the routes."""
        if not self.kinds[CDS].wildcard:
            self.say(CDS, [ANY])
        self.follow_clusters()
        if not self.kinds[RDS].wants(ROUTE_CONFIGURATION):
            self.say(RDS, [ROUTE_CONFIGURATION], nonce="")

    def follow_clusters(self) -> None:
        has, state = frozenset(self.held[CDS]), self.kinds[EDS]
        if state.wildcard or (state.asked and state.names == has):
            return
        if self.delta:
            self.say(EDS, sorted(has - state.names), sorted(state.names - has))
        else:
            self.say(EDS, sorted(has))

    def teardown(self) -> None:
        if hasattr(self, "subscription") and self.snapshot is not None:
            self.behave()


Dialogues.TestCase.settings = settings(
    max_examples=300, stateful_step_count=30, deadline=None, report_multiple_bugs=False
)
TestDialogues = Dialogues.TestCase
