# SPDX-License-Identifier: Apache-2.0
"""The exceptions, sorted by what the caller can do about them.

Every message is one line that names the thing, the value and the cure, so that it can be shown to a
person as it is.
"""


class CowshedError(Exception):
    """The root of every error cowshed raises on purpose."""


class UsageError(CowshedError):
    """The caller asked for something impossible; nothing was changed; ask differently."""


class PeerError(CowshedError):
    """The other end of a connection misbehaved; drop it and serve the rest."""


class PeerGoneError(PeerError):
    """The other end closed the connection, or died; a new one may be there by now."""


class CapacityError(CowshedError):
    """There is no room, now; free some (unpin, evict, raise a limit) and try again."""


class SourceError(CowshedError):
    """An image's source could not be read; the message names the operation and the place."""


class InvariantError(CowshedError):
    """Our own bookkeeping is wrong: a bug; do not go on."""
