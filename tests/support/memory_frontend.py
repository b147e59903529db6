# SPDX-License-Identifier: Apache-2.0
"""A frontend of the block request engine that has no socket: requests are calls, data is memory."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from cffi import FFI

from cowshed.accounting import Overlay
from cowshed.cache import Image
from cowshed.cache._core import ffi as core

ROOT = Path(__file__).parents[2]
SOURCES = (
    "cache/core/*.c",
    "accounting/core/*.c",
    "accounting/core/overlay/*.c",
    "transport/core/blocks/*.c",
    "tests/transport/blocks/frontend.c",
)
READ, WRITE, DISCARD, ZERO, FLUSH, PREFETCH = range(6)
FUA, SPLIT, ALLOCATE, FAST = 1, 2, 4, 8
RUN_BYTES = 256 << 10

CDEF = """
struct front_state {
	uint32_t accepts, frozen, nr_requests, nr_waits;
	uint64_t buffered_bytes, nr_waiting, nr_hits, nr_misses, nr_undone;
};
struct front_request_state { int err; uint32_t nr_completions, nr_runs, whole, missed; };
void *front_new(void *image, void *overlay);
void front_free(void *front);
void *front_submit(void *front, int op, uint32_t flags, uint64_t offset, uint64_t length,
                   uint8_t *memory);
uint64_t front_write(void *front, void *request, const uint8_t *bytes, uint64_t nr_bytes);
void front_cancel(void *front, void *request);
int front_run(void *front);
int front_wait(void *front, int timeout_ms);
void front_stall(void *front, int stalled);
void front_break(void *front);
void front_state(const void *front, struct front_state *state_out);
void front_request_state(const void *request, struct front_request_state *state_out);
void front_request_free(void *request);
"""
ffi = FFI()
ffi.cdef(CDEF)


@cache
def library(folder: Path) -> Any:
    """Compile the engine, the code below it and frontend.c; they use the core's objects."""
    built = folder / "frontend.so"
    sources = [source for pattern in SOURCES for source in sorted(ROOT.glob(pattern))]
    flags = [
        "-std=gnu11",
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-UNDEBUG",
        "-fPIC",
        "-shared",
    ]
    command = ["gcc", *flags, "-pthread", f"-I{ROOT}", "-o", built, *sources]
    subprocess.run(command, check=True)
    return ffi.dlopen(str(built))


class Request:
    """One request; its memory is what it reads."""

    def __init__(
        self, front: MemoryFrontend, op: int, flags: int, offset: int, length: int
    ) -> None:
        self._front = front
        self.memory = ffi.new("uint8_t[]", max(length, 1))
        self.length = length
        self.cdata = front.lib.front_submit(front.cdata, op, flags, offset, length, self.memory)

    @property
    def state(self) -> Any:
        state = ffi.new("struct front_request_state *")
        self._front.lib.front_request_state(self.cdata, state)
        return state

    @property
    def is_done(self) -> bool:
        assert self.state.nr_completions <= 1
        return self.state.nr_completions == 1

    @property
    def bytes(self) -> bytes:
        return bytes(ffi.buffer(self.memory, self.length))


class MemoryFrontend:
    """A queue of one device, whose worker is the calling thread."""

    def __init__(self, folder: Path, image: Image, overlay: Overlay | None = None) -> None:
        self.lib = library(folder)
        self._kept = image, overlay
        self.cdata = self.lib.front_new(
            ffi.cast("void *", int(core.cast("uintptr_t", image.cdata))),
            ffi.cast("void *", int(core.cast("uintptr_t", overlay.cdata)) if overlay else 0),
        )
        self._requests: list[Request] = []

    @property
    def state(self) -> Any:
        state = ffi.new("struct front_state *")
        self.lib.front_state(self.cdata, state)
        return state

    def submit(self, op: int, offset: int = 0, length: int = 0, flags: int = 0) -> Request:
        request = Request(self, op, flags, offset, length)
        self._requests.append(request)
        return request

    def write(self, request: Request, payload: bytes) -> int:
        """Pass payload of a WRITE; return how much of it was taken."""
        return int(self.lib.front_write(self.cdata, request.cdata, payload, len(payload)))

    def cancel(self, request: Request) -> None:
        self.lib.front_cancel(self.cdata, request.cdata)

    def run(self) -> None:
        """Run the worker until the queue has nothing to do."""
        while self.lib.front_run(self.cdata):
            pass

    def is_woken(self, seconds: float = 20) -> bool:
        return bool(self.lib.front_wait(self.cdata, int(1000 * seconds)))

    def finish(self, request: Request) -> int:
        """Serve the queue until a request is done; return its error."""
        self.run()
        while not request.is_done:
            assert self.is_woken(), "nothing wakes the worker"
            self.run()
        return int(request.state.err)

    def stall(self, on: bool) -> None:
        """Make the client take no data, or take it again."""
        self.lib.front_stall(self.cdata, on)

    def leave(self) -> None:
        """Simulate the client's end."""
        self.lib.front_break(self.cdata)
        self.run()

    def close(self) -> None:
        self.stall(False)
        for request in self._requests:
            self.finish(request)
        while self.state.nr_waits:
            assert self.is_woken()
            self.run()
        self.lib.front_free(self.cdata)
        for request in self._requests:
            self.lib.front_request_free(request.cdata)
