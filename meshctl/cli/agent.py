"""`meshctl agent`: the GPUs of this node as slots, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import gc
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshctl.errors import InputError
from meshctl.heap import share_heap, without

if TYPE_CHECKING:
    from deviceplugin.main import Config

SPARE_BYTES = 64 * 1024
"""Each listing of the node's pods would leave as much as it took, 2 MB."""


def agent(
    kubeconfig: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Cluster to use (default: the one this runs in; without one, --policy alone)."
        ),
    ] = None,
    node: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of this node (default: $NODE_NAME, else the host's).")
    ] = None,
    inventory: Annotated[
        str, typer.Option(metavar="nvml|file:F", help="Where the GPUs are listed: the driver, or a file (JSON, YAML).")
    ] = "nvml",
    plugin_dir: Annotated[Path, typer.Option(metavar="DIR", help="Where the kubelet finds device plugins.")] = Path(
        "/var/lib/kubelet/device-plugins"
    ),
    pod_resources: Annotated[
        Path, typer.Option(metavar="SOCK", help="Where the kubelet says which pod has which devices.")
    ] = Path("/var/lib/kubelet/pod-resources/kubelet.sock"),
    mps_control: Annotated[Path, typer.Option(metavar="BIN", help="NVIDIA's MPS control program.")] = Path(
        "nvidia-cuda-mps-control"
    ),
    mps_root: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory for the pipes and logs of the MPS daemons.")
    ] = Path("/run/meshctl/mps"),
    mps_cgroup: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Cgroup that MPS daemons move to, to outlive the agent's container."),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="GPUSharingPolicies in a file, instead of those of the cluster."),
    ] = None,
    state: Annotated[Path, typer.Option(metavar="FILE", help="What the next run must know.")] = Path(
        "/var/lib/meshctl/agent.json"
    ),
    admin: Annotated[str, typer.Option(metavar="HOST:PORT", help="Admin API and metrics.")] = "127.0.0.1:18002",
) -> None:
    """Run the node agent: offer each GPU as slots, keep MPS running, tell of health and holders."""
    import asyncio

    share_heap(SPARE_BYTES)
    with without("rich"):  # for tracebacks in colour; the log is JSON, and it weighs 6 MB on each node
        import structlog  # noqa: F401

    from deviceplugin.main import Config
    from meshctl.address import Address
    from meshctl.cli.logs import configure_logs

    cluster = kubeconfig is not None or "KUBERNETES_SERVICE_HOST" in os.environ
    if not cluster and policy is None:
        raise InputError("neither a cluster nor a policy: give --kubeconfig FILE, or --policy FILE to work without one")
    config = Config(
        node=node or os.environ.get("NODE_NAME") or socket.gethostname(),
        inventory=inventory,
        cluster=cluster,
        kubeconfig=kubeconfig,
        policy=policy,
        plugin_dir=plugin_dir,
        pod_resources=pod_resources,
        mps_control=mps_control,
        mps_root=mps_root,
        mps_cgroup=mps_cgroup,
        state=state,
        admin=Address.parse(admin, "--admin"),
    )
    configure_logs()
    asyncio.run(_serve(config))


async def _serve(config: Config) -> None:
    """Until the first SIGTERM or SIGINT."""
    from deviceplugin.main import serve
    from meshctl.cli.signals import ended_by_signal

    gc.freeze()  # what was imported stays: to look through it again and again is a pause of 30 ms in some Allocates
    await serve(config, ended_by_signal())
