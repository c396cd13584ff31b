"""A whole cluster on loopback: Kubernetes' control plane with our CRDs and, on request, Istio with its gateways.

    async with Cluster(tmp_path, istio=True, gateways=1) as cluster:
        await cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "demo"}})

Invariant: everything it starts ends with it, and everything it writes is in its directory. It is bound to no event
loop: `up` and `down` block, for a fixture of the session; what a test calls may be awaited from any loop.
"""

from __future__ import annotations

import base64
import csv
import os
import secrets
import signal
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import orjson

from tests.cluster.processes import (
    ISTIO_NAMESPACE,
    ApiServer,
    ControllerManager,
    Etcd,
    GatewayEnvoy,
    Istiod,
    Scheduler,
    binary,
    reserved_port,
)
from tests.harness.tools import DEADLINE_S, Processes, ToolProcess, completed, require, until

ADMIN = "admin"
GATEWAY = f"{ISTIO_NAMESPACE}/ingress"
"""The Gateway object, as a VirtualService names it: plain HTTP for every host."""
OUR_CRDS = Path(__file__).parents[2] / "crds"
Document = Mapping[str, Any]


class KubectlError(AssertionError):
    """What kubectl, or the API server through it, said against a command."""


class Cluster(Processes):
    """An async context manager, see the module; `istio` may come later, with `start_istio`.

    Attributes are the processes, for tests that break them: `etcd`, `apiserver`, `controllers`, `scheduler` (None
    unless asked for), `istiod`, `gateways`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        istio: bool = False,
        gateways: int = 1,
        crds: bool = True,
        scheduler: bool = False,
        pilot: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self.kubeconfig = directory / "admin.kubeconfig"
        """Of an administrator (group system:masters)."""
        self.kubectl_binary = binary("kubectl")
        if istio:
            require("istio")  # before anything starts
        self._want = (istio, gateways, crds)
        self._token = secrets.token_hex(16)
        self._pilot = pilot
        super().__init__()
        self._key = directory / "service-accounts.key"
        self.etcd = Etcd(directory / "etcd")
        self.apiserver = ApiServer(directory / "apiserver", self.etcd, directory / "tokens.csv", self._key)
        self.controllers = ControllerManager(directory / "controllers", self.kubeconfig, self._key)
        self.scheduler = Scheduler(directory / "scheduler", self.kubeconfig) if scheduler else None
        self.istiod: Istiod | None = None
        self.gateways: list[GatewayEnvoy] = []

    # ------------------------------------------------------------------------------------------------ up and down

    def up(self) -> Self:
        """Returns when everything takes requests."""
        istio, gateways, crds = self._want
        self.directory.mkdir(parents=True, exist_ok=True)
        self._stack.callback(self.apiserver.close)
        try:
            self._write_secrets()
            self._start(self.etcd)
            self._start(self.apiserver)
            self._write_kubeconfig(self.kubeconfig, ADMIN, self._token)
            # Custom resources first: the garbage collector looks for new kinds only every half a minute.
            self._create_crds([OUR_CRDS] if crds else [], istio=istio)
            self._start(self.controllers)
            if self.scheduler:
                self._start(self.scheduler)
            if istio:
                self._start_istio(gateways)
        except BaseException:
            self.down()
            raise
        return self

    @property
    def processes(self) -> list[ToolProcess]:
        """Everything that is part of it, running or not."""
        optional = [process for process in (self.scheduler, self.istiod) if process is not None]
        return [self.etcd, self.apiserver, self.controllers, *optional, *self.gateways]

    def _write_secrets(self) -> None:
        with (self.directory / "tokens.csv").open("w", newline="") as tokens:
            csv.writer(tokens).writerow((self._token, ADMIN, ADMIN, "system:masters"))
        identity = ("-x509", "-subj", "/O=system:masters/CN=kube-apiserver", "-out", self.apiserver.identity)
        made = ("openssl", "req", *identity, "-newkey", "rsa:2048", "-nodes", "-keyout", self._key)
        subprocess.run(made, check=True, capture_output=True, timeout=DEADLINE_S)

    def _write_kubeconfig(self, path: Path, user: str, token: str, namespace: str = "default") -> None:
        authority = base64.b64encode(self.apiserver.certificate.read_bytes()).decode()
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": self.server, "certificate-authority-data": authority}}],
            "users": [{"name": user, "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user, "namespace": namespace}}],
            "current-context": "test",
        }
        path.write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))  # JSON is YAML
        path.chmod(0o600)

    def _create_crds(self, ours: Sequence[Path], *, istio: bool) -> None:
        paths = [*ours, *([require("istio") / "crds.yaml"] if istio else [])]
        if paths:
            # Server-side: nothing is read before it is written, and no annotation of a megabyte.
            self.kubectl_now("apply", "--server-side", *(f"--filename={path}" for path in paths))
            self.kubectl_now("wait", "--for=condition=Established", "crd", "--all", f"--timeout={DEADLINE_S:g}s")

    # ----------------------------------------------------------------------------------------------------- Kubernetes

    @property
    def server(self) -> str:
        """The API server's URL; it stays when the server is stopped and started."""
        return self.apiserver.url

    async def kubectl(self, *arguments: str, stdin: str = "", kubeconfig: Path | None = None) -> str:
        """What kubectl prints. Raises KubectlError with what it says when it fails."""
        return await completed(partial(self.kubectl_now, *arguments, stdin=stdin, kubeconfig=kubeconfig))

    def kubectl_now(self, *arguments: str, stdin: str = "", kubeconfig: Path | None = None) -> str:
        """`kubectl`, without an event loop."""
        command: tuple[str | Path, ...] = (
            self.kubectl_binary,
            f"--kubeconfig={kubeconfig or self.kubeconfig}",
            *arguments,
        )
        # Its cache of what the server has lives and dies with the cluster.
        environment = {**os.environ, "KUBECACHEDIR": str(self.directory / "kubectl")}
        environment["KUBECONFIG"] = str(kubeconfig or self.kubeconfig)
        ran = subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=2 * DEADLINE_S, env=environment
        )
        if ran.returncode != 0:
            raise KubectlError(f"kubectl {' '.join(arguments)}: {ran.stderr.strip()[:2000]}")
        return ran.stdout

    async def get(self, *arguments: str) -> Any:
        """The JSON of ``kubectl get``."""
        return orjson.loads(await self.kubectl("get", *arguments, "--output=json"))

    async def apply(self, *what: str | Path | Document, kubeconfig: Path | None = None) -> str:
        """``kubectl apply`` of YAML texts, paths (files, folders) and documents, in one go."""
        paths = [f"--filename={path}" for path in what if isinstance(path, Path)]
        texts = [t if isinstance(t, str) else orjson.dumps(t).decode() for t in what if not isinstance(t, Path)]
        stdin = ["--filename=-"] if texts else []
        return await self.kubectl("apply", *paths, *stdin, stdin="\n---\n".join(texts), kubeconfig=kubeconfig)

    async def namespace(self, prefix: str = "test") -> str:
        """A new namespace, ready for pods, named `prefix` and something of its own. It goes with the cluster."""
        name = f"{prefix}-{secrets.token_hex(4)}"
        await self.kubectl("create", "namespace", name)

        async def ready() -> bool:
            return bool((await self.get("serviceaccounts", "--namespace", name))["items"])

        await until(ready, f"namespace {name} has its service account; log: {self.controllers.log}")
        return name

    async def kubeconfig_for(self, account: str) -> Path:
        """Of the service account `account` (NAMESPACE/NAME, which must exist): what a pod with it may do."""
        namespace, _, name = account.partition("/")
        token = await self.kubectl("create", "token", name, "--namespace", namespace)
        path = self.directory / f"{namespace}.{name}.kubeconfig"
        self._write_kubeconfig(path, name, token.strip(), namespace)
        return path

    def kubeconfig_bound(self, account: str, node: str) -> Path:
        """Likewise, of a pod of that account on `node`: the token says so. Without an event loop."""
        namespace, _, name = account.partition("/")
        bound = ("--bound-object-kind=Node", f"--bound-object-name={node}")
        token = self.kubectl_now("create", "token", name, "--namespace", namespace, *bound)
        path = self.directory / f"{namespace}.{name}.{node}.kubeconfig"
        self._write_kubeconfig(path, name, token.strip(), namespace)
        return path

    async def stop_apiserver(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Connections end and are refused from here on; the data stay. Asked kindly, it would wait for its watchers."""
        await self.apiserver.end(number)

    async def start_apiserver(self) -> None:
        """Again, at the same address."""
        await completed(self.apiserver.start)

    def freeze(self) -> None:
        """The API server keeps its connections, takes new ones, and answers nothing."""
        self.apiserver.freeze()

    def thaw(self) -> None:
        self.apiserver.thaw()

    # ---------------------------------------------------------------------------------------------------------- Istio

    @property
    def istiod_debug(self) -> str:
        """URL of istiod's monitoring address: /metrics, /debug/syncz, /debug/config_dump..."""
        assert self.istiod is not None, "the cluster was started without Istio"
        return self.istiod.monitoring

    def gateway(self, index: int = 0) -> GatewayEnvoy:
        """One of the Envoys behind the Gateway object `GATEWAY`: its `url`, `admin` and `node`."""
        return self.gateways[index]

    async def restart_istiod(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ends it, then starts it at the same address."""
        assert self.istiod is not None, "the cluster was started without Istio"
        await self.istiod.end(number)
        await completed(self.istiod.start)

    async def start_istio(self, gateways: int = 1) -> None:
        """Istio comes to a cluster that runs without it, its CRDs first."""
        await completed(partial(self._create_crds, [], istio=True))
        await completed(self._start_istio, gateways)

    def _start_istio(self, gateways: int) -> None:
        reserved = self._stack.enter_context(reserved_port())
        port = int(reserved.getsockname()[1])
        self.kubectl_now("create", "namespace", ISTIO_NAMESPACE)
        self.kubectl_now("create", "--filename=-", stdin=orjson.dumps(_gateway(port)).decode())
        self.istiod = Istiod(self.directory / "istiod", self.kubeconfig, self._pilot)
        self._start(self.istiod)
        for index in range(gateways):
            gateway = GatewayEnvoy(self.directory / f"gateway-{index}", self.istiod.grpc, index, port)
            self.gateways.append(gateway)
            self._start(gateway)


def _gateway(port: int) -> Document:
    """On loopback only, at `port`, for every host of every namespace."""
    namespace, _, name = GATEWAY.partition("/")
    http = {"number": port, "name": "http", "protocol": "HTTP"}
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "Gateway",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "selector": {"istio": "ingressgateway"},
            "servers": [{"port": http, "bind": "127.0.0.1", "hosts": ["*"]}],
        },
    }
