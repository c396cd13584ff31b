"""Several objects at once: who serves which host on which gateway, and what is made anew when a part changes."""

from __future__ import annotations

from typing import Any

from meshctl.api.objects import Declared, Key, read_manifest
from meshctl.api.resolve import Resolver, Servers, ServiceRef, resolve
from meshctl.model import Endpoint, EndpointId, RouteId
from tests.harness.manifests import profile, route, text

Objects = dict[Key, Declared]


def objects(*values: dict[str, Any]) -> Objects:
    manifest = read_manifest(text(*values).encode(), "f.yaml")
    assert not manifest.faults
    return dict(manifest.objects)


def behind(name: str) -> dict[str, Any]:
    return {"service": {"name": name, "port": 80}}


def servers(address: str, gpu: str = "V100", *remarks: str) -> Servers:
    endpoint = Endpoint(EndpointId(f"{address}:8000"), address, 8000, gpu, f"{address}:8002")
    return Servers((endpoint,), remarks)


def test_a_host_is_taken_per_gateway() -> None:
    """Two gateways serve the same host apart; on a shared one the first route by id has it, and the other is told."""
    found = resolve(
        objects(
            route("a", hosts=["x.com"], gateways=["istio-system/public"]),
            route("b", hosts=["x.com"], gateways=["istio-system/private"]),
            route("c", hosts=["x.com", "y.com"], gateways=["istio-system/private", "istio-system/public"]),
            route("d", hosts=["x.com"]),
        ),
        {},
    )
    assert {r: route.spec.hosts for r, route in found.routes.items()} == {
        "default/a": ("x.com",),
        "default/b": ("x.com",),
        "default/c": ("y.com",),
        "default/d": ("x.com",),
    }
    assert [(fault.subject, fault.field, fault.message) for fault in found.faults if "served by" in fault.message] == [
        (
            "ModelRoute default/c",
            "spec.hosts[0]",
            (
                "'x.com' is served by ModelRoute default/b on gateway istio-system/private, which comes first by name;"
                " choose other hosts"
            ),
        )
    ]


def test_a_host_is_taken_per_group_of_proxies() -> None:
    """Groups serve the same host apart; a route for no group takes none."""
    found = resolve(
        objects(
            route("a", hosts=["x.com"]),
            route("b", hosts=["x.com"], proxyGroups=["edge"]),
            route("c", hosts=["x.com"], proxyGroups=["batch", "edge"]),
            route("d", hosts=["x.com"], proxyGroups=["batch"]),
            route("e", hosts=["x.com"], proxyGroups=["meshctl"]),
            route("f", hosts=["x.com"], proxyGroups=[]),
        ),
        {},
    )
    assert list(found.routes) == ["default/a", "default/b", "default/d", "default/f"]
    first, second = [fault.message.split(", which")[0] for fault in found.faults if "served by" in fault.message]
    assert first == "'x.com' is served by ModelRoute default/b for proxy group edge"
    assert second == "'x.com' is served by ModelRoute default/a"


def aged(value: dict[str, Any], created: str) -> dict[str, Any]:
    return {**value, "metadata": {**value["metadata"], "creationTimestamp": created}}


def test_a_new_route_takes_no_host_from_one_that_is_served() -> None:
    """In a cluster the older route keeps a host, whatever the two are called; so do profiles."""
    old, new = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
    found = resolve(
        objects(
            aged(route("a", hosts=["x.com"]), new),
            aged(route("z", hosts=["x.com"]), old),
            aged(profile("a", gpu="V100"), new),
            aged(profile("z", gpu="V100"), old),
        ),
        {},
    )
    assert list(found.routes) == ["default/z"]
    taken, *_ = [fault for fault in found.faults if fault.subject == "ModelRoute default/a"]
    assert taken.message.startswith("'x.com' is served by ModelRoute default/z, which is older;")
    twice = [fault.subject for fault in found.faults if "already describes" in fault.message]
    assert twice == ["ModelProfile default/a"]


