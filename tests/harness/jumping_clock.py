"""A wall clock that jumps, for a program under test: what it decides by that clock goes wrong at once."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.harness.tools import DEADLINE_S, require

_SOURCE = Path(__file__).parent / "clock" / "jumping.c"


def jumping_clock(directory: Path) -> Mapping[str, str]:
    """Environment of the program. The clock is a day ahead at some looks, and right at others."""
    library = directory / "jumping.so"
    subprocess.run([require("cc"), "-shared", "-fPIC", "-o", library, _SOURCE], check=True, timeout=DEADLINE_S)
    return {"LD_PRELOAD": str(library)}
