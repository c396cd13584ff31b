"""A `meshctl extender` as a process, as deploy/extender starts it: HTTPS, and only for who has a certificate."""

from __future__ import annotations

import functools
import ssl
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.harness.tools import DEADLINE_S, ToolProcess, page

DEPLOY = Path(__file__).parents[2] / "deploy" / "extender"
SERVER = "meshctl-extender.meshctl-system.svc"
"""The name in its certificate."""


class ExtenderProcess(ToolProcess):
    """Ready when it leads and knows the cluster. Certificates are those of deploy/extender/certificates.sh."""

    name = "extender"

    def __init__(self, directory: Path, kubeconfig: Path, lease: str, *options: str | Path) -> None:
        super().__init__(directory)
        self._options = (f"--kubeconfig={kubeconfig}", f"--lease={lease}", *options)
        self._certificates = directory / "certificates"

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.ports[0]}"

    def ready(self) -> bool:
        return page(f"{self.url}/readyz", self._trusted) is not None

    def metrics(self) -> str:
        return page(f"{self.url}/metrics", self._trusted) or ""

    def command(self) -> Sequence[str | Path]:
        if not self._certificates.exists():
            made = (DEPLOY / "certificates.sh", self._certificates)
            subprocess.run(made, check=True, capture_output=True, timeout=DEADLINE_S)
        server = self._certificates / "server"
        return (
            Path(sys.executable).with_name("meshctl"),
            "extender",
            f"--listen=127.0.0.1:{self.ports[0]}",
            f"--tls-cert={server / 'tls.crt'}",
            f"--tls-key={server / 'tls.key'}",
            f"--client-ca={server / 'ca.crt'}",
            *self._options,
        )

    def scheduler_config(self) -> dict[str, Any]:
        """deploy/'s KubeSchedulerConfiguration, which finds this process; to be asked when it has started once."""
        with (DEPLOY / "scheduler-config.yaml").open() as stream:
            config: dict[str, Any] = YAML(typ="safe").load(stream)
        (extender,) = config["extenders"]
        client = self._certificates / "client"
        names = {"caFile": "ca.crt", "certFile": "tls.crt", "keyFile": "tls.key"}
        extender["urlPrefix"] = self.url
        extender["tlsConfig"] |= {key: str(client / name) for key, name in names.items()}
        return config

    @functools.cached_property
    def _trusted(self) -> ssl.SSLContext:
        client = self._certificates / "client"
        context = ssl.create_default_context(cafile=client / "ca.crt")
        context.check_hostname = False  # it is asked by its address; the scheduler checks the name
        context.load_cert_chain(client / "tls.crt", client / "tls.key")
        return context
