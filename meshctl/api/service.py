"""Service time by batch, as people write it: a straight line or measured points. Shared by ModelProfile and `solve`."""

from __future__ import annotations

import itertools
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from meshctl.api.base import Strict, cel, wrong
from meshctl.api.units import Duration, DurationOrZero
from meshctl.model import ServiceProfile

LARGEST_BATCH = 1_000_000
"""Batches beyond this take the default route; far above what any server holds in memory."""
MOST_POINTS = 32


def _non_decreasing(points: dict[str, float]) -> dict[str, float]:
    for batch in points:
        if not (batch.isascii() and batch.isdigit() and 0 < int(batch[:10]) <= LARGEST_BATCH and batch[0] != "0"):
            wrong(f"{batch!r} is not a batch; write a whole number from 1 to {LARGEST_BATCH}", batch)
    ordered = sorted(points.items(), key=lambda point: int(point[0]))
    for (small, fast_s), (large, slow_s) in itertools.pairwise(ordered):
        if slow_s < fast_s:
            times = f"batch {small} takes {fast_s * 1e3:g}ms and batch {large} takes {slow_s * 1e3:g}ms"
            wrong(f"{times}: a larger batch cannot be faster; correct one of the two, or leave it out", large)
    return dict(ordered)


def _null_is_absent(points: Any) -> Any:
    """As for the API server; see `Strict`."""
    return {batch: time for batch, time in points.items() if time is not None} if isinstance(points, dict) else points


Points = Annotated[
    dict[str, Duration],
    Field(
        min_length=1,
        max_length=MOST_POINTS,
        json_schema_extra=cel(
            (
                f"self.all(batch, batch.matches('^[1-9][0-9]{{0,6}}$') && int(batch) <= {LARGEST_BATCH})",
                f"batches are whole numbers from 1 to {LARGEST_BATCH}",
            ),
            (
                "self.all(a, self.all(b, int(a) > int(b) || duration(self[a]) <= duration(self[b])))",
                "a larger batch cannot be faster",
            ),
        ),
    ),
    BeforeValidator(_null_is_absent),
    AfterValidator(_non_decreasing),
]


class ServiceTime(Strict):
    """Time one request takes alone on the GPU, by batch: either `base` and `perItem`, or `points`."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "has(self.points) ? !has(self.base) && !has(self.perItem) : has(self.base) && has(self.perItem)",
                "give either base and perItem, or points",
            ),
            (
                (
                    "has(self.points) || !has(self.base) || !has(self.perItem)"
                    " || duration(self.base) + duration(self.perItem) > duration('0s')"
                ),
                "base and perItem must not both be zero",
            ),
        )
    )

    base: DurationOrZero | None = None
    """Part that does not depend on the batch."""
    per_item: DurationOrZero | None = None
    """Time of each item of the batch."""
    points: Points | None = None
    """Measured time by batch, e.g. `{"1": 11.8ms, "8": 24.4ms}`; between points it is interpolated. A larger batch is
    never faster."""

    @model_validator(mode="after")
    def _exactly_one(self) -> ServiceTime:
        line = (self.base is not None, self.per_item is not None)
        if (self.points is not None and any(line)) or (self.points is None and not all(line)):
            wrong("give either base and perItem, or points")
        if self.points is None and not (self.base or self.per_item):
            wrong("base and perItem are both zero; a request takes some time")
        return self

    def profile(self) -> ServiceProfile:
        if self.points is not None:
            return ServiceProfile(tuple((float(batch), time_s) for batch, time_s in self.points.items()))
        return ServiceProfile.affine(self.base or 0.0, self.per_item or 0.0)
