"""`meshctl gpu map`: the packing map of GPU objects, at the widths that terminals have, with colour and without."""

from __future__ import annotations

import io
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from meshctl.api.gpu import GPU
from meshctl.cli.gpu_map import FREE, STARTING, UNAVAILABLE, GpuMap, cells, letters, short_names, spans, totals
from meshctl.sharing import Owner
from tests.harness.gpus import NOW, condition, gpu_object, read, unhealthy

AT = datetime.fromisoformat(NOW)
RESNET = ("serving", "resnet50-6d8f7c9b5-x2k4p", "server", [0, 1, 2])
BERT = ("serving", "bert-7c9b8d6f4-qq9zl", "server", [3, 4])
TRAIN = ("research", "train-0", "main", [0, 1, 2, 5])

FLEET = (
    gpu_object("gpu-a", "GPU-5f0a1b2c-0d1e-4f2a-8b3c-4d5e6f708192", held=[RESNET, BERT]),
    gpu_object("gpu-a", "GPU-77aa0011-0d1e-4f2a-8b3c-4d5e6f708192", held=[TRAIN], tenant="research"),
    gpu_object(
        *("gpu-b", "GPU-88bb0022-0d1e-4f2a-8b3c-4d5e6f708192", 4),
        **unhealthy(4, 0, "Xid", "XID 79 (fallen off the bus) at 09:58:11"),
        product="Tesla K40m",
        memory="12Gi",
        mode="TimeSlicing",
        mps=None,
    ),
)

SAME = (("Healthy", ""), ("Shared", "MPS, 10 slots, but MPS is not there: "))


def gpus(*objects: dict[str, Any]) -> list[GPU]:
    return [read(data) for data in objects or FLEET]


def drawn(shown: list[GPU], width: int = 100, at: datetime = AT, encoding: str = "utf-8") -> str:
    """As on a terminal without colour. Spaces at the ends of lines are not compared."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=out, width=width, no_color=True).print(GpuMap(shown, at))
    out.seek(0)
    return "".join(f"{line.rstrip()}\n" for line in out)


WIDE = """\
gpu-a  hpe.com/gpus 9 of 20 used, 11 free, but at most 6 on one GPU
  GPU-5f0a1b2c  AAABB·····  5/10  Tesla V100-SXM2-16GB  16Gi  MPS, 2 clients
  GPU-77aa0011  CCC··C····  4/10  Tesla V100-SXM2-16GB  16Gi  MPS, 1 client
    only for namespace research, as long as its pods are on it
   A  serving/resnet50-6d8f7c9b5-x2k4p[server]  GPU-5f0a1b2c: 0-2
   B  serving/bert-7c9b8d6f4-qq9zl[server]      GPU-5f0a1b2c: 3-4
   C  research/train-0[main]                    GPU-77aa0011: 0-2,5

gpu-b  hpe.com/gpus 0 of 4 used, 0 free, 4 unavailable
  GPU-88bb0022  ××××         0/4  Tesla K40m            12Gi  TimeSlicing, unhealthy
    unhealthy (Xid): XID 79 (fallen off the bus) at 09:58:11

· free, × unavailable
2 nodes, 3 GPUs: hpe.com/gpus 9 of 24 used, 11 free, but at most 6 on one GPU, 4 unavailable
"""
NARROW = """\
gpu-a  hpe.com/gpus 9 of 20 used, 11 free, but at most 6 on one GPU
  GPU-5f0a1b2c  AAABB·····  5/10  Tesla V100-SXM2…  16Gi  MPS, 2 clients
"""


def test_who_holds_what_is_seen_without_colour() -> None:
    """Letters, marks and a legend with every slot; totals say what one container can still get."""
    assert drawn(gpus()) == WIDE


def test_order_of_the_objects_means_nothing() -> None:
    """The map is of nodes and UUIDs in order, whatever the API server's order."""
    assert drawn(gpus(*reversed(FLEET))) == WIDE


def test_narrow_terminal_costs_product_names_first() -> None:
    """At 80 columns nothing is lost but the ends of names."""
    assert drawn(gpus(), width=80).startswith(NARROW)


@pytest.mark.parametrize("width", [80, 100, 132, 200])
def test_nothing_is_wider_than_the_terminal(width: int) -> None:
    """However many slots, and however long the names of what holds them."""
    many = [("n" * 63, "p" * 253, f"c{i}", [i]) for i in range(90)]
    shown = gpus(gpu_object("node", "GPU-0001", 100, many), *FLEET)
    lines = drawn(shown, width).splitlines()
    assert max(map(cell_len, lines)) <= width
    assert "".join(re.findall(r"^  GPU-0001 +(\S+)", "\n".join(lines), re.MULTILINE)).startswith("ABCDEFGHIJKLMNOPQRST")
    assert sum(line.count("p") for line in lines) >= 90 * 253  # no name is cut off


def test_hundred_holders_of_a_gpu_have_a_letter_each() -> None:
    """As many as a GPU can have; the node's next GPU goes on where this one ended."""
    held = [("n", f"p{i:03}", "c", [i]) for i in range(100)]
    first, second = gpus(gpu_object("a", "GPU-1", 100, held), gpu_object("a", "GPU-2", 2, [("n", "q", "c", [1])]))
    of = letters([first, second])
    marks = [mark for mark, _ in cells(first, of)]
    assert len({*marks}) == 100
    assert not {*marks} & {FREE, STARTING, UNAVAILABLE}
    assert {cell_len(mark) for mark in marks} == {1}
    assert [mark for mark, _ in cells(second, of)] == [FREE, of[Owner("n", "q", "c")]]


