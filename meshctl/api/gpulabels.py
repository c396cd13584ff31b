"""Which GPU product labels and annotations speak of, and under which names. Data and pure functions.

The annotations are written on a pod by whoever gives it its GPU (GPU allocation, or a person); the node's labels are
those that GPU discovery and the clouds write. The first of `NODE_PRODUCTS` that a node has wins, most exact first: a
cloud's own name says the family, GPU discovery says the board.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from meshctl.api.base import PRODUCT

GPU_PRODUCT = "meshctl.io/gpu-product"
"""Annotation of a pod: the product of the GPU it has. As a label of a node: of the node's GPUs."""
GPU_UUID = "meshctl.io/gpu-uuid"
"""Annotation of a pod: UUID of the GPU it has, as DCGM labels it; of several, separated by commas, the first counts."""
NVIDIA_PRODUCT = "nvidia.com/gpu.product"
"""Of NVIDIA's GPU feature discovery; what the problem text tells people to set."""

POD_PRODUCTS = (GPU_PRODUCT, NVIDIA_PRODUCT)
NODE_PRODUCTS = (
    GPU_PRODUCT,
    NVIDIA_PRODUCT,
    "amd.com/gpu.product-name",
    "beta.amd.com/gpu.product-name",
    "gpu.intel.com/product",
    "gpu.nvidia.com/class",  # CoreWeave
    "cloud.google.com/gke-accelerator",
    "k8s.amazonaws.com/accelerator",
    "eks.amazonaws.com/instance-gpu-name",
    "karpenter.k8s.aws/instance-gpu-name",
)
GKE_PARTITION = "cloud.google.com/gke-gpu-partition-size"
"""Beside GKE's accelerator, for MIG: ``1g.5gb``."""
SHARED = "-SHARED"
"""NVIDIA's suffix for a GPU that several pods may be given (time slicing, MPS)."""

_PRODUCT = re.compile(PRODUCT)


def pod_product(labels: Mapping[str, str], annotations: Mapping[str, str]) -> str:
    """What the pod itself says; "" when it says nothing, or something that is not a product's name."""
    said = (annotations.get(key) or labels.get(key) for key in POD_PRODUCTS)
    return next(filter(None, (product(value) for value in said if value)), "")


def node_product(labels: Mapping[str, str]) -> str:
    """What the node's labels say; "" when there is none of `NODE_PRODUCTS`."""
    for key in NODE_PRODUCTS:
        if found := product(labels.get(key, "")):
            partition = labels.get(GKE_PARTITION, "") if key == "cloud.google.com/gke-accelerator" else ""
            return f"{found}-MIG-{partition}" if partition else found
    return ""


def product(text: str) -> str:
    """The product's name without what is no part of it; "" when it is not one that a ModelProfile could name.

    A shared GPU takes as long for a request as one that is not (who else is on it is measured), so `SHARED` goes. A MIG
    slice is slower than the whole GPU, so ``-MIG-1g.5gb`` stays, and makes a product of its own.
    """
    name = text.strip().removesuffix(SHARED)
    return name if _PRODUCT.fullmatch(name) and not name.endswith("-MIG-INVALID") else ""


def hyphened(name: str) -> str:
    """NVML's name of a product as GPU discovery writes it into a node's label."""
    return "-".join(name.split())


def first_uuid(annotations: Mapping[str, str]) -> str:
    """UUID of the pod's (first) GPU; "" when unknown."""
    return annotations.get(GPU_UUID, "").partition(",")[0].strip()
