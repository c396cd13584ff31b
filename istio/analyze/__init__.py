"""What Istio's CRD schema lets through and istiod or Envoy would not. Pure.

Decides: what is wrong with VirtualServices, DestinationRules, ServiceEntries and Gateways, alone and together.
Invariant: any JSON is analyzed without an exception. Three layers: `shapes` (single fields), one module per kind
(fields together), `across` (objects together).

Covered is everything of istiod's validation that concerns routing, balancing and endpoints; of the rest (TLS files,
CORS, header operations, Lua, Wasm) only the types. Rejected: asking istiod's webhook with a dry run, which needs a
cluster, costs a round trip per object, sees no other objects, and may be switched off; calling istioctl, a large binary
with the same answers (the tests compare with it).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from istio.analyze import across
from istio.analyze.finding import CODES, Finding, Rule, Severity, found
from istio.analyze.known import POD, SERVICE, Known, View
from istio.names import DESTINATION_RULE, GATEWAY, SERVICE_ENTRY, VIRTUAL_SERVICE
from meshctl.ports import KubeObject

__all__ = [
    "CODES",
    "ISTIO_KINDS",
    "POD",
    "SERVICE",
    "Finding",
    "Known",
    "Rule",
    "Severity",
    "analyze",
    "check",
    "found",
]

ISTIO_KINDS = frozenset({VIRTUAL_SERVICE, DESTINATION_RULE, SERVICE_ENTRY, GATEWAY})


def analyze(
    objects: Iterable[KubeObject], beside: Iterable[KubeObject] | Known = (), complete: Collection[str] = ISTIO_KINDS
) -> tuple[Finding, ...]:
    """Everything wrong with `objects` where they stand beside others, ordered by object and place.

    Older versions of `objects` among the others do not count, other kinds are passed over. `complete` are the kinds of
    which every object is given: what is missing of another kind is not reported. Pass a `Known` to look at many small
    sets beside the same others: then one route of a thousand takes about 1 ms.
    """
    view = View(beside if isinstance(beside, Known) else Known(beside), Known(objects, judged=True))
    findings: list[Finding] = []
    for subject in view.over.subjects():
        findings += subject.own
        findings += across.judge(subject, view, complete)
    return tuple(sorted(findings, key=lambda finding: finding.order))


def check(
    wanted: Iterable[KubeObject], others: Iterable[KubeObject] | Known, complete: Collection[str] = ISTIO_KINDS
) -> tuple[Finding, ...]:
    """What would be wrong with `wanted` once they are written: `analyze`, before a write.

    An error is a reason not to write. What another object heals whenever it comes (a root without its delegate, a
    gateway that is not there yet) is a warning here.
    """
    return tuple(_softened(finding) for finding in analyze(wanted, others, complete))


def _softened(finding: Finding) -> Finding:
    return replace(finding, severity=Severity.WARNING) if CODES[finding.code].heals else finding
