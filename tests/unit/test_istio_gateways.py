"""A route whose Gateway is not there says so."""

from __future__ import annotations

import pytest

from istio.gateways import absent
from tests.harness.objects import MemoryObjects


def virtual_service(**spec: object) -> dict[str, object]:
    return {"kind": "VirtualService", "metadata": {"namespace": "team", "name": "resnet"}, "spec": spec}


def gateways(*keys: str) -> MemoryObjects:
    pairs = [key.split("/") for key in keys]
    return MemoryObjects(
        *(
            {
                "apiVersion": "networking.istio.io/v1",
                "kind": "Gateway",
                "metadata": {"namespace": namespace, "name": name},
                "spec": {},
            }
            for namespace, name in pairs
        )
    )


@pytest.mark.parametrize(
    ("named", "gone"),
    [
        (["istio-system/ingress"], ""),
        (["istio-system/ingress", "own"], "Gateway team/own"),
        (["istio-system/nope", "nope"], "Gateway istio-system/nope, team/nope"),
        (["mesh"], ""),
        (["mesh", "istio-system/nope"], "Gateway istio-system/nope"),
    ],
)
def test_gateways_that_do_not_exist_are_named(named: list[str], gone: str) -> None:
    """With their namespace; the mesh is always there."""
    said = absent(virtual_service(gateways=named), gateways("istio-system/ingress", "other/own"))
    assert said.partition(", which")[0] == (f"waits for {gone}" if gone else "")


def test_gateways_outside_the_namespaces_that_are_seen_may_be_there() -> None:
    """``--namespace team`` sees none of istio-system."""
    named = virtual_service(gateways=["istio-system/ingress", "nope"])
    assert "waits for Gateway team/nope, which" in absent(named, gateways(), ("team",))


def test_nothing_is_said_of_a_delegate_nor_while_gateways_are_not_known() -> None:
    """The first names none; what is not seen may be there."""
    objects = gateways()
    assert absent(virtual_service(), objects) == ""
    objects.set_missing("Gateway", "may not be listed")
    assert absent(virtual_service(gateways=["istio-system/nope"]), objects) == ""
