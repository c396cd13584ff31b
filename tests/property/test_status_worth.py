"""What holds of statuses and of their comparison, whatever somebody wrote into one."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from meshctl.controller.conditions import Condition, ConditionType, Status
from meshctl.controller.notices import of_statuses
from meshctl.controller.statuses import (
    MESSAGE_CHARS,
    Worth,
    as_confirmed_before,
    awaits_confirmation,
    unusable_status,
    worth_writing,
)
from meshctl.told import dated

THEN, NOW = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
known = st.sampled_from(("conditions", "weights", "attainment", "endpoints", "observedGeneration"))
foreign = st.dictionaries(known, anything | st.lists(st.dictionaries(st.sampled_from(("type", "status")), anything)))
"""A status that somebody else wrote."""
conditions = st.builds(
    Condition,
    st.sampled_from(ConditionType),
    st.sampled_from(Status),
    st.sampled_from(("Pending", "InvalidInput", "Quarantined")),
    st.text(max_size=3 * MESSAGE_CHARS),
)


@st.composite
def statuses(draw: st.DrawFn) -> dict[str, Any]:
    told = draw(st.lists(conditions, unique_by=lambda c: c.type, min_size=1))
    percent = st.floats(0, 100).map(lambda p: f"{p:.1f}%")
    share = st.fixed_dictionaries({"size": st.sampled_from("ab"), "gpu": st.sampled_from("xy"), "share": percent})
    counts = {"endpoints": draw(st.integers(0, 3)), "attainment": draw(percent), "weights": draw(st.lists(share))}
    return dated({**unusable_status(told, draw(st.integers(1, 2))), **counts}, {}, THEN)


@given(statuses(), statuses())
def test_the_same_is_never_written_again(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Nothing differs from itself; once written, a status is worth no other write and no Event."""
    written = dated(new, old, NOW)
    assert worth_writing(written, dated(new, written, NOW)) is Worth.NOTHING
    assert of_statuses(written, written) == ()
    assert dated(new, written, THEN) == written, "no flip, no other time"


@given(statuses(), statuses())
def test_times_move_with_the_status_alone(old: dict[str, Any], new: dict[str, Any]) -> None:
    """A condition has the time of old where its status is that of old, and now elsewhere."""
    before = {c["type"]: c for c in old["conditions"]}
    for condition in dated(new, old, NOW)["conditions"]:
        was = before.get(condition["type"])
        flipped = was is None or was["status"] != condition["status"]
        assert condition["lastTransitionTime"] == (NOW if flipped else THEN)
        assert len(condition["message"]) <= MESSAGE_CHARS


@given(foreign, statuses())
def test_a_status_of_somebody_else_is_just_different(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Whatever stands in the status, it is compared, dated and told of without an error."""
    assert worth_writing(old, new) is Worth.NOW
    assert not awaits_confirmation(old, new) or as_confirmed_before(old, new)
    of_statuses(old, dated(new, old, NOW))
