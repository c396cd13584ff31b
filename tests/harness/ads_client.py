"""A small ADS client over real gRPC: says what a test tells it to, remembers nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from envoy_data_plane.envoy.config.core.v3 import Node
from envoy_data_plane.envoy.service.discovery.v3 import DiscoveryRequest, DiscoveryResponse
from envoy_data_plane.google.protobuf import Struct
from envoy_data_plane.google.rpc import Status
from grpc import aio

from xds.wire import ADMIN_METADATA

METHOD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources"
DEADLINE_S = 20.0
"""Generous: a test that reaches it has failed, on any machine."""


@dataclass
class AdsStream:
    """One stream of one client."""

    call: Any
    node: Node
    _named: bool = False

    async def ask(
        self, type_url: str, names: Sequence[str] = (), *, version: str = "", nonce: str = "", error: str = ""
    ) -> None:
        """Sends one DiscoveryRequest; the node goes with the first."""
        message = DiscoveryRequest(
            type_url=type_url,
            resource_names=list(names),
            version_info=version,
            response_nonce=nonce,
            node=None if self._named else self.node,
            error_detail=Status(code=3, message=error) if error else None,
        )
        self._named = True
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
        data = await asyncio.wait_for(self.call.read(), DEADLINE_S)
        assert data is not aio.EOF, f"the server ended the stream: {await self.call.code()}"
        return DiscoveryResponse.parse(data)

    async def code(self) -> Any:
        """How the server ended the stream."""
        return await asyncio.wait_for(self.call.code(), DEADLINE_S)


@asynccontextmanager
async def ads_stream(
    address: str, node: str = "test", *, cluster: str = "meshctl", admin: str = ""
) -> AsyncIterator[AdsStream]:
    """A stream to the server at `address`."""
    metadata = Struct.from_dict({ADMIN_METADATA: admin}) if admin else None
    async with aio.insecure_channel(address) as channel:
        call = channel.stream_stream(METHOD)()
        try:
            yield AdsStream(call, Node(id=node, cluster=cluster, metadata=metadata))
        finally:
            call.cancel()
