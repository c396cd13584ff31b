"""A `meshctl agent` as a process, as users start it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from tests.harness.tools import DEADLINE_S, ToolProcess, free_ports, page

PRODUCT = "Tesla V100-SXM2-16GB"


def inventory(directory: Path, *uuids: str, cc: str = "7.0", product: str = PRODUCT) -> Path:
    """An inventory file with these GPUs; replaces the one that is there."""
    path, fresh = directory / "gpus.json", directory / "gpus.json.new"
    gpus = [
        {"uuid": uuid, "product": product, "memory": "16Gi", "computeCapability": cc, "minor": minor}
        for minor, uuid in enumerate(uuids)
    ]
    fresh.write_bytes(orjson.dumps(gpus))
    fresh.replace(path)
    return path


def policies(directory: Path, **specs: Mapping[str, Any]) -> Path:
    """A policy file: name -> spec; replaces the one that is there."""
    path, fresh = directory / "policies.yaml", directory / "policies.yaml.new"
    documents = [
        {"apiVersion": "meshctl.io/v1alpha1", "kind": "GPUSharingPolicy", "metadata": {"name": name}, "spec": spec}
        for name, spec in specs.items()
    ]
    fresh.write_text("\n---\n".join(orjson.dumps(document).decode() for document in documents))
    fresh.replace(path)
    return path


HASTY = Path(__file__).with_name("hasty_agent.py")


class AgentProcess(ToolProcess):
    """Ready when it serves its admin API. `options` go on top; a `hasty` one looks at everything more often."""

    name = "agent"

    def __init__(
        self,
        directory: Path,
        plugin_dir: Path,
        pod_resources: Path,
        *options: str | Path,
        environment: Mapping[str, str] | None = None,
        hasty: bool = False,
    ) -> None:
        super().__init__(directory)
        self._program = (sys.executable, HASTY) if hasty else (Path(sys.executable).with_name("meshctl"),)
        self._sockets = (f"--plugin-dir={plugin_dir}", f"--pod-resources={pod_resources}")
        self._options = options
        self._environment = environment or {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def ready_url(self) -> str:
        return f"{self.url}/healthz"

    def environment(self) -> Mapping[str, str]:
        return {**os.environ, **self._environment}

    def command(self) -> Sequence[str | Path]:
        return (
            *self._program,
            "agent",
            "--node=node-1",
            f"--state={self.directory / 'agent.json'}",
            f"--mps-root={self.directory / 'mps'}",
            f"--admin=127.0.0.1:{self.ports[0]}",
            *self._sockets,
            *self._options,
        )

    def refused(self, *before: str) -> tuple[int, str]:
        """Runs it where it can't start: its exit status and what it said. `before` is what runs the command, if any."""
        self.ports = free_ports(self.port_count)
        done = subprocess.run(
            [*before, *self.command()], capture_output=True, text=True, timeout=DEADLINE_S, env=self.environment()
        )
        return done.returncode, done.stderr

    def problems(self) -> list[str]:
        """What /readyz says is wrong; empty while it is not ready."""
        text = page(f"{self.url}/readyz")
        found: list[str] = orjson.loads(text)["problems"] if text is not None else []
        return found

    def condition(self, uuid: str, type_: str) -> dict[str, Any]:
        """Of one GPU object; empty when there is none."""
        conditions = self.gpus().get(uuid, {}).get("conditions", ())
        return next((one for one in conditions if one["type"] == type_), {})

    def gpus(self) -> dict[str, Any]:
        """Status of the GPU objects by UUID, as the agent tells."""
        text = page(f"{self.url}/api/v1/gpus")
        assert text is not None, "the agent does not answer"
        return {one["spec"]["uuid"]: one["status"] for one in orjson.loads(text)}

    def metrics(self) -> str:
        return page(f"{self.url}/metrics") or ""

    @property
    def memory_mib(self) -> float:
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))
