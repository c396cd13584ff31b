"""Small xDS clients over real gRPC, state of the world and delta: they say what a test tells them to, and remember
nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from envoy_data_plane.envoy.config.core.v3 import Node
from envoy_data_plane.envoy.service.discovery.v3 import (
    DeltaDiscoveryRequest,
    DeltaDiscoveryResponse,
    DiscoveryRequest,
    DiscoveryResponse,
)
from envoy_data_plane.google.protobuf import Struct
from envoy_data_plane.google.rpc import Status
from grpc import aio

from xds.services import METHODS
from xds.wire import ADMIN_METADATA, TypeUrl

DEADLINE_S = 20.0
"""Generous: a test that reaches it has failed, on any machine."""
_OPTIONS = (
    # Channels of one process to one address share a connection otherwise.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", -1),
)


@dataclass
class _Stream:
    """One stream of one client."""

    call: Any
    node: Node
    _named: bool = False

    async def code(self) -> Any:
        """How the server ended the stream."""
        return await asyncio.wait_for(self.call.code(), DEADLINE_S)

    async def details(self) -> str:
        """What it said of that."""
        return str(await asyncio.wait_for(self.call.details(), DEADLINE_S))

    def _introduction(self) -> Node | None:
        """The node goes with the first request."""
        named, self._named = self._named, True
        return None if named else self.node

    async def _read(self) -> bytes:
        data: bytes = await asyncio.wait_for(self.call.read(), DEADLINE_S)
        assert data is not aio.EOF, f"the server ended the stream: {await self.code()} {await self.details()}"
        return data


@dataclass
class AdsStream(_Stream):
    """State of the world."""

    async def ask(
        self, type_url: str, names: Sequence[str] = (), *, version: str = "", nonce: str = "", error: str = ""
    ) -> None:
        """Sends one DiscoveryRequest."""
        message = DiscoveryRequest(
            type_url=type_url,
            resource_names=list(names),
            version_info=version,
            response_nonce=nonce,
            node=self._introduction(),
            error_detail=Status(code=3, message=error) if error else None,
        )
        await self.call.write(bytes(message))

    async def ack(self, response: DiscoveryResponse, names: Sequence[str] = ()) -> None:
        await self.ask(response.type_url, names, version=response.version_info, nonce=response.nonce)

    async def nack(
        self, response: DiscoveryResponse, error: str, names: Sequence[str] = (), *, version: str = ""
    ) -> None:
        """Refuses; `version` is the last one accepted."""
        await self.ask(response.type_url, names, version=version, nonce=response.nonce, error=error)

    async def read(self) -> DiscoveryResponse:
        """The next response, whatever its type."""
        return DiscoveryResponse.parse(await self._read())


@dataclass
class DeltaStream(_Stream):
    """Incremental."""

    async def ask(
        self,
        type_url: str,
        subscribe: Sequence[str] = (),
        unsubscribe: Sequence[str] = (),
        *,
        versions: Mapping[str, str] | None = None,
        nonce: str = "",
        error: str = "",
    ) -> None:
        """Sends one DeltaDiscoveryRequest."""
        message = DeltaDiscoveryRequest(
            type_url=type_url,
            resource_names_subscribe=list(subscribe),
            resource_names_unsubscribe=list(unsubscribe),
            initial_resource_versions=dict(versions or {}),
            response_nonce=nonce,
            node=self._introduction(),
            error_detail=Status(code=3, message=error) if error else None,
        )
        await self.call.write(bytes(message))

    async def ack(self, response: DeltaDiscoveryResponse) -> None:
        await self.ask(response.type_url, nonce=response.nonce)

    async def nack(self, response: DeltaDiscoveryResponse, error: str) -> None:
        await self.ask(response.type_url, nonce=response.nonce, error=error)

    async def read(self) -> DeltaDiscoveryResponse:
        """The next response, whatever its type."""
        return DeltaDiscoveryResponse.parse(await self._read())


@asynccontextmanager
async def ads_stream(
    address: str,
    node: str = "test",
    *,
    cluster: str = "meshctl",
    admin: str = "",
    agent: str = "",
    only: TypeUrl | None = None,
    credentials: grpc.ChannelCredentials | None = None,
) -> AsyncIterator[AdsStream]:
    """A stream to the server at `address`, aggregated or for `only` one type. `agent`: the node's user agent. Without
    `credentials` in plain text."""
    secure = credentials is not None
    async with (
        aio.secure_channel(address, credentials, _OPTIONS) if secure else aio.insecure_channel(address, _OPTIONS)
    ) as channel:
        call = open_call(channel, only=only)
        try:
            yield AdsStream(call, node_of(node, cluster, admin, agent))
        finally:
            call.cancel()


@asynccontextmanager
async def delta_stream(
    address: str,
    node: str = "test",
    *,
    cluster: str = "meshctl",
    admin: str = "",
    agent: str = "",
    only: TypeUrl | None = None,
) -> AsyncIterator[DeltaStream]:
    """`ads_stream`, incremental."""
    async with aio.insecure_channel(address, _OPTIONS) as channel:
        call = open_call(channel, only=only, delta=True)
        try:
            yield DeltaStream(call, node_of(node, cluster, admin, agent))
        finally:
            call.cancel()


def open_call(channel: aio.Channel, *, only: TypeUrl | None = None, delta: bool = False) -> Any:
    """A stream on `channel`, for bytes."""
    (method,) = (method for method, served in METHODS.items() if served == (only, delta))
    return channel.stream_stream(method)()


def node_of(node: str, cluster: str = "meshctl", admin: str = "", agent: str = "") -> Node:
    metadata = Struct.from_dict({ADMIN_METADATA: admin}) if admin else None
    return Node(id=node, cluster=cluster, metadata=metadata, user_agent_name=agent)
