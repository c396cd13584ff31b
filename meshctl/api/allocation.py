"""The annotation that says which physical GPUs a pod's containers are to get; whoever binds the pod writes it.

    meshctl.io/gpu-allocation: '{"version": 1, "containers": [{"name": "server", "gpus": {"GPU-0001": 3}}]}'

`gpus` is UUID -> number of slots. A container that is not named has no GPU; their order means nothing, the name does.
The agent steers the kubelet to these GPUs. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from meshctl.api.base import Strict, repeated, wrong

ALLOCATION = "meshctl.io/gpu-allocation"
"""Annotation of a pod. Written with the pod's binding; a ValidatingAdmissionPolicy refuses it from anybody else."""
VERSION = 1


class ContainerAllocation(Strict):
    """What one container gets."""

    name: Annotated[str, Field(min_length=1, max_length=63)]
    gpus: Annotated[dict[Annotated[str, Field(min_length=1)], Annotated[int, Field(ge=1)]], Field(min_length=1)]
    """UUID -> number of slots."""


class Allocation(Strict):
    """What a pod's containers get."""

    version: Annotated[int, Field(ge=VERSION, le=VERSION)] = VERSION
    containers: Annotated[tuple[ContainerAllocation, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _once(self) -> Allocation:
        names = [container.name for container in self.containers]
        if (again := repeated(names)) is not None:
            wrong(f"{names[again]!r} stands twice", "containers", again, "name")
        return self

    def by_container(self) -> Mapping[str, Mapping[str, int]]:
        return {container.name: container.gpus for container in self.containers}

    def text(self) -> str:
        return self.model_dump_json(by_alias=True)


def read_allocation(annotations: Mapping[str, str]) -> Allocation | None:
    """What the pod's annotation says; None when there is none. Raises ValueError that says what is wrong with it."""
    if (text := annotations.get(ALLOCATION)) is None:
        return None
    try:
        return Allocation.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = (*first["loc"], *first.get("ctx", {}).get("at", ()))
        where = ".".join(map(str, at)) or "the whole"
        raise ValueError(f"{ALLOCATION}: {where}: {first['msg']}") from error
