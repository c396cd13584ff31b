"""The option that names a placement policy, of every command that places."""

from __future__ import annotations

from typing import Annotated

import typer

from meshctl.core.packing.vocabulary import Policy

PolicyOption = Annotated[
    Policy,
    typer.Option(
        "--policy",
        metavar="NAME",
        help=f"How one of the places that fit is chosen: {', '.join(Policy)}. All but the first are there to compare.",
    ),
]
