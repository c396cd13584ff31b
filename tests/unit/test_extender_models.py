"""Which GPU products are too slow for what a pod serves."""

from __future__ import annotations

from typing import Any

from meshctl.extender.models import Models
from meshctl.ports import ObjectKey
from tests.harness.manifests import profile, route

LABELS = {"app": "triton", "rev": "3"}


def told(*values: dict[str, Any]) -> Models:
    models = Models()
    for value in values:
        tell(models, value)
    return models


def tell(models: Models, value: dict[str, Any], *, gone: bool = False) -> None:
    metadata = {"namespace": "default", **value["metadata"]}
    key = ObjectKey(value["kind"], metadata["namespace"], metadata["name"])
    models.take(key, None if gone else {**value, "metadata": metadata})


def service(name: str = "triton", **selector: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": {"selector": selector or None}}


def serves(name: str = "resnet", slo: str = "100ms", sizes: int = 8, **spec: Any) -> dict[str, Any]:
    classes = [{"name": "large", "min": sizes * 2, "max": 64}, {"name": "small", "min": sizes, "max": sizes}]
    backend = {"service": {"name": "triton", "port": 8000}}
    return route(name, backend=backend, slo={"latency": slo}, requestSize={"classes": classes}, model="resnet", **spec)


def takes(gpu: str, time: str, name: str = "", model: str = "resnet") -> dict[str, Any]:
    return profile(name or f"on-{gpu.lower()}", model=model, gpu=gpu, service={"base": "0s", "perItem": time})


K80, T4 = takes("Tesla-K80", "20ms"), takes("Tesla-T4", "5ms")
SELECTS = service(app="triton")


def test_a_product_whose_least_request_is_too_slow_is_unfit_and_says_so() -> None:
    """8 items of 20 ms in 100 ms; 8 of 5 ms are in time, though 64 are not."""
    found = told(serves(), K80, T4, SELECTS).unfit("default", LABELS)
    words = "ModelProfile on-tesla-k80: resnet takes 160 ms for batch 8, and default/resnet promises 100 ms"
    assert found == {"Tesla-K80": words}


def test_only_pods_that_the_routes_service_selects_are_meant() -> None:
    """Other labels, another namespace, a Service that selects nobody, one that is not there."""
    models = told(serves(), K80, SELECTS)
    assert models.unfit("default", {"app": "other"}) == {}
    assert models.unfit("other", LABELS) == {}
    assert told(serves(), K80, service()).unfit("default", LABELS) == {}
    assert told(serves(), K80).unfit("default", LABELS) == {}


def test_products_without_a_profile_are_not_refused() -> None:
    """Nor is one with a profile of another model."""
    assert told(serves(), SELECTS, takes("Tesla-K80", "1s", model="bert")).unfit("default", LABELS) == {}


def test_what_changes_counts_at_once() -> None:
    """A faster profile, a longer promise, a route that goes, a Service that selects others."""
    models = told(serves(), K80, SELECTS)
    assert models.unfit("default", LABELS)
    for change, undo in (
        (takes("Tesla-K80", "10ms"), K80),
        (serves(slo="200ms"), serves()),
        (service(app="other"), SELECTS),
    ):
        tell(models, change)
        assert models.unfit("default", LABELS) == {}
        tell(models, undo)
        assert models.unfit("default", LABELS)
    for value in (serves(), SELECTS, K80):
        tell(models, value, gone=True)
        assert models.unfit("default", LABELS) == {}
        tell(models, value)
        assert models.unfit("default", LABELS)


def test_an_object_that_cannot_be_read_is_not_there() -> None:
    """Until it can be."""
    models = told(serves(), K80, SELECTS)
    tell(models, {**K80, "spec": {"model": 3}})
    assert models.unfit("default", LABELS) == {}


def test_of_two_profiles_the_older_counts() -> None:
    """As for routes; in whatever order they come."""
    slow, fast = takes("Tesla-K80", "20ms", "a"), takes("Tesla-K80", "1ms", "b")
    slow["metadata"]["creationTimestamp"] = "2026-05-04T10:00:01Z"
    fast["metadata"]["creationTimestamp"] = "2026-05-04T10:00:00Z"
    for profiles in ((slow, fast), (fast, slow)):
        assert told(serves(), SELECTS, *profiles).unfit("default", LABELS) == {}


def test_a_pod_of_two_models_needs_a_gpu_that_serves_both() -> None:
    """Two routes to one Service: what either can't use is unfit; the first by name says why."""
    found = told(serves("b"), serves("a"), serves("c", slo="10ms"), K80, T4, SELECTS).unfit("default", LABELS)
    assert found.keys() == {"Tesla-K80", "Tesla-T4"}
    assert "default/a" in found["Tesla-K80"]
    assert "default/c" in found["Tesla-T4"]


def test_pods_of_the_same_services_are_told_the_same_object() -> None:
    """So that equal demands are seen to be equal at once."""
    models = told(serves(), K80, SELECTS)
    assert models.unfit("default", LABELS) is models.unfit("default", {"app": "triton"})
