"""Which pod a process on a GPU belongs to, and whether a pod has more of them than its share was divided for. Pure.

MPS limits processes, not containers: each may use what its container's environment says. A container whose share was
divided for one process and that runs three has three shares; nothing in the driver stops it, so it is told of. The
cgroup of a process names its pod, in the kubelet's own spelling.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from meshctl.sharing import Owner

_HEX = r"[0-9a-f]"
_POD = re.compile(rf"pod({_HEX}{{8}}(?:[-_]{_HEX}{{4}}){{3}}[-_]{_HEX}{{12}}|{_HEX}{{32}})")


def pod_uid(cgroup: str) -> str | None:
    """UID of the pod in the text of /proc/PID/cgroup; None for a process of no pod. The systemd driver writes ``_``."""
    found = _POD.search(cgroup)
    return found[1].replace("_", "-") if found else None


def excess(
    cgroups: Iterable[str], pods: Mapping[str, tuple[str, str]], holders: Iterable[Owner], allowed: int, own: str = ""
) -> tuple[str, ...]:
    """What is too much on one GPU, in words, sorted; empty when nothing is.

    `cgroups` of the processes that compute on it, `pods` (namespace, name) by UID, `holders` of its slots, `allowed`
    processes per container. In our `own` cgroup are the MPS servers that could not be moved out of it: nobody's excess.
    """
    others = (pod_uid(cgroup) for cgroup in cgroups if cgroup != own)
    running = Counter(pods[uid] for uid in others if uid is not None and uid in pods)
    containers = Counter((owner.namespace, owner.pod) for owner in holders)
    return tuple(
        f"{namespace}/{name} has {count} processes on the GPU and limits for {limit}"
        for (namespace, name), count in sorted(running.items())
        if count > (limit := containers[namespace, name] * allowed)
    )
