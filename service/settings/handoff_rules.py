# SPDX-License-Identifier: Apache-2.0
"""Which backends may give us their guests over a network."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HandoffRules"]


@dataclass(frozen=True)
class HandoffRules:
    """clients are names in certificates; plain is whether anybody may, without TLS."""

    clients: tuple[str, ...] = ()
    plain: bool = False

    def allows(self, client_name: str | None, scheme: str) -> bool:
        """Whether a handoff of who has that name, if any, is taken."""
        if client_name:
            return client_name in self.clients
        return self.plain and scheme in ("tcp", "vsock")
