"""A node of a cluster: a real kubelet on a real containerd, which runs pods on this machine.

    async with Cluster(tmp_path / "cluster", scheduler=True) as cluster, Node(cluster, tmp_path / "node") as node:
        await cluster.apply(a_pod_of(IMAGE))

Invariant: the machine is afterwards as it was, also when a test fails. A kubelet mounts, writes sysctls, and keeps to
fixed paths (/var/lib/kubelet/device-plugins, /run/containerd, /var/log/containers); its containers outlive it. So both
run in namespaces of their own: their mounts and processes go with the namespaces, the fixed paths lead to the node's
directory, and the sysctls that a kubelet sets are files there. Only cgroups are made on the machine itself: below one
of the node's own, which is removed. Putting mounts and sysctls back afterwards was rejected: a killed test would not.

Needs root (mount namespaces, cgroups). The pods' network is the machine's: ``hostNetwork: true`` is a must, and
``automountServiceAccountToken: false`` too (nobody publishes the authority that the token's volume names).
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import secrets
import signal
import socket
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import orjson
import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.processes import binary
from tests.harness.tools import DEADLINE_S, Processes, ToolProcess, holds_by, require

IMAGE = "localhost/busybox:1"
"""There from the start: /bin/sh and all of busybox. Runs until it is ended, unless told a command."""
NAME = "localhost"
"""The node's. A name that every machine resolves to loopback: the API server asks the kubelet for logs by it."""
SYSCTLS = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
"""What a kubelet sets, below /proc/sys."""
CONTROLLERS = ("cpu", "cpuset", "hugetlb", "memory", "pids")
"""Of cgroup v2, which a kubelet wants in the cgroup that it is given, where the machine has them."""
_HIDDEN = ("/run", "/var/lib", "/var/log")
_INIT = """
set -eu
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/lib
mkdir /var/lib/kubelet /var/lib/containerd
directory=$1; shift
mount --bind "$directory/kubelet" /var/lib/kubelet
mount --bind "$directory/containerd" /var/lib/containerd
mount --bind "$directory/log" /var/log
for name; do
  file=$directory/sysctl/$(basename "$name")
  cat "/proc/sys/$name" >"$file"
  mount --bind "$file" "/proc/sys/$name"
done
mount --make-rshared /
touch "$directory/ready"
sleep infinity & wait
"""
"""The first process of the namespaces, and the parent of whoever loses his own."""


def require_node() -> None:
    """Skips the test where no node can run, and says why: in CI too, for a kubelet is nothing without root.

    Only what scripts/tools.sh could have installed must be there in CI.
    """
    if (reason := _obstacle()) is not None:
        pytest.skip(reason)
    require("containerd")


def _obstacle() -> str | None:
    if os.geteuid() != 0:
        return "a kubelet needs root, for mounts and cgroups"
    tried = subprocess.run(_unshare("true"), capture_output=True, text=True, timeout=DEADLINE_S)
    if tried.returncode != 0:
        return f"a kubelet needs namespaces of its own: {tried.stderr.strip()}"
    if not all(os.access(root, os.W_OK) for root in _hierarchies()):
        return "a kubelet needs cgroups that it may write"
    return None if _address() else "a kubelet needs an address that is not loopback, and this machine has none"


class Node(Processes):
    """An async context manager, see the module; `config` goes on top of the kubelet's configuration.

    Attributes are the processes, for tests that break them: `containerd` and `kubelet` may be ended and started, and
    containers run on; `enclave` is what both live in.
    """

    def __init__(self, cluster: Cluster, directory: Path, config: Mapping[str, Any] | None = None) -> None:
        require_node()
        for needed in (directory, require("containerd"), binary("kubelet")):
            if any(needed.resolve().is_relative_to(hidden) for hidden in _HIDDEN):
                raise ValueError(f"a node covers {', '.join(_HIDDEN)} with its own: {needed} must be elsewhere")
        self.directory = directory
        self.cgroup = f"meshctl-{secrets.token_hex(4)}"
        """Of all its pods, below the root of each hierarchy."""
        self.cluster = cluster
        self.enclave = Enclave(directory)
        self.containerd = Containerd(directory, self.enclave)
        self.kubelet = Kubelet(directory, self.enclave, cluster, self.cgroup, config or {})
        super().__init__()

    @property
    def plugin_dir(self) -> Path:
        """Where device plugins listen and find ``kubelet.sock``; short enough for a socket, gone with the node."""
        return self.enclave.path("/var/lib/kubelet/device-plugins")

    @property
    def pod_resources(self) -> Path:
        """The kubelet's socket that tells which pod has which devices."""
        return self.enclave.path("/var/lib/kubelet/pod-resources/kubelet.sock")

    def up(self) -> Self:
        """Returns when the node is ready and takes pods."""
        try:
            self._stack.enter_context(_cgroup(self.cgroup))
            for process in (self.enclave, self.containerd):
                self._start(process)
            self.load(_busybox(self.directory / "busybox.tar"))
            self._start(self.kubelet)
            for condition in ("create", "condition=Ready"):
                self.cluster.kubectl_now("wait", f"--for={condition}", f"node/{NAME}", f"--timeout={DEADLINE_S:g}s")
            # The controller that would take it away does not run; it would evict pods of slow nodes.
            self.cluster.kubectl_now("taint", "node", NAME, "node.kubernetes.io/not-ready:NoSchedule-")
        except BaseException:
            self.down()
            raise
        return self

    def down(self) -> None:
        """Ends it and all its pods; the Node object stays in the cluster. Harmless when it has ended."""
        super().down()

    def load(self, archive: Path) -> None:
        """Images from a tar that ``docker save`` could have written; pods find them by their tags."""
        command = (require("containerd") / "ctr", "--namespace=k8s.io", "images", "import", "--snapshotter=native")
        ran = subprocess.run(
            self.enclave.inside(*command, archive), capture_output=True, text=True, timeout=2 * DEADLINE_S
        )
        assert ran.returncode == 0, f"{archive} was not imported: {ran.stderr.strip()}"


