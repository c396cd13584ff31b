"""One resource type of one stream: what the client asked for, has, has in flight, and must be sent next. Pure.

Two kinds with one face: `WorldChannel` speaks the state-of-the-world protocol, `DeltaChannel` the incremental one. What
a client is to have (`target`) is its subscription's business; what of that to send now, and what an answer means, is
here.

Invariants
- At most one response is in flight; whatever changes meanwhile is in the next one.
- What was refused (NACK) is not sent again on this stream: in state of the world the version, in delta the resources.
- A client that comes back with what it should have is sent nothing.

Memory: a stream that is in sync holds references to Tables that all streams share, and nothing of its own.

Source: https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from meshctl.model import RouteId
from xds.table import EMPTY, Changes, Table
from xds.translate import Resource
from xds.wire import (
    MOST_NAMES,
    NO_NAMES,
    DeltaRequest,
    Names,
    ProtocolError,
    Request,
    TypeUrl,
    interned,
    response,
)

WHOLE = (TypeUrl.CLUSTER, TypeUrl.LISTENER)
"""Types of which a state-of-the-world response holds everything: what is not in it is gone. They also have the legacy
wildcard: a client that names nothing wants everything."""
ANY = "*"
REFUSED_KEPT = 32
"""Versions of one type that a client refused: what is published goes back and forth between few of them."""
UNKNOWN = -1
"""The digest of a resource that a client has in a version we do not know."""
_NO_NAMES: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Flight:
    """A response that awaits its answer."""

    nonce: str
    version: str
    after: Table
    """What the client has once it accepts."""
    contents: Collection[Resource]
    removed: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """A client took a response, or refused it."""

    type_url: TypeUrl
    flight: Flight
    error: str | None = None
    """Its words when it refused, else None."""


class Channel(ABC):
    """See the module."""

    __slots__ = (
        "accepted",
        "asked",
        "error",
        "flight",
        "known",
        "names",
        "nonce",
        "sent",
        "type_url",
        "version",
        "wildcard",
    )

    def __init__(self, type_url: TypeUrl) -> None:
        self.type_url = type_url
        self.asked = False
        self.wildcard = False
        self.names = _NO_NAMES
        self.nonce = ""
        self.sent = EMPTY
        """What the client has once it accepts what is in flight."""
        self.accepted = EMPTY
        """What it said it has."""
        self.known = False
        """Whether `sent` is all that it has: not before the first response, nor once it has refused one."""
        self.flight: Flight | None = None
        self.version = ""
        """Of what was accepted last."""
        self.error = ""
        """The client's words when it last refused, "" once it has accepted something newer."""

    @property
    @abstractmethod
    def claims(self) -> bool:
        """Whether it said that it has something of an earlier stream, of which `offer` has not yet learnt."""

    @abstractmethod
    def offer(self, target: Table, nonce: str) -> bytes | None:
        """The response that leads to `target`, None where none is due; it is in flight from then on."""

    @abstractmethod
    def due(self, target: Table) -> bool:
        """Whether `offer` would give one. Only where nothing is in flight."""

    @abstractmethod
    def adopt(self, target: Table) -> bool:
        """What the client said it has counts as accepted where that is what it should have; whether it was so."""

    def again(self, names: frozenset[str]) -> None:
        """`names` are to be sent once more, whether or not they changed."""
        self.sent = self.sent.without(names)

    def settled(self, target: Table) -> bool:
        """Whether the client has accepted all of `target`, and is due nothing more."""
        return self.flight is None and not self.due(target) and not target.since(self.accepted).changed

    def _answered(self, nonce: str, error: str | None) -> Answer | None:
        """What a request with `nonce` says of the response in flight, None where it says nothing."""
        flight = self.flight
        if flight is None or nonce != flight.nonce:
            return None
        self.flight = None
        if error is None:
            self.error, self.accepted, self.version = "", self.sent, flight.version
        else:
            self.error = error
            self._refused(flight, error)
        return Answer(self.type_url, flight, error)

    @abstractmethod
    def _refused(self, flight: Flight, error: str) -> None: ...

    def _launch(self, flight: Flight) -> None:
        self.flight, self.sent, self.nonce, self.known = flight, flight.after, flight.nonce, True


