"""YAML becomes plain data with places; what is not YAML, or too much of it, is refused with a place."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshctl.api.document import MAX_BYTES, MAX_DEPTH, ManifestError, Place, parse, read_bounded, short


def refused(content: bytes) -> tuple[int, int, str]:
    """Line, column and message of the fault."""
    with pytest.raises(ManifestError) as caught:
        parse(content, "f.yaml")
    (fault,) = caught.value.faults
    assert fault.place.file == "f.yaml"
    return fault.place.line, fault.place.column, fault.message


@pytest.mark.parametrize(
    ("content", "line", "column", "message"),
    [
        pytest.param(b"a: 1\nb:\n  c: 1\n  c: 2\n", 4, 3, "has the key b.c twice", id="duplicate key"),
        pytest.param(b"a:\n\t- b\n", 2, 1, "'\\t' that cannot start any token", id="tab as indentation"),
        pytest.param(b"a: b: c\n", 1, 5, "mapping values are not allowed here", id="two colons"),
        pytest.param(b"a: [1, 2\n", 2, 1, "expected ',' or ']'", id="half-written list"),
        pytest.param(b'a: "b\n', 2, 1, "end of stream", id="half-written string"),
        pytest.param(b"a: *nowhere\n", 1, 4, "undefined alias", id="unknown alias"),
        pytest.param(b"a: !!python/object:os.system x\n", 1, 4, "is not supported", id="python tag"),
        pytest.param(b"a: !secret x\n", 1, 4, "!secret, which is not supported", id="own tag"),
        pytest.param(b"? [a, b]\n: 1\n", 1, 3, "key that is not a plain word", id="list as key"),
        pytest.param(b"<<: 5\n", 1, 1, "not a mapping", id="merge of a number"),
        pytest.param(b"a: 1\nb: \x00\n", 2, 4, "special characters", id="NUL"),
        pytest.param(b"a: 1\nb: \xff\xfe\n", 2, 1, "is not UTF-8 text (byte 0xff)", id="not UTF-8"),
        pytest.param(b"a: " + b"9" * 5000, 1, 4, "number that cannot be read", id="integer of 5000 digits"),
        pytest.param(b"a: &x [*x]\n", 1, 4, "nested too deeply", id="alias of itself"),
        pytest.param(b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), 1, 34, "nested too deeply", id="deep"),
        pytest.param(b"[" * 100_000, 1, 1, "nested too deeply", id="deeper than Python's stack"),
        pytest.param(b"a: <html>: x\n", 1, 10, "mapping values are not allowed here", id="HTML"),
    ],
)
def test_bad_text_has_a_place(content: bytes, line: int, column: int, message: str) -> None:
    """Every way a text can fail to be YAML names line and column, and why."""
    found = refused(content)
    assert found[:2] == (line, column)
    assert message in found[2]


def test_alias_bomb_is_refused_in_bounded_memory() -> None:
    """Aliases may repeat, but not multiply: nine levels of nine would be 387 million values."""
    levels = [b"a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    levels += [b"a%d: &a%d [%s]" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 9)]
    assert "use fewer aliases" in refused(b"\n".join(levels))[2]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"# only a comment\n", b"---\n---\n", b"\xef\xbb\xbf"])
def test_empty_documents_are_left_out(content: bytes) -> None:
    """An empty file has no documents, and is no error."""
    assert parse(content, "f.yaml") == []


def test_several_documents_keep_their_lines() -> None:
    """Each document knows the lines of the whole file; a missing field has the place of its parent."""
    first, second = parse(b"a: 1\n---\n# comment\nb:\n  - c: 2\n    d: 3\n", "f.yaml")
    assert (first.data, second.data) == ({"a": 1}, {"b": [{"c": 2, "d": 3}]})
    assert second.place(("b", 0, "d")) == Place("f.yaml", 6, 5)
    assert second.place(("b", 0, "missing", "deeper")) == Place("f.yaml", 5, 5)
    assert second.place(("nowhere",)) == Place("f.yaml", 4, 1)


def test_scalars_are_those_of_kubectl() -> None:
    """`yes` is true (quoted it is text), dates are text, 010 is eight, keys are text whatever they look like."""
    content = b"{a: yes, b: 010, c: 0x1f, d: 1e3, e: 2026-01-01, f: ~, g: TRUE, 8: 1_000, i: Off, j: 'no', on: 0}"
    (found,) = parse(content, "f.yaml")
    first = {"a": True, "b": 8, "c": 31, "d": 1000, "e": "2026-01-01", "f": None, "g": True, "8": 1000}
    assert found.data == {**first, "i": False, "j": "no", "on": 0}


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("8000.0", 8000),
        ("8e3", 8000),
        ("0b11", 3),
        ("0o17", 15),
        ("0", 0),
        ("-0", 0),
        ("09", 9),
        ("-010", -8),
        ("1.5", 1.5),
    ],
)
def test_whole_number_is_an_integer_however_it_is_written(written: str, value: float) -> None:
    """JSON knows one kind of number: a port may be written 8e3, and is the integer 8000."""
    (found,) = parse(f"a: {written}".encode(), "f.yaml")
    assert (found.data["a"], type(found.data["a"])) == (value, type(value))


def test_anchors_and_merges_are_followed() -> None:
    """What is near wins over what is merged, and repeated content is repeated."""
    (found,) = parse(b"base: &b {x: 1, y: 2}\nuse:\n  <<: *b\n  y: 3\nagain: [*b, *b]\n", "f.yaml")
    assert found.data["use"] == {"x": 1, "y": 3}
    assert found.data["again"] == [{"x": 1, "y": 2}] * 2


def test_tab_indented_json_is_read() -> None:
    """JSON may be indented with tabs, YAML's blocks may not."""
    (found,) = parse(b'{\n\t"a": 1,\n\t"b": [1,\t2]\n}', "f.json")
    assert found.data == {"a": 1, "b": [1, 2]}
    assert found.place(("b",)) == Place("f.json", 3, 2)


def test_oversized_file_is_refused_unread(tmp_path: Path) -> None:
    """A file over the limit is refused before it is parsed."""
    path = tmp_path / "big.yaml"
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(ManifestError, match=r"big.yaml:1:1: is larger than 4 MiB; split it"):
        read_bounded(path)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({}, "a mapping"),
        ([1], "a list"),
        (None, "nothing"),
        (True, "true"),
        ("x" * 99, f"'{'x' * 57}...'"),
        (1.5, "1.5"),
    ],
    ids=repr,
)
def test_values_in_messages_are_short(value: object, shown: str) -> None:
    """A message shows the value, never a page of it."""
    assert short(value) == shown
