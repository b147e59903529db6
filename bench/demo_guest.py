# SPDX-License-Identifier: Apache-2.0
"""One guest of the demo: a process of another user that opens the image and checks every byte.

    demo_guest.py JSON        # {"uri", "image", "file", "uid", "number", "seed", "write_bytes"}

It reads orders, one a line: "check", "write", "end". Answers are JSON lines: progress while it
works, then the result. It computes the expected bytes itself: those of the image's file ("file" is
a descriptor of it, open for reading), with its own writes over them.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from typing import Any, Final, Protocol

from cowshed.cache.errors import CowshedError
from cowshed.transport import Disk, connect

__all__ = ["ORDERS", "Checker", "Writes", "count_wrong", "visiting_order"]

ORDERS: Final = ("forward", "backward", "random", "strided")

# A slot holds one piece of a guest's writes, at an arbitrary offset: most pieces begin and end
# within a page, whose other bytes must stay the image's.
PIECE_BYTES: Final = 64 << 10
SLOT_BYTES: Final = 2 * PIECE_BYTES
_SHORT_BYTES: Final = 64 << 10
_LONG_BYTES: Final = 256 << 10
_STRIDE: Final = 17
_PROGRESS_BYTES: Final = 4 << 20
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4


class ReadsAt(Protocol):
    """Returns the image's bytes as a guest sees them."""

    def __call__(self, offset: int, length: int, /) -> bytes:
        """Read length bytes at offset."""


