"""What a finding is, and the table of all of them: how bad each is, what it means, what to do.

docs/reference/analyze.md is written from `CODES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from meshctl.ports import ObjectKey

FieldPath = tuple[str | int, ...]
"""``("spec", "http", 0, "route")``; () is the whole object."""


class Severity(StrEnum):
    ERROR = "error"
    """istiod refuses the object or Envoy does not do what it says: requests fail or go elsewhere."""
    WARNING = "warning"
    """It does less than it says, or nothing yet; no request fails for it that would not fail without it."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of finding."""

    severity: Severity
    meaning: str
    """What is the matter, and what comes of it."""
    remedy: str
    """What to do, as an imperative."""
    heals: bool = False
    """It is right as soon as another object arrives, in whatever order they are written: no reason not to write this
    one (`check` says warning)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong with one object."""

    code: str
    """A key of `CODES`."""
    severity: Severity
    key: ObjectKey
    path: FieldPath
    message: str
    """What is wrong, with the values, and what to do."""

    @property
    def field(self) -> str:
        """``spec.http[0].route``; "" for the whole object."""
        return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path).removeprefix(".")

    @property
    def order(self) -> tuple[object, ...]:
        """Findings sort by this: object, place (array items by number), code."""
        place = tuple((0, part, "") if isinstance(part, int) else (1, 0, part) for part in self.path)
        return (*self.key, place, self.code, self.message)

    def __str__(self) -> str:
        return ": ".join(filter(None, (f"{self.severity} {self.code}", str(self.key), self.field, self.message)))


def found(code: str, key: ObjectKey, path: FieldPath, what: str) -> Finding:
    """A finding of `code`; its message is `what` and the table's remedy."""
    rule = CODES[code]
    return Finding(code, rule.severity, key, path, f"{what}; {rule.remedy}")


_E, _W = Severity.ERROR, Severity.WARNING

