"""Who a proxy is by its certificate, and which groups that lets it belong to."""

from __future__ import annotations

import pytest

from meshctl.errors import InputError
from xds.identity import Identities, Identity, NotAllowedError

GATEWAY = Identity(spiffe="spiffe://cluster.local/ns/edge/sa/team-a", subject="gw.example", proven=True)
PLAIN = Identity(subject="gw-7", proven=True)
NAMELESS = Identity(proven=True)
STRANGER = Identity()
RULES = b"""
- spiffe: spiffe://cluster.local/ns/edge/sa/*
  groups: [team-a, team-b]
- {subject: 'gw-*', groups: [canary]}
- {subject: gw-7, groups: [team-b]}
- {subject: root, groups: ['*']}
"""


def allowed(identities: Identities, identity: Identity, group: str) -> bool:
    try:
        identities.check(identity, group)
    except NotAllowedError:
        return False
    return True


def test_an_identity_is_what_grpc_says_of_the_certificate() -> None:
    """Both names of it; the first DNS name stands in for a common name."""
    auth = {
        "transport_security_type": [b"ssl"],
        "x509_pem_cert": [b"-----"],
        "x509_common_name": [b""],
        "peer_dns": [b"gw.example", b"other.example"],
        "peer_uri": [b"spiffe://cluster.local/ns/edge/sa/team-a"],
        "peer_spiffe_id": [b"spiffe://cluster.local/ns/edge/sa/team-a"],
    }
    assert Identity.of(auth) == GATEWAY
    assert Identity.of({**auth, "x509_common_name": [b"cn"]}).subject == "cn"
    assert Identity.of({"x509_pem_cert": [b"-"], "x509_common_name": [b"a\xff"]}) == Identity("", "a\\xff", True)


@pytest.mark.parametrize("auth", [{}, {"transport_security_type": [b"ssl"]}])
def test_a_peer_that_showed_nothing_has_no_identity(auth: dict[str, list[bytes]]) -> None:
    """Plain text, and TLS that asks nobody."""
    assert Identity.of(auth) == STRANGER


@pytest.mark.parametrize(
    ("identity", "group"),
    [
        (GATEWAY, "team-a"),
        (PLAIN, "gw-7"),
        (NAMELESS, ""),
        (Identity(spiffe="spiffe://cluster.local", proven=True), ""),
        (Identity(spiffe="spiffe://td/one", subject="two", proven=True), "one"),
    ],
)
def test_a_certificate_is_named_after_a_group(identity: Identity, group: str) -> None:
    """The last segment of the SPIFFE ID, else the subject."""
    assert identity.group == group


def test_without_rules_a_proxy_may_name_the_group_of_its_certificate_only() -> None:
    """Not its own word counts, and a group called `*` is nobody's; who was not asked may name any."""
    identities = Identities()
    for group in ("team-a", "gw-7", "team", "", "*", "meshctl", "gw.example"):
        assert allowed(identities, GATEWAY, group) is (group == "team-a")
        assert allowed(identities, PLAIN, group) is (group == "gw-7")
        assert not allowed(identities, NAMELESS, group)
        assert not allowed(identities, Identity(subject="*", proven=True), group)
        assert allowed(identities, STRANGER, group)


def test_with_rules_a_proxy_may_name_the_groups_of_all_that_match() -> None:
    """And no longer the one that it is named after."""
    identities = Identities.parse(RULES, "rules.yaml")
    names = ("team-a", "team-b", "canary", "gw-7", "root")
    found = {who: [name for name in names if allowed(identities, who, name)] for who in (GATEWAY, PLAIN, NAMELESS)}
    assert found == {GATEWAY: ["team-a", "team-b"], PLAIN: ["team-b", "canary"], NAMELESS: []}
    assert allowed(identities, Identity(subject="root", proven=True), "any")
    assert not allowed(identities, STRANGER, "any")