class WorldChannel(Channel):
    """State of the world: a response has a version, names are said in full each time."""

    __slots__ = ("_claimed", "_refused_versions", "raw")

    def __init__(self, type_url: TypeUrl) -> None:
        super().__init__(type_url)
        self.raw = NO_NAMES
        """The names as they came, to know them again."""
        self._claimed = ""
        self._refused_versions: tuple[str, ...] = ()
        """The newest last."""

    @property
    def claims(self) -> bool:
        return bool(self._claimed)

    def receive(self, request: Request) -> Answer | None:
        """Takes a request in. One with a stale nonce is ignored, names and all: a newer one is under way."""
        if request.nonce and self.nonce and request.nonce != self.nonce:
            return None
        self._subscribe(request.names)
        if not self.asked:
            self.asked, self._claimed = True, request.version
        return self._answered(request.nonce, request.error)

    def _subscribe(self, names: Names) -> None:
        """An empty first list of names is the legacy wildcard, and stays one while it is empty."""
        stays = not self.asked or (self.wildcard and not self.raw.values)
        legacy = stays and not names.values and self.type_url in WHOLE
        everything = self.wildcard
        self.wildcard = legacy or ANY in names.values
        if names is self.raw:
            return
        self.raw, before = names, self.names
        self.names = interned(names.values - {ANY}) if ANY in names.values else names.values
        if self.wildcard:
            return
        if everything:
            before = frozenset((*self.sent, *self.accepted))
        if gone := before - self.names:
            self.sent, self.accepted = self.sent.without(gone), self.accepted.without(gone)

    def adopt(self, target: Table) -> bool:
        claimed, self._claimed = self._claimed, ""
        if not claimed or claimed != target.version:
            return False
        self.sent = self.accepted = target
        self.known, self.version = True, claimed
        return True

    def due(self, target: Table) -> bool:
        if not self.asked:
            return False
        if self.type_url in WHOLE:
            return (
                not (self.known and target.digest == self.sent.digest) and target.version not in self._refused_versions
            )
        return bool(target.since(self.sent).changed) and self._after(target).version not in self._refused_versions

    def offer(self, target: Table, nonce: str) -> bytes | None:
        if self.flight is not None or not self.due(target):
            return None
        if self.type_url in WHOLE:
            self._launch(Flight(nonce, target.version, target, target.values()))
            return response(self.type_url, target.version, nonce, target.body())
        body, after = target.body_since(self.sent), self._after(target)
        self._launch(Flight(nonce, after.version, after, target.since(self.sent).changed))
        return response(self.type_url, after.version, nonce, body)

    def _after(self, target: Table) -> Table:
        """What it has once it accepts: of these types nothing is taken away but by unsubscribing."""
        removed = target.since(self.sent).removed
        return target.plus({name: self.sent[name] for name in removed}) if removed else target

    def _refused(self, flight: Flight, error: str) -> None:
        """Clusters and load assignments of a refused response may be in force in part: what the proxy has of them is
        then unknown, and the next version is sent whole. Routes are refused as one."""
        self._refused_versions = (*self._refused_versions, flight.version)[-REFUSED_KEPT:]
        if self.type_url is TypeUrl.CLUSTER:
            self.known = False
        elif self.type_url is TypeUrl.ENDPOINT:
            self.sent = self.accepted = self.accepted.without(frozenset(r.name for r in flight.contents))
        else:
            self.sent = self.accepted


