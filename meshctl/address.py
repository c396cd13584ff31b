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
    def loopback(self) -> bool:
        """Whether only this machine reaches it; a name other than localhost may mean anything."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
