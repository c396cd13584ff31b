"""The reference fleet that every number of this project is measured on: 12 servers on four unlike GPUs.

Service times, mix and SLO are the definition; `capacity_rps` follows from them (744.5 requests/s) and is what "80 %
load" refers to. Used by the demo, the benches and the tests, so that they speak of the same fleet.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from ruamel.yaml import YAML

from meshctl.api.base import API_VERSION
from meshctl.api.units import format_duration
from meshctl.core.capacity import service_s
from meshctl.model import ServiceProfile, SizeClass
from meshctl.sim.config import FleetConfig
from meshctl.sim.fleet import ServerInfo

MODEL = "resnet50"
ROUTE = "reference"
SLO_S = 0.150
PERCENTILE = 99
SERVERS_PER_GPU = 3

SERVICE_S: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"V100": (0.005, 0.0008), "P100": (0.008, 0.0013), "T4": (0.010, 0.0018), "K40": (0.025, 0.005)}
)
"""GPU product -> (seconds of every request, seconds of each of its items); fastest first."""
PROFILES: Mapping[str, ServiceProfile] = MappingProxyType(
    {gpu: ServiceProfile.affine(*times) for gpu, times in SERVICE_S.items()}
)
SIZES = (
    SizeClass("small", 1, 4, batch=1, share=0.80),
    SizeClass("medium", 5, 16, batch=8, share=0.15),
    SizeClass("large", 17, 128, batch=64, share=0.05),
)
MIX = tuple((int(size.batch), size.share) for size in SIZES)
"""(batch, share) of the requests sent."""


def capacity_rps(mix: Iterable[tuple[int, float]] = MIX) -> float:
    """Requests/s that the fleet can answer in the long run: the sum over its servers of 1 / E[service time]."""
    pairs = tuple(mix)
    means_s = [sum(share * service_s(profile, batch) for batch, share in pairs) for profile in PROFILES.values()]
    return sum(SERVERS_PER_GPU / mean_s for mean_s in means_s)


def fleet_config(servers_per_gpu: int = SERVERS_PER_GPU) -> FleetConfig:
    """The fleet on ports that the kernel chooses."""
    servers = [{"gpu": gpu, "count": servers_per_gpu, "service": _service(gpu)} for gpu in SERVICE_S]
    return FleetConfig.model_validate({"model": MODEL, "servers": servers})


def manifests(servers: Iterable[ServerInfo], *, expected_load_rps: float | None = None, **spec: Any) -> str:
    """YAML of the ModelRoute over `servers` and of the fleet's ModelProfiles; `spec` adds to the route's spec."""
    documents = [_route(servers, expected_load_rps), *(_profile(gpu) for gpu in SERVICE_S)]
    documents[0]["spec"] |= spec
    text = io.StringIO()
    YAML(typ="safe", pure=True).dump_all(documents, text)
    return text.getvalue()


def _service(gpu: str) -> dict[str, str]:
    base_s, per_item_s = SERVICE_S[gpu]
    return {"base": format_duration(base_s), "perItem": format_duration(per_item_s)}


def _profile(gpu: str) -> dict[str, Any]:
    return {
        "apiVersion": API_VERSION,
        "kind": "ModelProfile",
        "metadata": {"name": f"{MODEL}-{gpu.lower()}"},
        "spec": {"model": MODEL, "gpu": gpu, "service": _service(gpu)},
    }


def _route(servers: Iterable[ServerInfo], expected_load_rps: float | None) -> dict[str, Any]:
    classes = [
        {"name": s.name, "min": s.min_batch, "max": s.max_batch, "batch": int(s.batch), "share": s.share} for s in SIZES
    ]
    endpoints = [
        {
            "address": server.address,
            "port": server.port,
            "metricsPort": server.metrics_port,
            "gpu": server.gpu,
            "gpuUUID": server.gpu_uuid,
            "concurrency": server.concurrency,
        }
        for server in servers
    ]
    spec: dict[str, Any] = {
        "hosts": ["*"],
        "model": MODEL,
        "slo": {"latency": format_duration(SLO_S), "percentile": PERCENTILE},
        "requestSize": {"classes": classes},
        "backend": {"endpoints": endpoints},
    }
    if expected_load_rps is not None:
        spec["expectedLoad"] = expected_load_rps
    return {"apiVersion": API_VERSION, "kind": "ModelRoute", "metadata": {"name": ROUTE}, "spec": spec}
