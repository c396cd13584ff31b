"""Make before break through Istio, whatever is interrupted: no gateway ever has a route to what it does not know.

The model of the gateways is harsher than istiod: what is written arrives at each of them later, kind by kind in any
order, so a gateway may have the newest VirtualService and an old ServiceEntry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from istio.names import DESTINATION_RULE, OURS, SERVICE_ENTRY, VIRTUAL_SERVICE, key_of
from istio.ownership import same
from istio.render import Rendered, render
from istio.steps import History, Written, next_step, observe, refs_of, written_of
from istio.tables import Ref
from meshctl.model import Mechanism, RouteId, SizeClass
from meshctl.ports import KubeObject, ObjectKey
from tests.harness.istio_plans import meshed, objects

ROUTE = RouteId("team/resnet")
VS = ObjectKey(VIRTUAL_SERVICE, "team", "resnet")
SIZES = (SizeClass("small", 1, 8, 4, 0.5), SizeClass("large", 9, 64, 32, 0.5))
GPUS = {"192.0.2.1:80": "A100", "192.0.2.2:80": "A100", "192.0.2.3:80": "L4"}
STEPS_MAX = 40
Objects = dict[ObjectKey, KubeObject]
Choice = tuple[Mechanism, int, tuple[str, ...], int] | None


@cache
def wanted(choice: Choice) -> Rendered | None:
    """Mechanism, number of size classes, endpoints, weight of the first one: enough to change each kind alone."""
    if choice is None:
        return None
    mechanism, sizes, addresses, first = choice
    rest = addresses[1:]
    weights = {addresses[0]: first if rest else 1000, **{a: (1000 - first) // len(rest) for a in rest}}
    plan = meshed(ROUTE, weights, sizes=SIZES[:sizes], mechanism=mechanism)
    endpoints = tuple(dataclasses.replace(e, gpu=GPUS[e.id]) for e in plan.route.endpoints)
    return render(dataclasses.replace(plan, route=dataclasses.replace(plan.route, endpoints=endpoints)))


@dataclass
class World:
    """The API server, two gateways, and the controller's memory."""

    live: Objects = field(default_factory=dict)
    log: dict[str, list[Objects]] = field(default_factory=lambda: {kind: [{}] for kind in OURS})
    """By kind: every state that its objects went through."""
    seen: list[dict[str, int]] = field(default_factory=lambda: [dict.fromkeys(OURS, 0) for _ in range(2)])
    """Of each gateway, by kind: how much of the log has arrived."""
    history: History = ()
    written: dict[Written, tuple[str, int]] = field(default_factory=lambda: {Written(VS, ""): (VIRTUAL_SERVICE, 0)})
    """When an object became what it is: kind and place in the log."""
    versions: int = 0

    def write(self, key: ObjectKey, value: KubeObject | None) -> None:
        self.versions += 1
        if value is None:
            self.live.pop(key, None)
        else:
            self.live[key] = {**value, "metadata": {**value["metadata"], "resourceVersion": str(self.versions)}}
        self.log[key.kind].append({k: v for k, v in self.live.items() if k.kind == key.kind})
        self.written[Written(key, "" if value is None else str(self.versions))] = (
            key.kind,
            len(self.log[key.kind]) - 1,
        )

    def confirmed(self) -> set[Written]:
        return {w for w, (kind, at) in self.written.items() if all(gateway[kind] >= at for gateway in self.seen)}

    def deliver(self, gateway: int, kind: str, share: float) -> None:
        known, newest = self.seen[gateway][kind], len(self.log[kind]) - 1
        self.seen[gateway][kind] = known + round((newest - known) * share)

    def arrive(self) -> None:
        """Everything, everywhere."""
        for gateway in range(len(self.seen)):
            for kind in OURS:
                self.deliver(gateway, kind, 1.0)
                self.check()

    def check(self) -> None:
        """No gateway sends requests to a host, subset or class of endpoints that it does not know."""
        for gateway in self.seen:
            have = {key: value for kind in OURS for key, value in self.log[kind][gateway[kind]].items()}
            refs = refs_of(have.get(VS))
            for ref in sorted(refs.named):
                check_known(ref, have, used=ref in refs.used)

    def step(self, target: Rendered | None, chosen: Callable[[int], bool] = lambda _: True) -> bool:
        """One step, of whose writes only the chosen are done; False: there was none."""
        confirmed = {dataclasses.replace(w, clusters=c) for w in self.confirmed() for c in self._clusters(w)}
        self.history = observe(self.history, VS, self.live.get(VS), confirmed)
        step = next_step(target, self.live, self.history, confirmed)
        for i, value in enumerate(step.apply):
            if chosen(i):
                self.write(key_of(value), value)
                self.check()
        for i, value in enumerate(step.delete):
            if chosen(i):
                self.write(key_of(value), None)
                self.check()
        return not step.done

    def _clusters(self, written: Written) -> list[tuple[str, ...]]:
        """What a question for this version may say of clusters; the gateways have them when they have the object."""
        live = self.live.get(written.key)
        backends = [value for key, value in self.live.items() if key.kind != VIRTUAL_SERVICE]
        named = written_of(live, backends).clusters if live is not None and written.key.kind != VIRTUAL_SERVICE else ()
        return [(), named]