def test_a_gateway_is_the_same_with_and_without_its_namespace() -> None:
    """``public`` of a route in ``default`` is ``default/public``."""
    found = resolve(objects(route("a", gateways=["public"]), route("b", gateways=["default/public"])), {})
    assert list(found.routes) == ["default/a"]


def test_delegates_never_collide() -> None:
    """Their hosts are those of Git's own VirtualServices."""
    found = resolve(objects(route("a", delegate=True), route("b", delegate=True), route("c")), {})
    assert list(found.routes) == ["default/a", "default/b", "default/c"]


def test_a_host_comes_back_when_it_is_given_up() -> None:
    """The route that had to leave it gets it when the other is gone, and nothing else changes."""
    resolver = Resolver()
    both = objects(route("a", hosts=["x.com"]), route("b", hosts=["x.com", "y.com"]))
    assert resolver.resolve(both).routes[RouteId("default/b")].spec.hosts == ("y.com",)
    only = {key: value for key, value in both.items() if key.name == "b"}
    again = resolver.resolve(only)
    assert again.routes[RouteId("default/b")].spec.hosts == ("x.com", "y.com")
    assert again.routes[RouteId("default/b")].spec.generation == 2


def test_servers_of_a_service_are_the_routes_endpoints() -> None:
    """They come with their profile, and with what was remarked, as warnings about the route's Service."""
    asked = []

    def backends(ref: ServiceRef) -> Servers:
        asked.append(ref)
        return servers("10.0.0.1", "V100", "beware")

    found = Resolver().resolve(objects(profile(), route("a", backend=behind("triton"))), backends)
    assert asked == [ServiceRef("default", "triton", 80, 8002, 1)]
    desired = found.routes[RouteId("default/a")]
    assert [e.id for e in desired.endpoints] == ["10.0.0.1:8000"]
    assert list(desired.profiles) == ["V100"]
    assert [(f.field, f.message, f.severity) for f in found.faults] == [("spec.backend.service", "beware", "warning")]


def test_an_unknown_gpu_asks_for_no_profile() -> None:
    """What is unknown is remarked once, by who looked for it."""
    found = Resolver().resolve(objects(route("a", backend=behind("triton"))), lambda _: servers("10.0.0.1", ""))
    assert (len(found.routes), found.faults) == (1, ())


def test_only_what_changed_is_made_anew() -> None:
    """A route whose servers are another object is looked at; equal ones keep the route, its generation and the rest."""
    known = {"a": servers("10.0.0.1"), "b": servers("10.0.0.2")}
    both = objects(route("a", hosts=["a"], backend=behind("a")), route("b", hosts=["b"], backend=behind("b")))
    resolver = Resolver()
    first = resolver.resolve(both, lambda ref: known[ref.name]).routes
    known["a"] = servers("10.0.0.1")
    second = resolver.resolve(both, lambda ref: known[ref.name]).routes
    assert all(second[r] is first[r] for r in first)
    known["a"] = servers("10.0.0.3")
    third = resolver.resolve(both, lambda ref: known[ref.name]).routes
    a, b = RouteId("default/a"), RouteId("default/b")
    assert third[b] is first[b]
    assert ([e.address for e in third[a].endpoints], third[a].spec.generation) == (["10.0.0.3"], 2)


def test_a_new_profile_reaches_the_routes_of_its_model_only() -> None:
    """Without a new generation: neither the spec nor the endpoints are others."""
    before = objects(route("a", hosts=["a"]), route("b", hosts=["b"], model="bert"))
    resolver = Resolver()
    first = resolver.resolve(before)
    assert len(first.faults) == 2
    second = resolver.resolve({**before, **objects(profile())})
    a, b = RouteId("default/a"), RouteId("default/b")
    assert second.routes[b] is first.routes[b]
    assert (list(second.routes[a].profiles), second.routes[a].spec.generation) == (["V100"], 1)
    assert [fault.subject for fault in second.faults] == ["ModelRoute default/b"]
