# SPDX-License-Identifier: Apache-2.0
"""The messages between a service and its supervisor, as in sd_notify(3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

__all__ = ["FOLLOWER", "LEFT", "NOT_HELD", "Groups", "Notice"]

# Fields besides systemd's. In a takeover the old backend sends its keeper the pid of the follower
# (0: none after all), and then sends the follower LEFT.
FOLLOWER: Final = "X_COWSHED_FOLLOWER"
LEFT: Final = "X_COWSHED_LEFT"
# Our keeper reports to its backend a group that it could not hold.
NOT_HELD: Final = "X_COWSHED_NOT_HELD"

Groups = dict[str, list[int]]


@dataclass(frozen=True)
class Notice:
    """One datagram of a service to its supervisor: NAME=VALUE lines."""

    fields: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, datagram: bytes) -> Notice:
        """Parse a datagram; ignores lines without '='; of a repeated name the last line counts."""
        lines = datagram.decode("utf-8", errors="replace").split("\n")
        return cls(dict(line.split("=", 1) for line in lines if "=" in line))

    def encode(self) -> bytes:
        """Return the datagram."""
        return "\n".join(f"{name}={value}" for name, value in self.fields.items()).encode()
