"""`meshctl sim`: a simulated fleet of GPU servers, and open-loop load on anything that speaks their HTTP."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import orjson
import typer
import uvloop
from rich.table import Table

from meshctl.api.units import parse_duration
from meshctl.cli.output import Output, OutputOption, emit
from meshctl.errors import InputError
from meshctl.openfiles import allow_many_connections
from meshctl.sim.config import FleetConfig, fleet_config, load_fleet_config
from meshctl.sim.fleet import Fleet, FleetInfo
from meshctl.sim.load import Load, LoadConfig, LoadResult, calm_gc, parse_mix

app = typer.Typer(help="A simulated GPU fleet and a load generator.", no_args_is_help=True, add_completion=False)
T = TypeVar("T")

FLEET_HELP = """Run a simulated fleet: a server per GPU that speaks Triton's HTTP API and metrics.

The file is YAML:

\b
model: resnet50        # also version: "1", host: 127.0.0.1, maxBatch: 128, controlPort: 0
servers:
- {gpu: V100, count: 3, service: {base: 5ms, perItem: 0.8ms}}
- {gpu: T4, service: {points: {"1": 11.8ms, "8": 24.4ms}}, concurrency: 2, port: 9010, metricsPort: 9110}

A port of 0, the default, is chosen by the kernel; without metricsPort the same port serves both. The addresses are
printed when every server listens, with -o json as one document on one line. POST /sim/faults/SERVER on the control
port (or /sim/faults on a server's own) makes it fail: {"slow": 2}, {"hang": true}, {"error_ratio": 0.5},
{"crash": true}, {"foreign_ratio": 0.3}, {"flap_period_s": 4}; {} heals it. Runs until SIGINT or SIGTERM.
"""


@app.command(help=FLEET_HELP)
def fleet(
    config: Annotated[Path, typer.Option("--config", "-c", help="The fleet's YAML file; - is standard input.")],
    output: OutputOption = Output.TABLE,
) -> None:
    found = fleet_config(sys.stdin.buffer.read(), "standard input") if str(config) == "-" else load_fleet_config(config)
    _run(_fleet(found, output))


async def _fleet(config: FleetConfig, output: Output) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with Fleet(config) as running:
        _print_fleet(running.info, output)
        calm_gc()
        await stop.wait()


def _print_fleet(info: FleetInfo, output: Output) -> None:
    if output is Output.JSON:
        # on one line, unlike other commands': who started us reads a line to know that we are ready
        sys.stdout.buffer.write(orjson.dumps(info.as_dict()) + b"\n")
    else:
        emit(info.as_dict(), output, lambda: _fleet_table(info))
    sys.stdout.flush()


def _fleet_table(info: FleetInfo) -> Table:
    table = Table("NAME", "GPU", "ADDRESS", "METRICS", "CONCURRENCY", box=None, caption=f"control: {info.control}")
    for server in info.servers:
        address, metrics = (f"{server.address}:{port}" for port in (server.port, server.metrics_port))
        table.add_row(server.name, server.gpu, address, metrics, str(server.concurrency))
    return table


@app.command()
def load(
    url: Annotated[list[str], typer.Option("--url", help="Where to; several: one is drawn per request.")],
    rate: Annotated[float, typer.Option("--rate", help="Requests per second.")],
    mix: Annotated[str, typer.Option("--mix", help="BATCH:SHARE,...; the shares sum to 1.")] = "1:0.8,8:0.15,64:0.05",
    seconds: Annotated[float, typer.Option("--seconds", help="How long to send for, after the warm-up.")] = 30.0,
    seed: Annotated[int, typer.Option("--seed", help="The same seed sends the same requests at the same times.")] = 1,
    header: Annotated[list[str] | None, typer.Option("--header", help="Header that carries the batch.")] = None,
    warmup: Annotated[float, typer.Option("--warmup", help="Seconds sent before, and not counted.")] = 0.0,
    slo: Annotated[str, typer.Option("--slo", help="Time within which an answer is good.")] = "150ms",
    timeout: Annotated[str, typer.Option("--timeout", help="Time after which a request has failed.")] = "30s",
    model: Annotated[str, typer.Option("--model", help="Model, where the URL has no path.")] = "model",
    host: Annotated[str, typer.Option("--host", help="Host header, where it is not the URL's.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Send requests at random (Poisson) times, whatever becomes of those before, and time them from the time at which
    they were due. Interrupted, it stops sending and prints what there is."""
    config = LoadConfig(
        urls=tuple(url),
        rate_rps=rate,
        mix=parse_mix(mix),
        seconds=seconds,
        seed=seed,
        warmup_s=warmup,
        slo_s=_duration_s("--slo", slo),
        timeout_s=_duration_s("--timeout", timeout),
        headers=tuple(header or ("x-batch-size",)),
        model=model,
        host=host,
    )
    result = _run(_load(config))
    emit(result.as_dict(), Output.JSON if as_json else Output.TABLE, lambda: _load_table(result))


async def _load(config: LoadConfig) -> LoadResult:
    running = Load(config)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, running.stop)
    calm_gc()
    return await running.run()


def _load_table(result: LoadResult) -> Table:
    def percent(ratio: float | None) -> str:
        return "-" if ratio is None else f"{100 * ratio:.2f} %"

    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f} ms"

    table = Table("WHAT", "VALUE", box=None)
    table.add_row("requests", f"{result.requests} ({result.rate_rps:.1f}/s for {result.seconds:.1f} s)")
    table.add_row("failed", ", ".join([str(result.failed), *(f"{k} {n}" for k, n in result.failures.items())]))
    for name in ("p50", "p90", "p99", "p999"):
        table.add_row(name, ms(getattr(result, f"{name}_ms")))
    table.add_row("goodput", percent(result.goodput))
    for size, ratio in result.goodput_by_size.items():
        table.add_row(f"  batch {size}", percent(ratio))
    table.add_row("send lag p99", ms(result.send_lag_p99_ms))
    return table


def _duration_s(option: str, text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise InputError(f"{option} {text!r} {error}") from error


def _run(main: Coroutine[Any, Any, T]) -> T:
    allow_many_connections()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)
