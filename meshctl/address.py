"""Where something listens."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from meshctl.errors import InputError


@dataclass(frozen=True, slots=True)
class Address:
    """``host:port``; an IPv6 host in brackets."""

    host: str
    port: int

    @staticmethod
    def parse(text: str, what: str) -> Address:
        """Raises InputError naming `what`."""
        host, colon, port = text.rpartition(":")
        if not colon or not host or not port.isdecimal() or int(port) > 65535:
            raise InputError(f"{what}: {text!r} is not HOST:PORT; for example 127.0.0.1:10000")
        return Address(host.strip("[]"), int(port))

    @property
    def ip(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        """The host, unless it is a name."""
        try:
            return ipaddress.ip_address(self.host)
        except ValueError:
            return None

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches it; a name other than localhost may mean anything."""
        return self.host == "localhost" if self.ip is None else self.ip.is_loopback

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