def test_container_on_several_gpus_has_one_letter() -> None:
    """The legend has its slots of each."""
    shown = gpus(
        gpu_object("a", "GPU-1", 2, [("n", "p", "c", [0, 1])]),
        gpu_object("a", "GPU-2", 3, [("n", "p", "c", [1])]),
    )
    text = drawn(shown)
    assert "GPU-1  AA " in text
    assert "GPU-2  ·A·" in text
    assert "A  n/p[c]  GPU-1: 0-1; GPU-2: 1" in text


def test_slots_of_starting_containers_are_neither_free_nor_held() -> None:
    """They count as used and have no holder yet."""
    slots = {"total": 5, "used": 3, "free": 2, "unavailable": 0}
    shown = gpus(gpu_object("a", "GPU-1", 5, [("n", "p", "c", [1])], slots=slots))
    text = drawn(shown)
    assert "GPU-1  ?A?··" in text
    assert "? promised to a container that starts, · free" in text


def test_without_utf8_the_marks_are_ascii() -> None:
    """A terminal that can show no more still shows everything."""
    text = drawn(gpus(), encoding="ascii")
    assert "AAABB....." in text
    assert "####" in text
    assert ". free, # unavailable" in text


def test_each_holder_has_a_colour_of_its_own_where_there_are_colours() -> None:
    """In the bar and in the legend the same."""
    console = Console(width=100, force_terminal=True, color_system="standard", file=io.StringIO())
    with console.capture() as capture:
        console.print(GpuMap(gpus(), AT))
    styles = re.findall(r"\x1b\[([0-9;]+)m([ABC])\x1b\[0m", capture.get())
    by_letter = {letter: {style for style, found in styles if found == letter} for letter in "ABC"}
    assert {len(found) for found in by_letter.values()} == {1}
    assert len({*map(tuple, by_letter.values())}) == 3


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ({"conditions": [condition("Shared", "False", "WaitingForPods", "for 2 containers")]},
         "not shared as wanted (WaitingForPods): for 2 containers"),
        ({"conditions": [condition("WithinLimits", "False", "TooManyProcesses", "serving/a[b]: 3 of 1")]},
         "over its limits (TooManyProcesses): serving/a[b]: 3 of 1"),
        ({"mps": {"state": "Failed", "restarts": 1, "message": "it does not answer [x]"}},
         "MPS Failed: it does not answer [x]"),
        ({"mode": None, "slots": None, "mps": None}, "not shared"),
        ({"mps": {"state": "Running", "restarts": 0}}, "MPS, running"),
    ],
    ids=["waiting", "limits", "mps", "no policy", "clients unknown"],
)  # fmt: skip
def test_what_is_out_of_the_ordinary_is_said_in_words(status: dict[str, Any], said: str) -> None:
    """Below the GPU's line, in the words of its agent; square brackets in them are no markup."""
    assert said in drawn(gpus(gpu_object("a", "GPU-1", **status)))


def test_what_two_conditions_say_is_said_once() -> None:
    """A GPU whose MPS daemon failed is ill of that, and not shared as wanted because of it."""
    conditions = [condition(kind, "False", "MpsFailed", f"{words}it died") for kind, words in SAME]
    text = drawn(gpus(gpu_object("n", "GPU-1", conditions=conditions)))
    assert text.count("it died") == 1
    assert "unhealthy (MpsFailed): it died" in text


def test_object_without_a_status_is_drawn() -> None:
    """The agent made it, and has not filled it in."""
    data = gpu_object("a", "GPU-1")
    del data["status"]
    text = drawn(gpus(data))
    assert "a  no slots" in text
    assert "said nothing of it yet" in text


def test_silent_agent_makes_the_map_old() -> None:
    """It writes every minute: after five without a word nobody knows."""
    shown = gpus(gpu_object("a", "GPU-1"))
    assert "said nothing" not in drawn(shown, at=AT + timedelta(seconds=299))
    assert "its agent has said nothing for 7 minutes" in drawn(shown, at=AT + timedelta(minutes=7))
    assert "said nothing" not in drawn(gpus(gpu_object("a", "GPU-1", heartbeat="nonsense")), at=datetime.now(UTC))


def test_resources_are_counted_apart() -> None:
    """Slots of one are of no use to who asks for another."""
    shown = gpus(gpu_object("a", "GPU-1", 4), gpu_object("a", "GPU-2", 2, resourceName="example.com/whole"))
    assert [str(total) for total in totals(shown)] == [
        "example.com/whole 0 of 2 used, 2 free",
        "hpe.com/gpus 0 of 4 used, 4 free",
    ]


@given(st.sets(st.integers(0, 99)))
def test_spans_say_every_number_once(numbers: set[int]) -> None:
    """Read back, they are the numbers again."""
    text = spans(sorted(numbers))
    found = [range(int(a), int(b or a) + 1) for a, _, b in (part.partition("-") for part in text.split(",") if part)]
    assert [number for span in found for number in span] == sorted(numbers)
    assert len(found) <= max(1, len(numbers))


def test_short_names_tell_all_apart() -> None:
    """Two parts of a UUID where they do, more where not."""
    assert short_names(["GPU-1a-b", "GPU-2a-b"]) == {"GPU-1a-b": "GPU-1a", "GPU-2a-b": "GPU-2a"}
    assert short_names(["GPU-1a-b-c", "GPU-1a-c-d", "GPU-9"]) == {
        "GPU-1a-b-c": "GPU-1a-b", "GPU-1a-c-d": "GPU-1a-c", "GPU-9": "GPU-9"
    }  # fmt: skip
    assert short_names([]) == {}
