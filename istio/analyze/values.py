"""Single values as Istio reads them: durations, host names, labels, headers. Pure.

Each check returns None, or (code, what is wrong). istiod accepts upper-case DNS labels; so do these.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from istio.analyze.regex import MAX_BYTES, fault_of

Verdict = tuple[str, str] | None
Check = Callable[[Any], Verdict]

_LABEL = re.compile(r"[a-zA-Z0-9]([-a-zA-Z0-9]{0,61}[a-zA-Z0-9])?")
_FIRST_LABEL = re.compile(r"\*|(\*-?)?[a-zA-Z0-9]([-a-zA-Z0-9]*[a-zA-Z0-9])?")
_HEADER = re.compile(r"[!#$%&'*+\-.^_`|~A-Za-z0-9]+")
_PSEUDO_HEADERS = frozenset({":method", ":scheme", ":authority", ":path", ":status"})
_KEY = re.compile(r"([a-zA-Z0-9]([-a-zA-Z0-9.]*[a-zA-Z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
_DURATION = re.compile(r"[+-]?(\d{1,12}(\.\d{1,12})?(h|m|s|ms|us|µs|ns))+|[+-]?0", re.ASCII)
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(h|ms|m|s|us|µs|ns)", re.ASCII)
_UNIT_MS = {
    unit: Decimal(ms)
    for unit, ms in {"h": "3.6e6", "m": "6e4", "s": "1e3", "ms": "1", "us": "1e-3", "µs": "1e-3", "ns": "1e-6"}.items()
}
MAX_HOST = 255
MAX_LABEL = 63


def duration_ms(text: str) -> Decimal | None:
    """Milliseconds of ``1m30s``; None when it is not a duration."""
    if not _DURATION.fullmatch(text):
        return None
    sign = -1 if text.startswith("-") else 1
    return sign * sum((Decimal(n) * _UNIT_MS[unit] for n, unit in _DURATION_PART.findall(text)), Decimal(0))


def duration(text: str) -> Verdict:
    ms = duration_ms(text)
    if ms is None:
        return "InvalidDuration", f"`{text[:40]}` is not a duration"
    if ms < 1 or ms % 1:
        return "InvalidDuration", f"`{text[:40]}` is {'shorter than 1ms' if ms < 1 else 'not in whole milliseconds'}"
    return None


def any_duration(text: str) -> Verdict:
    """0 is allowed, and switches something off."""
    ms = duration_ms(text)
    return None if ms is not None and ms >= 0 else ("InvalidDuration", f"`{text[:40]}` is not a duration of 0 or more")


def label(text: str) -> Verdict:
    """A DNS label; "" is as good as absent."""
    return None if not text or _LABEL.fullmatch(text) else ("InvalidName", f"`{text[:80]}` is not a DNS label")


def host(text: str) -> Verdict:
    """A DNS name whose first label may be, or begin with, a wildcard; not an IP address."""
    if not text:
        return "MissingField", "the host is empty"
    first, _, rest = text.partition(".")
    if len(text) > MAX_HOST or len(first) > MAX_LABEL or not _FIRST_LABEL.fullmatch(first) or (rest and bad_name(rest)):
        return "InvalidHost", f"`{text[:80]}` is not a host name"
    return None


def bad_name(name: str) -> bool:
    """Not a DNS name, wildcards not allowed. The last label may be empty, and is not a number."""
    labels = name.split(".")
    if re.fullmatch(r"[+-]?[0-9]+", labels[-1]):
        return True
    if labels[-1] == "" and len(labels) > 1:
        labels.pop()
    return len(name) > MAX_HOST or not all(_LABEL.fullmatch(part) for part in labels)


def host_or_ip(text: str) -> Verdict:
    return None if is_ip(text) else host(text)


def is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def subnet(text: str) -> Verdict:
    try:
        ipaddress.ip_interface(text)
    except ValueError:
        return "InvalidAddress", f"`{text[:80]}` is neither an address nor a CIDR block"
    return None


def header(text: str) -> Verdict:
    """A header that is matched on; claims of a JWT (``@request.auth.claims``) too."""
    if text in _PSEUDO_HEADERS or text.startswith("@request.auth.claims") or _HEADER.fullmatch(text):
        return None
    return "InvalidHeader", f"`{text[:80]}` is not a header's name"


def label_key(text: str) -> Verdict:
    return None if _KEY.fullmatch(text) else ("InvalidLabel", f"`{text[:80]}` is not a label's key")


def label_value(text: str) -> Verdict:
    return None if _VALUE.fullmatch(text) else ("InvalidLabel", f"`{text[:80]}` is not a label's value")


def regex(text: str) -> Verdict:
    if not text:
        return "MissingField", "the regular expression is empty"
    size = len(text.encode(errors="surrogatepass"))
    if size > MAX_BYTES:
        return "RegexTooLong", f"the regular expression has {size} bytes, at most {MAX_BYTES} are taken"
    fault = fault_of(text)
    return ("InvalidRegex", f"`{text[:80]}`: {fault}") if fault else None


def within(low: float, high: float) -> Check:
    """Numbers from `low` to `high`, both included."""

    def check(value: float) -> Verdict:
        ok = low <= value <= high
        return None if ok else ("OutOfRange", f"{value:g} is not between {low:g} and {high:g}")

    return check


def at_least(low: float) -> Check:
    return lambda value: None if value >= low else ("OutOfRange", f"{value:g} is less than {low:g}")


def weight(value: int) -> Verdict:
    return None if value >= 0 else ("NegativeWeight", f"the weight is {value}")


def one_of(*words: str) -> Check:
    allowed = frozenset(words)

    def check(value: str) -> Verdict:
        known = ", ".join(words)
        return None if value in allowed else ("UnknownValue", f"`{value[:40]}` is none of {known}")

    return check