class DeltaChannel(Channel):
    """Incremental: each resource has its version, names are subscribed and unsubscribed one by one."""

    __slots__ = ("_claimed", "_refused_digests", "_wanted")

    def __init__(self, type_url: TypeUrl) -> None:
        super().__init__(type_url)
        self._claimed: Mapping[str, str] | None = None
        self._refused_digests: dict[str, int] = {}
        """Of resources that this client refused."""
        self._wanted: set[str] = set()
        """Names just subscribed to: they are answered, if only with the word that there is no such resource."""

    @property
    def claims(self) -> bool:
        return bool(self._claimed)

    def receive(self, request: DeltaRequest) -> Answer | None:
        """Takes a request in. What it subscribes to counts whatever its nonce is."""
        first = not self.asked
        self.asked = True
        if first:
            self._claimed = request.versions
        self._subscribe(request, first=first)
        return self._answered(request.nonce, request.error)

    def _subscribe(self, request: DeltaRequest, *, first: bool) -> None:
        subscribed = frozenset(request.subscribe)
        if ANY in subscribed or (first and not subscribed and self.type_url in WHOLE):
            self.wildcard = True
        elif ANY in request.unsubscribe:
            self.wildcard = False
        if subscribed or request.unsubscribe:
            gone = frozenset(request.unsubscribe) - subscribed
            self.names = interned((self.names | subscribed) - gone - {ANY})
            if len(self.names) > MOST_NAMES:
                raise ProtocolError(
                    f"{len(self.names)} names subscribed to; at most {MOST_NAMES} are served on one stream"
                )
            self._forget(gone)
            asked = subscribed.difference({ANY}, request.versions)
            self.again(asked)
            self._wanted |= asked

    def _forget(self, gone: frozenset[str]) -> None:
        """The client drops what it unsubscribes from. Where the wildcard covers that too, it is sent once more."""
        if ANY in gone:
            gone |= self.sent.keys() - self.names
        self._wanted.difference_update(gone)
        self.sent, self.accepted = self.sent.without(gone), self.accepted.without(gone)

    def adopt(self, target: Table) -> bool:
        claimed, self._claimed = self._claimed, None
        if not claimed:
            return False
        names = (name for name in claimed if name not in self._wanted and (self.wildcard or name in self.names))
        held = {name: _held(target.get(name), name, claimed[name]) for name in names}
        table = Table(held)
        whole = len(table) == len(target) and table.digest == target.digest
        self.sent = self.accepted = target if whole else table
        self.known = True
        return whole

    def due(self, target: Table) -> bool:
        if not self.asked:
            return False
        return bool(self._changes(target)) or (self.wildcard and not self.known)

    def offer(self, target: Table, nonce: str) -> bytes | None:
        if self.flight is not None or not self.due(target):
            return None
        changes = self._changes(target)
        plain = changes is target.since(self.sent)
        body = target.delta_since(self.sent) if plain else changes.delta_body()
        after = target if plain else self.sent.replaced(changes.changed, changes.removed)
        if len(after) == len(target) and after.digest == target.digest:
            after = target  # shared by all streams
        self._launch(Flight(nonce, target.version, after, changes.changed, changes.removed))
        self._wanted.clear()
        return response(self.type_url, target.version, nonce, body)

    def _changes(self, target: Table) -> Changes:
        """What is to be sent: what changed and was not refused, and of what was asked for that there is none."""
        changes = target.since(self.sent)
        missing, refused = self._wanted - target.keys(), self._refused_digests
        if not missing and not refused:
            return changes
        changed = tuple(r for r in changes.changed if refused.get(r.name) != r.digest)
        return Changes(changed, tuple(sorted(missing.union(changes.removed))))

    def _answered(self, nonce: str, error: str | None) -> Answer | None:
        answer = super()._answered(nonce, error)
        if answer is not None and error is None and self._refused_digests:
            for name in (*(r.name for r in answer.flight.contents), *answer.flight.removed):
                self._refused_digests.pop(name, None)
        return answer

    def _refused(self, flight: Flight, error: str) -> None:
        """The resources that the client names, or all, are not sent again; what it has of any of them is unknown. Each
        refusal leaves fewer to be tried, so this ends whatever a client says. That something is no more was said."""
        self._refused_digests.update({r.name: r.digest for r in meant(error, flight.contents)})
        self.sent = self.sent.replaced([_unknown(r.name) for r in flight.contents if r.name in self.sent])


def meant(error: str, resources: Collection[Resource]) -> Collection[Resource]:
    """Those that a refusal's words name, all of them where they name none. ``n/a`` is not named by ``n/a-2`` and not by
    ``n/a/large``."""
    hits = [r for r in resources if r.name in error]
    named = [r for r in hits if re.search(rf"(?<![\w/-]){re.escape(r.name)}(?![\w/-])", error)]
    return named or hits or resources


def _held(resource: Resource | None, name: str, version: str) -> Resource:
    """What a client has that says it has `version`."""
    return resource if resource is not None and f"{resource.digest:032x}" == version else _unknown(name)


def _unknown(name: str) -> Resource:
    return Resource(name, RouteId(""), b"", UNKNOWN)
