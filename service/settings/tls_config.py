# SPDX-License-Identifier: Apache-2.0
"""The table [tls]: the certificates of every server that listens with TLS.

    [tls]
    cert = "/etc/cowshed/server.pem"   # the daemon's certificate, then those up to the CA's
    key = "/etc/cowshed/server.key"    # its key, without a passphrase
    ca = "/etc/cowshed/ca.pem"         # the CA that signs clients' certificates
    clients = "required"               # or "optional": clients without one have no identity

Relative paths start at the configuration file's directory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from cowshed.cache.errors import UsageError

__all__ = ["TlsConfig", "parse_tls"]

Clients = Literal["required", "optional"]

_FILES: Final = ("cert", "key", "ca")


@dataclass(frozen=True)
class TlsConfig:
    """Three PEM files, not opened here, and whether clients must show a certificate."""

    cert: Path
    key: Path
    ca: Path
    clients: Clients = "required"


def parse_tls(table: object, base_dir: Path) -> TlsConfig:
    """Parse a configuration's table [tls]. Raises UsageError; opens nothing."""
    if not isinstance(table, dict):
        raise UsageError(f"tls is {table!r}: write [tls] and cert, key and ca below it")
    known = (*_FILES, "clients")
    for key, value in table.items():
        if key not in known:
            raise UsageError(f"tls has unknown key {key!r}: known keys are {', '.join(known)}")
        if not isinstance(value, str) or not value or "\0" in value:
            raise UsageError(f"{key} of tls is {value!r}: give text in quotes")
    if missing := [name for name in _FILES if name not in table]:
        raise UsageError(f'tls lacks {missing[0]}: write {missing[0]} = "FILE" below [tls]')
    clients = table.get("clients", "required")
    if clients not in get_args(Clients):
        raise UsageError(f"clients of tls is {clients!r}: use required or optional")
    cert, key, ca = (base_dir / table[name] for name in _FILES)
    return TlsConfig(cert, key, ca, clients)
