# SPDX-License-Identifier: Apache-2.0
"""The backends that may hand their guests over to this one by a network."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HandoffRules"]


@dataclass(frozen=True)
class HandoffRules:
    """clients: the names in certificates that may; plain: whether anybody may without TLS."""

    clients: tuple[str, ...] = ()
    plain: bool = False

    def allows(self, client_name: str | None, scheme: str) -> bool:
        """Whether to accept a handoff from a peer with that certificate name, or none."""
        if client_name:
            return client_name in self.clients
        return self.plain and scheme in ("tcp", "vsock")
