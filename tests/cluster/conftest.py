"""The cluster that tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.gpunode import GpuNode
from tests.cluster.node import require_node


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Kubernetes, our CRDs, Istio, and two gateways, up once for the tests here; tests of any loop scope may use it.

    A test makes a namespace of its own (``await cluster.namespace()``) and route hosts of its own, changes nothing
    outside them, and stops nothing: one that breaks things starts a `Cluster` for itself. Objects of other tests are
    there: a controller under test watches the test's namespace alone.
    """
    shared = Cluster(tmp_path_factory.mktemp("cluster"), istio=True, gateways=2).up()
    yield shared
    shared.down()


@pytest.fixture(scope="package")
def gpu_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GpuNode]:
    """A node with GPUs and an agent, up once; see `GpuNode` for what a test leaves as it was."""
    require_node()
    shared = GpuNode(tmp_path_factory.mktemp("gpus")).up()
    yield shared
    shared.down()
