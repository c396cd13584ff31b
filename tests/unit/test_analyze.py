"""istio.analyze on whole documents, and on what a writer asks before it writes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from istio.analyze import CODES, ISTIO_KINDS, SERVICE, Finding, Known, Severity, analyze, check
from istio.analyze.regex import fault_of
from istio.analyze.shape import Entries, Items, Message, Shape
from istio.analyze.shapes import SHAPES
from istio.render import render
from meshctl.api.document import parse
from meshctl.model import Mechanism
from meshctl.ports import ObjectKey
from tests.harness.istio_plans import GATEWAY, meshed, objects

DATA = Path(__file__).parents[1] / "data" / "istio"
REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "analyze.md"
CASES = sorted(DATA.glob("*.yaml"))
Object = dict[str, Any]


def documents(path: Path) -> list[Object]:
    return [document.data for document in parse(path.read_bytes(), str(path))]


def made(kind: str, name: str, spec: Object, namespace: str = "default", **metadata: str) -> Object:
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": kind,
        "metadata": {"name": name, "namespace": namespace, **metadata},
        "spec": spec,
    }


def route(name: str, host: str, *rules: Object, **more: Any) -> Object:
    return made("VirtualService", name, {"hosts": [host], "http": list(rules or [to("a")]), **more})


def to(host: str, *matches: Object, **more: Any) -> Object:
    match = {"match": list(matches)} if matches else {}
    return {**match, "route": [{"destination": {"host": host, **more}}]}


def codes(findings: tuple[Finding, ...]) -> set[str]:
    return {finding.code for finding in findings}


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_each_document_has_the_findings_it_names(path: Path) -> None:
    """The first line of tests/data/istio/*.yaml says which; files called good have none, odd ones only warnings."""
    expected = set(path.read_text().splitlines()[0].removeprefix("# expect: ").split()) - {"nothing"}
    given_objects = documents(path)
    before = copy.deepcopy(given_objects)
    findings = analyze(given_objects)
    assert codes(findings) == expected
    assert given_objects == before
    errors = any(finding.severity is Severity.ERROR for finding in findings)
    assert (bool(findings), errors) == {"bad": (True, True), "odd": (True, False), "good": (False, False)}[
        path.stem.partition("-")[0]
    ]


def test_every_kind_of_finding_is_documented_in_the_reference() -> None:
    """docs/reference/analyze.md has the table of `CODES`, as it is."""
    rows = [f"| `{code}` | {rule.severity} | {rule.meaning} | {rule.remedy} |" for code, rule in CODES.items()]
    assert [line for line in REFERENCE.read_text().splitlines() if line.startswith("| `")] == rows


def test_a_finding_says_where_what_and_what_to_do() -> None:
    (finding,) = analyze([route("r", "h", {"route": [{"destination": {"host": "a"}, "weight": -1}]})])
    assert finding.key == ObjectKey("VirtualService", "default", "r")
    assert finding.field == "spec.http[0].route[0].weight"
    assert finding.message == "the weight is -1; write 0 or more"
    assert str(finding).startswith("error NegativeWeight: VirtualService default/r: spec.http[0].route[0].weight: ")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["8", "1s", "a.b"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def shaped(shape: Shape) -> st.SearchStrategy[Any]:
    """Values of about the right form: known fields, some with something else in them."""
    match shape:
        case Message(fields):
            known = {name: shaped(child) for name, child in fields.items()}
            return st.fixed_dictionaries({}, optional=known) | JSON
        case Items(of):
            return st.lists(shaped(of), max_size=2) | JSON
        case Entries(of):
            return st.dictionaries(st.sampled_from(["x-batch-size", "", "a/b", "é"]), shaped(of), max_size=2) | JSON
        case _:
            return JSON | st.sampled_from(["exact", "/", "*", "*.a.example", "(", "10ms", "STATIC", "192.0.2.1", 0, 80])


@given(st.lists(JSON | st.builds(dict, kind=st.sampled_from([*ISTIO_KINDS, SERVICE]), metadata=JSON, spec=JSON)))
def test_any_json_is_analyzed(values: list[Any]) -> None:
    """Whatever it is, there is an answer, and the same one again."""
    assert analyze(values, values) == analyze(values, values)


SPECS = st.one_of([st.tuples(st.just(kind), shaped(SHAPES[kind])) for kind in sorted(SHAPES)])


@given(st.lists(SPECS, max_size=4))
def test_anything_like_an_istio_object_is_analyzed(specs: list[tuple[str, Any]]) -> None:
    """Known fields with other values in them are where a rule could trip."""
    values = [made(kind, f"o{index % 3}", spec) for index, (kind, spec) in enumerate(specs)]
    findings = analyze(values, values, (*ISTIO_KINDS, SERVICE))
    assert list(findings) == sorted(findings, key=lambda finding: finding.order)
    assert all(finding.code in CODES for finding in findings)


@given(st.text(alphabet=r"ab1*+?{},()[]^$|\.-:P<>=!dpQEzA0", max_size=20))
def test_any_regex_is_judged(text: str) -> None:
    """Without an exception, and in bounded time."""
    assert isinstance(fault_of(text), str)


@pytest.mark.parametrize(
    "text", [r"\+?0*([89]|[12][0-9]|3[0-2])", "(?i)a", r"[[:alpha:]]\pL\z", "a{2,}?", "(?P<n>a)", "{", "a{,2}", "[]a]"]
)
def test_re2_is_taken(text: str) -> None:
    assert fault_of(text) == ""


@pytest.mark.parametrize(
    "text",
    ["(?=a)", "(?<!a)", r"(a)\1", "a++", "(?>a)", "a{1001}", "(a{100}){11}", "[z-a]", "(", ")", r"\Z", "*", "[a"],
)
def test_what_is_not_re2_is_refused(text: str) -> None:
    """Look-around, back-references, possessive repetition, and what never closes."""
    assert fault_of(text) != ""


@pytest.mark.parametrize("mechanism", Mechanism)
@pytest.mark.parametrize("delegate", [False, True], ids=["root", "delegate"])
def test_what_is_rendered_has_no_finding(mechanism: Mechanism, delegate: bool) -> None:
    """Also where an endpoint has no weight, or a GPU class gets none of a size."""
    weights = {"192.0.2.1:8000": 0, "192.0.2.2:8000": 1000}
    plan = meshed("team/resnet", weights, mechanism=mechanism, delegate=delegate)
    server = {"port": {"number": 80, "name": "http", "protocol": "HTTP"}, "hosts": ["*"]}
    namespace, name = GATEWAY.split("/")
    root = {"hosts": ["h.example"], "http": [{"match": [{"uri": {"prefix": "/v2"}}], "delegate": {"name": "resnet"}}]}
    others = [
        made("Gateway", name, {"servers": [server]}, namespace),
        *([made("VirtualService", "root", root, "team")] if delegate else []),
    ]
    assert check(objects(render(plan)), others) == ()


class TestCheck:
    """What the writer asks: only what it is about to write is judged, beside what is there."""

    delegate = made("VirtualService", "d", {"http": [to("small.r.default.sizes.meshctl.internal")]})
    entry = made(
        "ServiceEntry",
        "e",
        {
            "hosts": ["small.r.default.sizes.meshctl.internal"],
            "resolution": "STATIC",
            "ports": [{"name": "http", "number": 80, "protocol": "HTTP"}],
        },
    )

    def test_others_are_not_judged(self) -> None:
        """A mistake of somebody else is no reason not to write."""
        assert check([route("r", "h")], [route("s", "other", {})]) == ()
        assert codes(analyze([route("s", "other", {})])) == {"NoRoute"}

    def test_what_a_later_object_heals_is_a_warning(self) -> None:
        """A delegate before its root, a root before its gateway or its delegate: the order is free."""
        root = made(
            "VirtualService", "root", {"hosts": ["h"], "http": [{"delegate": {"name": "d"}}], "gateways": ["g"]}
        )
        early = check([self.delegate, self.entry, root], [])
        assert codes(early) == {"UnknownGateway"}
        assert codes(check([self.delegate, self.entry], [])) == {"DelegateNotUsed"}
        assert codes(check([root], [])) == {"UnknownGateway", "UnknownDelegate"}
        assert {f.severity for f in (*early, *check([root], []))} == {Severity.WARNING}
        assert Severity.ERROR in {finding.severity for finding in analyze([root])}

    def test_a_root_that_contradicts_our_delegate_is_reported_on_ours(self) -> None:
        """Git's root matches on the batch size itself: istiod would drop our rules."""
        match = {"headers": {"x-batch-size": {"regex": "[0-9]+"}}}
        root = made("VirtualService", "root", {"hosts": ["h"], "http": [{"match": [match], "delegate": {"name": "d"}}]})
        ours = made("VirtualService", "d", {"http": [to("a", {"headers": {"x-batch-size": {"exact": "8"}}}), to("a")]})
        (finding,) = check([ours], [root])
        assert (finding.code, finding.field) == ("DelegateMatch", "spec.http[0].match[0]")
        assert check([ours], [{**root, "spec": {"hosts": ["h"], "http": [{"delegate": {"name": "d"}}]}}]) == ()

    def test_backends_count_as_written_and_old_versions_do_not(self) -> None:
        """What is written together may name each other; a subset that goes must not be named any more."""
        rule = made("DestinationRule", "r", {"host": "a", "subsets": [{"name": "t4", "labels": {"gpu": "t4"}}]})
        service = route("r", "h", to("a", subset="t4"))
        assert check([rule, service], []) == ()
        assert check([service], [rule]) == ()
        gone = {**rule, "spec": {"host": "a"}}
        assert codes(check([gone, service], [rule])) == {"UndefinedSubset"}

    def test_a_rule_for_a_wildcard_has_subsets_for_all_its_hosts(self) -> None:
        rule = made("DestinationRule", "r", {"host": "*.b.example", "subsets": [{"name": "t4"}]})
        assert check([route("r", "h", to("a.b.example", subset="t4"))], [rule]) == ()
        assert codes(check([route("r", "h", to("b.example", subset="t4"))], [rule])) == {"UndefinedSubset"}

    def test_the_older_claim_of_a_host_is_not_reported(self) -> None:
        """istiod serves the older; a new version of an old object is as old as that one."""
        old = route("z", "h") | {
            "metadata": {"name": "z", "namespace": "default", "creationTimestamp": "2026-01-01T00:00:00Z"}
        }
        young = route("a", "h") | {
            "metadata": {"name": "a", "namespace": "default", "creationTimestamp": "2026-01-02T00:00:00Z"}
        }
        assert check([route("z", "h")], [old, young]) == ()
        assert codes(check([route("a", "h")], [old, young])) == {"HostClaimedTwice"}
        assert codes(check([route("new", "h")], [old])) == {"HostClaimedTwice"}

    def test_hosts_that_nobody_else_can_see_are_no_conflict(self) -> None:
        """Two namespaces that export to themselves only."""
        one, two = (made("VirtualService", "r", route("r", "h.example")["spec"] | {"exportTo": ["."]}, n) for n in "xy")
        assert analyze([one, two]) == ()
        assert codes(analyze([one, {**two, "spec": {**two["spec"], "exportTo": ["*"]}}])) == {"HostClaimedTwice"}

    def test_what_is_not_known_in_full_is_not_called_missing(self) -> None:
        """Before the first list of gateways, none is known."""
        service = route("r", "h.example", gateways=["g"])
        assert codes(check([service], [])) == {"UnknownGateway"}
        assert check([service], [], ISTIO_KINDS - {"Gateway"}) == ()

    def test_services_are_looked_up_where_they_are_known(self) -> None:
        service: Mapping[str, Any] = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "a", "namespace": "default"},
            "spec": {"ports": [{"port": 80}, {"port": 81}]},
        }
        complete = (*ISTIO_KINDS, SERVICE)
        assert codes(check([route("r", "h")], [], complete)) == {"UnknownDestination"}
        assert codes(check([route("r", "h")], [service], complete)) == {"DestinationPort"}
        assert check([route("r", "h", to("a", port={"number": 81}))], [service], complete) == ()


class TestKnown:
    """The index that many checks share."""

    def test_it_answers_as_a_fresh_one_does_after_changes(self) -> None:
        """Objects come, change and go; only what changed is read again."""
        known = Known([route("a", "h"), route("b", "i")])
        for others in ([route("b", "h")], [], [route("c", "h"), route("d", "h")]):
            known.sync(others)
            assert check([route("new", "h")], known) == check([route("new", "h")], others)

    def test_equal_objects_are_not_read_again(self) -> None:
        live = [route(f"r{index}", f"h{index}") for index in range(3)]
        known = Known(live)
        before = list(known.subjects())
        known.sync(live)
        assert all(one is other for one, other in zip(known.subjects(), before, strict=True))
