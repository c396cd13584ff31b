"""A simulated server's state in the words of Triton and DCGM: the Prometheus text format and Triton's statistics JSON.

Invariant: names, labels, units and semantics are those of the real exporters (Triton 2.51, dcgm-exporter), so that what
reads this page reads theirs. The text is written by hand because prometheus-client appends `_total` to the name of
every counter, which Triton's do not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from meshctl.sim.gpu import COPY_RATIO, Gpu

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FAILURE_REASONS = ("BACKEND", "CANCELED", "OTHER", "REJECTED")
"""Triton exposes each from the start; simulated errors are the backend's."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What labels the series of one server."""

    name: str
    gpu: str
    """GPU product."""
    gpu_uuid: str
    index: int
    model: str
    version: str


def exposition(who: Identity, gpu: Gpu, now_s: float) -> str:
    """The page of `/metrics`. `gpu` must have been advanced to `now_s`."""
    return "".join(_lines(who, gpu, now_s))


def _lines(who: Identity, gpu: Gpu, now_s: float) -> Iterator[str]:
    model = f'model="{_escape(who.model)}",version="{_escape(who.version)}"'
    c = gpu.counters
    yield from _series("nv_inference_request_success", "counter", "Requests answered", [(model, c.succeeded)])
    failures = [
        (f'model="{_escape(who.model)}",reason="{reason}",version="{_escape(who.version)}"', c.failed * (not i))
        for i, reason in enumerate(FAILURE_REASONS)
    ]
    yield from _series("nv_inference_request_failure", "counter", "Requests failed, by reason", failures)
    for name, text, value in (
        ("nv_inference_count", "Items inferred (a batch of n counts n)", c.items),
        ("nv_inference_exec_count", "Executions", c.executions),
        ("nv_inference_request_duration_us", "Microseconds from arrival to answer", _us(c.request_s)),
        ("nv_inference_queue_duration_us", "Microseconds spent waiting", _us(c.queue_s)),
        ("nv_inference_compute_input_duration_us", "Microseconds of input copies", _us(c.compute_s * COPY_RATIO)),
        (
            "nv_inference_compute_infer_duration_us",
            "Microseconds of inference",
            _us(c.compute_s * (1 - 2 * COPY_RATIO)),
        ),
        ("nv_inference_compute_output_duration_us", "Microseconds of output copies", _us(c.compute_s * COPY_RATIO)),
    ):
        yield from _series(name, "counter", text, [(model, value)])
    yield from _series("nv_inference_pending_request_count", "gauge", "Requests waiting", [(model, gpu.pending)])
    yield from _gpu_lines(who, gpu.utilization_ratio(now_s))


def _gpu_lines(who: Identity, utilization_ratio: float) -> Iterator[str]:
    uuid = _escape(who.gpu_uuid)
    yield from _series(
        "nv_gpu_utilization", "gauge", "GPU utilisation, 0 to 1", [(f'gpu_uuid="{uuid}"', f"{utilization_ratio:.4f}")]
    )
    labels = (
        f'gpu="{who.index}",UUID="{uuid}",device="nvidia{who.index}",modelName="{_escape(who.gpu)}",'
        f'Hostname="{_escape(who.name)}"'
    )
    percent = round(100 * utilization_ratio)
    yield from _series("DCGM_FI_DEV_GPU_UTIL", "gauge", "GPU utilisation in percent", [(labels, percent)])
    yield from _series(
        "DCGM_FI_PROF_GR_ENGINE_ACTIVE",
        "gauge",
        "Share of time with the graphics engine active",
        [(labels, f"{utilization_ratio:.4f}")],
    )


def _series(name: str, kind: str, text: str, samples: Sequence[tuple[str, int | str]]) -> Iterator[str]:
    yield f"# HELP {name} {text}\n# TYPE {name} {kind}\n"
    for labels, value in samples:
        yield f"{name}{{{labels}}} {value}\n"


def _us(seconds: float) -> int:
    return round(seconds * 1e6)


def _escape(value: str) -> str:
    """A label value in the text format."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def statistics(who: Identity, gpu: Gpu) -> dict[str, Any]:
    """The body of `GET /v2/models/{model}/stats`; durations in nanoseconds."""
    c = gpu.counters

    def entry(count: int, seconds: float) -> dict[str, int]:
        return {"count": count, "ns": round(seconds * 1e9)}

    return {
        "model_stats": [
            {
                "name": who.model,
                "version": who.version,
                "inference_count": c.items,
                "execution_count": c.executions,
                "inference_stats": {
                    "success": entry(c.succeeded, c.request_s),
                    "fail": entry(c.failed, 0.0),
                    "queue": entry(c.succeeded, c.queue_s),
                    "compute_input": entry(c.succeeded, c.compute_s * COPY_RATIO),
                    "compute_infer": entry(c.succeeded, c.compute_s * (1 - 2 * COPY_RATIO)),
                    "compute_output": entry(c.succeeded, c.compute_s * COPY_RATIO),
                },
            }
        ]
    }
