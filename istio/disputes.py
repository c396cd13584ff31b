"""May we write this object, or has somebody else a say in it? Pure: `now_s` is an argument.

A change by others to what we wrote is never written over: it is a conflict, until they undo it (the object says again
what we wrote) or somebody asks for it back (`meshctl resume` gives the route a new ``meshctl.io/resumed-at``, and ONE
write is forced). An object of ours that others delete is written again: once at once, then with back-off. So there is
no war of rewrites, whoever is on the other side.

Another meshctl that writes here too (no Lease, or another version) has our own name as field manager. It shows in an
object that says neither what we wrote last nor what somebody else owns. The first time it is written over at once (it
may be the last word of a former leader); from then on it is a conflict as well.

After an undone change the other one still owns the fields, though they say what we wrote. Then the next write is
forced, but only onto exactly the version that was looked at: nothing of theirs can be lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from istio.names import key_of
from istio.ownership import managed, others_fields, resumed_at, same, stranger
from meshctl.model import RouteId
from meshctl.ports import KubeObject, ObjectKey

BACK_OFF_S, BACK_OFF_MAX_S = 30.0, 600.0
"""Before an object in dispute is written again: doubled each time; long enough that two controllers that both insist
write a few times per hour (of one such fight 418 writes in 34 s are on record)."""
RUN_ONE = "let one of them lead (--lease), or serve other namespaces"
FORGET_S = 2 * BACK_OFF_MAX_S
"""A dispute so long ago does not lengthen the next one's back-off."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether a write may be done."""

    conflict: str = ""
    """Who has a say, in what, and what to do; then nothing is written. "" for none."""
    force: bool = False
    pinned: bool = False
    """Only onto the version that was looked at."""


FREE = Judgement()


@dataclass(slots=True)
class _Case:
    strikes: int = 0
    open: bool = False
    until_s: float = 0.0
    last_s: float = 0.0
    words: str = ""


class Disputes:
    """See the module. One for all routes; nothing in it is lost that matters: after a restart only back-offs are."""

    def __init__(self) -> None:
        self._cases: dict[ObjectKey, _Case] = {}
        self._said: dict[ObjectKey, KubeObject] = {}
        """What we wrote last, or found as we want it, with the spec that the API server made of it."""

    def agreed(self, wanted: KubeObject, live: KubeObject) -> None:
        """The live object is what `wanted` becomes when it is written: written by us, or found so."""
        key = key_of(wanted)
        said = self._said.get(key)
        if said is None or said["metadata"] is not wanted["metadata"] or said["spec"] is not live["spec"]:
            self._said[key] = {**wanted, "spec": live["spec"]}
        if (case := self._cases.get(key)) is not None:
            case.open = False

    def gone(self, key: ObjectKey) -> None:
        """We deleted it."""
        self._said.pop(key, None)
        self._cases.pop(key, None)

    def unsure(self, key: ObjectKey) -> None:
        """We may have written it or not: there was no answer."""
        self._said.pop(key, None)

    def took_over(self) -> None:
        """From here on this replica writes; what it wrote earlier is not what was written last."""
        self._said.clear()

    def lost(self, wanted: KubeObject, words: str, now_s: float) -> None:
        """The API server says that somebody else owns what we would write: again, where the last back-off is over."""
        key = key_of(wanted)
        if (case := self._cases.get(key)) is not None and now_s >= case.until_s:
            case.open = False
        self._struck(key, now_s).words = words

    def judge(self, route: RouteId, wanted: KubeObject, live: KubeObject | None, now_s: float) -> Judgement:
        """Of writing `wanted` over `live`, which says something else."""
        key = key_of(wanted)
        if live is None:
            return self._of_deleted(route, key, wanted, now_s)
        if why := stranger(route, live) if not managed(live) else "":
            return Judgement(f"{key} is not meshctl's: {why}; delete or rename it, or rename the ModelRoute {route}")
        if resumed_at(wanted) not in ("", resumed_at(live), resumed_at(self._said.get(key))):
            return Judgement(force=True)
        fields = others_fields(wanted, live)
        if fields and key in self._said and same(self._said[key], live):
            return Judgement(force=True, pinned=True)
        if fields:
            self._struck(key, now_s)
            return Judgement(f"{key} was changed by {_listed(fields)}; {_remedy(route)}")
        if key in self._said and not same(self._said[key], live):
            struck = self._struck(key, now_s)
            struck.words = struck.words or f"{key} is written by another meshctl: {RUN_ONE}"
        case = self._cases.get(key)
        once = case is not None and case.words.endswith(RUN_ONE) and case.strikes == 1
        if case is not None and case.open and now_s < case.until_s and not once:
            return Judgement(f"{case.words or f'{key} was changed by others'}; {_remedy(route)}")
        return FREE

    def due_s(self) -> float | None:
        """When the next back-off ends; None when there is none."""
        return min((case.until_s for case in self._cases.values() if case.open), default=None)

    def _of_deleted(self, route: RouteId, key: ObjectKey, wanted: KubeObject, now_s: float) -> Judgement:
        said = self._said.get(key)
        if said is None or resumed_at(said) != resumed_at(wanted):
            return FREE
        case = self._struck(key, now_s)
        if case.strikes <= 1 or now_s >= case.until_s:
            return FREE
        return Judgement(f"{key} is deleted by somebody again and again; {_remedy(route)}")

    def _struck(self, key: ObjectKey, now_s: float) -> _Case:
        """The open case of an object, opened now if there was none."""
        case = self._cases.setdefault(key, _Case())
        if not case.open:
            case.strikes = 1 + (case.strikes if now_s - case.last_s < FORGET_S else 0)
            case.open, case.last_s, case.words = True, now_s, ""
            case.until_s = now_s + min(BACK_OFF_MAX_S, BACK_OFF_S * 2.0 ** (case.strikes - 1))
        return case


def _listed(fields: Mapping[str, tuple[str, ...]]) -> str:
    return " and ".join(f"{manager} ({', '.join(names)})" for manager, names in fields.items())


def _remedy(route: RouteId) -> str:
    return f"nothing is written over it; undo it, or take it back: `meshctl resume {route}`"
