"""What the agent knows of its cluster: its own Node, its node's pods, the GPUSharingPolicies; or of a policy file.

Invariants: what was known stays known when the API server is away, forgets a kind for a moment, or has a policy that is
not valid (its last valid version counts on); and what was never known is None, not empty: an agent that starts while
the API server is away must not take its GPUs' policies for deleted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

from deviceplugin.policies import Policy, policy_of
from meshctl.adapters.kubernetes.client import Client
from meshctl.adapters.kubernetes.kinds import KINDS, OWN_ANNOTATIONS, Kind, Raw, pick
from meshctl.adapters.kubernetes.reflector import Pace, Reflector
from meshctl.api.document import Fault, ManifestError, Place, Severity, read_bounded
from meshctl.api.gpusharingpolicy import GPUSharingPolicy
from meshctl.api.objects import Manifest, read_manifest, read_object
from meshctl.errors import InputError, RefusedError, UnavailableError
from meshctl.model import Problem
from meshctl.ports import KubeObject, ObjectKey

POLL_S = 1.0
"""A policy file is read this often: it is small, and no notification works on every file system."""
HOSTNAME = "kubernetes.io/hostname"
"""The label that a node has without a cluster, too."""

# ------------------------------------------------------------------------------------------------- what is kept of what


def _container(raw: Raw) -> Raw:
    """Its extended resources are those with a domain before a slash."""
    limits = (raw.get("resources") or {}).get("limits") or {}
    asked = {name: limits[name] for name in sorted(limits) if "/" in name}
    return pick(raw, "name", "restartPolicy") | ({"resources": {"limits": asked}} if asked else {})


def _pod(raw: Raw) -> Raw:
    """What `tickets` reads; not what changes every few seconds of a pod's life."""
    metadata, spec = raw["metadata"], raw.get("spec") or {}
    kept = pick(metadata, "name", "namespace", "uid", "creationTimestamp", "deletionTimestamp")
    annotations = metadata.get("annotations") or {}
    if own := {name: value for name, value in annotations.items() if name.startswith(OWN_ANNOTATIONS)}:
        kept["annotations"] = own
    groups = ("initContainers", "containers")
    containers = {name: [_container(one) for one in spec[name]] for name in groups if spec.get(name)}
    return {"metadata": kept, "spec": containers, "status": pick(raw.get("status"), "phase", "startTime")}


def _policy(raw: Raw) -> Raw:
    """Without its status, which others write."""
    identity = ("name", "uid", "generation", "creationTimestamp", "deletionTimestamp")
    return {"metadata": pick(raw["metadata"], *identity), "spec": raw.get("spec")}


NODE = KINDS["Node"]
POD = replace(KINDS["Pod"], keep=_pod)
POLICY = replace(KINDS["GPUSharingPolicy"], keep=_policy, absent_ok=False)


# ------------------------------------------------------------------------------------------------------------ the file


def load_policies(path: Path) -> tuple[Policy, ...]:
    """The policies of a YAML file, by name. Raises InputError that names every place with something wrong."""
    return _policies(read_bounded(path), path)


def _policies(content: bytes, path: Path) -> tuple[Policy, ...]:
    manifest = read_manifest(content, str(path))
    faults = [fault for fault in manifest.faults if fault.severity is Severity.ERROR]
    found: list[Policy] = []
    for declared in manifest.objects.values():
        if isinstance(declared.value, GPUSharingPolicy):
            found.append(policy_of(declared.value))
        else:
            faults.append(declared.fault("kind", "must be GPUSharingPolicy here; keep others elsewhere"))
    if not found and not faults:
        faults.append(Fault(Place(str(path)), "", "has no GPUSharingPolicy; write one (docs/howto/share-gpus.md)"))
    if faults:
        raise ManifestError(tuple(faults))
    return tuple(sorted(found, key=lambda policy: policy.name))


class PolicyFile:
    """The policies of one file. A version of it that is not valid changes nothing and is a problem."""

    def __init__(self, path: Path) -> None:
        """Blocks. Raises InputError when the file is not valid: at the start nothing is in force that could stay."""
        self.path = path
        self.problem: Problem | None = None
        self._content = read_bounded(path)
        self.policies = _policies(self._content, path)

    def look(self) -> bool:
        """Read it again; True when `policies` or `problem` is another. Blocks."""
        before = self.policies, self.problem
        try:
            content = read_bounded(self.path)
            if content != self._content or self.problem is not None:
                self.policies, self._content = _policies(content, self.path), content
            self.problem = None
        except InputError as error:
            self.problem = Problem(str(self.path), f"{error} (what was read before stays in force)")
        return (self.policies, self.problem) != before


class FileView:
    """`agent.World` without a cluster: the policies of a file, no pods, and no label but the node's name."""

    def __init__(self, node: str, file: PolicyFile) -> None:
        self.node_labels: Mapping[str, str] | None = {HOSTNAME: node}
        self.node_uid = ""
        self._file = file

    def policies(self) -> Sequence[Policy] | None:
        return self._file.policies

    def pods(self) -> Sequence[KubeObject] | None:
        return ()

    async def fresh_pods(self, deadline_s: float) -> Sequence[KubeObject]:
        return ()

    def problems(self) -> tuple[Problem, ...]:
        return (self._file.problem,) if self._file.problem else ()

    async def start(self, deadline_s: float) -> None:
        """Nothing to wait for: the file was read."""

    async def wait_changed(self) -> None:
        """Returns when the file says something else."""
        while not await asyncio.to_thread(self._file.look):  # noqa: ASYNC110 (a file: there is no event to wait for)
            await asyncio.sleep(POLL_S)

    async def stop(self) -> None:
        """Nothing runs between calls."""


# --------------------------------------------------------------------------------------------------------- the cluster


