"""`make cluster-demo`: the before and after of `meshctl demo`, through a real Istio.

    make cluster-demo ARGS="--once --json"

Same options and same JSON as `meshctl demo`; --mechanism says how weights reach the gateway.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from meshctl.cli.demo import Asked, Signals, show
from meshctl.errors import MeshctlError
from meshctl.model import Mechanism
from tests.cluster.local import cluster_stand


def demo(
    once: Annotated[bool, typer.Option("--once", help="Measure both policies once, print, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --once: print JSON.")] = False,
    load: Annotated[float, typer.Option("--load", help="Part of the fleet's capacity that is asked for.")] = 0.8,
    seconds: Annotated[float | None, typer.Option("--seconds", help="Measured time per policy.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="The same seed sends the same requests at the same times.")] = 1,
    mechanism: Annotated[Mechanism, typer.Option("--mechanism", help="spec.mechanism.")] = Mechanism.ENDPOINTS,
) -> None:
    """Show the same load through Istio's default and through meshctl in Istio, live until Ctrl-C."""
    asked = Asked(once=once, as_json=as_json, load=load, seconds=seconds, seed=seed, signals=Signals.PROMETHEUS)
    show(asked, lambda rate_rps, say: cluster_stand(rate_rps, say, mechanism=mechanism.value))


if __name__ == "__main__":
    try:
        typer.run(demo)
    except MeshctlError as error:
        sys.stderr.write(f"cluster-demo: {error}\n")
        sys.exit(error.exit_code)
