"""The command line. `main` is the one place where an error becomes words and an exit code.

Package rule: a command's module is imported only when the command runs (`app`), so that each starts fast; commands
print through `output`, and raise MeshctlError rather than exit.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["main"]


def main() -> None:
    """Run the command in sys.argv. Exit codes: 0 done, 1 could not be done, 2 the input is wrong."""
    from meshctl.cli.app import app
    from meshctl.errors import MeshctlError

    try:
        app(prog_name="kubectl meshctl" if Path(sys.argv[0]).name == "kubectl-meshctl" else None)
    except MeshctlError as error:
        if "MESHCTL_DEBUG" in os.environ:
            raise
        sys.stderr.write(f"meshctl: {error}\n")
        sys.exit(error.exit_code)
