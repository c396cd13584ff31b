"""The input of `meshctl solve`: one question about one fleet, without names of machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from meshctl.api.base import GpuProduct, Label, Strict, repeated, validated, wrong
from meshctl.api.document import Fault, ManifestError, Place, parse, read_bounded
from meshctl.api.service import LARGEST_BATCH, ServiceTime
from meshctl.api.sizes import MOST_CLASSES, check_shares, normal_shares
from meshctl.api.units import Duration, Ratio
from meshctl.model import Policy


class SolveSize(Strict):
    """One size of request."""

    name: Label
    """Name of the size."""
    batch: Annotated[float, Field(ge=1, le=LARGEST_BATCH)]
    """Its batch."""
    share: Ratio | None = None
    """Its share of the requests, 0..1. Give every size one (they sum to 1), or none (then all are equal)."""


class SolveClass(Strict):
    """One class of like endpoints."""

    name: GpuProduct
    """Name of the class: a GPU product."""
    endpoints: Annotated[int, Field(ge=0, le=100_000)]
    """How many there are; 0 is allowed as long as some class has one."""
    service: ServiceTime
    """Time of one request by batch."""
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 1
    """Requests each endpoint serves at once."""
    available: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Part of each GPU that is ours, 0 < available <= 1; the rest is used by others."""


class SolveInput(Strict):
    """What `meshctl solve` is asked."""

    slo_s: Annotated[Duration, Field(alias="slo")]
    """Time within which a request is to be answered."""
    percentile: Annotated[float, Field(gt=0, lt=100)] = 99.0
    """Percentage of every size that must be answered within it for the answer to be called feasible; 0..100."""
    load_rps: Annotated[float, Field(alias="load", gt=0, le=1e9)]
    """Requests per second, all sizes together."""
    policy: Annotated[Policy, Field(strict=False)] = Policy.BALANCED
    """How weights are chosen."""
    sizes: Annotated[tuple[SolveSize, ...], Field(strict=False, min_length=1, max_length=MOST_CLASSES)]
    """Sizes of the requests."""
    classes: Annotated[tuple[SolveClass, ...], Field(strict=False, min_length=1, max_length=64)]
    """Classes of endpoints."""

    @model_validator(mode="after")
    def _consistent(self) -> SolveInput:
        named = {"sizes": [s.name for s in self.sizes], "classes": [c.name for c in self.classes]}
        for field, names in named.items():
            again = repeated(names)
            if again is not None:
                wrong(f"{names[again]!r} stands twice; names are unique", field, again, "name")
        check_shares([s.share for s in self.sizes], "sizes")
        if not any(c.endpoints for c in self.classes):
            wrong("no class has an endpoint; give at least one class endpoints: 1 or more", "classes")
        return self

    def shares(self) -> tuple[float, ...]:
        """Of `sizes`, in their order; they sum to 1."""
        return tuple(normal_shares([s.share for s in self.sizes]))


def load_solve_file(path: Path) -> SolveInput:
    """The question in a YAML or JSON file. Raises InputError, naming file, line and field."""
    documents = parse(read_bounded(path), str(path))
    if len(documents) != 1:
        found = f"has {len(documents)} documents" if documents else "is empty"
        place = documents[1].place() if documents else Place(str(path))
        raise ManifestError((Fault(place, "", f"{found}; write one mapping with slo, load, sizes and classes"),))
    return validated(SolveInput, documents[0])
