"""A real node: its pods run, device plugins reach its kubelet, and the machine is afterwards as it was."""

from __future__ import annotations

import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import grpc.aio
import pytest

from tests.cluster.cluster import Cluster, Document
from tests.cluster.node import IMAGE, NAME, SYSCTLS, Node, require_node
from tests.cluster.processes import Scheduler
from tests.harness.tools import DEADLINE_S, completed

pytestmark = pytest.mark.cluster
FIXED_PATHS = ("/var/lib/kubelet", "/var/lib/containerd", "/run/containerd", "/var/log/pods", "/opt/containerd")
"""Where a kubelet and containerd write when nobody stops them."""
SCHEDULER = "test-node"
"""Of the pods here alone: what other tests left in the cluster stays where it is."""


@pytest.fixture(autouse=True)
def _node_possible() -> None:
    """Says so before a cluster is started for nothing."""
    require_node()


async def test_a_node_runs_pods_and_leaves_the_machine_as_it_was(cluster: Cluster, tmp_path: Path) -> None:
    """Scheduled by the real scheduler, run to the end, the log read through the API server; then nothing is left.

    In between, kubelet and containerd are killed and come back: pods do not notice, and sockets stay where they were.
    """
    before, namespace = _machine(), await cluster.namespace()
    config = {"profiles": [{"schedulerName": SCHEDULER}]}
    try:
        async with (
            Scheduler(tmp_path / "scheduler", cluster.kubeconfig, config),
            Node(cluster, tmp_path / "node") as node,
        ):
            await cluster.apply(_pod("stays", namespace, "exec sleep 3600"))
            await _phase(cluster, namespace, "stays", "Running")
            for process in (node.kubelet, node.containerd):
                await process.end(signal.SIGKILL)
            for process in (node.containerd, node.kubelet):
                await completed(process.start)
            await cluster.apply(_pod("greets", namespace, "echo hello; cat /proc/self/cgroup"))
            await _phase(cluster, namespace, "greets", "Succeeded")
            log = await cluster.kubectl("logs", "greets", "--namespace", namespace)
            stays = await cluster.get("pod", "stays", "--namespace", namespace)
            resources = await _pod_resources(node.pod_resources)
            _connect(node.plugin_dir / "kubelet.sock")
            written = node.enclave.path("/proc/sys/kernel/panic_on_oops").read_text()
            pids, during = _inhabitants(node.enclave.init), _machine()
    finally:
        await cluster.kubectl("delete", "pod", "--all", "--namespace", namespace, "--force", "--grace-period=0")
        await cluster.kubectl("delete", "node", NAME, "--ignore-not-found")
    assert log.startswith("hello\n")
    assert f"/{node.cgroup}/kubepods/" in log
    assert stays["status"]["containerStatuses"][0]["restartCount"] == 0
    assert b"stays" in resources
    assert int(written) == 1  # by the kubelet, who wants it so, into a file of the node's
    assert during == before
    assert _machine() == before
    assert (
        len(pids) >= 4
    )  # the init, containerd, the kubelet, a shim; the pods' are in namespaces below, and in the cgroup
    assert _left(node, pids) == []


async def test_a_node_that_does_not_come_up_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    """What it had started and made goes with the error, which has the last lines of the log."""
    before, node = _machine(), Node(cluster, tmp_path, {"maxPods": -1})
    with pytest.raises(AssertionError, match=r"kubelet ended while starting(.|\n)*maxPods"):
        async with node:
            pass
    assert _machine() == before
    assert _left(node, []) == []
    assert node.enclave.process is None


def _machine() -> dict[str, object]:
    """What a node could change: the sysctls, the mounts, and what is at fixed paths."""
    return {
        "sysctls": {name: Path("/proc/sys", name).read_text() for name in SYSCTLS},
        "mounts": Path("/proc/self/mounts").read_text(),
        "paths": {path: Path(path).exists() for path in FIXED_PATHS},
    }


def _left(node: Node, pids: Sequence[int]) -> list[Path]:
    """Of its cgroups and processes."""
    processes = [path for path in (Path(f"/proc/{pid}") for pid in pids) if path.exists()]
    return [*Path("/sys/fs/cgroup").rglob(node.cgroup), *processes]


def _inhabitants(pid: int) -> list[int]:
    """The processes in the process namespace of `pid`."""
    space = Path(f"/proc/{pid}/ns/pid").readlink()
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            found += [int(path.name)] if (path / "ns" / "pid").readlink() == space else []
    return found


def _connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE_S)
        client.connect(str(path))


async def _pod_resources(path: Path) -> bytes:
    """The answer of the kubelet's List, as it is on the wire."""
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        call = channel.unary_unary("/v1.PodResourcesLister/List")
        return bytes(await call(b"", timeout=DEADLINE_S, wait_for_ready=True))


async def _phase(cluster: Cluster, namespace: str, pod: str, phase: str) -> None:
    """Returns when the pod has come to it."""
    condition = f"--for=jsonpath={{.status.phase}}={phase}"
    await cluster.kubectl("wait", condition, f"pod/{pod}", "--namespace", namespace, f"--timeout={DEADLINE_S:g}s")


def _pod(name: str, namespace: str, script: str) -> Document:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "schedulerName": SCHEDULER,
            "hostNetwork": True,
            "automountServiceAccountToken": False,
            "restartPolicy": "Never",
            "containers": [{"name": "main", "image": IMAGE, "command": ["sh", "-c", script]}],
        },
    }
