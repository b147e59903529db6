# SPDX-License-Identifier: Apache-2.0
"""Cut a byte stream into the packets of protocol.py, by their headers.

The packets are the same as on a sequenced-packet socket, one after the other, and without
descriptors. Each header is checked as soon as it is complete, so that a peer cannot announce what
it may not send. The buffers hold at most one unfinished packet and one unfinished message.
"""

from __future__ import annotations

from typing import Final

from cowshed.cache.errors import PeerError
from cowshed.transport.messages.protocol import (
    HEADER,
    MAGIC,
    MAX_PIECE_BYTES,
    MAX_REPLY_BYTES,
    VERSION,
    Decoder,
    Message,
)

__all__ = ["StreamDecoder"]


class StreamDecoder:
    """Reassembles a stream's messages. After a PeerError it must not be used.

    Invariant: _held is shorter than one packet: a header, or a header and part of its piece.
    """

    def __init__(self, limit_bytes: int = MAX_REPLY_BYTES) -> None:
        self._decoder: Final = Decoder(limit_bytes)
        self._held = bytearray()

    @property
    def unfinished(self) -> bool:
        """Whether a packet or a message has begun and not ended."""
        return bool(self._held) or self._decoder.unfinished

    def feed(self, arrived: bytes | bytearray | memoryview) -> list[Message]:
        """Take received bytes, as many or few as came; return the messages they end, in order."""
        messages: list[Message] = []
        rest = memoryview(arrived)
        while rest:
            wanted = self._wanted() - len(self._held)
            self._held += rest[:wanted]
            rest = rest[wanted:]
            if len(self._held) >= HEADER.size and len(self._held) == self._wanted():
                packet, self._held = self._held, bytearray()
                messages += self._decoder.feed(packet)
        return messages

    def check(self) -> None:
        """Raise AssertionError if the invariant does not hold."""
        assert len(self._held) < HEADER.size or len(self._held) < self._wanted()
        self._decoder.check()

    def _wanted(self) -> int:
        """Return the length that _held must reach before the next step."""
        if len(self._held) < HEADER.size:
            return HEADER.size
        magic, version, _, _, _, _, _, piece_length = HEADER.unpack_from(self._held)
        if magic != MAGIC:
            raise PeerError(f"stream has {magic:#010x} for {MAGIC:#010x}: not a cowshed peer")
        if version != VERSION:
            raise PeerError(f"protocol version {version}; this end speaks {VERSION}")
        if not 0 < piece_length <= MAX_PIECE_BYTES:
            raise PeerError(f"piece of {piece_length} bytes; 1 to {MAX_PIECE_BYTES} are allowed")
        size_bytes: int = HEADER.size + piece_length
        return size_bytes
