"""`make cluster`: the whole product on this machine, until Ctrl-C.

Kubernetes, Istio with one gateway, a simulated fleet, Prometheus, and meshctl between them, with the reference route
applied. Prints what to set to look around with kubectl and meshctl. SIGINT and SIGTERM end everything.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path
from tempfile import mkdtemp

import pytest

from meshctl.errors import MeshctlError
from meshctl.sim.children import unless_ended, until_signal
from meshctl.sim.reference import MODEL
from tests.cluster.local import HOST, Local, local


async def show(directory: Path) -> None:
    """Start, say where things are, and stay."""
    print(f"starting Kubernetes, Istio, the fleet and meshctl; logs in {directory}", flush=True)  # noqa: T201 (its job)
    async with local(directory) as running:
        print(_words(running), flush=True)  # noqa: T201
        await unless_ended(_forever(), *running.ends)


async def _forever() -> None:
    await asyncio.Event().wait()


def _words(running: Local) -> str:
    cluster, bins = running.cluster, [running.cluster.kubectl_binary.parent, Path(sys.executable).parent]
    return f"""
export KUBECONFIG={cluster.kubeconfig}
export PATH={":".join(map(str, bins))}:$PATH

gateway     {cluster.gateway().url} (admin http://{cluster.gateway().admin})
istiod      {cluster.istiod_debug}/debug
prometheus  {running.prometheus.url}
meshctl     {running.controller.admin}

kubectl get modelroutes
curl -H 'host: {HOST}' -H 'x-batch-size: 8' -X POST {cluster.gateway().url}/v2/models/{MODEL}/infer
meshctl explain default/reference --admin {running.controller.admin}

Ctrl-C ends it.
"""


def main() -> int:
    directory = Path(mkdtemp(prefix="meshctl-cluster-"))
    try:
        asyncio.run(until_signal(show(directory)))
    except (MeshctlError, AssertionError, pytest.skip.Exception, pytest.fail.Exception) as error:
        print(f"{error}\nlogs are kept in {directory}", file=sys.stderr)  # noqa: T201
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
