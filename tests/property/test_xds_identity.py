"""Whatever certificates and rules say: nobody gets what nothing gives, and rules only add."""

from __future__ import annotations

import fnmatch

import orjson
from hypothesis import given
from hypothesis import strategies as st

from xds.identity import Identities, Identity, NotAllowedError, Rule

LETTERS = st.text("ab.*", min_size=1, max_size=4)
GROUPS = st.sampled_from(["a", "b", "ab", "*", ""])
PATHS = st.lists(st.text("ab.", min_size=1, max_size=2), min_size=1, max_size=3).map("/".join)
IDENTITIES = st.builds(
    Identity,
    spiffe=st.one_of(st.just(""), PATHS.map("spiffe://td/{}".format)),
    subject=st.text("ab./", max_size=4),
    proven=st.just(True),
)
RULES = st.one_of(
    st.builds(Rule, st.just("subject"), LETTERS, st.tuples(st.sampled_from(["a", "b", "*"]))),
    st.builds(Rule, st.just("spiffe"), LETTERS.map("spiffe://td/{}".format), st.tuples(st.sampled_from(["a", "b"]))),
)


def allowed(identities: Identities, identity: Identity, group: str) -> bool:
    try:
        identities.check(identity, group)
    except NotAllowedError as refused:
        return f"{identity} may belong to " not in str(refused) or f", not to {group!r}: " not in str(refused)
    return True


@given(st.lists(RULES, max_size=3), st.lists(RULES, max_size=2), IDENTITIES, GROUPS)
def test_more_rules_never_allow_less_and_their_order_is_nothing(
    some: list[Rule], more: list[Rule], identity: Identity, group: str
) -> None:
    """So a file can be read rule by rule."""
    before = allowed(Identities(tuple(some)), identity, group)
    after = allowed(Identities((*some, *more)), identity, group)
    assert after or not before
    assert after is allowed(Identities((*more, *reversed(some))), identity, group)
    assert after is any(allowed(Identities((rule,)), identity, group) for rule in (*some, *more))


@given(RULES, IDENTITIES)
def test_a_pattern_is_a_shell_pattern_that_leaves_no_segment(rule: Rule, identity: Identity) -> None:
    """As the standard library has it (whose other signs don't occur here), segment by segment."""
    value = identity.spiffe if rule.kind == "spiffe" else identity.subject
    pairs = list(zip(value.split("/"), rule.pattern.split("/"), strict=False))
    same = value.count("/") == rule.pattern.count("/")
    expected = bool(value) and same and all(fnmatch.fnmatchcase(part, pattern) for part, pattern in pairs)
    assert rule.matches(identity) is expected


@given(IDENTITIES, GROUPS)
def test_without_rules_there_is_one_group_at_most(identity: Identity, group: str) -> None:
    """And it is part of the certificate."""
    if allowed(Identities(), identity, group):
        assert group
        assert (identity.spiffe or identity.subject).endswith(group)
        assert not allowed(Identities(), identity, group + "x")


@given(st.lists(RULES, min_size=1, max_size=3))
def test_what_a_file_says_is_what_is_read(rules: list[Rule]) -> None:
    """JSON is YAML."""
    file = orjson.dumps([{rule.kind: rule.pattern, "groups": list(rule.groups)} for rule in rules])
    assert Identities.parse(file, "f") == Identities(tuple(rules))
