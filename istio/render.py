"""Plan -> Istio objects, and back. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from meshctl.model import DesiredRoute, RouteId, RoutePlan, Weights
from meshctl.ports import KubeObject


@dataclass(frozen=True, slots=True)
class Rendered:
    """The objects of one route. Every host and subset that the VirtualService names is among the backends."""

    route: RouteId
    backends: tuple[KubeObject, ...]
    """ServiceEntries, then DestinationRules."""
    virtual_service: KubeObject


def render(plan: RoutePlan) -> Rendered:
    """The objects of one route that is `meshed`."""
    raise NotImplementedError


def weights_of(route: DesiredRoute, live: Iterable[KubeObject]) -> Weights | None:
    """The weights that the live objects of `route` stand for; None when they are not all there."""
    raise NotImplementedError
