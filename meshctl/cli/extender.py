"""`meshctl extender`: where pods with virtual GPUs go, for kube-scheduler, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshctl.cli.policy import PolicyOption
from meshctl.cli.tls import tls_files
from meshctl.core.packing.vocabulary import Policy
from meshctl.errors import InputError
from meshctl.heap import share_heap

if TYPE_CHECKING:
    from meshctl.extender.main import Config
    from meshctl.ports import ObjectKey

YOUNG, NEVER = 50_000, 1_000_000_000
"""New objects after which the garbage collector looks through these; 700 by default, several times in each request."""


def extender(
    kubeconfig: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Cluster to use (default: the one this runs in, or $KUBECONFIG)."),
    ] = None,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where kube-scheduler asks; also health and metrics.")
    ] = "127.0.0.1:18003",
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificate (PEM, with its chain): serve HTTPS.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key (PEM, no password).")] = None,
    client_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Answer only clients with a certificate of this CA (PEM).")
    ] = None,
    policy: PolicyOption = Policy.STRANDING,
    lease: Annotated[
        str, typer.Option(metavar="NS/NAME", help="Only the holder of this Lease binds pods.")
    ] = "kube-system/meshctl-extender",
    pod: Annotated[
        str | None,
        typer.Option(
            metavar="NS/NAME",
            help="The pod that this runs in. While this replica binds it has the label meshctl.io/extender-binds: the"
            " Service selects by it (default: $NAMESPACE/$POD_NAME).",
        ),
    ] = None,
) -> None:
    """Run the scheduler extender: pack virtual GPUs onto physical ones, and bind pods to them."""
    import asyncio

    import uvloop

    from meshctl.address import Address
    from meshctl.cli.logs import configure_logs
    from meshctl.extender.main import Config

    _namespaced("--lease", lease)
    config = Config(
        kubeconfig=kubeconfig,
        listen=Address.parse(listen, "--listen"),
        tls=tls_files("", tls_cert, tls_key, client_ca),
        policy=policy,
        lease=lease,
        pod=_pod(pod),
    )
    configure_logs()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(config))


def _namespaced(option: str, text: str) -> tuple[str, str]:
    """Raises InputError unless it is NAMESPACE/NAME."""
    if not (found := re.fullmatch(r"([a-z0-9.-]+)/([a-z0-9.-]+)", text)):
        raise InputError(f"{option} must be NAMESPACE/NAME, not {text!r}")
    return found[1], found[2]


def _pod(text: str | None) -> ObjectKey | None:
    """The pod that this runs in; None outside a cluster."""
    from meshctl.ports import ObjectKey

    if text is None and os.environ.get("POD_NAME"):
        text = f"{os.environ.get('NAMESPACE', '')}/{os.environ['POD_NAME']}"
    return ObjectKey("Pod", *_namespaced("--pod (or $NAMESPACE/$POD_NAME)", text)) if text else None


async def _serve(config: Config) -> None:
    """Until the first SIGTERM or SIGINT."""
    from meshctl.cli.signals import ended_by_signal
    from meshctl.extender.main import serve

    gc.set_threshold(YOUNG, 20, NEVER)
    share_heap()
    await serve(config, ended_by_signal(), _settle_memory)


def _settle_memory() -> None:
    """Leaves what the start made to itself: for the garbage collector to look through the whole cluster's objects is a
    pause of half a second, in the middle of some requests. Nearly all of it stays anyway."""
    gc.freeze()
    gc.set_threshold(YOUNG, 20, 20)
