# SPDX-License-Identifier: Apache-2.0
"""Listen, connect, send and receive; and the library through which a guest uses an image."""

from cowshed.transport.guest.client import Backend, ByteDisk, Disk, connect
from cowshed.transport.guest.page_refs import PageRef, Resolver
from cowshed.transport.links.connection import EOF, Connection, Peer, Received
from cowshed.transport.links.schemes import AnyListener, listen
from cowshed.transport.links.unix import Listener, adopt_connection, adopt_listener

__all__ = [
    "EOF",
    "AnyListener",
    "Backend",
    "ByteDisk",
    "Connection",
    "Disk",
    "Listener",
    "PageRef",
    "Peer",
    "Received",
    "Resolver",
    "adopt_connection",
    "adopt_listener",
    "connect",
    "listen",
]
