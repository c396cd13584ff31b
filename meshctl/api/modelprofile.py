"""ModelProfile: how long one model takes on one GPU product, by batch."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from meshctl.api.base import API_VERSION, Conditions, GpuProduct, Metadata, ModelName, Strict, Unread
from meshctl.api.service import ServiceTime


class ProfileSource(StrEnum):
    """Where a profile's numbers come from."""

    PUBLISHED = "Published"
    MEASURED = "Measured"


class ModelProfileSpec(Strict):
    """Service time of one model on one GPU product, alone on the GPU."""

    model: ModelName
    """Model, as the inference server names it."""
    gpu: GpuProduct
    """GPU product, as the endpoints of a ModelRoute name it."""
    service: ServiceTime
    """Time of one request by batch."""
    source: Annotated[ProfileSource, Field(strict=False)] = ProfileSource.PUBLISHED
    """Published: from a vendor or a paper. Measured: by `meshctl profile` on this GPU."""


class ModelProfileStatus(Strict):
    """What the controller says of the profile."""

    observed_generation: Annotated[int, Field(ge=0)] | None = None
    """metadata.generation that was last read."""
    conditions: Conditions | None = None
    """Accepted: the profile is used."""


class ModelProfile(Strict):
    """How long one model takes on one GPU product, by batch."""

    api_version: Literal["meshctl.io/v1alpha1"] = API_VERSION
    kind: Literal["ModelProfile"] = "ModelProfile"
    metadata: Metadata
    spec: ModelProfileSpec
    status: Unread = None
