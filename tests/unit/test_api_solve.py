"""The input of `meshctl solve` and the service times it shares with ModelProfile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from meshctl.api.base import validated
from meshctl.api.document import ManifestError
from meshctl.api.modelprofile import ModelProfile
from meshctl.api.solve import SolveInput, load_solve_file
from meshctl.errors import InputError
from meshctl.model import Policy
from tests.harness.manifests import ABSENT, changed, document, profile, question, text

BAD: list[tuple[str, str, Any, str, str]] = [
    ("no unit", "slo", 150, "slo", "150 has no unit"),
    ("no SLO", "slo", ABSENT, "slo", "is required"),
    ("load 0", "load", 0, "load", "greater than 0"),
    ("load as text", "load", "595/s", "load", "must be a valid number, not '595/s'"),
    ("load true", "load", True, "load", "must be a valid number, not true"),
    ("unknown policy", "policy", "Fair", "policy", "'Balanced'"),
    ("unknown field", "lod", 3, "lod", "did you mean load?"),
    ("no sizes", "sizes", [], "sizes", "is empty; give at least 1"),
    ("no classes", "classes", [], "classes", "is empty; give at least 1"),
    ("shares sum to 1.2", "sizes.1.share", 0.4, "sizes", "the shares sum to 1.2"),
    ("share missing", "sizes.1.share", ABSENT, "sizes[1].share", "is missing"),
    ("size twice", "sizes.1.name", "small", "sizes[1].name", "'small' stands twice"),
    ("batch 0", "sizes.0.batch", 0, "sizes[0].batch", "greater than or equal to 1"),
    ("no endpoint at all", "classes.0.endpoints", 0, "classes", "no class has an endpoint"),
    ("endpoints negative", "classes.0.endpoints", -1, "classes[0].endpoints", "greater than or equal to 0"),
    ("endpoints 2.5", "classes.0.endpoints", 2.5, "classes[0].endpoints", "valid integer"),
    ("concurrency 0", "classes.0.concurrency", 0, "classes[0].concurrency", "greater than or equal to 1"),
    ("available 0", "classes.0.available", 0, "classes[0].available", "greater than 0"),
    ("available 70", "classes.0.available", 70, "classes[0].available", "less than or equal to 1, not 70"),
    ("perItem as number", "classes.0.service.perItem", 0.8, "classes[0].service.perItem", "0.8 has no unit"),
]

BAD_SERVICE: list[tuple[str, Any, str, str]] = [
    ("nothing", {}, "", "give either base and perItem, or points"),
    ("base alone", {"base": "1ms"}, "", "give either base and perItem, or points"),
    ("both", {"base": "1ms", "perItem": "1ms", "points": {"1": "1ms"}}, "", "give either base and perItem, or points"),
    ("base and points", {"base": "1ms", "points": {"1": "1ms"}}, "", "give either base and perItem, or points"),
    ("all zero", {"base": "0s", "perItem": "0s"}, "", "both zero"),
    ("negative", {"base": "-1ms", "perItem": "1ms"}, ".base", "must not be negative"),
    ("no points", {"points": {}}, ".points", "is empty; give at least 1"),
    ("points as list", {"points": ["1ms"]}, ".points", "must be a mapping"),
    ("batch 0", {"points": {"0": "1ms"}}, ".points.0", "'0' is not a batch"),
    ("batch negative", {"points": {"-1": "1ms"}}, ".points.-1", "'-1' is not a batch"),
    ("batch 1.5", {"points": {"1.5": "1ms"}}, ".points.1.5", "'1.5' is not a batch"),
    ("batch as word", {"points": {"one": "1ms"}}, ".points.one", "'one' is not a batch"),
    ("batch twice", {"points": {"1": "1ms", "01": "1ms"}}, ".points.01", "'01' is not a batch"),
    ("time zero", {"points": {"1": "0ms"}}, ".points.1", "longer than zero"),
    ("time without unit", {"points": {"1": 11.8}}, ".points.1", "11.8 has no unit"),
    (
        "not monotone",
        {"points": {"64": "125ms", "1": "11.8ms", "8": "200ms"}},
        ".points.64",
        "batch 8 takes 200ms and batch 64 takes 125ms: a larger batch cannot be faster",
    ),
]


@pytest.mark.parametrize(("path", "value", "field", "message"), [case[1:] for case in BAD], ids=[c[0] for c in BAD])
def test_bad_question_is_named(path: str, value: object, field: str, message: str) -> None:
    """Exactly the wrong field is reported."""
    with pytest.raises(ManifestError) as caught:
        validated(SolveInput, document(changed(question(), path, value)))
    assert [fault.field for fault in caught.value.faults] == [field]
    assert message in caught.value.faults[0].message


@pytest.mark.parametrize(("service", "field", "message"), [c[1:] for c in BAD_SERVICE], ids=[c[0] for c in BAD_SERVICE])
def test_bad_service_time_is_named(service: object, field: str, message: str) -> None:
    """A profile and a question refuse the same service times, at their own places."""
    for model, data, prefix in (
        (ModelProfile, changed(profile(), "spec.service", service), "spec.service"),
        (SolveInput, changed(question(), "classes.0.service", service), "classes[0].service"),
    ):
        with pytest.raises(ManifestError) as caught:
            validated(model, document(data))
        assert [fault.field for fault in caught.value.faults] == [prefix + field]
        assert message in caught.value.faults[0].message


def test_question_is_read(tmp_path: Path) -> None:
    """Keys of points may be numbers; what is left out has its default; shares sum to 1."""
    path = tmp_path / "q.yaml"
    path.write_text(
        "{slo: 150ms, load: 595.6, sizes: [{name: a, batch: 1}, {name: b, batch: 2.5}],"
        " classes: [{name: T4, endpoints: 3, service: {points: {8: 24.4ms, 1: 11.8ms}}, available: 0.7}]}"
    )
    found = load_solve_file(path)
    assert (found.slo_s, found.load_rps, found.percentile, found.policy) == (0.15, 595.6, 99.0, Policy.BALANCED)
    assert found.shares() == (0.5, 0.5)
    assert found.classes[0].service.profile().points == ((1.0, 0.0118), (8.0, 0.0244))
    assert (found.classes[0].available, found.classes[0].concurrency) == (0.7, 1)


def test_line_is_a_profile_through_two_points() -> None:
    """base + perItem * batch."""
    found = validated(ModelProfile, document(profile())).spec.service.profile()
    assert dict(found.points) == pytest.approx({1.0: 0.0058, 2.0: 0.0066})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "1:1: is empty; write one mapping"),
        ("# nothing\n", "is empty"),
        ("- 1\n", "must be a mapping"),
        ("just words\n", "must be a mapping"),
        (text(question(), question()), "has 2 documents"),
        ("slo: 150ms\nslo: 1s\n", "2:1: has the key slo twice"),
        ("<html>\n<p>404</p>", "must be a mapping"),
    ],
)
def test_file_that_is_no_question_is_refused(tmp_path: Path, content: str, message: str) -> None:
    """The file and what is expected are named."""
    path = tmp_path / "q.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=r"q\.yaml") as caught:
        load_solve_file(path)
    assert message in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    """A file that is not there is the caller's fault."""
    with pytest.raises(InputError, match=r"nope.yaml:1:1: cannot be read: No such file"):
        load_solve_file(tmp_path / "nope.yaml")
