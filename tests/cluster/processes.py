"""The processes of a cluster: etcd, Kubernetes' control plane, istiod, and Envoys that istiod configures.

Each listens on loopback only, on ports from the kernel, and keeps everything it writes in its directory. None needs
root or a network.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from meshctl.address import Address
from meshctl.sim.envoy import envoy_binary
from tests.harness.tools import ToolProcess, page, require
from xds.bootstrap import base, http2, static_assignment

ISTIO_NAMESPACE = "istio-system"
ISTIO_TAGS = (
    # As in Istio's own bootstrap: Envoy's would end a cluster's name at its first dot, which is inside ours.
    {"tag_name": "cluster_name", "regex": "^cluster(\\.(.+);)"},
    {"tag_name": "response_code", "regex": "_rq(_(\\d{3}))$"},
    {"tag_name": "response_code_class", "regex": "_rq(_(\\dxx))$"},
)
CONTROLLERS = (
    "serviceaccount-controller",
    "serviceaccount-token-controller",
    "endpointslice-controller",
    "garbage-collector-controller",
    "namespace-controller",
)
"""Of kube-controller-manager: what a namespace, a Service and an owner reference need."""


def binary(name: str, tool: str = "kubernetes") -> Path:
    """The program `name` of `tool`; KUBEBUILDER_ASSETS goes first, for those it has. Skips (fails in CI) without."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if assets and (Path(assets) / name).exists():
        return Path(assets) / name
    return require(tool) / name


def healthy(url: str) -> bool:
    """Whether a GET is answered 200, by a server whose certificate it made for itself and shows to nobody else."""
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    return page(url, trusting) is not None


def reserved_port() -> socket.socket:
    """A port that stays ours while the socket is open, for programs that bind with SO_REUSEPORT: nobody else gets it,
    and as it does not listen, no connection goes to it."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("127.0.0.1", 0))
    return held


class Etcd(ToolProcess):
    """One member, data in its directory."""

    name = "etcd"
    port_count = 2

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.binary = binary("etcd", "etcd")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def ready_url(self) -> str:
        return f"{self.url}/health"

    def command(self) -> Sequence[str | Path]:
        peer = f"http://127.0.0.1:{self.ports[1]}"
        return (
            self.binary,
            f"--data-dir={self.directory / 'data'}",
            f"--listen-client-urls={self.url}",
            f"--advertise-client-urls={self.url}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--heartbeat-interval=10",  # it elects itself: there is nobody to wait for
            "--election-timeout=50",
            "--logger=zap",
            "--log-level=warn",
        )


class ApiServer(ToolProcess):
    """kube-apiserver with RBAC and static tokens; its port stays its own while it is stopped, until `close`.

    `tokens` are Kubernetes' own token file: token,user,uid,"groups". `key` signs the service accounts' tokens, and
    is the server's own towards kubelets, with the certificate `identity`.
    """

    name = "kube-apiserver"
    port_count = 0

    def __init__(self, directory: Path, etcd: Etcd, tokens: Path, key: Path) -> None:
        super().__init__(directory)
        self.binary = binary(self.name)
        self._etcd, self._tokens, self._key = etcd, tokens, key
        self._reserved = reserved_port()
        self.url = f"https://127.0.0.1:{self._reserved.getsockname()[1]}"
        self.certificate = directory / "pki" / "apiserver.crt"
        """Made by the server itself: its certificate, and the authority's, which clients trust."""
        self.identity = key.with_suffix(".crt")
        """What it shows to kubelets; signed by itself, so it is the authority too."""

    def close(self) -> None:
        self._reserved.close()

    def ready(self) -> bool:
        if not self.certificate.exists():
            return False
        return page(f"{self.url}/readyz", ssl.create_default_context(cafile=self.certificate)) is not None

    def command(self) -> Sequence[str | Path]:
        return (
            self.binary,
            f"--etcd-servers={self._etcd.url}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self.url.rpartition(':')[2]}",
            "--permit-port-sharing",
            f"--cert-dir={self.certificate.parent}",
            f"--token-auth-file={self._tokens}",
            "--authorization-mode=Node,RBAC",
            "--allow-privileged=true",  # as everybody's cluster; pod security says where
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self._key}",
            f"--service-account-signing-key-file={self._key}",
            "--service-cluster-ip-range=198.51.100.0/24",  # TEST-NET-2: leads nowhere
            "--endpoint-reconciler-type=none",
            "--kubelet-preferred-address-types=Hostname",
            f"--kubelet-client-certificate={self.identity}",
            f"--kubelet-client-key={self._key}",
            "--profiling=false",
        )


