"""Inference servers that speak gRPC and say who they are, clients of their own `xds:///` resolver, and their plans."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import grpc
import orjson
import pytest
from grpc import aio

from meshctl.address import Address
from meshctl.model import Protocol, RoutePlan
from tests.harness.envoy import SIZES, route_plan
from tests.harness.tools import until
from xds.grpcbootstrap import ClientTls, grpc_bootstrap

METHOD = "/inference.Inference/Infer"
HANG = "/inference.Inference/Hang"
"""Never answers."""
DEADLINE_S = 20.0


def grpc_plan(
    name: str,
    weights: Mapping[str, Mapping[str, int]] | Mapping[str, int],
    *,
    hosts: Sequence[str],
    gpus: Mapping[str, str] | None = None,
    **spec: Any,
) -> RoutePlan:
    """`route_plan` of servers that speak gRPC; `gpus` by address (else all are the same), `spec` changes the spec."""
    plan = route_plan(name, weights, hosts=hosts, sizes=SIZES, not_ready=spec.pop("not_ready", ()))
    endpoints = tuple(replace(e, gpu=(gpus or {}).get(e.id, e.gpu)) for e in plan.route.endpoints)
    changed = replace(plan.route.spec, protocol=Protocol.GRPC, **spec)
    return replace(plan, route=replace(plan.route, spec=changed, endpoints=endpoints))


@dataclass
class GrpcServers:
    """`count` servers on loopback; each answers with its address."""

    count: int
    addresses: list[str] = field(default_factory=list)
    _servers: list[aio.Server] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        for _ in range(self.count):
            server, index = aio.server(), len(self._servers)

            async def answer(_: bytes, __: Any, index: int = index) -> bytes:
                return self.addresses[index].encode()

            async def hang(_: bytes, __: Any) -> bytes:
                return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]  # never

            handlers = {"Infer": answer, "Hang": hang}
            methods = {name: grpc.unary_unary_rpc_method_handler(handler) for name, handler in handlers.items()}
            handler = grpc.method_handlers_generic_handler("inference.Inference", methods)
            server.add_generic_rpc_handlers((handler,))
            self.addresses.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
            await server.start()
            self._servers.append(server)
        return self

    async def leave(self, index: int) -> None:
        """As a server does that is told to end: what it has begun it answers."""
        await self._servers[index].stop(grace=DEADLINE_S)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(server.stop(grace=None) for server in self._servers))


@dataclass
class Answers:
    """What a number of calls came to."""

    served: Counter[str] = field(default_factory=Counter)
    """By the server's address."""
    failed: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Client:
    """One gRPC client."""

    channel: aio.Channel

    async def ask(
        self, count: int, metadata: Mapping[str, str] | None = None, *, at_once: int = 8, method: str = METHOD
    ) -> Answers:
        """`count` calls, `at_once` at a time."""
        answers, call = Answers(), self.channel.unary_unary(method)
        sent = tuple((metadata or {}).items())
        left = iter(range(count))

        async def some() -> None:
            for _ in left:
                try:
                    answers.served[(await call(b"", metadata=sent, timeout=DEADLINE_S)).decode()] += 1
                except aio.AioRpcError as error:
                    answers.failed[f"{error.code().name}: {error.details()}"] += 1

        await asyncio.gather(*(some() for _ in range(at_once)))
        return answers

    async def settled(self, expected: set[str]) -> None:
        """Waits until exactly the `expected` servers answer."""

        async def only_those() -> bool:
            return set((await self.ask(60)).served) == expected

        await until(only_those, f"only {sorted(expected)} answer")


@asynccontextmanager
async def grpc_client(
    environment: pytest.MonkeyPatch, xds: str, host: str, *, group: str = "", tls: ClientTls | None = None
) -> AsyncIterator[Client]:
    """A client of ``xds:///host`` that knows nothing but its bootstrap, as a user sets it."""
    bootstrap = grpc_bootstrap(Address.parse(xds, "xds"), f"client of {host}", group=group, tls=tls)
    environment.setenv("GRPC_XDS_BOOTSTRAP_CONFIG", orjson.dumps(bootstrap).decode())
    async with aio.insecure_channel(f"xds:///{host}") as channel:
        yield Client(channel)
