"""Snapshots that follow from the ones before them are those that would be made from nothing; what fails changes
nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshctl.model import Plan, RouteId
from tests.property.test_xds_dialogues import GROUPS, PLANS, made
from xds.cache import Cache
from xds.snapshot import InconsistentError, Snapshot
from xds.table import Changes, Table
from xds.translate import Resource, RouteResources, translate
from xds.wire import Flavour

Routes = Mapping[str, tuple[int, int, float, str, tuple[str, ...]]]
EVERYBODY = [(group, flavour) for group in (*GROUPS, "nobody") for flavour in Flavour]


def planned(routes: Routes) -> Plan:
    return Plan({RouteId(f"n/{name}"): made(name, *what, grpc=name != "c") for name, what in routes.items()})


def seen(cache: Cache) -> dict[object, Snapshot | None]:
    """What everybody is served."""
    return {key: cache.snapshot_of(*key) for key in EVERYBODY}


def contents(snapshot: Snapshot | None) -> object:
    """All that counts of it: not what went lately, which a new server does not know."""
    assert snapshot is not None
    hosts = {name: (host.packed, host.needs) for name, host in snapshot.virtual_hosts.items()}
    tables = [(table.version, {r.name: (r.packed, r.digest) for r in table.values()}) for table in snapshot.tables]
    return snapshot.version, tables, hosts, list(snapshot.virtual_hosts), snapshot.problems


@settings(max_examples=100)
@given(st.lists(PLANS, min_size=1, max_size=6))
def test_a_snapshot_is_that_of_its_plan_whatever_came_before(steps: list[Routes]) -> None:
    """For each group and flavour: versions, bytes, order of the virtual hosts, and who may not have a host."""
    cache = Cache()
    for routes in steps:
        cache.apply(planned(routes))
        fresh = Cache()
        fresh.apply(planned(routes))
        assert {key: contents(s) for key, s in seen(cache).items()} == {
            key: contents(s) for key, s in seen(fresh).items()
        }
        assert (cache.version, cache.problems) == (fresh.version, fresh.problems)


@settings(max_examples=50)
@given(st.lists(PLANS, min_size=2, max_size=6))
def test_what_is_counted_as_changed_differs(steps: list[Routes]) -> None:
    """The same plan again, in new objects and another order, changes nothing and makes no new Table."""
    cache = Cache()
    for routes in steps:
        cache.apply(planned(routes))
        before = seen(cache)
        assert cache.put(dict(translate(planned({name: routes[name] for name in reversed(list(routes))})).routes)) == 0
        after = seen(cache)
        for key, snapshot in before.items():
            now = after[key]
            assert snapshot is not None
            assert now is not None
            assert all(new is old for new, old in zip(now.tables, snapshot.tables, strict=True) if len(old))


RESOURCES = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 3))


def resource(name: str, content: int) -> Resource:
    return Resource(name, RouteId("n/r"), f"{name}{content}".encode(), ord(name) * 100 + content)


@given(st.lists(RESOURCES, min_size=2, max_size=6), st.lists(st.frozensets(st.sampled_from("abcdefgh")), max_size=4))
def test_what_changed_between_tables_is_the_plain_difference(
    steps: list[dict[str, int]], parts: list[frozenset[str]]
) -> None:
    """Between neighbours, which know it from how they were made, and any other two; of parts of them too."""
    tables = [Table.of(resource(name, content) for name, content in sorted(steps[0].items()))]
    for before, after in pairwise(steps):
        changed = [resource(name, content) for name, content in after.items()]
        tables.append(tables[-1].replaced(changed, [name for name in before if name not in after]))
    tables += [table.subset(part) for table in tables for part in parts]
    tables += [table.without(part) for table in tables[: len(steps)] for part in parts]
    tables += [table.plus(tables[0]) for table in tables[: len(steps)]]
    for new in tables:
        assert new.digest == sum(r.digest for r in new.values()) % 2**128
        for old in tables:
            assert new.since(old) == difference(new, old)
            assert new.body_since(old) == b"".join(r.packed for r in difference(new, old).changed)
            assert old.replaced(new.since(old).changed, new.since(old).removed).digest == new.digest


def difference(new: Table, old: Table) -> Changes:
    changed = tuple(new[name] for name in sorted(new) if name not in old or old[name].digest != new[name].digest)
    return Changes(changed, tuple(name for name in sorted(old) if name not in new))


def without_an_assignment(good: RouteResources) -> RouteResources:
    return replace(good, assignments=dict(list(good.assignments.items())[1:]))


def without_a_cluster(good: RouteResources) -> RouteResources:
    return replace(good, clusters=dict(list(good.clusters.items())[1:]))


def with_weights_of_zero(good: RouteResources) -> RouteResources:
    return replace(
        good, assignments={n: replace(r, weights=(0,), digest=r.digest + 1) for n, r in good.assignments.items()}
    )


@pytest.mark.parametrize("spoil", [without_an_assignment, without_a_cluster, with_weights_of_zero])
@settings(max_examples=30)
@given(before=PLANS, after=PLANS.filter(bool), data=st.data())
def test_what_is_inconsistent_changes_nothing(spoil, before: Routes, after: Routes, data: st.DataObject) -> None:  # type: ignore[no-untyped-def]
    """In no group, not even in those that do not have the route; and what is published next is as if it had not been
    tried."""
    cache, untouched = Cache(), Cache()
    for one in (cache, untouched):
        one.apply(planned(before))
    wanted = dict(translate(planned(after)).routes)
    bad = data.draw(st.sampled_from(sorted(wanted)))
    served, version = seen(cache), cache.version
    refused = spoil(replace(wanted[bad], plan=None))
    with pytest.raises(InconsistentError):
        cache.put({**wanted, bad: replace(refused, virtual_host=replace(refused.virtual_host, digest=1))})
    now = seen(cache)
    assert all(now[key] is snapshot for key, snapshot in served.items() if snapshot is not None and snapshot.clusters)
    assert (cache.version, cache.problems, cache.quarantined) == (version, untouched.problems, {})
    for one in (cache, untouched):
        one.apply(planned(after))
    assert {key: contents(s) for key, s in seen(cache).items()} == {
        key: contents(s) for key, s in seen(untouched).items()
    }
