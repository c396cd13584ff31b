"""Which sizes of request a ModelRoute tells apart, and how a request's size is read."""

from __future__ import annotations

import itertools
import math
from typing import Annotated

from pydantic import ConfigDict, Field, model_validator

from meshctl import model as core
from meshctl.api.base import SET, Label, Strict, cel, repeated, wrong
from meshctl.api.service import LARGEST_BATCH
from meshctl.api.units import Ratio

LEAST_SUM, LARGEST_SUM = 0.999, 1.001
"""Shares written with three digits (0.333 three times) are meant to sum to 1; they are scaled to do so exactly."""
HEADER = r"^[A-Za-z0-9_-]+$"
HEADERS = ("x-batch-size", "batch_size", "NV-InferRequest")
MOST_CLASSES = 16

Batch = Annotated[int, Field(ge=1, le=LARGEST_BATCH)]
Header = Annotated[str, Field(pattern=HEADER, max_length=128)]


def check_shares(shares: list[float | None], *at: str) -> None:
    """All given and summing to 1, or none given."""
    given = [share for share in shares if share is not None]
    if given and len(given) < len(shares):
        wrong("is missing, but others have one; give every one a share, or none", *at, shares.index(None), "share")
    if given and not LEAST_SUM <= sum(given) <= LARGEST_SUM:
        wrong(f"the shares sum to {sum(given):g}; they must sum to 1", *at)


def normal_shares(shares: list[float | None]) -> list[float]:
    """Shares that sum to 1: the declared ones scaled, equal ones where none is declared."""
    given = [1.0 if share is None else share for share in shares]
    return [share / sum(given) for share in given]


class SizeClassSpec(Strict):
    """Requests whose batch size lies in [min, max], both included."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("self.name != 'default'", "the name default is reserved"),
            ("self.min <= self.max", "min must not exceed max"),
            (
                "!has(self.batch) || (double(self.min) <= self.batch && self.batch <= double(self.max))",
                "batch must lie in [min, max]",
            ),
        )
    )

    name: Label
    """Name of the class; `default` is reserved for requests without a usable size."""
    min: Batch
    """Smallest batch of the class."""
    max: Batch
    """Largest batch of the class."""
    batch: Annotated[float, Field(ge=1, le=LARGEST_BATCH)] | None = None
    """Batch whose service time stands for the class; the geometric mean of min and max when not given."""
    share: Ratio | None = None
    """Share of the requests, 0..1: the prior until the mix is observed. Give every class one (they sum to 1), or none
    (then all are equal)."""

    @model_validator(mode="after")
    def _consistent(self) -> SizeClassSpec:
        if self.name == core.DEFAULT_CLASS:
            wrong(f"{self.name!r} is reserved for requests without a usable size; choose another name", "name")
        if self.min > self.max:
            wrong(f"{self.max} is less than min, {self.min}; swap them", "max")
        if self.batch is not None and not self.min <= self.batch <= self.max:
            wrong(f"{self.batch:g} is outside [{self.min}, {self.max}]; choose a batch of the class", "batch")
        return self


ALL_SIZES = SizeClassSpec(name="all", min=1, max=LARGEST_BATCH, batch=1.0)
"""The only class when none is declared. It stands for batch 1, the commonest size, until sizes are observed."""


class RequestSize(Strict):
    """How a request's size is read, and which sizes are told apart."""

    headers: Annotated[
        tuple[Header, ...],
        Field(
            strict=False,
            min_length=1,
            max_length=8,
            json_schema_extra=SET
            | cel(
                (
                    "self.all(a, self.exists_one(b, a.lowerAscii() == b.lowerAscii()))",
                    "a header may stand once (case does not count)",
                )
            ),
        ),
    ] = HEADERS
    """Headers that may carry the batch size; the first present wins. `NV-InferRequest` is read as
    `batch_size: N` inside its value, the others as a whole number."""
    classes: Annotated[
        tuple[SizeClassSpec, ...],
        Field(
            strict=False,
            min_length=1,
            max_length=MOST_CLASSES,
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
                **cel(
                    (
                        "self.all(a, self.exists_one(b, a.min <= b.max && b.min <= a.max))",
                        "classes must not overlap",
                    ),
                    (
                        "self.all(c, has(c.share)) || !self.exists(c, has(c.share))",
                        "give every class a share, or none",
                    ),
                    (
                        (
                            f"!self.all(c, has(c.share)) || ({LEAST_SUM} <= self.map(c, c.share).sum()"
                            f" && self.map(c, c.share).sum() <= {LARGEST_SUM})"
                        ),
                        "shares must sum to 1",
                    ),
                ),
            },
        ),
    ] = (ALL_SIZES,)
    """Size classes, not overlapping. Sizes in a gap between them take the default route."""

    @model_validator(mode="after")
    def _consistent(self) -> RequestSize:
        again = repeated([header.lower() for header in self.headers])
        if again is not None:
            wrong(f"{self.headers[again]} stands twice (case does not count); keep one", "headers", again)
        again = repeated([c.name for c in self.classes])
        if again is not None:
            wrong(f"{self.classes[again].name!r} stands twice; names of classes are unique", "classes", again, "name")
        order = sorted(range(len(self.classes)), key=lambda i: (self.classes[i].min, i))
        for lower, upper in itertools.pairwise(order):
            a, b = self.classes[lower], self.classes[upper]
            if b.min <= a.max:
                both = f"[{b.min}, {b.max}] overlaps [{a.min}, {a.max}] of class {a.name}"
                wrong(f"{both}; make one end before the other begins", "classes", upper)
        check_shares([c.share for c in self.classes], "classes")
        return self

    def sizes(self) -> tuple[core.SizeClass, ...]:
        shares = normal_shares([c.share for c in self.classes])
        both = sorted(zip(self.classes, shares, strict=True), key=lambda pair: pair[0].min)
        return tuple(
            core.SizeClass(c.name, c.min, c.max, c.batch if c.batch is not None else math.sqrt(c.min * c.max), share)
            for c, share in both
        )
