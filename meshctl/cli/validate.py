"""`meshctl validate`: are these manifests right? Asks nobody: the same reading and rules as the controller's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshctl.cli.output import Output, OutputOption, emit

if TYPE_CHECKING:
    from meshctl.api.document import Fault

Files = Annotated[list[Path], typer.Argument(help="Manifest files, or directories of them.", show_default=False)]


def validate(files: Files, output: OutputOption = Output.TABLE) -> None:
    """Check manifests; exit 0 when all are right, 2 when something is wrong.

    Each problem is one line, `file:line:column: field: message`. A warning alone is not wrong.
    """
    from meshctl.adapters.manifests import read_all
    from meshctl.api.document import Severity

    objects, found = read_all(files)
    faults = sorted(found, key=lambda f: (f.place.file, f.place.line, f.place.column, f.field, f.message))
    valid = not any(fault.severity is Severity.ERROR for fault in faults)
    if output is Output.TABLE:  # plain lines, which an editor can jump to and no terminal width breaks
        for fault in faults:
            typer.echo(fault)
        typer.echo(f"{len(objects)} valid objects, {len(faults)} problems", err=True)
    else:
        data = {
            "valid": valid,
            "objects": [{"object": str(key), "place": str(objects[key].place)} for key in sorted(objects)],
            "problems": [_record(fault) for fault in faults],
        }
        emit(data, output, str)
    if not valid:
        raise typer.Exit(2)


def _record(fault: Fault) -> dict[str, object]:
    return {
        "file": fault.place.file,
        "line": fault.place.line,
        "column": fault.place.column,
        "object": fault.subject,
        "field": fault.field,
        "severity": str(fault.severity),
        "message": fault.message,
    }