class ControllerManager(ToolProcess):
    """kube-controller-manager with the few controllers that are needed."""

    name = "kube-controller-manager"

    def __init__(self, directory: Path, kubeconfig: Path, key: Path, controllers: Sequence[str] = CONTROLLERS) -> None:
        super().__init__(directory)
        self.binary = binary(self.name)
        self._kubeconfig, self._key, self._controllers = kubeconfig, key, controllers

    def ready(self) -> bool:
        return healthy(f"https://127.0.0.1:{self.ports[0]}/healthz")

    def command(self) -> Sequence[str | Path]:
        return (
            self.binary,
            f"--kubeconfig={self._kubeconfig}",
            f"--controllers={','.join(self._controllers)}",
            f"--service-account-private-key-file={self._key}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self.ports[0]}",
            f"--cert-dir={self.directory / 'pki'}",
            "--leader-elect=false",
        )


class Scheduler(ToolProcess):
    """kube-scheduler; `config` is a KubeSchedulerConfiguration (Kubernetes' own profile without), used by `kubeconfig`.

    It competes for a Lease only where the configuration says so.
    """

    name = "kube-scheduler"

    def __init__(self, directory: Path, kubeconfig: Path, config: Mapping[str, Any] | None = None) -> None:
        super().__init__(directory)
        self.binary = binary(self.name)
        self._config = {
            "apiVersion": "kubescheduler.config.k8s.io/v1",
            "kind": "KubeSchedulerConfiguration",
            "leaderElection": {"leaderElect": False},
            **(config or {}),
            # With --config, --kubeconfig is ignored.
            "clientConnection": {**(config or {}).get("clientConnection", {}), "kubeconfig": str(kubeconfig)},
        }

    def ready(self) -> bool:
        return healthy(f"https://127.0.0.1:{self.ports[0]}/readyz")

    def command(self) -> Sequence[str | Path]:
        config = self.directory / "config.json"  # JSON is YAML
        config.write_bytes(orjson.dumps(self._config, option=orjson.OPT_INDENT_2))
        return (
            self.binary,
            f"--config={config}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self.ports[0]}",
            f"--cert-dir={self.directory / 'pki'}",
            "--authentication-skip-lookup=true",
        )


