"""What is wrong with one VirtualService beyond its single fields. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from http import HTTPStatus
from itertools import combinations
from typing import Any

from istio.analyze import values
from istio.analyze.finding import FieldPath
from istio.analyze.hosts import covers
from istio.analyze.matches import takes
from istio.analyze.shapes import UINT32

Report = Callable[[str, FieldPath, str], None]
Spec = Mapping[str, Any]

MESH = "mesh"
"""The name that stands for the sidecars; also where no gateway is named."""
_ACTIONS = ("route", "redirect", "directResponse")
_NOT_WITH = {
    "redirect": ("fault", "rewrite"),
    "directResponse": ("fault", "rewrite"),
    "delegate": ("route", "redirect"),
    "mirror": ("mirrors",),
}  # fmt: skip
_RETRY_ON = re.compile(
    "5xx|gateway-error|reset|reset-before-request|connect-failure|retriable-4xx|refused-stream|retriable-status-codes|"
    "retriable-headers|envoy-ratelimited|http3-post-connect-failure|cancelled|deadline-exceeded|internal|"
    "resource-exhausted|unavailable"
)
_STATUS = frozenset(str(int(status)) for status in HTTPStatus)
MAX_COMPARED = 200
"""Matches of one object that are compared with each other (200 take 20 ms); those behind are not."""


def judge(spec: Spec, report: Report) -> None:
    """`spec` as `shape.Reader` gives it."""
    hosts = spec.get("hosts", [])
    _whole(spec, hosts, report)
    for index, rule in enumerate(spec.get("http", [])):
        _http(rule, ("spec", "http", index), report, delegate=not hosts)
    for protocol in ("tcp", "tls"):
        for index, rule in enumerate(spec.get(protocol, [])):
            path: FieldPath = ("spec", protocol, index)
            if not rule.get("route"):
                report("NoRoute", path, f"the {protocol} rule has no route")
            _weights(rule.get("route", []), (*path, "route"), report)
    _shadows(spec.get("http", []), report)


def gateways_of(spec: Spec) -> Sequence[str]:
    """The gateways that the VirtualService is for; `MESH` where it names none."""
    named: Sequence[str] = spec.get("gateways") or (MESH,)
    return named


def destinations(spec: Spec) -> Iterator[tuple[FieldPath, Spec]]:
    """Every destination with its place, mirrors included."""
    for protocol in ("http", "tcp", "tls"):
        for index, rule in enumerate(spec.get(protocol, [])):
            path: FieldPath = ("spec", protocol, index)
            for number, weighted in enumerate(rule.get("route", [])):
                if "destination" in weighted:
                    yield (*path, "route", number, "destination"), weighted["destination"]
            for number, mirror in enumerate(rule.get("mirrors", [])):
                if "destination" in mirror:
                    yield (*path, "mirrors", number, "destination"), mirror["destination"]
            if "mirror" in rule:
                yield (*path, "mirror"), rule["mirror"]


def _whole(spec: Spec, hosts: Sequence[str], report: Report) -> None:
    if not any(spec.get(protocol) for protocol in ("http", "tcp", "tls")):
        report("NoRules", ("spec",), "there is no http, tcp or tls")
    if not hosts:
        for name in ("gateways", "tcp", "tls"):
            if spec.get(name):
                report("DelegateFields", ("spec", name), f"there are no hosts, but {name}")
    elif MESH in gateways_of(spec) and "*" in hosts:
        report("WildcardInMesh", ("spec", "hosts", hosts.index("*")), "the host `*` is for the mesh")
    for name in gateways_of(spec):
        _gateway_name(name, report)
    for (_, one), (second, other) in combinations(enumerate(hosts[:MAX_COMPARED]), 2):
        if covers(one, other) or covers(other, one):
            report("DuplicateHost", ("spec", "hosts", second), f"`{one}` and `{other}` overlap")


def _gateway_name(name: str, report: Report) -> None:
    """``name``, ``namespace/name``, or the old ``name.namespace.svc.cluster.local``."""
    if "/" in name:
        parts = name.split("/", 1)
        wrong = not all(parts) or any(values.label(part) for part in parts)
    else:
        wrong = not name or values.bad_name(name)
    if wrong:
        report("InvalidName", ("spec", "gateways"), f"`{name[:80]}` is not `namespace/name` of a gateway")


def _http(rule: Spec, path: FieldPath, report: Report, *, delegate: bool) -> None:
    if "delegate" in rule and delegate:
        report("DelegateFields", (*path, "delegate"), "a delegate delegates")
    acting = [name for name in _ACTIONS if rule.get(name) or (name in rule and name != "route")]
    if not acting and "delegate" not in rule:
        report("NoRoute", path, "the rule has no route")
    for name, excluded in _NOT_WITH.items():
        for other in excluded:
            if name in rule and rule.get(other):
                report("ConflictingActions", (*path, other), f"`{name}` and `{other}` in one rule")
    if len(acting) > 1:
        report("ConflictingActions", path, f"`{'` and `'.join(acting)}` in one rule")
    _weights(rule.get("route", []), (*path, "route"), report)
    _retries(rule, (*path, "retries"), report)
    _extras(rule, path, report)
    for index, match in enumerate(rule.get("match", [])):
        _match(match, (*path, "match", index), report)


def _weights(route: Sequence[Spec], path: FieldPath, report: Report) -> None:
    total = sum(weighted.get("weight", 0) for weighted in route)
    if len(route) > 1 and total == 0:
        report("ZeroWeights", path, f"the weights of {len(route)} destinations sum to 0")
    if total > UINT32:
        report("WeightsTooLarge", path, f"the weights sum to {total}")


def _retries(rule: Spec, path: FieldPath, report: Report) -> None:
    retries = rule.get("retries", {})
    idle = [name for name in ("perTryTimeout", "retryOn", "retryRemoteLocalities") if name in retries]
    if idle and not retries.get("attempts"):
        report("RetryPolicy", path, f"attempts is 0 (no retries), and `{idle[0]}` is set")
    for word in str(retries.get("retryOn", "")).split(","):
        if word and not _RETRY_ON.fullmatch(word) and word not in _STATUS:
            report("RetryPolicy", (*path, "retryOn"), f"`{word[:40]}` is not a condition for a retry")


def _extras(rule: Spec, path: FieldPath, report: Report) -> None:
    """Fields that need something else: rewrite, fault."""
    rewrite = rule.get("rewrite")
    if rewrite is not None and not any(rewrite.get(name) for name in ("uri", "uriRegexRewrite", "authority")):
        report("MissingField", (*path, "rewrite"), "the rewrite changes nothing")
    if rewrite and rewrite.get("uri") and "uriRegexRewrite" in rewrite:
        report("SeveralAlternatives", (*path, "rewrite"), "`uri` and `uriRegexRewrite` are set")
    fault = rule.get("fault")
    if fault is not None and not ("abort" in fault or "delay" in fault):
        report("MissingField", (*path, "fault"), "the fault has neither abort nor delay")
    for kind, name in (("abort", "http2Error"), ("delay", "exponentialDelay")):
        if name in (fault or {}).get(kind, {}):
            report("UnknownValue", (*path, "fault", kind, name), f"Istio has `{name}`, but does not support it")


def _match(match: Spec, path: FieldPath, report: Report) -> None:
    for name in ("scheme", "method", "authority"):
        _prefix(match.get(name, {}), (*path, name), report)
    for group in ("headers", "queryParams"):
        for name, text in match.get(group, {}).items():
            _prefix(text, (*path, group, name), report)
    for name, text in match.get("withoutHeaders", {}).items():
        here = (*path, "withoutHeaders", name)
        _prefix(text, here, report)
        if text.get("regex", "*") != "*" and (verdict := values.regex(text["regex"])):
            report(verdict[0], (*here, "regex"), verdict[1])


def _prefix(text: Spec, path: FieldPath, report: Report) -> None:
    if text.get("prefix") == "":
        report("MissingField", (*path, "prefix"), "the prefix is empty")


def _shadows(rules: Sequence[Spec], report: Report) -> None:
    """Matches that never get a request, because an earlier one takes all of them."""
    earlier: list[tuple[int, Spec]] = []
    for index, rule in enumerate(rules):
        matches: Sequence[Spec] = rule.get("match") or [{}]
        hidden = 0
        for number, match in enumerate(matches):
            path: FieldPath = ("spec", "http", index, "match", number)
            by = next((other for other, before in earlier if takes(before, match)), None)
            if by is None:
                if len(earlier) < MAX_COMPARED:
                    earlier.append((index, match))
                continue
            hidden += 1
            if len(matches) > 1 and hidden < len(matches):
                report("MatchShadowed", path, f"http[{by}] takes all that match {number} of http[{index}] would")
        if hidden == len(matches):
            report("RuleUnreachable", ("spec", "http", index), f"http[{index}] never gets a request")
