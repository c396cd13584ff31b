"""The fleet's file: what it means, and what each mistake in it is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshctl.errors import InputError
from meshctl.model import ServiceProfile
from meshctl.sim.config import FleetConfig, load_fleet_config, server_plans

GOOD = """\
model: resnet50
servers:
- {gpu: V100, count: 2, service: {base: 5ms, perItem: 0.8ms}, port: 9001}
- gpu: T4
  service: {points: {"1": 11.8ms, 8: 24.4ms}}
  concurrency: 2
  metricsPort: 9110
  model: other
- {gpu: V100, service: {base: 5ms, perItem: 0.8ms}}
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "fleet.yaml"
    path.write_text(text)
    return path


def test_servers_come_in_order_with_names_ports_and_profiles(tmp_path: Path) -> None:
    """Numbers count per product over the whole file, ports within an entry; what an entry leaves out is the file's."""
    plans = server_plans(load_fleet_config(write(tmp_path, GOOD)))

    assert [plan.identity.name for plan in plans] == ["v100-0", "v100-1", "t4-0", "v100-2"]
    assert [(plan.port, plan.metrics_port) for plan in plans] == [(9001, None), (9002, None), (0, 9110), (0, None)]
    assert [plan.identity.model for plan in plans] == ["resnet50", "resnet50", "other", "resnet50"]
    assert [plan.concurrency for plan in plans] == [1, 1, 2, 1]
    assert plans[2].profile == ServiceProfile(((1.0, 0.0118), (8.0, 0.0244)))


def test_gpus_have_the_same_uuids_in_every_run(tmp_path: Path) -> None:
    """A UUID depends on the server's name alone, and no two share one."""
    config = load_fleet_config(write(tmp_path, GOOD))
    uuids = [plan.identity.gpu_uuid for plan in server_plans(config)]

    assert uuids == [plan.identity.gpu_uuid for plan in server_plans(config)]
    assert len(set(uuids)) == len(uuids)


def test_a_config_survives_being_written_as_json(tmp_path: Path) -> None:
    """What is handed to a child process means the same there."""
    config = load_fleet_config(write(tmp_path, GOOD))
    again = load_fleet_config(write(tmp_path, config.model_dump_json(by_alias=True, exclude_none=True)))

    assert isinstance(again, FleetConfig)
    assert server_plans(again) == server_plans(config)


@pytest.mark.parametrize(
    ("old", "new", "place", "said"),
    [
        pytest.param("count: 2", "count: 0", "fleet.yaml:3:", "count", id="no-server"),
        pytest.param("base: 5ms", "base: 5", "fleet.yaml:3:", "no unit", id="no-unit"),
        pytest.param("base: 5ms, ", "", "fleet.yaml:3:", "base and perItem", id="half-a-line"),
        pytest.param("concurrency: 2", "concurency: 2", "fleet.yaml:6:", "did you mean concurrency", id="typo"),
        pytest.param("8: 24.4ms", "8: 4ms", "fleet.yaml:5:", "cannot be faster", id="not-monotone"),
        pytest.param("port: 9001", "port: 70000", "fleet.yaml:3:", "port", id="no-such-port"),
        pytest.param("port: 9001", "port: 65535", "fleet.yaml:3:", "65535", id="ports-run-out"),
        pytest.param("- gpu: T4", "- gpu: [T4]", "fleet.yaml:4:", "gpu", id="wrong-type"),
        pytest.param("servers:", "server:", "fleet.yaml:", "servers", id="no-servers"),
        pytest.param("model: resnet50", "model: [", "fleet.yaml:", "YAML", id="not-yaml"),
        pytest.param("model: resnet50", "a: 1\n---\nb: 1\n---", "fleet.yaml", "3 documents", id="several-documents"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, old: str, new: str, place: str, said: str) -> None:
    """The error has file, line and field, and says what is wrong with it."""
    assert old in GOOD
    with pytest.raises(InputError) as caught:
        load_fleet_config(write(tmp_path, GOOD.replace(old, new, 1)))

    assert place in str(caught.value)
    assert said in str(caught.value)


def test_a_missing_file_is_the_callers_mistake(tmp_path: Path) -> None:
    """A path that is not there is named."""
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        load_fleet_config(tmp_path / "nowhere.yaml")
