# SPDX-License-Identifier: Apache-2.0
"""An object of an origin, as an image's source: what identifies it. Reads nothing."""

from __future__ import annotations

from dataclasses import dataclass

from cowshed.cache.errors import SourceError
from cowshed.cache.sources import SourceAtPath, SourceIdentity

__all__ = ["RemoteSource"]


@dataclass(frozen=True)
class RemoteSource:
    """An object at a URL, pinned to the version that it had when it was opened.

    path is the URL, without user, password or token. etag is the entity tag of RFC 9110, quotes
    and all, or ""; modified_ns the time of its last change, or 0. At least one of them is known.
    It has no descriptors, as no file is on this host.
    """

    path: str
    size_bytes: int
    etag: str
    modified_ns: int
    fd = -1
    direct_fd = -1

    @property
    def identity(self) -> SourceIdentity:
        """Identifies URL and version; device is 0, which no file has."""
        return SourceIdentity(0, _hash(self.path), self.size_bytes, self.mtime_ns)

    @property
    def mtime_ns(self) -> int:
        """Stands for the version: the hash of the entity tag, or the time of the last change."""
        return _hash(self.etag) if self.etag else self.modified_ns

    def reopen(self) -> int:
        """Raise SourceError: there is no file to open."""
        raise SourceError(
            f"image source {self.path!r} is no file of this host: its bytes come from there; "
            "name the image itself, not its file"
        )

    def changed(self) -> str | None:
        """Return None: a change is found by the next fetch."""
        return None

    def written_ns(self) -> int:
        """Return mtime_ns: as changed()."""
        return self.mtime_ns

    def at_path(self) -> SourceAtPath:
        """Return "same": as changed()."""
        return "same"

    def close(self) -> None:
        """Do nothing: no descriptor is open."""


def _hash(text: str) -> int:
    import hashlib  # not above: guests and commands import this module, and hash nothing

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
