"""A route of a test's own in the shared cluster: loopback servers behind it, and a controller that serves it.

Signals are absent on purpose (the servers have no metrics), so weights follow from the spec alone and a test says when
they change.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from meshctl.adapters.kubernetes.client import Client, connect
from meshctl.ports import ObjectKey
from tests.cluster.cluster import GATEWAY, Cluster
from tests.harness import manifests
from tests.harness.controller import RunProcess, run_with
from tests.harness.controller import api as admin_api
from tests.harness.envoy import Backends, Outcome, load, request
from tests.harness.tools import DEADLINE_S, until

NAME = "resnet"
ISTIO_KINDS = ("VirtualService", "DestinationRule", "ServiceEntry")
TICK = ("--tick", "250ms")
DEPLOY = Path(__file__).parents[2] / "deploy"
ACCOUNT = "meshctl-system/meshctl"
LEASE = ACCOUNT
"""The only one that the account may hold."""
GPUS = ("V100", "T4", "P100")


@dataclass
class World:
    """A namespace with the route `NAME` over `backends`, each on a GPU product of its own."""

    cluster: Cluster
    api: Client
    namespace: str
    backends: Backends
    directory: Path
    account: Path
    """Kubeconfig of the controller's own account: it may do what deploy/rbac.yaml says and nothing else."""
    runs: int = 0

    @property
    def host(self) -> str:
        return f"{self.namespace}.example"

    @property
    def url(self) -> str:
        return self.cluster.gateway().url

    def endpoints(self, *indexes: int) -> list[dict[str, Any]]:
        """For spec.backend.endpoints; all without `indexes`."""
        found = []
        for index in indexes or range(len(self.backends.addresses)):
            address, _, port = self.backends.addresses[index].rpartition(":")
            found.append({"address": address, "port": int(port), "gpu": GPUS[index]})
        return found

    def route(self, name: str = NAME, **spec: Any) -> dict[str, Any]:
        """The manifest; `spec` on top."""
        backend = {"endpoints": self.endpoints()}
        sizes = {"classes": [{"name": "small", "min": 1, "max": 4}, {"name": "large", "min": 5, "max": 64}]}
        base = {"hosts": [self.host], "gateways": [GATEWAY], "expectedLoad": 10, "requestSize": sizes, "warmUp": "0s"}
        made = manifests.route(name, **{"backend": backend, **base, **spec})
        made["metadata"]["namespace"] = self.namespace
        return made

    async def apply(self, **spec: Any) -> None:
        """The route and a profile for each GPU product."""
        profiles = []
        for index, gpu in enumerate(GPUS):
            service = {"base": f"{5 * (index + 1)}ms", "perItem": "800us"}
            profile = manifests.profile(f"resnet-{gpu.lower()}", gpu=gpu, service=service)
            profile["metadata"]["namespace"] = self.namespace
            profiles.append(profile)
        await self.cluster.apply(*profiles, self.route(**spec))

    async def patch(self, patch: str, *, kind: str = "modelroute", manager: str = "kubectl-patch") -> None:
        """A merge patch of the object `NAME`."""
        options = ("--type=merge", f"--field-manager={manager}", f"--patch={patch}")
        await self.cluster.kubectl("patch", kind, NAME, f"--namespace={self.namespace}", *options)

    # ---------------------------------------------------------------------------------------------------- what holds

    async def get(self, kind: str = "ModelRoute", name: str = NAME) -> dict[str, Any]:
        """The object; empty when there is none."""
        return await self.api.get(ObjectKey(kind, self.namespace, name)) or {}

    async def conditions(self, name: str = NAME) -> dict[str, tuple[str, str]]:
        """Type -> (status, reason) of the route."""
        status = (await self.get(name=name)).get("status") or {}
        return {c["type"]: (c["status"], c["reason"]) for c in status.get("conditions", ())}

    async def message(self, type_: str, name: str = NAME) -> str:
        """What a condition of the route says to people."""
        status = (await self.get(name=name)).get("status") or {}
        return next((str(c["message"]) for c in status.get("conditions", ()) if c["type"] == type_), "")

    async def until_condition(self, type_: str, status: str, reason: str = "", name: str = NAME) -> None:
        async def holds() -> bool:
            found = (await self.conditions(name)).get(type_, ("", ""))
            return found[0] == status and reason in ("", found[1])

        try:
            await until(holds, f"{type_} is {status} {reason}")
        except AssertionError as late:
            logs = "\n".join(p.read_text()[-3000:] for p in sorted(self.directory.glob("run-*.log")))
            raise AssertionError(f"{late}: {await self.conditions(name)}\n{logs}") from late

    async def objects(self) -> dict[str, dict[str, Any]]:
        """``Kind/name`` -> object, of everything of Istio's in the namespace."""
        return {
            f"{kind}/{item['metadata']['name']}": item
            for kind in ISTIO_KINDS
            for item in (await self.api.list(kind, self.namespace)).items
        }

    async def istio_versions(self, kind: str = "") -> dict[str, str]:
        """``Kind/name`` -> resourceVersion, of Istio's objects (of one kind)."""
        found = {name: value["metadata"]["resourceVersion"] for name, value in (await self.objects()).items()}
        return {name: version for name, version in found.items() if name.startswith(kind)}

    async def steady(self, controller: RunProcess) -> dict[str, str]:
        """`istio_versions`, once they are the same before and after 8 decisions."""
        before: dict[str, str] = {}

        async def still() -> bool:
            nonlocal before
            last, before = before, await self.istio_versions()
            if last == before:
                await decisions(controller, 8)
            return last == before == await self.istio_versions()

        await until(still, "nothing is written any more")
        return before

    async def weights(self) -> dict[str, dict[int, int]]:
        """ServiceEntry -> weights by endpoint's port, as they are live."""
        return {
            name: {e["ports"]["http"]: e.get("weight", 1) for e in value["spec"].get("endpoints", ())}
            for name, value in (await self.objects()).items()
            if name.startswith("ServiceEntry/")
        }

    async def versions(self) -> dict[str, str]:
        """``Kind/name`` -> resourceVersion, of Istio's objects and the route: nobody wrote where they are the same."""
        found = {**await self.objects(), "ModelRoute": await self.get()}
        return {name: value["metadata"]["resourceVersion"] for name, value in found.items()}

    async def served(self) -> None:
        """Return when the gateway serves the route."""
        async with aiohttp.ClientSession() as session:

            async def ok() -> bool:
                return (await request(session, self.url, host=self.host))[0] == 200

            await until(ok, f"{self.host} is served")

    def load(self, workers: int = 4) -> AbstractAsyncContextManager[Outcome]:
        return load(self.url, workers=workers, host=self.host)

    async def until_weights(self, holds: Callable[[Mapping[int, int]], bool], what: str, size: str = "small") -> float:
        """Wait until the live ServiceEntry of `size` has weights (by endpoint's port) of which `holds`; how long."""
        began_s = time.monotonic()

        async def live() -> bool:
            return holds((await self.weights()).get(f"ServiceEntry/{NAME}.{size}.size", {}))

        await until(live, what)
        return time.monotonic() - began_s

    # -------------------------------------------------------------------------------------------------- who serves it

    def controller(
        self, *options: str, kubeconfig: Path | None = None, program: Sequence[str | Path] = ("-m", "meshctl")
    ) -> AbstractAsyncContextManager[RunProcess]:
        """A `meshctl run` for this namespace alone, with the rights that deploy/ gives it."""
        self.runs += 1
        where = ("--kubeconfig", str(kubeconfig or self.account), "--namespace", self.namespace)
        log = self.directory / f"run-{self.runs}.log"
        return run_with(log, *where, "--istio", *TICK, *options, program=program)

    def confirming(self, *options: str, **how: Any) -> AbstractAsyncContextManager[RunProcess]:
        """One that asks istiod what the gateways acknowledged; `how` as for `controller`."""
        return self.controller("--istiod", self.cluster.istiod_debug, *options, **how)


