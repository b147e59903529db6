# SPDX-License-Identifier: Apache-2.0
"""The messages between a service and its supervisor, as in sd_notify(3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

__all__ = ["FOLLOWER", "LEFT", "NOT_HELD", "Groups", "Notice"]

# Besides systemd's words. A backend that leaves tells its keeper whose backend comes after it (a
# pid, 0: nobody's after all), and the keeper that comes after that it leaves to that.
FOLLOWER: Final = "X_COWSHED_FOLLOWER"
LEFT: Final = "X_COWSHED_LEFT"
# A keeper of ours tells its backend which group it could not hold.
NOT_HELD: Final = "X_COWSHED_NOT_HELD"

Groups = dict[str, list[int]]


@dataclass(frozen=True)
class Notice:
    """One datagram of a service to its supervisor: NAME=VALUE lines."""

    fields: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, datagram: bytes) -> Notice:
        """Read a datagram; lines without '=' say nothing, of two with one name the last counts."""
        lines = datagram.decode("utf-8", errors="replace").split("\n")
        return cls(dict(line.split("=", 1) for line in lines if "=" in line))

    def encode(self) -> bytes:
        """Give the datagram."""
        return "\n".join(f"{name}={value}" for name, value in self.fields.items()).encode()
