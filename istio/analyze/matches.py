"""Does one HTTP match take every request that another one would? Does a root's match exclude a delegate's? Pure.

`takes` is cautious: it is true only where it is certain. A regular expression is certain to cover only itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Match = Mapping[str, Any]

_TEXTS = ("uri", "scheme", "method", "authority")
_GROUPS = ("headers", "queryParams")


def takes(first: Match, second: Match) -> bool:
    """Every request that `second` matches is matched by `first`. ``{}`` matches all."""
    fold = first.get("ignoreUriCase", False)
    if not fold and second.get("ignoreUriCase") and _condition(first.get("uri")):
        return False
    if fold:
        first, second = _folded(first), _folded(second)
    return (
        all(_implied(first.get(name), second.get(name)) for name in _TEXTS if name != "uri" or not _any_path(first))
        and all(_all_implied(first.get(group, {}), second.get(group, {})) for group in _GROUPS)
        and first.get("withoutHeaders", {}).items() <= second.get("withoutHeaders", {}).items()
        and first.get("sourceLabels", {}).items() <= second.get("sourceLabels", {}).items()
        and first.get("port", 0) in (0, second.get("port", 0))
        and first.get("sourceNamespace", "") in ("", second.get("sourceNamespace", ""))
        and _subset(second.get("gateways"), first.get("gateways"))
    )


def contradicts(root: Match, delegate: Match) -> bool:
    """istiod can't join the two, and drops the delegate's (each header, and the URI, is matched by one of them only,
    or the delegate's is a part of the root's by a prefix or an exact value)."""
    pairs = [(root.get(name), delegate.get(name)) for name in _TEXTS]
    for group in (*_GROUPS, "withoutHeaders"):
        ours = root.get(group, {})
        pairs += [(ours.get(name), text) for name, text in delegate.get(group, {}).items()]
    if any(_apart(one, other) for one, other in pairs):
        return True
    if bool(root.get("ignoreUriCase")) != bool(delegate.get("ignoreUriCase")):
        return True
    if root.get("port") and delegate.get("port") and root["port"] != delegate["port"]:
        return True
    if root.get("sourceNamespace") and delegate.get("sourceNamespace") != root["sourceNamespace"]:
        return True
    labels = root.get("sourceLabels", {})
    if any(labels.get(key, value) != value for key, value in delegate.get("sourceLabels", {}).items()):
        return True
    named, wanted = root.get("gateways", ()), delegate.get("gateways", ())
    return bool(named and wanted) and not set(wanted) <= set(named)


def is_catch_all(match: Match) -> bool:
    """No condition on the request but, perhaps, that its path begins with ``/``."""
    return takes(match, {"uri": {"prefix": "/"}})


def _condition(text: Match | None) -> tuple[str, str] | None:
    """("exact" | "prefix" | "regex", value); None for "is there"."""
    for kind in ("exact", "prefix", "regex"):
        if text and text.get(kind):
            return kind, str(text[kind])
    return None


def _implied(first: Match | None, second: Match | None) -> bool:
    """`first` holds wherever `second` does."""
    wide = _condition(first)
    if wide is None:
        return True
    narrow = _condition(second)
    if narrow is None or narrow == wide:
        return narrow is not None
    return wide[0] == "prefix" and narrow[0] in ("exact", "prefix") and narrow[1].startswith(wide[1])


def _all_implied(first: Match, second: Match) -> bool:
    """The same for headers: one that `first` names must be there at all."""
    return all(name in second and _implied(text, second[name]) for name, text in first.items())


def _any_path(match: Match) -> bool:
    """Every path begins with a slash."""
    return _condition(match.get("uri")) == ("prefix", "/")


def _subset(narrow: list[str] | None, wide: list[str] | None) -> bool:
    """Of gateways; none named is all."""
    return not wide or bool(narrow and set(narrow) <= set(wide))


def _folded(match: Match) -> Match:
    """Without the case of the URI, where that does not matter."""
    text = match.get("uri", {})
    return {**match, "uri": {kind: value if kind == "regex" else value.lower() for kind, value in text.items()}}


def _apart(root: Match | None, delegate: Match | None) -> bool:
    if root is None or delegate is None:
        return False
    one, other = _condition(root), _condition(delegate)
    if one is None or "regex" in (one[0], other[0] if other else ""):
        return True
    if one[0] == "exact":
        return other != one
    return other is None or not other[1].startswith(one[1])
