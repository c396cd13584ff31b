"""The ConfigMap that tells the admission policy which resources are slots of shared GPUs, and how many one may ask for.

    kind: ConfigMap
    metadata: {name: meshctl-gpu-resources, namespace: meshctl-system}
    data: {hpe.com_gpus: "10"}

A key is a resource's name with its '/' written as '_', which no domain has, and no ConfigMap's key may have a '/'. The
value is the largest number of slots that one container can get anywhere: those of the GPU with the most, or, where a
policy allows several GPUs, of all GPUs of one node; "0": no limit is known. The GPU operator writes it,
deploy/admission.yaml reads it. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

NAMESPACE = "meshctl-system"
"""Where deploy/ puts it; deploy/admission.yaml says the same."""
NAME = "meshctl-gpu-resources"


def key(resource: str) -> str:
    """``hpe.com/gpus`` -> ``hpe.com_gpus``. Raises ValueError for a name without a domain."""
    domain, slash, name = resource.partition("/")
    if not (domain and slash and name):
        raise ValueError(f"{resource!r} is not DOMAIN/NAME")
    return f"{domain}_{name}"


def resource(key: str) -> str:
    """``hpe.com_gpus`` -> ``hpe.com/gpus``. Raises ValueError for what is no key of ours."""
    domain, found, name = key.partition("_")
    if not (domain and found and name):
        raise ValueError(f"{key!r} is not DOMAIN_NAME")
    return f"{domain}/{name}"


def data(limits: Mapping[str, int]) -> dict[str, str]:
    """The ConfigMap's data for resource -> most slots of one container (0: no limit is known), sorted by resource."""
    return {key(name): str(limits[name]) for name in sorted(limits)}
