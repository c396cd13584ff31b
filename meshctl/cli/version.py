"""`meshctl version`."""

from __future__ import annotations

from meshctl import __version__
from meshctl.cli.output import Output, OutputOption, emit


def version(output: OutputOption = Output.TABLE) -> None:
    """Print the version."""
    emit({"version": __version__}, output, lambda: __version__)
