# SPDX-License-Identifier: Apache-2.0
"""Which edition of an image is served: page references and guests that reconnect compare it."""

from __future__ import annotations

import hashlib

from cowshed.cache import Image

__all__ = ["image_generation"]


def image_generation(image: Image) -> str:
    """Name the source that an image is read from: another file, or other bytes in it, another name.

    The same through restarts of the daemon. By device, inode, size and time of last change when it
    was opened, since a digest takes as long as reading all of it.
    """
    identity = image.source.identity
    facts = (identity.device, identity.inode, image.size_bytes, identity.mtime_ns)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