def check_known(ref: Ref, have: Objects, *, used: bool) -> None:
    """`ref` is a cluster of a gateway that knows `have`, with endpoints if it is used."""
    entries = [v for v in have.values() if v["kind"] == SERVICE_ENTRY and ref.host in v["spec"]["hosts"]]
    assert entries, f"{ref} is named, and not known"
    endpoints = [e for entry in entries for e in entry["spec"]["endpoints"]]
    if ref.subset:
        rules = [v for v in have.values() if v["kind"] == DESTINATION_RULE and v["spec"]["host"] == ref.host]
        labels = [s["labels"] for rule in rules for s in rule["spec"].get("subsets", ()) if s["name"] == ref.subset]
        assert labels, f"subset {ref} is named, and not known"
        endpoints = [e for e in endpoints if labels[0].items() <= e["labels"].items()]
    assert endpoints or not used, f"{ref} is used, and has no endpoint"


CHOICES = st.none() | st.tuples(
    st.sampled_from(Mechanism),
    st.sampled_from([1, 2]),
    st.lists(st.sampled_from(sorted(GPUS)), min_size=1, max_size=3, unique=True).map(lambda a: tuple(sorted(a))),
    st.sampled_from([0, 1, 400]),
)
DELIVERY = st.tuples(st.sampled_from([0, 1]), st.sampled_from(OURS), st.sampled_from([0.5, 1.0]))
HAPPENINGS = st.one_of(
    st.just("step"),
    st.just("arrive"),
    DELIVERY,
    st.just("step"),
    st.frozensets(st.integers(0, 4), max_size=3),
    st.just("restart"),
)
EVENTS = st.lists(st.tuples(CHOICES, st.lists(HAPPENINGS, min_size=3, max_size=12)), min_size=1, max_size=4)
"""What is wanted, and what happens before something else is: deliveries, whole steps, parts of steps, restarts."""


@settings(max_examples=400, deadline=None)
@given(CHOICES, EVENTS)
def test_no_interruption_leaves_a_route_to_nowhere(first: Choice, events: list[tuple[Choice, list[Any]]]) -> None:
    """Plans, steps done in part, restarts and late deliveries in any order; and in the end all is as wanted."""
    world, target = World(), wanted(first)
    settle(world, target)
    for choice, happenings in events:
        target = wanted(choice)
        for happening in happenings:
            if happening == "step":
                world.step(target)
            elif happening == "restart":
                world.history = ()
            elif happening == "arrive":
                world.arrive()
            elif isinstance(happening, frozenset):
                world.step(target, happening.__contains__)
            else:
                world.deliver(*happening)
            world.check()
    settle(world, target)
    assert {k: v["spec"] for k, v in world.live.items()} == {
        key_of(v): v["spec"] for v in ([] if target is None else objects(target))
    }
    before = world.versions
    world.history = ()
    assert not world.step(target)  # not after a restart either
    assert world.versions == before


def settle(world: World, target: Rendered | None) -> None:
    """Everything arrives, and every step is made: it ends."""
    for _ in range(STEPS_MAX):
        world.arrive()
        if not world.step(target):
            return
    raise AssertionError(f"not done after {STEPS_MAX} steps: {sorted(world.live)}")


@given(CHOICES, CHOICES)
@settings(max_examples=60, deadline=None)
def test_what_is_the_same_is_not_written(old: Choice, new: Choice) -> None:
    """From one plan to another each object is written as often as it has to be: once, or twice when it is widened."""
    world = World()
    settle(world, wanted(old))
    before = dict(world.live)
    count = {kind: len(world.log[kind]) for kind in OURS}
    settle(world, target := wanted(new))
    after = {} if target is None else {key_of(v): v for v in objects(target)}
    changed = [k for k in before.keys() | after.keys() if k not in after or not same(after[k], before.get(k))]
    for kind in OURS:
        writes, needed = len(world.log[kind]) - count[kind], sum(key.kind == kind for key in changed)
        assert needed <= writes <= needed * (1 if kind == VIRTUAL_SERVICE else 2)
