"""Who a proxy proved to be, and which groups of proxies it may belong to. Pure.

A proxy names its group itself, in the node that it sends: what it may name is decided here, from the certificate that
it showed in the TLS handshake. Invariants: a certificate without a name is allowed nothing; more rules never allow
less; in a pattern nothing but `*` stands for anything else, and `*` for no `/`, so that no pattern leaves its trust
domain.

Without rules a certificate is for the one group that it is named after: the last segment of its SPIFFE ID (in a mesh
the service account), else its subject. One that must be told apart otherwise needs a file of rules.

Rejected: regular expressions for patterns (an unescaped `.` or a missing anchor lets others in, and none is needed);
the first rule that matches decides (the order of a list would be a matter of security); rules that forbid.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meshctl.api.document import Document, Fault, ManifestError, Place, parse, short
from meshctl.errors import MeshctlError
from xds.wire import GROUP_METADATA

EVERY_GROUP = "*"
_PATTERNS = {
    "spiffe": "spiffe://TRUST-DOMAIN/PATH, where `*` stands for a part of the path",
    "subject": "a common name or DNS name, where `*` stands for a part of it",
}
_KINDS = tuple(_PATTERNS)


class NotAllowedError(MeshctlError):
    """A peer asks for what is not meant for it. The message is for the peer: who, which group, which instead."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What the certificate of a peer says; all empty for one that was not asked for a certificate."""

    spiffe: str = ""
    """``spiffe://TRUST-DOMAIN/PATH``; "" unless the certificate has one, as the standard demands."""
    subject: str = ""
    """Its common name, else its first DNS name."""
    proven: bool = False
    """Whether there was a certificate."""

    @staticmethod
    def of(auth: Mapping[str, Sequence[bytes]]) -> Identity:
        """From what gRPC knows of a connection: property -> values (ServicerContext.auth_context)."""
        return Identity(
            spiffe=_first(auth, "peer_spiffe_id"),
            subject=_first(auth, "x509_common_name") or _first(auth, "peer_dns"),
            proven="x509_pem_cert" in auth,
        )

    @property
    def group(self) -> str:
        """The group that it is named after; "" for none."""
        if not self.spiffe:
            return self.subject
        _, _, path = self.spiffe.removeprefix("spiffe://").partition("/")
        return path.rpartition("/")[2]

    def __str__(self) -> str:
        if self.spiffe or self.subject:
            return self.spiffe or f"the certificate of {self.subject!r}"
        return "a certificate without a name" if self.proven else "a peer without a certificate"


@dataclass(frozen=True, slots=True)
class Rule:
    """Peers whose `kind` ("spiffe" or "subject") matches `pattern` may belong to each of `groups`."""

    kind: str
    pattern: str
    groups: tuple[str, ...]
    _regex: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        regex = "[^/]*".join(map(re.escape, self.pattern.split("*")))
        object.__setattr__(self, "_regex", re.compile(regex))

    def matches(self, identity: Identity) -> bool:
        value: str = getattr(identity, self.kind)
        return bool(value) and self._regex.fullmatch(value) is not None


@dataclass(frozen=True, slots=True)
class Identities:
    """Which groups a peer may name."""

    rules: tuple[Rule, ...] | None = None
    """None: no file was given, and a peer may name the group that its certificate is named after."""

    @staticmethod
    def parse(content: bytes, file: str) -> Identities:
        """A YAML (or JSON) list of ``{spiffe | subject: PATTERN, groups: [NAME, ...]}``.

        Raises ManifestError that names the place of everything that is wrong in `file`.
        """
        documents = parse(content, file)
        if len(documents) != 1 or not isinstance(documents[0].data, list) or not documents[0].data:
            place = documents[0].place() if documents else Place(file)
            raise ManifestError((Fault(place, "", f"{_SHAPE}: without a rule nobody would be served"),))
        (document,) = documents
        faults = tuple(fault for index, item in enumerate(document.data) for fault in _faults(document, index, item))
        if faults:
            raise ManifestError(faults)
        return Identities(tuple(_rule(item) for item in document.data))

    def check(self, identity: Identity, group: str) -> None:
        """Raises NotAllowedError unless the peer may belong to `group`."""
        if not identity.proven and self.rules is None:
            return  # certificates are not asked for: whoever reaches the port may name any
        allowed = self._allowed(identity)
        if not allowed & {group, EVERY_GROUP}:
            raise NotAllowedError(self._refusal(identity, group, sorted(allowed)))

    def _allowed(self, identity: Identity) -> set[str]:
        if self.rules is None:
            return {identity.group} - {"", EVERY_GROUP}
        return {name for rule in self.rules if rule.matches(identity) for name in rule.groups}

    def _refusal(self, identity: Identity, group: str, allowed: Sequence[str]) -> str:
        which = " or ".join(map(repr, allowed)) or "no group"
        one = "that" if len(allowed) == 1 else "one of them"
        name = f"name {one} in the node's metadata {GROUP_METADATA}, or " if allowed else ""
        let = "let the server have --xds-identities" if self.rules is None else "change the server's --xds-identities"
        return f"{identity} may belong to {which}, not to {group!r}: {name}{let}"


_SHAPE = "must be a list of {spiffe or subject: PATTERN, groups: [NAME, ...]}"


def _faults(document: Document, index: int, item: Any) -> list[Fault]:
    """What is wrong with one item of the list."""
    if not isinstance(item, dict):
        return [document.fault((index,), f"is {short(item)}; the file {_SHAPE}")]
    wrong = dict.fromkeys(sorted(item.keys() - {*_KINDS, "groups"}), "is unknown; give spiffe or subject, and groups")
    kinds = [kind for kind in _KINDS if kind in item]
    if len(kinds) != 1:
        wrong[""] = f"has {' and '.join(kinds) or 'neither spiffe nor subject'}; give one of them"
    for kind in kinds:
        if not _is_pattern(kind, item[kind]):
            wrong[kind] = f"is {short(item[kind])}; give {_PATTERNS[kind]}"
    if not _is_names(item.get("groups")):
        wrong["groups"] = f"must be a list of names, or [{EVERY_GROUP!r}]"
    return [document.fault((index, key) if key else (index,), message) for key, message in wrong.items()]


def _is_pattern(kind: str, value: Any) -> bool:
    return isinstance(value, str) and bool(value) and (kind != "spiffe" or bool(re.match(r"spiffe://[^/*]+/.", value)))


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) and name for name in value)


def _rule(item: Mapping[str, Any]) -> Rule:
    (kind,) = [kind for kind in _KINDS if kind in item]
    return Rule(kind, item[kind], tuple(item["groups"]))


def _first(auth: Mapping[str, Sequence[bytes]], name: str) -> str:
    """What is no UTF-8 is written with backslashes: two names that differ must not become one."""
    return next((value.decode(errors="backslashreplace") for value in auth.get(name, ())), "")
