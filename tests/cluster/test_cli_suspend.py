"""`meshctl pause` and `meshctl resume` on a real API server, and `kubectl meshctl`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner

from meshctl.cli.app import app
from meshctl.errors import InputError, MeshctlError, RefusedError
from tests.cluster.cluster import Cluster
from tests.harness.manifests import changed, route
from tests.harness.tools import DEADLINE_S, completed

pytestmark = pytest.mark.cluster


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """With the route `resnet` in it."""
    name = f"suspend-{os.urandom(4).hex()}"
    cluster.kubectl_now("create", "namespace", name)
    stored(cluster, changed(route(), "metadata.namespace", name))
    yield name
    cluster.kubectl_now("delete", "namespace", name, "--wait=false")


def stored(cluster: Cluster, data: dict[str, Any]) -> None:
    cluster.kubectl_now("apply", "--filename=-", stdin=orjson.dumps(data).decode())


def live(cluster: Cluster, namespace: str) -> Any:
    return orjson.loads(cluster.kubectl_now("get", "mr", "resnet", "--namespace", namespace, "--output=json"))


def run(*arguments: object) -> str:
    """What the command prints. Raises what it raises."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, MeshctlError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_pause_and_resume_change_suspend_and_nothing_else(cluster: Cluster, namespace: str) -> None:
    """Paused twice is paused once; resuming leaves the time in an annotation, for the controller."""
    name = f"{namespace}/resnet"
    before = live(cluster, namespace)
    assert f"ModelRoute {name} is paused" in run("pause", name, "--kubeconfig", cluster.kubeconfig)
    paused = live(cluster, namespace)
    assert paused["spec"] == before["spec"] | {"suspend": True}
    run("pause", "resnet", "-n", namespace, "--kubeconfig", cluster.kubeconfig)
    assert live(cluster, namespace) == paused

    assert f"ModelRoute {name} is resumed" in run("resume", name, "--kubeconfig", cluster.kubeconfig)
    resumed = live(cluster, namespace)
    assert resumed["spec"] == before["spec"]
    new = resumed["metadata"]["annotations"].items() - before["metadata"]["annotations"].items()
    ((key, at),) = new
    assert key == "meshctl.io/resumed-at"
    assert datetime.fromisoformat(at).tzinfo is not None


def test_route_kept_in_git_is_said_to_be(cluster: Cluster, namespace: str) -> None:
    """Where Argo CD or Flux would undo it, the command says so."""
    label = {"argocd.argoproj.io/instance": "ml"}
    stored(cluster, changed(changed(route(), "metadata.namespace", namespace), "metadata.labels", label))
    assert "kept as it is in Git: change `suspend: true` there too" in run(
        "pause", f"{namespace}/resnet", "--kubeconfig", cluster.kubeconfig
    )


def test_wrong_names_say_what_there_is(cluster: Cluster, namespace: str) -> None:
    """A route that is not there is the caller's mistake, and the ones that are there are named."""
    with pytest.raises(InputError, match=rf"no ModelRoute nope in namespace {namespace}; there are: resnet"):
        run("pause", f"{namespace}/nope", "--kubeconfig", cluster.kubeconfig)
    with pytest.raises(InputError, match="in namespace default; see `kubectl get modelroutes -A`"):
        run("pause", "no-such-route", "--kubeconfig", cluster.kubeconfig)  # the namespace of the kubeconfig's context


async def test_who_may_not_is_told_so(cluster: Cluster) -> None:
    """Without the rights nothing is changed, and the API server's words say which are missing."""
    namespace = await cluster.namespace("suspend")
    await cluster.apply(changed(route(), "metadata.namespace", namespace))
    kubeconfig = await cluster.kubeconfig_for(f"{namespace}/default")
    command = (sys.executable, "-m", "meshctl", "pause", "resnet", "--kubeconfig", kubeconfig)
    ran = await completed(partial(subprocess.run, command, capture_output=True, text=True, timeout=DEADLINE_S))
    assert (ran.returncode, ran.stdout) == (RefusedError.exit_code, "")
    assert "cannot get resource" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_kubectl_runs_it_as_a_plugin(cluster: Cluster, namespace: str) -> None:
    """`kubectl meshctl` is the same program; it finds the cluster as kubectl does."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "KUBECONFIG": str(cluster.kubeconfig)}

    def plugin(*arguments: str) -> subprocess.CompletedProcess[str]:
        command: list[str | Path] = [cluster.kubectl_binary, "meshctl", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, env=environment)

    paused = plugin("pause", f"{namespace}/resnet")
    assert (paused.returncode, paused.stderr) == (0, "")
    assert live(cluster, namespace)["spec"]["suspend"] is True
    assert "kubectl meshctl" in plugin("--help").stdout
