"""Which pod is on which physical GPU, as the GPU objects say. Pure: objects in, answers out.

The node's agent writes there what the kubelet says, so it counts for more than what a pod's annotations claim. A pod is
known by its name alone: one that is named on a GPU of another node than its own is its predecessor.

Kept by GPU and by pod, so that a GPU that changes costs its own holders, and a heartbeat nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from meshctl.api.gpulabels import hyphened, product
from meshctl.ports import KubeObject, ObjectKey


class HeldGpu(NamedTuple):
    """A GPU that a pod has slots of."""

    uuid: str
    product: str
    """As GPU discovery writes it, so that one ModelProfile fits both; "" when the agent did not say."""
    node: str


_NO_GPU = HeldGpu("", "", "")


class GpuHolders:
    """`take` each GPU object that is another now, then ask for pods."""

    def __init__(self) -> None:
        self._gpus: dict[ObjectKey, dict[ObjectKey, HeldGpu]] = {}
        """What each GPU object said: pod -> the GPU."""
        self._pods: dict[ObjectKey, set[HeldGpu]] = {}

    def take(self, key: ObjectKey, value: KubeObject | None) -> set[ObjectKey]:
        """`value` None: it is gone. The pods of which something else is known now."""
        before, now = self._gpus.pop(key, {}), {} if value is None else _holders(value)
        if now:
            self._gpus[key] = now
        changed = {pod for pod in before.keys() | now.keys() if before.get(pod) != now.get(pod)}
        for pod in changed:
            held = self._pods.setdefault(pod, set())
            held.discard(before.get(pod, _NO_GPU))
            if pod in now:
                held.add(now[pod])
            if not held:
                del self._pods[pod]
        return changed

    def of(self, pod: ObjectKey, node: str) -> HeldGpu | None:
        """The pod's GPU on `node` ("": wherever it is); of several the first by UUID."""
        return min((gpu for gpu in self._pods.get(pod, ()) if node in ("", gpu.node)), default=None)


def _holders(value: KubeObject) -> dict[ObjectKey, HeldGpu]:
    spec, status = value.get("spec") or {}, value.get("status") or {}
    gpu = HeldGpu(str(spec["uuid"]), product(hyphened(str(status.get("product") or ""))), str(spec["node"]))
    return {ObjectKey("Pod", str(h["namespace"]), str(h["pod"])): gpu for h in status.get("holders") or ()}
