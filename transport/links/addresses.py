# SPDX-License-Identifier: Apache-2.0
"""Addresses read from URIs: tcp://host:port, tls://host:port, vsock://cid:port.

Options follow as a query; each has an environment variable that is used if the URI lacks it:
`tls://host:7000?cert=me.pem&key=me.key&ca=ca.pem&server_name=backend.example`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

from cowshed.cache.errors import UsageError

__all__ = ["TLS_OPTIONS", "Address", "parse_stream_uri", "scheme_of"]

# Option -> the environment variable used if the URI lacks it.
TLS_OPTIONS: Final = {
    "cert": "COWSHED_TLS_CERT",
    "key": "COWSHED_TLS_KEY",
    "ca": "COWSHED_TLS_CA",
    "server_name": "COWSHED_TLS_SERVER_NAME",
}
VSOCK_ANY: Final = 0xFFFFFFFF
_SCHEME: Final = re.compile(r"([a-z][a-z0-9+.-]*):")


@dataclass(frozen=True, slots=True)
class Address:
    """One end of a stream: host is a name, an address, or a vsock context id in digits.

    uri is as given; without_options may be shown to others.
    """

    uri: str
    scheme: str
    host: str
    port: int
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def without_options(self) -> str:
        """The URI less its query, which may name files of ours."""
        return self.uri.partition("?")[0]

    @property
    def cid(self) -> int:
        """The vsock context id; "*" and "any" are all of this host's."""
        return VSOCK_ANY if self.host in ("*", "any") else int(self.host)


def scheme_of(uri: str) -> str:
    """Return a URI's scheme; UsageError if it has none."""
    match = _SCHEME.match(uri)
    if match is None:
        raise UsageError(f"{uri!r} is no URI; write unix:///path, tcp://host:port or the like")
    return match[1]


def parse_stream_uri(uri: str) -> Address:
    """Parse a tcp, tls or vsock URI; tls options that it lacks come from the environment.

    Raises UsageError that names the mistake. Port 0 is for listening: the kernel chooses.
    """
    scheme = scheme_of(uri)
    allowed = TLS_OPTIONS if scheme == "tls" else {}
    try:
        parts = urlsplit(uri)
        port = None if scheme == "vsock" else parts.port
        given = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as error:
        raise UsageError(f"cannot use {uri!r}: {error}; write {_shape(scheme)}") from error
    host = unquote(parts.hostname or "")
    if not host or parts.path not in ("", "/") or parts.fragment or parts.username is not None:
        raise UsageError(f"cannot use {uri!r}: write {_shape(scheme)}")
    if scheme == "vsock":
        port = _vsock_port(uri, parts.netloc)
        if host not in ("*", "any") and not (
            host.isascii() and host.isdigit() and int(host) < VSOCK_ANY
        ):
            raise UsageError(f"cannot use {uri!r}: {host!r} is no context id; write vsock://2:7000")
    if port is None:
        raise UsageError(f"cannot use {uri!r}: it names no port; write {_shape(scheme)}")
    options = {
        name: os.environ[variable] for name, variable in allowed.items() if os.environ.get(variable)
    }
    for name, value in given:
        if name not in allowed:
            known = ", ".join(allowed) or "none"
            raise UsageError(f"cannot use {uri!r}: unknown option {name!r}; {scheme} knows {known}")
        if not value:
            raise UsageError(f"cannot use {uri!r}: option {name!r} is empty; give it a value")
        options[name] = value
    return Address(uri, scheme, host, port, options)


def _vsock_port(uri: str, netloc: str) -> int | None:
    """Parse a vsock port, which has 32 bits; urlsplit takes only 16."""
    _, colon, text = netloc.rpartition(":")
    if not colon:
        return None
    if not (text.isascii() and text.isdigit() and int(text) <= 0xFFFFFFFF):
        raise UsageError(
            f"cannot use {uri!r}: {text!r} is no vsock port; give one up to 4294967295"
        )
    return int(text)


def _shape(scheme: str) -> str:
    return "vsock://cid:port" if scheme == "vsock" else f"{scheme}://host:port"
