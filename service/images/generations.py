# SPDX-License-Identifier: Apache-2.0
"""The identifier of an image's content, compared by page references and reconnecting guests."""

from __future__ import annotations

import hashlib

from cowshed.cache import Image

__all__ = ["image_generation"]


def image_generation(image: Image) -> str:
    """Return an identifier of the image's source; it differs for another file or other bytes.

    Stable over restarts of the daemon. Made of device, inode, size and time of last change when the
    source was opened, since a digest takes as long as reading all of it.
    """
    identity = image.source.identity
    facts = (identity.device, identity.inode, image.size_bytes, identity.mtime_ns)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