@pytest.mark.parametrize(
    "spiffe",
    [
        "spiffe://cluster.local/ns/edge/sa/a/b",
        "spiffe://cluster.local/ns/edge/x/sa/a",
        "spiffe://cluster-local/ns/edge/sa/a",
        "spiffe://evil/spiffe://cluster.local/ns/edge/sa/a",
        "spiffe://cluster.local/ns/edge/sa",
    ],
)
def test_a_pattern_matches_whole_segments_as_they_are_written(spiffe: str) -> None:
    """`*` is for no slash, a dot only for itself, and nothing may stand before or after."""
    assert not allowed(Identities.parse(RULES, "rules.yaml"), Identity(spiffe=spiffe, proven=True), "team-a")


@pytest.mark.parametrize(
    ("identities", "identity", "message"),
    [
        (
            Identities(),
            GATEWAY,
            (
                "spiffe://cluster.local/ns/edge/sa/team-a may belong to 'team-a', not to 'other': name that in the"
                " node's metadata meshctl.io/group, or let the server have --xds-identities"
            ),
        ),
        (
            Identities(),
            NAMELESS,
            "a certificate without a name may belong to no group, not to 'other': let the server have --xds-identities",
        ),
        (
            Identities.parse(RULES, "rules.yaml"),
            PLAIN,
            (
                "the certificate of 'gw-7' may belong to 'canary' or 'team-b', not to 'other': name one of them in the"
                " node's metadata meshctl.io/group, or change the server's --xds-identities"
            ),
        ),
        (
            Identities.parse(RULES, "rules.yaml"),
            STRANGER,
            "a peer without a certificate may belong to no group, not to 'other': change the server's --xds-identities",
        ),
    ],
)
def test_the_refusal_says_who_what_and_what_to_do(identities: Identities, identity: Identity, message: str) -> None:
    """It is all that the proxy's operator sees."""
    with pytest.raises(NotAllowedError) as refused:
        identities.check(identity, "other")
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f:1:1: must be a list of {spiffe or subject: PATTERN, groups: [NAME, ...]}: without a rule nobody"),
        ("[]", "f:1:1: must be a list"),
        ("subject: a", "f:1:1: must be a list"),
        ("- a", "f:1:3: [0]: is 'a'; the file must be a list of"),
        ("- groups: [a]", "f:1:3: [0]: has neither spiffe nor subject; give one of them"),
        ("- {spiffe: spiffe://a/b, subject: c, groups: [a]}", "has spiffe and subject; give one of them"),
        ("- {subject: 7, groups: [a]}", "f:1:4: [0].subject: is 7; give a common name or DNS name"),
        ("- {subject: '', groups: [a]}", "[0].subject: is ''; give a common name"),
        ("- {spiffe: 'spiffe://*/sa/a', groups: [a]}", "[0].spiffe: is 'spiffe://*/sa/a'; give spiffe://TRUST-DOMAIN/"),
        ("- {spiffe: team-a, groups: [a]}", "[0].spiffe: is 'team-a'; give spiffe://TRUST-DOMAIN/PATH"),
        ("- {subject: a}", "f:1:3: [0].groups: must be a list of names, or ['*']"),
        ("- {subject: a, groups: a}", "[0].groups: must be a list of names"),
        ("- {subject: a, groups: ['']}", "[0].groups: must be a list of names"),
        (
            "- {subject: a, group: [a], groups: [a]}",
            "f:1:16: [0].group: is unknown; give spiffe or subject, and groups",
        ),
        ("- {subject: a, groups: [a]\n", "f:2:1: is not YAML"),
    ],
)
def test_a_file_that_is_wrong_says_where(text: str, message: str) -> None:
    """Line, column, field, what to write instead."""
    with pytest.raises(InputError) as wrong:
        Identities.parse(text.encode(), "f")
    assert message in str(wrong.value)


def test_everything_wrong_with_a_file_is_said_at_once() -> None:
    """Of each rule."""
    with pytest.raises(InputError) as wrong:
        Identities.parse(b"- {subject: 1, groups: []}\n- 2\n", "f")
    assert len(str(wrong.value).splitlines()) == 3
