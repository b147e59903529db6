# SPDX-License-Identifier: Apache-2.0
"""Listen, connect, send and receive; and the library a guest uses an image with."""

from cowshed.transport.client import Backend, Disk, connect
from cowshed.transport.connection import EOF, Connection, Peer, Received
from cowshed.transport.unix import Listener, adopt_listener, listen

__all__ = [
    "EOF",
    "Backend",
    "Connection",
    "Disk",
    "Listener",
    "Peer",
    "Received",
    "adopt_listener",
    "connect",
    "listen",
]
