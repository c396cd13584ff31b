"""What is not imported, and comes back."""

from __future__ import annotations

import importlib
import sys

import pytest

from meshctl.heap import share_heap, without

NAME = "this"
"""A module of the standard library that nobody imports: it prints."""


def test_a_module_is_absent_for_a_while_and_those_that_are_there_stay(capsys: pytest.CaptureFixture[str]) -> None:
    """Its import fails as if it were not installed; afterwards it works, and what was imported before is the same."""
    with without(NAME, "sys"):
        assert importlib.import_module("sys") is sys
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(NAME)
    importlib.import_module(NAME)
    assert capsys.readouterr().out
    del sys.modules[NAME]


def test_it_is_no_error_to_share_the_heap() -> None:
    """On whatever C library."""
    share_heap()
