"""Which GPU products are too slow for the model that a pod serves, in words. Pure: objects in, answers out.

A pod serves the model of each ModelRoute whose Service selects it. A product is unfit when the ModelProfile of that
model, in the route's namespace, says that not even the smallest request is answered within the SLO: the smallest batch
of the smallest size class, alone on the GPU. A product without a profile is not refused: nobody knows.

Kept by namespace, and made anew for the namespace of which an object changed; of an object that can't be read nothing
is known. Of two profiles for one model and product the older counts, as in `meshctl.api.resolve`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from meshctl.api.gpulabels import hyphened, product
from meshctl.api.modelprofile import ModelProfile
from meshctl.api.modelroute import ModelRoute
from meshctl.api.objects import Object, read_object
from meshctl.core.capacity import service_s
from meshctl.ports import KubeObject, ObjectKey

KINDS = ("ModelProfile", "ModelRoute", "Service")
_NOTHING: Mapping[str, str] = MappingProxyType({})
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
_Items = frozenset[tuple[str, str]]


class _Served(NamedTuple):
    """Pods with these labels serve a model for which some products are too slow."""

    selector: _Items
    unfit: Mapping[str, str]


class Models:
    """`take` each object that is another now, then ask for pods."""

    def __init__(self) -> None:
        self._objects: dict[str, dict[ObjectKey, Object]] = {}
        """ModelRoutes and ModelProfiles by namespace."""
        self._selectors: dict[str, dict[str, _Items]] = {}
        """Namespace -> Service -> what it selects."""
        self._served: dict[str, tuple[_Served, ...]] = {}
        """By namespace, of those that were asked about since they changed."""

    def take(self, key: ObjectKey, value: KubeObject | None) -> None:
        """`value` None: it is gone."""
        self._served.pop(key.namespace, None)
        if key.kind == "Service":
            selector = (value.get("spec") or {}).get("selector") if value is not None else None
            _put(self._selectors, key.namespace, key.name, frozenset(selector.items()) if selector else None)
        else:
            read = list(read_object(value, str(key)).objects.values()) if value is not None else []
            _put(self._objects, key.namespace, key, read[0].value if read else None)

    def unfit(self, namespace: str, labels: Mapping[str, str]) -> Mapping[str, str]:
        """Product -> why it will not do, for a pod with these labels; the same object for pods of the same Services."""
        if namespace not in self._objects:
            return _NOTHING
        if namespace not in self._served:
            self._served[namespace] = tuple(self._make(namespace))
        mine = labels.items()
        found = [served.unfit for served in self._served[namespace] if served.selector <= mine]
        match found:
            case []:
                return _NOTHING
            case [one]:
                return one
            case _:
                return {gpu: why for unfit in reversed(found) for gpu, why in unfit.items()}

    def _make(self, namespace: str) -> Iterator[_Served]:
        objects = self._objects[namespace]
        profiles = _oldest_first([value for value in objects.values() if isinstance(value, ModelProfile)])
        selectors = self._selectors.get(namespace, {})
        for key in sorted(objects):
            route = objects[key]
            if isinstance(route, ModelRoute) and (service := route.spec.backend.service) is not None:
                selector, unfit = selectors.get(service.name), _too_slow(route, profiles)
                if selector and unfit:
                    yield _Served(selector, unfit)


def _too_slow(route: ModelRoute, profiles: Iterable[ModelProfile]) -> Mapping[str, str]:
    slo_s, batch = route.spec.slo.latency, min(size.min_batch for size in route.spec.request_size.sizes())
    found, seen = {}, set()
    for profile in profiles:
        gpu = product(hyphened(profile.spec.gpu))
        if profile.spec.model != route.spec.model or gpu in seen:
            continue
        seen.add(gpu)
        least_s = service_s(profile.spec.service.profile(), batch)
        if least_s > slo_s:
            times = f"{least_s * 1e3:g} ms for batch {batch}, and {route.id} promises {slo_s * 1e3:g} ms"
            found[gpu] = f"ModelProfile {profile.metadata.name}: {route.spec.model} takes {times}"
    return MappingProxyType(found)


def _oldest_first(profiles: Iterable[ModelProfile]) -> list[ModelProfile]:
    return sorted(profiles, key=lambda one: (one.metadata.creation_timestamp, one.metadata.name))


def _put(kept: dict[str, dict[_Key, _Value]], namespace: str, key: _Key, value: _Value | None) -> None:
    """Namespaces of which nothing is kept are not there."""
    inner = kept.setdefault(namespace, {})
    inner.pop(key, None)
    if value is not None:
        inner[key] = value
    if not inner:
        del kept[namespace]
