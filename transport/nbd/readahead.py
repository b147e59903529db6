# SPDX-License-Identifier: Apache-2.0
"""Decide what to read ahead: pure, no bytes and no sockets.

A read that begins where one of the last few ended continues a stream. A stream's window starts at
FIRST_BYTES with its second read and doubles with each further one. It is requested in chunks, so
that while the reader consumes one, the others are in flight. A lone read causes no readahead.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

__all__ = ["CHUNK_BYTES", "ReadAhead"]

CHUNK_BYTES: Final = 256 << 10
FIRST_BYTES: Final = 2 * CHUNK_BYTES
_NR_STREAMS: Final = 8


@dataclass
class _Stream:
    window_bytes: int
    asked_to: int


class ReadAhead:
    """Remembers the ends of the last reads.

    Invariants: (1) at most _NR_STREAMS are remembered; (2) no window is over max_bytes, and nothing
    at or past size_bytes is asked for.
    """

    def __init__(self, size_bytes: int, max_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._max_bytes = max_bytes
        self._streams: OrderedDict[int, _Stream] = OrderedDict()

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        assert len(self._streams) <= _NR_STREAMS
        for end, stream in self._streams.items():
            assert stream.window_bytes <= self._max_bytes
            assert stream.asked_to <= max(end, self._size_bytes)

    def note(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Record a read; return the (offset, length) chunks to read ahead."""
        end = offset + length
        stream = self._streams.pop(offset, None)
        if not self._max_bytes or length == 0:
            return []
        if stream is None:
            self._remember(end, _Stream(0, end))
            return []
        window = min(self._max_bytes, max(FIRST_BYTES, 2 * stream.window_bytes))
        start = max(end, stream.asked_to)
        stop = min(end + window, self._size_bytes)
        # Avoid small requests: wait until a whole chunk of the window is free, or the end is near.
        if stop - start < CHUNK_BYTES and stop < self._size_bytes:
            stop = start
        self._remember(end, _Stream(window, stop))
        return [
            (at, min(CHUNK_BYTES, stop - at)) for at in range(start, max(start, stop), CHUNK_BYTES)
        ]

    def forget(self) -> None:
        """Forget all streams, since the chunks read ahead are lost."""
        self._streams.clear()

    def _remember(self, end: int, stream: _Stream) -> None:
        self._streams[end] = stream
        self._streams.move_to_end(end)
        while len(self._streams) > _NR_STREAMS:
            self._streams.popitem(last=False)
