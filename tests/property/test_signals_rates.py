"""What holds of signals for any series of pages and any numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from meshctl.adapters import series
from meshctl.adapters.scrape import Target
from meshctl.adapters.series import FORMULAS, Measured, Reading, Subject
from meshctl.model import DesiredRoute, RouteId, Signal
from tests.harness.pages import route, server

NAME = "nv_inference_request_success"
anything = st.floats(allow_nan=True, allow_infinity=True)


def target() -> Target:
    return Target("http://t/metrics", "t", frozenset({NAME}))


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30), st.integers(1, 10))
def test_a_rate_is_the_mean_over_the_window(steps: list[int], window: int) -> None:
    """With a page a second, the rate is the mean of what the last `window` seconds added."""
    page = target()
    for at, total in enumerate(accumulate(steps, initial=0)):
        page.take(f'{NAME}{{model="m"}} {total}', float(at), window)
        reading = page.reading(0)
        if at:
            last = steps[max(0, at - window) : at]
            assert reading is not None
            assert math.isclose(reading.value, sum(last) / len(last))


@given(st.lists(st.floats(0, 1e12), min_size=2, max_size=30))
def test_no_counter_makes_a_negative_rate(values: list[float]) -> None:
    """However a counter jumps, its rate is finite and not below 0."""
    page = target()
    for at, value in enumerate(values):
        page.take(f'{NAME}{{model="m"}} {value!r}', float(at), 5.0)
    reading = page.reading(0)
    assert reading is not None
    assert 0 <= reading.value < math.inf


@given(st.lists(st.tuples(st.integers(1, 1000), st.booleans()), min_size=1, max_size=30))
def test_restarts_to_zero_lose_nothing(steps: list[tuple[int, bool]]) -> None:
    """A restart that shows (the counter is lower) adds what was counted since and keeps what was before."""
    page, counter, total = target(), 0, 0
    page.take(f'{NAME}{{model="m"}} 0', 0.0, math.inf)
    for at, (requests, restarts) in enumerate(steps, start=1):
        counter = requests if restarts and requests < counter else counter + requests
        total += requests
        page.take(f'{NAME}{{model="m"}} {counter}', float(at), math.inf)
    reading = page.reading(0)
    assert reading is not None
    assert math.isclose(reading.value, total / len(steps))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.booleans()), min_size=1, max_size=30))
def test_a_restart_that_one_counter_shows_is_one_of_all(steps: list[tuple[int, int, bool]]) -> None:
    """Requests and their items, each step its own batch: when either is lower than before, neither loses anything."""
    names = NAME, "nv_inference_count"
    page, counters, totals = Target("http://t/metrics", "t", frozenset(names)), (0, 0), (0, 0)
    page.take("".join(f'{name}{{model="m"}} 0\n' for name in names), 0.0, math.inf)
    for at, (requests, batch, restarts) in enumerate(steps, start=1):
        did = requests, requests * batch
        shows = did[0] < counters[0] or did[1] < counters[1]
        counters = did if restarts and shows else (counters[0] + did[0], counters[1] + did[1])
        totals = totals[0] + did[0], totals[1] + did[1]
        page.take("".join(f'{n}{{model="m"}} {c}\n' for n, c in zip(names, counters, strict=True)), float(at), math.inf)
    for column, total in enumerate(totals):
        reading = page.reading(column)
        assert reading is not None
        assert math.isclose(reading.value, total / len(steps))


@given(
    st.text(max_size=200) | st.from_regex(r'nv_inference_request_success(\{[a-z="]*\})? [0-9.NaInf+-]*', fullmatch=True)
)
def test_a_page_is_taken_whole_or_not_at_all(text: str) -> None:
    """Any text is metrics or a ValueError; after an error the target is what it was."""
    page = target()
    page.take(f'{NAME}{{model="m"}} 5', 0.0, 5.0)
    before = repr(page)
    try:
        page.take(text, 1.0, 5.0)
    except ValueError:
        assert repr(page) == before
    else:
        assert all(reading is None or not math.isnan(reading.value) for reading in map(page.reading, page.present()))


def test_series_that_are_gone_are_forgotten() -> None:
    """A page that had many series and has few keeps memory for few, and the rates of those."""
    page = target()
    page.take("".join(f'{NAME}{{model="{i}"}} {i}\n' for i in range(1000)), 0.0, 5.0)
    page.take(f'{NAME}{{model="7"}} 17\n{NAME}{{model="new"}} 1\n', 2.0, 5.0)
    assert [page.about[i] for i in page.present()] == [(NAME, ("t", "7")), (NAME, ("t", "new"))]
    assert len(page.columns) == len(page.about) == len(page.last) == 2
    assert page.reading(page.columns[f'{NAME}{{model="7"}}']) == Reading(5.0, 2.0)
    page.take(f'{NAME}{{model="new"}} 5\n', 4.0, 5.0)
    assert page.reading(page.columns[f'{NAME}{{model="new"}}']) == Reading(2.0, 4.0)


@given(st.dictionaries(st.sampled_from(sorted({n for f in FORMULAS for n in f.terms})), anything))
def test_no_number_makes_an_impossible_signal(values: dict[str, float]) -> None:
    """Whatever the series say, a Signal is finite and in its range, or it is the last one, or there is a Problem."""
    of = route(server("m:8002", gpu_uuid="GPU-1"))
    labels = {
        "instance": "m:8002",
        "model": "resnet50",
        "model_name": "resnet50",
        "UUID": "GPU-1",
        "route": "demo/resnet",
        "size": "demo/resnet/small",
        "envoy_endpoint_address": "127.0.0.1:8000",
    }
    measured = Measured()
    for formula in FORMULAS:
        subject = tuple(labels[name] for name in formula.family.by)

        def read(name: str, subject: Subject = subject) -> Mapping[Subject, Reading]:
            return {subject: Reading(values[name], 7.0)} if name in values else {}

        series.evaluate(formula, read, measured)
    routes: dict[RouteId, DesiredRoute] = {of.spec.id: of}
    found = series.assemble(routes, measured, {})[of.spec.id]
    (endpoint,) = found.endpoints.values()
    for name in endpoint.__slots__:
        signal: Signal = getattr(endpoint, name)
        assert signal.value is None or 0.0 <= signal.value <= 1e9
        assert not name.endswith("_ratio") or signal.value is None or signal.value <= 1.0
    assert series.assemble(routes, measured, {}) == {of.spec.id: found}
