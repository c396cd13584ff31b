"""What is wrong with one DestinationRule beyond its single fields. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from istio.analyze import values
from istio.analyze.finding import FieldPath

Report = Callable[[str, FieldPath, str], None]
Spec = Mapping[str, Any]


def judge(spec: Spec, report: Report) -> None:
    """`spec` as `shape.Reader` gives it."""
    _policy(spec.get("trafficPolicy"), ("spec", "trafficPolicy"), report)
    seen: set[str] = set()
    for index, subset in enumerate(spec.get("subsets", [])):
        path: FieldPath = ("spec", "subsets", index)
        name = subset.get("name", "")
        if name and name in seen:
            report("DuplicateSubset", (*path, "name"), f"the subset `{name}` is there twice")
        seen.add(name)
        _policy(subset.get("trafficPolicy"), (*path, "trafficPolicy"), report)


def _policy(policy: Spec | None, path: FieldPath, report: Report) -> None:
    if policy is None:
        return
    if not policy:
        report("EmptyPolicy", path, "the traffic policy is empty")
    _settings(policy, path, report)
    for index, port in enumerate(policy.get("portLevelSettings", [])):
        here: FieldPath = (*path, "portLevelSettings", index)
        if not port.keys() - {"port"}:
            report("EmptyPolicy", here, "the port's policy is empty")
        _settings(port, here, report)
    target = policy.get("tunnel", {}).get("targetHost", "")
    if target and values.bad_name(target) and not values.is_ip(target):
        report("InvalidHost", (*path, "tunnel", "targetHost"), f"`{target[:80]}` is neither a host name nor an address")


def _settings(policy: Spec, path: FieldPath, report: Report) -> None:
    pool = policy.get("connectionPool")
    if pool is not None and not ("http" in pool or "tcp" in pool):
        report("EmptyPolicy", (*path, "connectionPool"), "the connection pool is empty")
    http = (pool or {}).get("http", {})
    if http.get("h2UpgradePolicy") == "UPGRADE" and http.get("useClientProtocol"):
        report("PolicyConflict", (*path, "connectionPool", "http"), "useClientProtocol and h2UpgradePolicy UPGRADE")
    outliers = policy.get("outlierDetection", {})
    if outliers.get("consecutiveLocalOriginFailures") and not outliers.get("splitExternalLocalOriginErrors"):
        what = "consecutiveLocalOriginFailures counts only with splitExternalLocalOriginErrors"
        report("PolicyConflict", (*path, "outlierDetection"), what)
    _balancer(policy.get("loadBalancer", {}), (*path, "loadBalancer"), report)
    _tls(policy.get("tls", {}), (*path, "tls"), report)


def _balancer(balancer: Spec, path: FieldPath, report: Report) -> None:
    size = balancer.get("consistentHash", {}).get("maglev", {}).get("tableSize", 2)
    if size > 1 and any(size % divisor == 0 for divisor in range(2, int(min(size, 5_000_011) ** 0.5) + 1)):
        report("PolicyConflict", (*path, "consistentHash", "maglev", "tableSize"), f"{size} is not a prime number")
    if balancer.get("warmup", {}).get("aggression") == 0:
        report("OutOfRange", (*path, "warmup", "aggression"), "0 is not greater than 0")
    locality = balancer.get("localityLbSetting", {})
    here: FieldPath = (*path, "localityLbSetting")
    if locality.get("distribute") and locality.get("failover"):
        report("SeveralAlternatives", here, "`distribute` and `failover` are set")
    for index, share in enumerate(locality.get("distribute", [])):
        total = sum(share.get("to", {}).values())
        if total != 100 or 0 in share.get("to", {}).values():
            what = f"the weights sum to {total}, not to 100 (each from 1)"
            report("OutOfRange", (*here, "distribute", index, "to"), what)
    for index, move in enumerate(locality.get("failover", [])):
        if move.get("from") == move.get("to"):
            report("PolicyConflict", (*here, "failover", index), f"from and to are both `{move.get('from', '')[:80]}`")


def _tls(tls: Spec, path: FieldPath, report: Report) -> None:
    mode = tls.get("mode", "DISABLE")
    own = [name for name in ("clientCertificate", "privateKey", "caCertificates", "caCrl") if tls.get(name)]
    if mode in ("SIMPLE", "MUTUAL") and tls.get("credentialName"):
        if own:
            report("PolicyConflict", path, f"credentialName and `{own[0]}` exclude each other")
    elif mode == "MUTUAL":
        for name in ("clientCertificate", "privateKey"):
            if not tls.get(name):
                report("MissingField", (*path, name), f"mode MUTUAL needs `{name}`")