@dataclass(frozen=True, slots=True)
class _Read:
    """One GPUSharingPolicy as it was read."""

    value: KubeObject
    policy: Policy | None
    """In force; None: it never was valid."""
    fault: str
    """What is wrong with `value`; "" when nothing is."""


class ClusterView:
    """`agent.World` of the node `node`, over `client`. With a `file`, its policies count instead of the cluster's."""

    def __init__(self, client: Client, node: str, *, file: PolicyFile | None = None, pace: Pace | None = None) -> None:
        self._client, self._node, self._file = client, node, file
        self._changed = asyncio.Event()
        self._selector = f"spec.nodeName={node}"
        self._nodes = self._reflector(NODE, f"metadata.name={node}", pace)
        self._pods = self._reflector(POD, self._selector, pace)
        self._policies = self._reflector(POLICY, "", pace)
        self._watched = (self._nodes, self._pods, *(() if file is not None else (self._policies,)))
        self._read: dict[ObjectKey, _Read] = {}
        self._tasks: list[asyncio.Task[None]] = []

    # ---------------------------------------------------------------------------------------------------- what is known

    @property
    def node_labels(self) -> Mapping[str, str] | None:
        """None while the Node is not known."""
        node = self._own_node()
        return None if node is None else node["metadata"].get("labels", {})

    @property
    def node_uid(self) -> str:
        """Empty while the Node is not known."""
        node = self._own_node()
        return "" if node is None else str(node["metadata"]["uid"])

    def policies(self) -> Sequence[Policy] | None:
        """Valid ones, by name; None while they are not known."""
        if self._file is not None:
            return self._file.policies
        if not self._policies.synced:
            return None
        return [read.policy for _, read in sorted(self._take().items()) if read.policy is not None]

    def pods(self) -> Sequence[KubeObject] | None:
        """Of this node, as last seen, by namespace and name; None while they are not known."""
        if not self._pods.synced:
            return None
        return [value for _, value in sorted(self._pods.objects.items())]

    async def fresh_pods(self, deadline_s: float) -> Sequence[KubeObject]:
        """Of this node, all that the API server knows when it answers. Raises UnavailableError."""
        found: list[KubeObject] = []
        pages = self._client.pages(POD, field_selector=self._selector, deadline_s=deadline_s)
        try:
            async with asyncio.timeout(deadline_s), aclosing(pages):
                async for page in pages:
                    found += map(POD.kept, page.items)
        except TimeoutError as late:
            raise UnavailableError(f"list pods of node {self._node}: no answer within {deadline_s:g} s") from late
        except RefusedError as refused:
            raise UnavailableError(f"pods of node {self._node} are not told: {refused}") from refused
        return sorted(found, key=POD.key)

    def problems(self) -> tuple[Problem, ...]:
        """What is not known, what may be behind, and which policies are not valid."""
        found = [
            Problem(f"{self._client.server} {reflector.kind.resource}", message)
            for reflector in self._watched
            for message in (reflector.missing, reflector.problem)
            if message
        ]
        if self._nodes.synced and self._own_node() is None:
            found.append(
                Problem(f"Node {self._node}", "there is no such Node (yet); its GPUs' policies may go by labels")
            )
        if self._file is not None:
            return (*found, *((self._file.problem,) if self._file.problem else ()))
        return (*found, *(Problem(str(key), read.fault) for key, read in sorted(self._take().items()) if read.fault))

    # --------------------------------------------------------------------------------------------------------- its life

    async def start(self, deadline_s: float) -> None:
        """Returns when everything was listed or refused, or after `deadline_s`: what is not known then comes later."""
        self._tasks = [asyncio.create_task(one.keep(), name=f"reflect {one.kind.resource}") for one in self._watched]
        if self._file is not None:
            self._tasks.append(asyncio.create_task(self._reread(self._file), name=f"read {self._file.path}"))
        try:
            async with asyncio.timeout(deadline_s):
                while not all(one.settled for one in self._watched):
                    await self.wait_changed()
        except TimeoutError:
            return

    async def wait_changed(self) -> None:
        """For ONE consumer: returns when something changed since the last return."""
        await self._changed.wait()
        self._changed.clear()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -------------------------------------------------------------------------------------------------------- the parts

    def _reflector(self, kind: Kind, field_selector: str, pace: Pace | None) -> Reflector:
        changed = self._changed.set
        return Reflector(
            self._client, kind, field_selector=field_selector, on_change=self._hear, on_state=changed, pace=pace
        )

    def _hear(self, _: ObjectKey) -> None:
        self._changed.set()

    async def _reread(self, file: PolicyFile) -> None:
        while True:
            if await asyncio.to_thread(file.look):
                self._changed.set()
            await asyncio.sleep(POLL_S)

    def _own_node(self) -> KubeObject | None:
        return self._nodes.objects.get(ObjectKey("Node", "", self._node))

    def _take(self) -> Mapping[ObjectKey, _Read]:
        """Every policy, read anew where it is another object."""
        self._read = {key: _read(key, value, self._read.get(key)) for key, value in self._policies.objects.items()}
        return self._read


def _read(key: ObjectKey, value: KubeObject, before: _Read | None) -> _Read:
    if before is not None and value is before.value:
        return before
    manifest: Manifest = read_object(value, str(key))
    for declared in manifest.objects.values():
        if isinstance(declared.value, GPUSharingPolicy):
            return _Read(value, policy_of(declared.value), "")
    same = before is not None and before.value["metadata"].get("uid") == value["metadata"].get("uid")
    good = before.policy if before is not None and same else None
    still = " (its last valid version stays in force)" if good is not None else ""
    words = "; ".join(f"{fault.field}: {fault.message}" for fault in manifest.faults)
    return _Read(value, good, f"{words}{still}")
