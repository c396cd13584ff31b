"""GPUSharingPolicies among manifests of routes: `meshctl validate` judges them, routes' sources pass them over."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from meshctl.adapters.kubernetes.source import KubernetesSource
from meshctl.adapters.manifests import Contents, read_directory
from meshctl.cli.validate import validate
from meshctl.model import RouteId
from tests.harness.cluster_objects import served
from tests.harness.manifests import profile, route, sharing_policy, text
from tests.harness.objects import MemoryObjects

app = typer.Typer()
app.command()(validate)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("replicas: 49", ""),
        ("replicas: 0", "spec.replicas: must be greater than or equal to 1, not 0"),
        ("replicas: 61", "spec.replicas: 61 slots with 1 client each are 61 clients; an MPS server has at most 60"),
        ("mod: MPS", "spec.mod: is not a field here; did you mean mode?"),
        ("nodeSelector: {a b: c}", "spec.nodeSelector.a b: 'a b' is not a label's key"),
    ],
)
def test_a_policy_is_judged_with_line_and_column(tmp_path: Path, spec: str, said: str) -> None:
    """Like every other object; 0 slots and more than any MPS server has are refused before a cluster sees them."""
    path = tmp_path / "a.yaml"
    path.write_text(
        f"apiVersion: meshctl.io/v1alpha1\nkind: GPUSharingPolicy\nmetadata: {{name: shared}}\nspec:\n  {spec}\n"
    )
    result = CliRunner().invoke(app, [str(path)])
    assert result.exit_code == (2 if said else 0)
    assert result.stdout.startswith(f"{path}:5:" if said else "")
    assert said in result.stdout
    assert result.stderr == ("0 valid objects, 1 problems\n" if said else "1 valid objects, 0 problems\n")


def test_a_directory_of_routes_may_have_policies(tmp_path: Path) -> None:
    """They are no routes, and no fault; a look that sees one come or go changes no route."""
    (tmp_path / "routes.yaml").write_text(text(route("a"), profile()))
    before = read_directory(tmp_path, Contents())
    (tmp_path / "gpus.yaml").write_text(text(sharing_policy(), sharing_policy("b", mode="Exclusive")))
    after = read_directory(tmp_path, before)
    assert (before.faults, after.faults) == ((), ())
    assert list(after.routes) == [RouteId("default/a")]
    assert after.routes[RouteId("default/a")] is before.routes[RouteId("default/a")]


async def test_a_cluster_of_routes_may_have_policies() -> None:
    """They wake nobody, not even broken ones: the GPU operator tells of them."""
    objects = MemoryObjects(served(route("a")), served(profile()))
    source = KubernetesSource(objects)
    await source.start()
    desired = source.desired()
    objects.put(sharing_policy())
    objects.put(sharing_policy("broken", replicas=0))
    assert not source.look()
    assert source.desired() == desired
