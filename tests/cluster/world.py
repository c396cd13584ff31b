"""A route of a test's own in the shared cluster: loopback servers behind it, and a controller that serves it.

Signals are absent on purpose (the servers have no metrics), so weights follow from the spec alone and a test says when
they change.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from tests.cluster.cluster import GATEWAY, Cluster
from tests.harness import manifests
from tests.harness.controller import RunProcess, run_with
from tests.harness.envoy import Backends, Outcome, load, request
from tests.harness.tools import until

NAME = "resnet"
ISTIO_KINDS = "virtualservices,destinationrules,serviceentries"
TICK = ("--tick", "250ms")
GPUS = ("V100", "T4", "P100")


@dataclass
class World:
    """A namespace with the route `NAME` over `backends`, each on a GPU product of its own."""

    cluster: Cluster
    namespace: str
    backends: Backends
    directory: Path
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

    def route(self, **spec: Any) -> dict[str, Any]:
        """The manifest; `spec` on top."""
        backend = {"endpoints": self.endpoints()}
        sizes = {"classes": [{"name": "small", "min": 1, "max": 4}, {"name": "large", "min": 5, "max": 64}]}
        base = {"hosts": [self.host], "gateways": [GATEWAY], "expectedLoad": 10, "requestSize": sizes, "warmUp": "0s"}
        made = manifests.route(NAME, **{"backend": backend, **base, **spec})
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

    async def get(self, kind: str = "modelroute") -> dict[str, Any]:
        found: dict[str, Any] = await self.cluster.get(kind, NAME, f"--namespace={self.namespace}")
        return found

    async def conditions(self) -> dict[str, tuple[str, str]]:
        """Type -> (status, reason) of the route."""
        status = (await self.get()).get("status") or {}
        return {c["type"]: (c["status"], c["reason"]) for c in status.get("conditions", ())}

    async def until_condition(self, type_: str, status: str, reason: str = "") -> None:
        async def holds() -> bool:
            found = (await self.conditions()).get(type_, ("", ""))
            return found[0] == status and reason in ("", found[1])

        try:
            await until(holds, f"{type_} is {status} {reason}")
        except AssertionError as late:
            logs = "\n".join(p.read_text()[-3000:] for p in sorted(self.directory.glob("run-*.log")))
            raise AssertionError(f"{late}: {await self.conditions()}\n{logs}") from late

    async def objects(self) -> dict[str, dict[str, Any]]:
        """``Kind/name`` -> object, of everything of Istio's in the namespace."""
        items = (await self.cluster.get(ISTIO_KINDS, f"--namespace={self.namespace}"))["items"]
        return {f"{i['kind']}/{i['metadata']['name']}": i for i in items}

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
            entry = (await self.objects()).get(f"ServiceEntry/{NAME}.{size}.size")
            endpoints = entry["spec"].get("endpoints", ()) if entry else ()
            return holds({e["ports"]["http"]: e.get("weight", 1) for e in endpoints})

        await until(live, what)
        return time.monotonic() - began_s

    # -------------------------------------------------------------------------------------------------- who serves it

    def controller(self, *options: str, kubeconfig: Path | None = None) -> AbstractAsyncContextManager[RunProcess]:
        """A `meshctl run` for this namespace alone."""
        self.runs += 1
        where = ("--kubeconfig", str(kubeconfig or self.cluster.kubeconfig), "--namespace", self.namespace)
        return run_with(self.directory / f"run-{self.runs}.log", *where, "--istio", *TICK, *options)

    def confirming(self, *options: str) -> AbstractAsyncContextManager[RunProcess]:
        """One that asks istiod what the gateways acknowledged."""
        return self.controller("--istiod", self.cluster.istiod_debug, *options)


@asynccontextmanager
async def world(cluster: Cluster, directory: Path, backends: int = 2) -> AsyncIterator[World]:
    """Nothing is applied yet. Its route is deleted in the end, so that the shared gateways forget it."""
    namespace = await cluster.namespace()
    async with Backends(backends) as servers:
        try:
            yield World(cluster, namespace, servers, directory)
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
