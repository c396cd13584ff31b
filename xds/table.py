"""All resources of one type at one instant, shared by every stream that has them. Pure.

A thousand streams hold the same few Tables. What they would each compute (the difference to what a stream has, the part
that it subscribed to, the bytes of either) is computed once and kept with the Table that it leads to, for as long as
somebody holds the Table that it starts from. So the cost of a change is that of the change, whatever the number of
resources, once; and per stream only that of a message.

A Table is never changed after it was made. Its version is a content hash: the sum, modulo 2**128, of the resources'
digests. A sum needs no order, and the version of any PART of the resources comes from the same digests. Counters were
rejected: after a restart the same content must have the same version, so that who reconnects is sent nothing.
"""

from __future__ import annotations

from collections.abc import Collection, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from xds.translate import Resource
from xds.wire import delta_removed, delta_resource

MODULUS = 2**128
"""Of digests."""
_DERIVED_NAMES = 1_000_000
"""Names that may be in what a Table keeps of its parts: some 100 MB, which only clients that subscribe to ever other
names come to."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What must be sent to who has one Table, so that he has another one. In order of name."""

    changed: tuple[Resource, ...]
    """New, or of other content."""
    removed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.changed or self.removed)

    def body(self) -> bytes:
        """The changed ones as they stand in a DiscoveryResponse."""
        return b"".join(r.packed for r in self.changed)

    def delta_body(self) -> bytes:
        """As they stand in a DeltaDiscoveryResponse."""
        sent = b"".join(delta_resource(r.name, version_text(r.digest), r.packed) for r in self.changed)
        return sent + delta_removed(self.removed)


class Table(Mapping[str, Resource]):
    """See the module. By name."""

    __slots__ = ("__weakref__", "_derived", "_derived_names", "_differences", "_resources", "digest")

    def __init__(self, resources: Mapping[str, Resource], digest: int | None = None) -> None:
        """`digest`, where it is known, is the sum of the resources' digests. `resources` must not change any more."""
        self._resources = resources
        total = sum(r.digest for r in resources.values()) if digest is None else digest
        self.digest = total % MODULUS
        self._differences: WeakKeyDictionary[Table, _Difference] = WeakKeyDictionary()
        self._derived: dict[object, Table | None] = {}
        """What `subset`, `plus` and `without` made of it; None: itself."""
        self._derived_names = 0

    def __getitem__(self, name: str) -> Resource:
        return self._resources[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._resources)

    def __len__(self) -> int:
        return len(self._resources)

    def __contains__(self, name: object) -> bool:
        return name in self._resources

    # The dict's own views: those of `Mapping` compare and iterate in Python, a hundred times slower.

    def keys(self) -> KeysView[str]:
        return self._resources.keys()

    def values(self) -> ValuesView[Resource]:
        return self._resources.values()

    def items(self) -> ItemsView[str, Resource]:
        return self._resources.items()

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def version(self) -> str:
        return version_text(self.digest)

    @classmethod
    def of(cls, resources: Iterable[Resource]) -> Table:
        return cls({r.name: r for r in resources})

    # --------------------------------------------------------------------------------------------------- other Tables

    def replaced(self, changed: Iterable[Resource], removed: Iterable[str] = ()) -> Table:
        """This Table with `changed` put in and `removed` taken out; itself when that changes nothing."""
        changed = [r for r in changed if (old := self._resources.get(r.name)) is None or old.digest != r.digest]
        removed = [name for name in removed if name in self._resources]
        if not changed and not removed:
            return self
        resources, digest = dict(self._resources), self.digest
        for resource in changed:
            old = resources.get(resource.name)
            digest += resource.digest - (old.digest if old is not None else 0)
            resources[resource.name] = resource
        for name in removed:
            digest -= resources.pop(name).digest
        table = Table(resources, digest)
        table._differences[self] = _Difference(_changes(changed, removed))
        return table

    def without(self, names: frozenset[str]) -> Table:
        """This Table less `names`."""
        if self._resources.keys().isdisjoint(names):
            return self
        key = ("without", names)
        if key not in self._derived:
            left = self.replaced((), names & self._resources.keys())
            self._derive(key, left, len(names))
        found = self._derived[key]
        return self if found is None else found

    def subset(self, names: frozenset[str]) -> Table:
        """Those of `names` that there are. Quick for names that are one object each time (`wire.interned`)."""
        if not self._resources:
            return self
        if names not in self._derived:
            whole = len(names) >= len(self._resources) and names >= self._resources.keys()
            part = self if whole else Table.of(self[name] for name in sorted(names) if name in self)
            self._derive(names, part, len(names))
        found = self._derived[names]
        return self if found is None else found

    def plus(self, more: Mapping[str, Resource]) -> Table:
        """With those of `more` whose names it does not have."""
        added = [r for name, r in more.items() if name not in self._resources]
        if not added:
            return self
        key = tuple(sorted((r.name, r.digest) for r in added))
        if key not in self._derived:
            self._derive(key, self.replaced(added), len(added))
        found = self._derived[key]
        return self if found is None else found

    def _derive(self, key: object, table: Table, names: int) -> None:
        self._derived_names += names + 100
        if self._derived_names > _DERIVED_NAMES:
            self._derived.clear()
            self._derived_names = 0
        self._derived[key] = None if table is self else table

    # --------------------------------------------------------------------------------------------------- differences

    def since(self, old: Table) -> Changes:
        """What has changed since `old`."""
        return NOTHING if old is self else self._difference(old).changes

    def body(self) -> bytes:
        """All of it as it stands in a DiscoveryResponse."""
        return self.body_since(EMPTY)

    def body_since(self, old: Table) -> bytes:
        """What has changed since `old` as it stands in a DiscoveryResponse."""
        difference = self._difference(old)
        if difference.body is None:
            difference.body = difference.changes.body()
        return difference.body

    def delta_since(self, old: Table) -> bytes:
        """What has changed since `old` as it stands in a DeltaDiscoveryResponse."""
        difference = self._difference(old)
        if difference.delta is None:
            difference.delta = difference.changes.delta_body()
        return difference.delta

    def _difference(self, old: Table) -> _Difference:
        found = self._differences.get(old)
        if found is None:
            found = self._differences[old] = _Difference(self._compared(old))
        return found

    def _compared(self, old: Table) -> Changes:
        had, has = old._resources, self._resources
        changed = [r for name, r in has.items() if (was := had.get(name)) is not r and not _same(was, r)]
        removed = [name for name in had if name not in has] if len(had) + len(changed) > len(has) else []
        return _changes(changed, removed)


class _Difference:
    """To one other Table, with its bytes once somebody asked for them."""

    __slots__ = ("body", "changes", "delta")

    def __init__(self, changes: Changes) -> None:
        self.changes = changes
        self.body: bytes | None = None
        self.delta: bytes | None = None


def version_text(digest: int) -> str:
    """A digest as versions show it."""
    return f"{digest:032x}"


def _same(old: Resource | None, new: Resource) -> bool:
    return old is not None and old.digest == new.digest


def _changes(changed: Collection[Resource], removed: Collection[str]) -> Changes:
    return Changes(tuple(sorted(changed, key=lambda r: r.name)), tuple(sorted(removed)))


EMPTY = Table({})
NOTHING = Changes(())