CODES: Mapping[str, Rule] = MappingProxyType(
    {
        # one field
        "WrongType": Rule(
            _E, "A field has a value of another type; the API server refuses it.", "write the type named"
        ),
        "UnknownField": Rule(
            _E, "Istio has no such field; the API server drops it silently.", "correct the spelling or remove it"
        ),
        "DuplicateObject": Rule(
            _E, "Two objects of one kind have one name: the second replaces the first.", "rename one"
        ),
        "MissingField": Rule(_E, "A field that Istio needs is missing or empty.", "add it"),
        "UnknownValue": Rule(_E, "The field takes only certain words.", "choose one of those"),
        "OutOfRange": Rule(_E, "A number is outside of what Istio or Envoy takes.", "write a number in that range"),
        "InvalidDuration": Rule(
            _E,
            "Istio takes durations of at least 1ms in whole milliseconds.",
            "write a duration such as `250ms` or `1m30s`",
        ),
        "InvalidHost": Rule(
            _E,
            "Not a DNS name (a `*` may stand for the first label).",
            "write a host name of letters, digits and hyphens",
        ),
        "InvalidName": Rule(
            _E, "Not a DNS label (subset, port, namespace, gateway).", "use at most 63 letters, digits and hyphens"
        ),
        "InvalidLabel": Rule(_E, "Not a Kubernetes label.", "write a valid label key and value"),
        "InvalidHeader": Rule(_E, "Not the name of an HTTP header.", "write a header's name"),
        "InvalidAddress": Rule(_E, "Not an address that the entry's resolution takes.", "write an IP address"),
        "InvalidRegex": Rule(
            _E,
            "Not RE2 (no look-around, no back-references, no possessive repetition): istiod refuses it.",
            "write it in RE2's syntax",
        ),
        "RegexTooLong": Rule(
            _E,
            "istiod refuses regular expressions of more than 1024 bytes.",
            "shorten it or split it into several matches",
        ),
        "SeveralAlternatives": Rule(_E, "Only one of these fields may be set.", "keep one of them"),
        # one VirtualService
        "NegativeWeight": Rule(_E, "A weight is below 0.", "write 0 or more"),
        "ZeroWeights": Rule(
            _E,
            "All of several destinations have weight 0: istiod refuses it, Envoy would NACK it.",
            "give at least one a weight above 0",
        ),
        "WeightsTooLarge": Rule(_E, "The weights sum to more than Envoy can count (4294967295).", "divide all of them"),
        "NoRoute": Rule(
            _E, "A rule does nothing with its requests.", "add route, redirect, directResponse or (with hosts) delegate"
        ),
        "NoRules": Rule(_E, "The VirtualService has no rule.", "add http, tcp or tls"),
        "ConflictingActions": Rule(_E, "A rule has actions that exclude each other.", "keep one of them"),
        "DelegateFields": Rule(
            _E,
            "A VirtualService without hosts is a delegate, which has only http rules that route by themselves.",
            "remove them, or add hosts",
        ),
        "WildcardInMesh": Rule(
            _E, "The host `*` is not allowed for the mesh's sidecars.", "name the hosts, or a gateway"
        ),
        "DuplicateHost": Rule(_E, "One host covers another one of the same object.", "keep one of them"),
        "RetryPolicy": Rule(_E, "The retry policy contradicts itself or names an unknown condition.", "correct it"),
        "RuleUnreachable": Rule(
            _W, "An earlier rule takes every request that this rule would.", "move it before that rule or remove it"
        ),
        "MatchShadowed": Rule(
            _W, "An earlier match takes every request that this match would.", "move it before that one or remove it"
        ),
        # one DestinationRule
        "DuplicateSubset": Rule(_E, "Two subsets have one name.", "rename one"),
        "EmptyPolicy": Rule(
            _E, "A traffic policy or connection pool without any setting.", "set something or remove it"
        ),
        "PolicyConflict": Rule(_E, "Settings that exclude or need each other.", "correct it as said"),
        # one ServiceEntry
        "ZeroEndpointWeight": Rule(
            _E,
            "Istio reads an endpoint's weight 0 as 1: it gets requests.",
            "leave the endpoint out, or give it a weight above 0",
        ),
        "DuplicateEndpoint": Rule(
            _W, "The same address and port twice: it gets the requests of both.", "keep one and add up the weights"
        ),
        "DuplicatePort": Rule(_E, "Two ports have one name or number.", "keep one of them"),
        "UnknownPort": Rule(
            _E, "An endpoint names a port that the entry does not have.", "name one of the entry's ports"
        ),
        "ResolutionConflict": Rule(_E, "The resolution does not go with the other fields.", "correct it as said"),
        # one Gateway
        "GatewayServer": Rule(
            _E, "A server of the gateway is not complete or contradicts itself.", "correct it as said"
        ),
        # several objects
        "UndefinedSubset": Rule(
            _E,
            "No DestinationRule for the host has the subset: requests get 503.",
            "add the subset to the host's DestinationRule first",
        ),
        "UnknownDestination": Rule(
            _E, "No Service and no ServiceEntry has the destination's host: requests get 503.", "add it first"
        ),
        "DestinationPort": Rule(
            _E, "The destination has no such port, or several and none is named.", "name one of its ports"
        ),
        "UnknownGateway": Rule(
            _E, "The gateway is not there: no request comes through it.", "create it or correct the name", heals=True
        ),
        "GatewayHost": Rule(
            _W,
            "No server of the gateway serves the VirtualService's host: no request for it comes through.",
            "add the host to a server of the gateway",
            heals=True,
        ),
        "GatewayWithoutPods": Rule(
            _W, "The gateway's selector fits no pod: nothing serves it.", "correct the selector", heals=True
        ),
        "UnknownDelegate": Rule(
            _E,
            "The VirtualService named as delegate is not there: Istio drops the rule, requests get 404.",
            "create it or correct the name",
            heals=True,
        ),
        "DelegateNotUsed": Rule(
            _W,
            "A VirtualService without hosts that no other names: it serves nothing.",
            "name it as delegate in a root",
            heals=True,
        ),
        "DelegateWithHosts": Rule(
            _E,
            "The VirtualService named as delegate has hosts of its own: Istio drops the rule, requests get 404.",
            "remove the hosts and gateways from the delegate",
        ),
        "DelegateMatch": Rule(
            _E,
            "A match of the delegate contradicts the root's: Istio drops the delegate's rule.",
            "remove what both match on from one of them",
        ),
        "HostClaimedTwice": Rule(
            _E,
            "An older VirtualService has the host: in the mesh istiod ignores this one; on a gateway both have a rule "
            "for all requests, and only the older's is reached.",
            "merge the two, or let a root VirtualService delegate",
        ),
        "HostShared": Rule(
            _W,
            "An older VirtualService has the host on the same gateway: Istio puts the rules of this one behind its.",
            "make sure that their matches exclude each other",
        ),
        "DestinationRuleTwice": Rule(
            _W,
            "An older DestinationRule for the same host in the same namespace: its traffic policy counts.",
            "merge the two",
        ),
        "EntryHostTwice": Rule(
            _W, "Another ServiceEntry has the same host: Istio joins or hides one of them.", "keep one of them"
        ),
    }
)
"""Every kind of finding."""
