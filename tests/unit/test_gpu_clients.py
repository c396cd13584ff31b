"""Processes on a GPU, by pod."""

from __future__ import annotations

import pytest

from deviceplugin.clients import excess, pod_uid
from meshctl.sharing import Owner

UID = "1b4e28ba-2fa1-11d2-883f-0016d3cca427"


@pytest.mark.parametrize(
    ("cgroup", "uid"),
    [
        pytest.param(f"11:memory:/kubepods/burstable/pod{UID}/0123abcd\n", UID, id="cgroupfs driver, version 1"),
        pytest.param(
            f"0::/kubepods.slice/burstable.slice/kubepods-burstable-pod{UID.replace('-', '_')}.slice/cri-a.scope",
            UID,
            id="systemd driver, version 2",
        ),
        pytest.param("0::/kubepods/pod" + "a" * 32 + "/x", "a" * 32, id="a static pod"),
        pytest.param("0::/system.slice/nvidia-persistenced.service", None, id="no pod"),
        pytest.param("", None, id="a process that ended"),
    ],
)
def test_a_process_is_known_by_its_cgroup(cgroup: str, uid: str | None) -> None:
    """Every spelling of the kubelet's leads to the pod's UID."""
    assert pod_uid(cgroup) == uid


def _words(processes: int, *, containers: int = 1, allowed: int = 1) -> tuple[str, ...]:
    holders = [Owner("a", "server", f"c{number}") for number in range(containers)]
    return excess([f"/pod{UID}/x"] * processes, {UID: ("a", "server")}, holders, allowed)


def test_as_many_processes_as_the_limits_are_for_are_fine() -> None:
    """One each, or as many as the policy says."""
    assert _words(1) == _words(2, containers=2) == _words(6, containers=2, allowed=3) == ()


def test_more_processes_than_the_limits_are_for_are_told_of() -> None:
    """Each has the container's whole share: the pod is named, with both numbers."""
    assert _words(3) == ("a/server has 3 processes on the GPU and limits for 1",)


def test_processes_of_no_pod_are_nobodys() -> None:
    """What runs outside of Kubernetes is not held against a pod."""
    assert excess(["0::/user.slice"], {UID: ("a", "server")}, [Owner("a", "server", "c")], 1) == ()


def test_an_mps_server_beside_the_agent_is_no_pods_excess() -> None:
    """Where it can't be moved to a cgroup of its own it is in that of the agent's pod, which holds no slots."""
    agent, server = f"0::/kubepods/pod{UID}/agent", f"0::/kubepods/pod{UID.replace('1', '2')}/x"
    pods = {UID: ("meshctl-agent", "agent"), UID.replace("1", "2"): ("a", "server")}
    holders = [Owner("a", "server", "c")]
    assert excess([agent, server], pods, holders, 1, own=agent) == ()
    assert excess([agent, server], pods, holders, 1) != ()