@asynccontextmanager
async def world(cluster: Cluster, directory: Path, backends: int = 2) -> AsyncIterator[World]:
    """Nothing is applied yet. Its route is deleted in the end, so that the shared gateways forget it."""
    namespace = await cluster.namespace()
    await cluster.apply(DEPLOY / "namespace.yaml", DEPLOY / "rbac.yaml")
    account = await cluster.kubeconfig_for(ACCOUNT)
    async with Backends(backends) as servers, connect(cluster.kubeconfig) as api:
        try:
            yield World(cluster, api, namespace, servers, directory, account)
        finally:
            await cluster.kubectl("delete", "namespace", namespace, "--wait=false")


async def decisions(controller: RunProcess, count: int) -> None:
    """Wait for `count` more decisions."""
    async with aiohttp.ClientSession() as session:

        async def made() -> float:
            async with session.get(f"{controller.admin}/metrics") as answer:
                lines = (await answer.text()).splitlines()
            return next(float(x.split()[-1]) for x in lines if x.startswith('meshctl_decisions_total{outcome="ok"}'))

        goal = await made() + count

        async def reached() -> bool:
            return await made() >= goal

        await until(reached, f"{count} more decisions")


async def problems(controller: RunProcess, holds: Callable[[str], bool]) -> str:
    """What the controller says is wrong, but for missing metrics, as soon as it is as `holds` says; "" when well."""
    found = ""

    def said(status: Any) -> bool:
        nonlocal found
        parts = [p for source, listed in status["problems"].items() if source != "signals" for p in listed]
        found = "\n".join(f"{part['where']}: {part['message']}" for part in parts)
        return holds(found)

    await admin_api(controller, "status", said)
    return found


async def meshctl(*arguments: str) -> str:
    """What a command prints, which must succeed."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "meshctl", *arguments, stdout=pipe, stderr=pipe
    )
    printed, said = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    assert process.returncode == 0, said.decode()
    return printed.decode()