class Enclave(ToolProcess):
    """Namespaces for mounts and processes: whatever runs in them ends with it."""

    name = "enclave"
    port_count = 0

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._ready = directory / "ready"

    @property
    def init(self) -> int:
        """The id of its first process, as this machine's."""
        assert self.process is not None, "the node is not running"
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())

    def path(self, inside: str) -> Path:
        """`inside`, as it is reached from outside."""
        return Path(f"/proc/{self.init}/root", inside.lstrip("/"))

    def inside(self, *command: str | Path) -> tuple[str | Path, ...]:
        """The command that runs `command` in it."""
        return ("nsenter", f"--target={self.init}", "--mount", "--pid", "--", *command)

    def ready(self) -> bool:
        return self._ready.exists()

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Returns when nothing in it runs: with the first process the kernel ends them all, then tells its parent."""
        if self.process is not None and self.process.poll() is None:
            with suppress(OSError, ValueError, subprocess.TimeoutExpired):  # it is not there yet, or no more
                os.kill(self.init, signal.SIGKILL)
                self.process.wait(DEADLINE_S)
        super().stop(signal.SIGKILL)

    def command(self) -> Sequence[str | Path]:
        self._ready.unlink(missing_ok=True)
        for part in ("kubelet", "containerd", "log", "sysctl"):
            (self.directory / part).mkdir(exist_ok=True)
        return _unshare("sh", "-c", _INIT, "init", self.directory, *SYSCTLS)


class Containerd(ToolProcess):
    """containerd with runc, at the paths of its own inside the enclave."""

    name = "containerd"
    port_count = 0

    def __init__(self, directory: Path, enclave: Enclave) -> None:
        super().__init__(directory)
        self._home = require("containerd")
        self._enclave = enclave

    def ready(self) -> bool:
        return _accepts(self._enclave.path("/run/containerd/containerd.sock"))

    def environment(self) -> Mapping[str, str]:
        return {**os.environ, "PATH": f"{self._home}:{os.environ['PATH']}"}  # it looks there for the shim

    def command(self) -> Sequence[str | Path]:
        networks = self.directory / "cni"
        networks.mkdir(exist_ok=True)
        # A node is ready when it has a network; pods on the machine's own never ask it for anything.
        network = {"cniVersion": "0.4.0", "name": "none", "plugins": [{"type": "none"}]}
        (networks / "none.conflist").write_bytes(orjson.dumps(network))
        config = self.directory / "containerd.toml"
        config.write_text(self._config(networks))
        return self._enclave.inside(self._home / "containerd", f"--config={config}", "--log-level=info")

    def _config(self, networks: Path) -> str:
        cri = 'plugins."io.containerd.grpc.v1.cri"'
        return f"""
version = 2

[plugins."io.containerd.internal.v1.opt"]
path = "/var/lib/containerd/opt"  # else it makes /opt/containerd

[{cri}]
sandbox_image = "{IMAGE}"
stream_server_address = "127.0.0.1"
restrict_oom_score_adj = true  # a machine may not let it go below its own
disable_apparmor = true

[{cri}.cni]
bin_dir = "{networks}"
conf_dir = "{networks}"

[{cri}.containerd]
snapshotter = "native"  # copies: works on every file system, and the images are small