class Istiod(ToolProcess):
    """istiod without what an ingress gateway does not need: certificates, injection, its webhooks.

    `environment_more` are settings of pilot (PILOT_DEBOUNCE_AFTER for example).
    """

    name = "istiod"
    port_count = 3

    def __init__(self, directory: Path, kubeconfig: Path, more: Mapping[str, str] | None = None) -> None:
        super().__init__(directory)
        self.binary = binary("pilot-discovery", "istio")
        self._kubeconfig, self._more = kubeconfig, dict(more or {})

    @property
    def grpc(self) -> Address:
        """Where Envoys get their configuration."""
        return Address("127.0.0.1", self.ports[1])

    @property
    def monitoring(self) -> str:
        return f"http://127.0.0.1:{self.ports[2]}"

    @property
    def ready_url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}/ready"

    def command(self) -> Sequence[str | Path]:
        mesh = self.directory / "mesh.json"  # JSON is YAML
        mesh.write_bytes(orjson.dumps({"enableAutoMtls": False, "rootNamespace": ISTIO_NAMESPACE}))
        return (
            self.binary,
            "discovery",
            f"--kubeconfig={self._kubeconfig}",
            f"--meshConfig={mesh}",
            "--registries=Kubernetes",
            f"--httpAddr=127.0.0.1:{self.ports[0]}",
            f"--grpcAddr={self.grpc}",
            f"--monitoringAddr=127.0.0.1:{self.ports[2]}",
            "--httpsAddr=",
            "--secureGRPCAddr=",
            "--ctrlz_port=0",
            "--shutdownDuration=1s",
        )

    def environment(self) -> Mapping[str, str]:
        return {
            **os.environ,
            "POD_NAMESPACE": ISTIO_NAMESPACE,
            "POD_NAME": "istiod-0",
            "ENABLE_CA_SERVER": "false",
            "VALIDATION_WEBHOOK_CONFIG_NAME": "",
            "INJECTION_WEBHOOK_CONFIG_NAME": "",
            "PILOT_ENABLE_GATEWAY_API": "false",
            # Filters that only Istio's own build of Envoy has.
            "PILOT_ENABLE_METADATA_EXCHANGE": "false",
            "PILOT_ENABLE_ALPN_FILTER": "false",
            **self._more,
        }


class GatewayEnvoy(ToolProcess):
    """A stock Envoy as an ingress gateway: a pod ``gw-<index>`` labelled istio=ingressgateway, to istiod.

    Gateways of one cluster share the port of the Gateway object (SO_REUSEPORT), as replicas behind a Service would.
    """

    def __init__(self, directory: Path, istiod: Address, index: int, port: int) -> None:
        self.name = f"gw-{index}"
        super().__init__(directory)
        self.binary = envoy_binary()
        self._istiod, self._port = istiod, port
        self.node = f"router~127.0.0.1~{self.name}.{ISTIO_NAMESPACE}~{ISTIO_NAMESPACE}.svc.cluster.local"
        self.url = f"http://127.0.0.1:{port}"
        """Where requests go."""

    @property
    def admin(self) -> str:
        """``host:port`` of the admin interface."""
        return f"127.0.0.1:{self.ports[0]}"

    def ready(self) -> bool:
        """It has everything that istiod sends, the listener included."""
        listening = f"::127.0.0.1:{self._port}\n" in (page(f"http://{self.admin}/listeners") or "")
        return listening and page(f"http://{self.admin}/ready") is not None

    def command(self) -> Sequence[str | Path]:
        config = self.directory / "bootstrap.json"
        config.write_bytes(orjson.dumps(self._bootstrap(), option=orjson.OPT_INDENT_2))
        options = ("--disable-hot-restart", "--concurrency", "1", "--log-level", "warning")
        return (self.binary, "-c", config, *options)

    def _bootstrap(self) -> dict[str, object]:
        ads = {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"}
        return {
            **base(Address.parse(self.admin, "admin"), self.node),
            "node": {
                "id": self.node,
                "cluster": f"ingressgateway.{ISTIO_NAMESPACE}",
                "metadata": {
                    "NAMESPACE": ISTIO_NAMESPACE,
                    "LABELS": {"istio": "ingressgateway"},
                    "CLUSTER_ID": "Kubernetes",
                    "INSTANCE_IPS": "127.0.0.1",
                },
            },
            "stats_config": {"use_all_default_tags": False, "stats_tags": ISTIO_TAGS},
            "dynamic_resources": {
                "ads_config": {
                    "api_type": "GRPC",
                    "transport_api_version": "V3",
                    "grpc_services": [{"envoy_grpc": {"cluster_name": "istiod"}}],
                    "set_node_on_first_message_only": True,
                },
                "cds_config": ads,
                "lds_config": ads,
            },
            "static_resources": {
                "clusters": [
                    {
                        "name": "istiod",
                        "type": "STATIC",
                        "connect_timeout": "1s",
                        "typed_extension_protocol_options": http2(),
                        "load_assignment": static_assignment("istiod", [self._istiod]),
                    }
                ]
            },
        }