class Writes:
    """The writes of one guest: the same for the same seed, number and sizes.

    pieces maps slots to the piece's offset. All guests share a quarter of the slots, so that they
    write different bytes to the same pages.
    """

    def __init__(self, seed: int, number: int, size_bytes: int, write_bytes: int) -> None:
        self._key: Final = f"{seed}/{number}"
        nr_slots = size_bytes // SLOT_BYTES
        nr_pieces = min(write_bytes // PIECE_BYTES, nr_slots)
        common = random.Random(f"{seed}/common").sample(range(nr_slots), nr_pieces // 4)
        chance = random.Random(self._key)
        others = sorted(set(range(nr_slots)) - set(common))
        slots = common + chance.sample(others, nr_pieces - len(common))
        self.pieces: Final = {
            slot: slot * SLOT_BYTES + chance.randrange(SLOT_BYTES - PIECE_BYTES) for slot in slots
        }

    def content(self, slot: int) -> bytes:
        """Return the bytes of the piece in slot."""
        return random.Random(f"{self._key}/{slot}").randbytes(PIECE_BYTES)

    def overlay(self, data: bytearray, offset: int) -> None:
        """Copy the written bytes over data, the image's bytes from offset on."""
        end = offset + len(data)
        for slot in range(offset // SLOT_BYTES, -(-end // SLOT_BYTES)):
            at = self.pieces.get(slot)
            if at is None:
                continue
            first, last = max(at, offset), min(at + PIECE_BYTES, end)
            if first < last:
                data[first - offset : last - offset] = self.content(slot)[first - at : last - at]


def visiting_order(name: str, size_bytes: int, chance: random.Random) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of chunks that cover the image exactly once, in one of ORDERS."""
    chunk_bytes = _SHORT_BYTES if name in ("random", "strided") else _LONG_BYTES
    nr_chunks = -(-size_bytes // chunk_bytes)
    first = chance.randrange(nr_chunks)
    chunks = [*range(first, nr_chunks), *range(first)]
    if name == "backward":
        chunks.reverse()
    elif name == "random":
        chance.shuffle(chunks)
    elif name == "strided":
        chunks = [chunk for start in range(_STRIDE) for chunk in chunks[start::_STRIDE]]
    for chunk in chunks:
        offset = chunk * chunk_bytes
        yield offset, min(chunk_bytes, size_bytes - offset)


def count_wrong(found: bytes, wanted: bytearray) -> int:
    """Return the number of bytes that differ or are missing."""
    if found == wanted:
        return 0
    return sum(a != b for a, b in zip(found, wanted, strict=False)) + abs(len(found) - len(wanted))


class Checker:
    """Compares every byte that read returns with the expected one; file_fd is the image file."""

    def __init__(self, read: ReadsAt, file_fd: int) -> None:
        self._read = read
        self._file_fd = file_fd
        self.writes: Writes | None = None
        self.wrong_bytes = 0
        self.first_wrong: int | None = None

    def wanted(self, offset: int, length: int) -> bytearray:
        """Return the expected bytes."""
        data = bytearray(length)
        done = 0
        while done < length:
            nr = os.preadv(self._file_fd, [memoryview(data)[done:]], offset + done)
            if nr == 0:
                raise EOFError(f"the image file ends at {offset + done}")
            done += nr
        if self.writes is not None:
            self.writes.overlay(data, offset)
        return data

    def check(self, offset: int, length: int) -> None:
        """Compare one range, and count its wrong bytes."""
        found, wanted = self._read(offset, length), self.wanted(offset, length)
        wrong = count_wrong(found, wanted)
        if wrong and self.first_wrong is None:
            pairs = enumerate(zip(found, wanted, strict=False))
            self.first_wrong = offset + next((at for at, (a, b) in pairs if a != b), len(found))
        self.wrong_bytes += wrong


class Guest:
    """The disk and the orders about it."""

    def __init__(self, terms: dict[str, Any], disk: Disk) -> None:
        self._disk = disk
        self._number: int = terms["number"]
        self._seed: int = terms["seed"]
        self._write_bytes: int = terms["write_bytes"]
        self._round = 0
        self._unsaid_bytes = 0
        # Half of the guests use the disk as a file, half as memory; each half has all ORDERS.
        self._view = disk.view if (self._number + self._number // len(ORDERS)) % 2 else None
        self._checker = Checker(self._peek if self._view is not None else disk.read, terms["file"])

    def _peek(self, offset: int, length: int) -> bytes:
        assert self._view is not None
        return bytes(self._view[offset : offset + length])

    def check(self) -> dict[str, Any]:
        """Compare the whole image, in this guest's order."""
        self._round += 1
        name = ORDERS[self._number % len(ORDERS)]
        chance = random.Random(f"{self._seed}/{self._number}/{self._round}")
        for offset, length in visiting_order(name, self._disk.size_bytes, chance):
            self._checker.check(offset, length)
            self._progress(length)
        checker = self._checker
        return {"wrong_bytes": checker.wrong_bytes, "first_wrong": checker.first_wrong}

    def write(self) -> dict[str, Any]:
        """Write this guest's pieces, the way it reads."""
        size_bytes = self._disk.size_bytes
        writes = Writes(self._seed, self._number, size_bytes, self._write_bytes)
        for slot, at in writes.pieces.items():
            content = writes.content(slot)
            if self._view is None:
                self._disk.write(at, content)
            else:
                self._view[at : at + PIECE_BYTES] = content
            self._progress(PIECE_BYTES)
        self._checker.writes = writes
        return {"written_bytes": len(writes.pieces) * PIECE_BYTES}

    def end(self) -> dict[str, Any]:
        """Close the disk."""
        if self._view is not None:
            self._view.release()
        self._disk.close()
        return {}

    def _progress(self, nr_bytes: int) -> None:
        self._unsaid_bytes += nr_bytes
        if self._unsaid_bytes >= _PROGRESS_BYTES:
            say(progress=self._unsaid_bytes)
            self._unsaid_bytes = 0


def become(uid: int) -> None:
    """Change to uid for good, and die with the parent; /proc/self then belongs to that user."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for option, value in ((_PR_SET_DUMPABLE, 1), (_PR_SET_PDEATHSIG, int(signal.SIGKILL))):
        if prctl(option, value, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")


def say(**answer: Any) -> None:
    """Answer in one line."""
    print(json.dumps(answer), flush=True)


def main() -> int:
    """Be a guest until told to end."""
    terms = json.loads(sys.argv[1])
    try:
        # Not before: the other user may not be able to read modules to import.
        become(terms["uid"])
        with connect(terms["uri"]) as backend:
            disk = backend.open(terms["image"], guest=f"guest-{terms['number'] + 1}")
        guest = Guest(terms, disk)
        say(done={})
        for line in sys.stdin:
            order = line.strip()
            say(done={"check": guest.check, "write": guest.write, "end": guest.end}[order]())
    except (CowshedError, OSError, EOFError) as error:
        say(error=f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
