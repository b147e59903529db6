# SPDX-License-Identifier: Apache-2.0
"""Listen, connect, send and receive; and the library a guest uses an image with."""

from cowshed.transport.client import Backend, ByteDisk, Disk, connect
from cowshed.transport.connection import EOF, Connection, Peer, Received
from cowshed.transport.page_refs import PageRef, Resolver
from cowshed.transport.schemes import AnyListener, listen
from cowshed.transport.unix import Listener, adopt_connection, adopt_listener

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
