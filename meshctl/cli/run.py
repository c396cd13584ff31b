"""`meshctl run`: the controller, until SIGTERM or Ctrl-C."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshctl.errors import InputError

if TYPE_CHECKING:
    from meshctl.controller.main import Config


def run(
    manifests: Annotated[Path, typer.Option(help="Directory of ModelRoutes and ModelProfiles.")],
    prometheus: Annotated[str | None, typer.Option(metavar="URL", help="Take signals from this Prometheus.")] = None,
    scrape: Annotated[bool, typer.Option("--scrape", help="Scrape endpoints and proxies directly (default).")] = False,
    xds: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where proxies connect.")] = "127.0.0.1:18000",
    admin: Annotated[str, typer.Option(metavar="HOST:PORT", help="Admin API and metrics.")] = "127.0.0.1:18001",
    state: Annotated[
        Path | None, typer.Option(metavar="FILE", help="State file (default: under XDG_STATE_HOME).")
    ] = None,
    tick: Annotated[str, typer.Option(metavar="DURATION", help="Time between two looks at the signals.")] = "1s",
    window: Annotated[str, typer.Option(metavar="DURATION", help="Rates are means over this time.")] = "5s",
) -> None:
    """Run the controller: watch the manifests, decide, and serve the proxies."""
    if prometheus is not None and scrape:
        raise InputError("--prometheus and --scrape exclude each other: give one of them")
    import asyncio

    import uvloop

    from meshctl.cli.logs import configure_logs
    from meshctl.controller.main import Config
    from xds.bootstrap import Address

    config = Config(
        manifests=manifests,
        prometheus=prometheus,
        xds=Address.parse(xds, "--xds"),
        admin=Address.parse(admin, "--admin"),
        state=state,
        tick_s=_positive_s("--tick", tick),
        window_s=_positive_s("--window", window),
    )
    configure_logs()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(config))


async def _serve(config: Config) -> None:
    """Until the first SIGTERM or SIGINT; a second one ends it at once, as without a handler."""
    import asyncio
    import signal

    from meshctl.controller.main import running

    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def end(number: int) -> None:
        ended.set()
        loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)
    async with running(config):
        await ended.wait()


def _positive_s(option: str, text: str) -> float:
    from meshctl.api.units import parse_duration

    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise InputError(f"{option} {error}, not {text!r}") from error
    if seconds <= 0:
        raise InputError(f"{option} must be more than 0, not {text!r}")
    return seconds
