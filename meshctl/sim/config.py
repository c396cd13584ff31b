"""The file of `meshctl sim fleet`: which GPU servers there are, how fast they are, and where they listen.

```yaml
model: resnet50            # default for every server; also version: "1", host: 127.0.0.1, maxBatch: 128
controlPort: 0             # faults of every server, crashed ones too; 0: the kernel chooses (the default)
servers:
- {gpu: V100, count: 3, service: {base: 5ms, perItem: 0.8ms}}
- {gpu: T4, service: {points: {"1": 11.8ms, "8": 24.4ms}}, concurrency: 2, port: 9010, metricsPort: 9110}
```

A server is named `<gpu>-<n>`, in lower case, n counting from 0 per GPU product over the whole file. `port` is the
first of `count` consecutive ones (0: chosen by the kernel); without `metricsPort` the same port serves both.
"""

from __future__ import annotations

import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from meshctl.api.base import GpuProduct, ModelName, Strict, validated, wrong
from meshctl.api.document import parse, read_bounded
from meshctl.api.service import ServiceTime
from meshctl.errors import InputError
from meshctl.model import ServiceProfile
from meshctl.sim.metrics import Identity

MAX_PORT = 65535
Port = Annotated[int, Field(ge=0, le=MAX_PORT)]
Host = Annotated[str, Field(min_length=1, max_length=253)]
_UUIDS = uuid.UUID("5d1f3c57-6d9b-4d39-9f0c-4d6573686374")
"""Namespace of the simulated GPUs' UUIDs: the same name has the same UUID in every run."""


class ServerSpec(Strict):
    """`count` like servers."""

    gpu: GpuProduct
    """GPU product."""
    count: Annotated[int, Field(ge=1, le=1000)] = 1
    """How many of them."""
    service: ServiceTime
    """Time of one request alone on the GPU, by batch."""
    concurrency: Annotated[int, Field(ge=1, le=64)] = 1
    """Requests served at once, each at full speed."""
    model: ModelName | None = None
    """The model, where it is not the file's."""
    host: Host | None = None
    """Address to listen on, where it is not the file's."""
    port: Port = 0
    """First of `count` consecutive ports; 0: the kernel chooses each."""
    metrics_port: Port | None = None
    """The same for `/metrics`; absent: the inference port serves it too."""

    @model_validator(mode="after")
    def _ports_exist(self) -> ServerSpec:
        for name, first in (("port", self.port), ("metricsPort", self.metrics_port)):
            if first and first + self.count - 1 > MAX_PORT:
                wrong(f"{self.count} consecutive ports from {first} go beyond {MAX_PORT}; begin lower", name)
        return self


class FleetConfig(Strict):
    """The whole file."""

    model: ModelName = "model"
    version: str = "1"
    host: Host = "127.0.0.1"
    control_port: Port = 0
    max_batch: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    """Largest batch; a larger one in a body is refused (400), in a header it is nonsense and counts as 1."""
    servers: Annotated[tuple[ServerSpec, ...], Field(min_length=1, strict=False)]


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """One server to be started; ports as configured."""

    identity: Identity
    profile: ServiceProfile
    concurrency: int
    max_batch: int
    host: str
    port: int
    metrics_port: int | None


def load_fleet_config(path: Path) -> FleetConfig:
    """Read and check a file. Raises InputError with file, line and field."""
    return fleet_config(read_bounded(path), str(path))


def fleet_config(content: bytes, file: str) -> FleetConfig:
    """The same of text already read; `file` is what errors call it."""
    documents = parse(content, file)
    if len(documents) != 1:
        raise InputError(f"{file}: holds {len(documents)} documents; a fleet is described by one")
    return validated(FleetConfig, documents[0])


def server_plans(config: FleetConfig) -> tuple[ServerPlan, ...]:
    """Every server of the fleet, in the order of the file."""
    plans: list[ServerPlan] = []
    numbers: Counter[str] = Counter()
    for spec in config.servers:
        for offset in range(spec.count):
            index, numbers[spec.gpu] = numbers[spec.gpu], numbers[spec.gpu] + 1
            plans.append(_plan(config, spec, offset, f"{spec.gpu}-{index}".lower().replace(" ", "-"), len(plans)))
    return tuple(plans)


def _plan(config: FleetConfig, spec: ServerSpec, offset: int, name: str, index: int) -> ServerPlan:
    gpu_uuid = f"GPU-{uuid.uuid5(_UUIDS, name)}"
    return ServerPlan(
        identity=Identity(name, spec.gpu, gpu_uuid, index, spec.model or config.model, config.version),
        profile=spec.service.profile(),
        concurrency=spec.concurrency,
        max_batch=config.max_batch,
        host=spec.host or config.host,
        port=spec.port and spec.port + offset,
        metrics_port=spec.metrics_port and spec.metrics_port + offset,
    )
