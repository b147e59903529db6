# SPDX-License-Identifier: Apache-2.0
"""HOST:PORT, the address of a server in the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from cowshed.cache.errors import UsageError

__all__ = ["Endpoint", "parse_endpoint"]

_PORT_MAX = 65535


@dataclass(frozen=True)
class Endpoint:
    """A host name or address, without brackets, and a port; 0: the kernel chooses one."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_endpoint(text: str, what: str) -> Endpoint:
    """Parse host:port or [address]:port. Raises UsageError; the message calls the value `what`."""
    host, colon, port_text = text.strip().rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    if not colon or not host or (":" in host and not bracketed) or not host.isprintable():
        raise UsageError(f"{what} {text!r} is not HOST:PORT: give, for instance, localhost:9432")
    if not (port_text.isascii() and port_text.isdigit()) or int(port_text[:6]) > _PORT_MAX:
        raise UsageError(f"{what} {text!r} has no port from 0 to {_PORT_MAX}: give HOST:PORT")
    return Endpoint(host, int(port_text))
