"""`meshctl run`: the controller, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshctl.cli.tls import xds_tls
from meshctl.errors import InputError
from meshctl.heap import share_heap
from meshctl.openfiles import allow_many_connections

if TYPE_CHECKING:
    from meshctl.controller.config import ClusterConfig, Config
    from meshctl.controller.loop import Loop

STARTED_S = 60.0
"""A start that takes longer waits for somebody else."""
MAPPED_BYTES = 65_536
"""gRPC keeps a buffer of this size for each connection that once read much, and reads a few bytes into it from then on:
with pages of its own it is 4 kB."""
YOUNG, NEVER = 50_000, 1_000_000_000
"""New objects after which the garbage collector looks through these; 700 by default."""


def run(
    manifests: Annotated[
        Path | None, typer.Option(help="Directory of ModelRoutes and ModelProfiles, instead of a Kubernetes cluster.")
    ] = None,
    kubeconfig: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Cluster to use (default: the one this runs in, or $KUBECONFIG)."),
    ] = None,
    namespace: Annotated[
        list[str] | None, typer.Option(metavar="NS", help="Namespaces to serve, repeatable (default: all).")
    ] = None,
    istio: Annotated[
        bool, typer.Option("--istio", help="Write VirtualServices and the like for meshed routes.")
    ] = False,
    istiod: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="Where istiod says what proxies acknowledged (its port 15014), repeatable; without it, a settle time"
            " stands in.",
        ),
    ] = None,
    lease: Annotated[
        str | None, typer.Option(metavar="NS/NAME", help="Only the holder of this Lease writes to the cluster.")
    ] = None,
    prometheus: Annotated[str | None, typer.Option(metavar="URL", help="Take signals from this Prometheus.")] = None,
    scrape: Annotated[bool, typer.Option("--scrape", help="Scrape endpoints and proxies directly (default).")] = False,
    xds: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where proxies connect.")] = "127.0.0.1:18000",
    xds_tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificate (PEM, with its chain): serve proxies over TLS.")
    ] = None,
    xds_tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key (PEM, no password).")] = None,
    xds_client_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Serve only proxies with a certificate of this CA (PEM).")
    ] = None,
    xds_identities: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Which certificate is for which groups of proxies (default: each for the one that it is named after).",
        ),
    ] = None,
    xds_insecure: Annotated[
        bool, typer.Option("--xds-insecure", help="Let others reach --xds in plain text, and believe what they say.")
    ] = False,
    admin: Annotated[str, typer.Option(metavar="HOST:PORT", help="Admin API and metrics.")] = "127.0.0.1:18001",
    state: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --manifests: state file (default: under XDG_STATE_HOME).")
    ] = None,
    tick: Annotated[str, typer.Option(metavar="DURATION", help="Time between two looks at the signals.")] = "1s",
    window: Annotated[str, typer.Option(metavar="DURATION", help="Rates are means over this time.")] = "5s",
) -> None:
    """Run the controller: watch what is asked for, decide, write to Istio and serve the proxies."""
    if prometheus is not None and scrape:
        raise InputError("--prometheus and --scrape exclude each other: give one of them")
    import asyncio

    import uvloop

    from meshctl.address import Address
    from meshctl.cli.logs import configure_logs
    from meshctl.controller.config import Config

    xds_address = Address.parse(xds, "--xds")
    config = Config(
        manifests=manifests,
        cluster=_cluster(manifests, kubeconfig, tuple(namespace or ()), lease, tuple(istiod or ()), istio=istio),
        prometheus=prometheus,
        xds=xds_address,
        xds_tls=xds_tls(xds_address, xds_tls_cert, xds_tls_key, xds_client_ca, xds_identities, insecure=xds_insecure),
        xds_identities=xds_identities,
        admin=Address.parse(admin, "--admin"),
        state=state,
        tick_s=_positive_s("--tick", tick),
        window_s=_positive_s("--window", window),
    )
    if manifests is None and state is not None:
        raise InputError("--state belongs to --manifests: in a cluster nothing is kept in files")
    configure_logs()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(config))


def _cluster(
    manifests: Path | None,
    kubeconfig: Path | None,
    namespaces: tuple[str, ...],
    lease: str | None,
    istiod: tuple[str, ...],
    *,
    istio: bool,
) -> ClusterConfig | None:
    """The cluster to use, None with --manifests. Raises InputError for options that contradict each other."""
    from meshctl.controller.config import ClusterConfig

    if manifests is not None:
        given = {
            "--kubeconfig": kubeconfig,
            "--namespace": namespaces,
            "--istio": istio,
            "--istiod": istiod,
            "--lease": lease,
        }
        wrong = [option for option, value in given.items() if value]
        if wrong:
            raise InputError(
                f"--manifests is for running without a cluster: leave out {', '.join(wrong)}, or --manifests"
            )
        return None
    if istiod and not istio:
        raise InputError("--istiod says what istiod has of what --istio writes: give --istio too")
    if lease is not None and not re.fullmatch(r"[a-z0-9.-]+/[a-z0-9.-]+", lease):
        raise InputError(f"--lease must be NAMESPACE/NAME, not {lease!r}")
    return ClusterConfig(kubeconfig, namespaces, istio, istiod, lease)


async def _serve(config: Config) -> None:
    """Until the first SIGTERM or SIGINT."""
    import asyncio

    gc.set_threshold(YOUNG, 20, NEVER)
    share_heap(mapped_bytes=MAPPED_BYTES)
    from meshctl.cli.signals import ended_by_signal
    from meshctl.controller.main import running

    allow_many_connections()
    ended = ended_by_signal()
    async with running(config) as controller:
        settling = asyncio.create_task(_settle_memory(controller.loop))
        await ended.wait()
        settling.cancel()


async def _settle_memory(loop: Loop) -> None:
    """Leaves what the start made to itself, once the first plan is in force.

    Nearly all of it stays. For the garbage collector to look through it again and again is 2 of 13 s of CPU with
    10,000 endpoints, and later a pause of up to a second at a time; so only what is young is looked through until then.
    """
    from contextlib import suppress

    with suppress(TimeoutError):
        await loop.wait_for(lambda state: state.published, STARTED_S)
    gc.freeze()
    gc.set_threshold(YOUNG, 20, 20)


def _positive_s(option: str, text: str) -> float:
    from meshctl.api.units import parse_duration

    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise InputError(f"{option} {error}, not {text!r}") from error
    if seconds <= 0:
        raise InputError(f"{option} must be more than 0, not {text!r}")
    return seconds