[{cri}.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[{cri}.containerd.runtimes.runc.options]
BinaryName = "{self._home / "runc"}"
"""


class Kubelet(ToolProcess):
    """kubelet with the rights of a node, which lets in whom the API server does."""

    name = "kubelet"
    port_count = 2

    def __init__(
        self, directory: Path, enclave: Enclave, cluster: Cluster, cgroup: str, more: Mapping[str, Any]
    ) -> None:
        super().__init__(directory)
        self.binary = binary(self.name)
        self._enclave, self._cluster, self._cgroup, self._more = enclave, cluster, cgroup, more

    @property
    def ready_url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}/healthz"

    def command(self) -> Sequence[str | Path]:
        config, kubeconfig = self.directory / "kubelet.json", self.directory / "kubelet.kubeconfig"
        config.write_bytes(orjson.dumps({**self._config(), **self._more}, option=orjson.OPT_INDENT_2))
        kubeconfig.write_bytes(orjson.dumps(self._kubeconfig(), option=orjson.OPT_INDENT_2))
        kubeconfig.chmod(0o600)
        return self._enclave.inside(
            self.binary,
            f"--config={config}",
            f"--kubeconfig={kubeconfig}",
            f"--hostname-override={NAME}",
            f"--node-ip={_address()}",
        )

    def _kubeconfig(self) -> Any:
        """The administrator's, who poses as the node: what he does is authorized as the node's."""
        config = orjson.loads(self._cluster.kubeconfig.read_bytes())
        config["users"][0]["user"] |= {"as": f"system:node:{NAME}", "as-groups": ["system:nodes"]}
        return config

    def _config(self) -> dict[str, object]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": "127.0.0.1",
            "port": self.ports[1],
            "healthzBindAddress": "127.0.0.1",
            "healthzPort": self.ports[0],
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(self._cluster.apiserver.identity)},
            },
            "authorization": {"mode": "Webhook"},
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "cgroupRoot": f"/{self._cgroup}",
            "cgroupDriver": "cgroupfs",
            "failCgroupV1": False,
            "failSwapOn": False,
            "enforceNodeAllocatable": [],
            "makeIPTablesUtilChains": False,
            "resolvConf": "",
            "nodeStatusUpdateFrequency": "1s",  # how soon a device plugin's devices are allocatable; 10 s by default
            # It evicts no pod and removes no image on a machine whose disk others fill.
            "evictionHard": {"memory.available": "1Mi"},
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
        }


# ---------------------------------------------------------------------------------------------------------- the machine


def _unshare(*command: str | Path) -> tuple[str | Path, ...]:
    """The command that runs `command` as the first process of new namespaces."""
    return ("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "--", *command)


def _address() -> str | None:
    """An address of this machine's that is not loopback. TEST-NET-1 is only named: nothing is sent."""
    with socket.socket(type=socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
    return None


def _accepts(path: Path) -> bool:
    """Whether somebody listens there."""
    with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
        probe.settimeout(5.0)
        probe.connect(str(path))
        return True
    return False


def _hierarchies() -> list[Path]:
    """Where cgroups are mounted: one place with version 2, one for each controller with version 1."""
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return sorted({Path(m[4]) for m in mounts if m[m.index("-") + 1] in {"cgroup", "cgroup2"}})


@contextmanager
def _cgroup(name: str) -> Iterator[None]:
    """A cgroup `name` below the root of each hierarchy; it goes, with all below it, when its processes are gone."""
    with ExitStack() as stack:
        for root in _hierarchies():
            control = root / "cgroup.subtree_control"
            if control.exists():
                stack.enter_context(_controllers(root, control))
            (root / name).mkdir()
            stack.callback(_remove, root / name)
        yield


@contextmanager
def _controllers(root: Path, control: Path) -> Iterator[None]:
    """Version 2: the controllers that a kubelet wants work below `root`; afterwards those that did before."""
    available = (root / "cgroup.controllers").read_text().split()
    before = control.read_text().split()
    control.write_text(" ".join(f"+{name}" for name in CONTROLLERS if name in available))
    try:
        yield
    finally:
        added = [name for name in control.read_text().split() if name not in before]
        with suppress(OSError):  # somebody else has come to need one of them
            control.write_text(" ".join(f"-{name}" for name in added))


def _remove(cgroup: Path) -> None:
    """A cgroup is busy until the kernel has buried the processes in it."""

    def removed() -> bool:
        for path in sorted((p for p in cgroup.rglob("*") if p.is_dir()), reverse=True):  # the deepest first
            with suppress(OSError):
                path.rmdir()
        with suppress(OSError):
            cgroup.rmdir()
        return not cgroup.exists()

    holds_by(removed, f"cgroup {cgroup} is empty and removed")


def _busybox(archive: Path) -> Path:
    """`IMAGE` as a docker-archive: one layer, with the machine's static busybox under all its names."""
    program = require("containerd") / "busybox"
    names = subprocess.run((program, "--list"), check=True, capture_output=True, text=True, timeout=DEADLINE_S)
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        tar.add(program, "bin/busybox")
        for name in sorted({*names.stdout.split()} - {"busybox"}):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    config = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["sleep", "2147483647"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer.getvalue()).hexdigest()}"]},
    }
    manifest = orjson.dumps([{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}])
    files = {"config.json": orjson.dumps(config), "layer.tar": layer.getvalue(), "manifest.json": manifest}
    with tarfile.open(archive, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive
