# SPDX-License-Identifier: Apache-2.0
"""The measuring process: guest and plain peer in turn, controlled by lines of JSON.

    worker.py BUILD_DIR URI DAEMON_PID

Orders are the methods do_* of Worker; an answer is {"ok": value} or {"error": text}. One process
plays both sides, so that they share its placement, its heap and the compiled loops.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from array import array
from pathlib import Path
from typing import Any

from machine import cpu_of, thread_times
from mappings import (
    PAGE_BYTES,
    GuestMapping,
    HugeMapping,
    PlainMapping,
    page_order,
    smaps_of,
)
from native import checked, cost_of, ffi, load

from cowshed.transport import connect

HOW = {"read": 0, "copy": 1, "write": 2}
MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23
Mapping = GuestMapping | PlainMapping | HugeMapping
_GUESTS = ("guest", "open")
# Single faults between two looks at where both ends are.
LOOK_FAULTS = 128


class Worker:
    """The orders; holds at most one mapping at a time."""

    def __init__(self, build_dir: Path, uri: str, daemon_pid: int) -> None:
        self._lib = load(build_dir)
        self._uri = uri
        self._daemon_pid = daemon_pid
        self._backend = connect(uri)
        self._orders: dict[tuple[int, str, int], array[int]] = {}
        self._memfds: dict[tuple[str, str], int] = {}
        self._pong: tuple[int, int, int] | None = None

    def do_pin(self, cpus: list[int]) -> None:
        """Run on these CPUs."""
        os.sched_setaffinity(0, cpus)

    def do_touch(
        self,
        side: str,
        how: str,
        order: str,
        place: str,
        seed: int = 1,
        read_before: bool = False,
    ) -> dict[str, Any]:
        """Map, touch, touch again, unmap. place is the image's name for a guest, else a path.

        side "plain" maps the file; "populate" also has the kernel map everything in one call;
        "memfd" maps a copy of the file in a memfd, like the backend's frames but without a backend;
        "huge" one in huge pages. "open" is a guest whose regions are all open.
        """
        before = thread_times(self._daemon_pid) if side in _GUESTS else {}
        began = time.perf_counter_ns()
        mapping = self._map(side, place)
        mapped_ns = time.perf_counter_ns() - began
        try:
            nr_pages = mapping.nr_bytes // PAGE_BYTES
            if read_before:
                self._touch(mapping, "read", self._order(nr_pages, "sequential", 0), 0)
            pages = self._order(nr_pages, order, seed)
            advice = 0
            if side == "populate":
                advice = MADV_POPULATE_WRITE if how == "write" else MADV_POPULATE_READ
            cost = self._touch(mapping, how, pages, advice)
            answer = {
                "cost": cost,
                "attach_ns": mapped_ns,
                "nr_pages": len(pages),
                "again_ns": self._touch(mapping, how, pages, 0)["wall_ns"],
                "mapped_pages": smaps_of(os.getpid(), mapping.address)["Rss"] // PAGE_BYTES,
            }
            if isinstance(mapping, GuestMapping):
                answer["daemon"] = self._daemon_since(before)
                answer["guest"] = self._guest_status(mapping.name)
            return answer
        finally:
            mapping.close()

    def do_each(
        self, place: str, nr: int, seed: int, fault_cpus: list[int] | None
    ) -> dict[str, Any]:
        """Open as a guest with windows of one page; time nr single faults on random pages.

        fault_cpus are the CPUs that the daemon's thread for this guest may use; None for all.
        apart in the answer: in what part of the time the two were on different CPUs.
        """
        mapping = GuestMapping(self._uri, place, window_bytes=PAGE_BYTES)
        try:
            tid = self._fault_thread()
            if fault_cpus is not None:
                os.sched_setaffinity(tid, fault_cpus)
            before = thread_times(self._daemon_pid)
            pages = self._order(mapping.nr_bytes // PAGE_BYTES, "shuffled", seed)[:nr]
            each = ffi.new("uint32_t[]", nr)
            numbers = ffi.from_buffer("uint32_t[]", pages)
            nr_apart = 0
            began = time.perf_counter_ns()
            parts = range(0, nr, LOOK_FAULTS)
            for first in parts:
                nr_now = min(LOOK_FAULTS, nr - first)
                err = self._lib.touch_each(mapping.base, numbers + first, nr_now, each + first)
                checked(err, "touching pages")
                nr_apart += cpu_of(os.getpid()) != cpu_of(tid)
            wall_ns = time.perf_counter_ns() - began
            return {
                "each_ns": list(each),
                "wall_ns": wall_ns,
                "apart": nr_apart / len(parts),
                "handler_cpus": sorted(os.sched_getaffinity(tid)),
                "daemon": self._daemon_since(before),
                "guest": self._guest_status(mapping.name),
            }
        finally:
            mapping.close()

    def do_stay(self, place: str, seconds: float, seed: int | None) -> dict[str, Any]:
        """Open as a guest and read all; then touch random pages, or rest (seed None), for so long.

        Returns the time of the 50th, 99th and 99.9th of 100 touches (the median of passes over all
        pages), of the slowest of all, and the daemon's CPU time.
        """
        mapping = GuestMapping(self._uri, place)
        try:
            nr_pages = mapping.nr_bytes // PAGE_BYTES
            self._touch(mapping, "read", self._order(nr_pages, "sequential", 0), 0)
            pages = self._order(nr_pages, "shuffled", seed or 0)
            each = ffi.new("uint32_t[]", nr_pages)
            numbers = ffi.from_buffer("uint32_t[]", pages)
            before, began = thread_times(self._daemon_pid), time.monotonic()
            times: list[list[int]] = []
            slowest = 0
            while (left := began + seconds - time.monotonic()) > 0:
                if seed is None:
                    time.sleep(left)
                    continue
                checked(self._lib.touch_each(mapping.base, numbers, nr_pages, each), "touching")
                ordered = sorted(ffi.unpack(each, nr_pages))
                times.append([ordered[int(nr_pages * part)] for part in (0.5, 0.99, 0.999)])
                slowest = max(slowest, ordered[-1])
            run_ns = sum(sums["run_ns"] for sums in self._daemon_since(before).values())
            elapsed = time.monotonic() - began
            medians = [sorted(column)[len(times) // 2] for column in zip(*times, strict=True)]
            return {
                "percent": run_ns / elapsed / 1e7,
                "ns": medians,
                "slowest_ns": slowest,
                "nr": len(times) * nr_pages,
            }
        finally:
            mapping.close()

    def do_ping(self, nr: int, pong_cpus: list[int] | None) -> dict[str, Any]:
        """Time nr round trips of a byte through two pipes to a process that runs on pong_cpus."""
        if self._pong is None:
            self._pong = self._start_pong()
        pid, to_fd, from_fd = self._pong
        os.sched_setaffinity(pid, pong_cpus or range(os.cpu_count() or 1))
        each = ffi.new("uint32_t[]", nr)
        began = time.perf_counter_ns()
        checked(self._lib.touch_ping(to_fd, from_fd, nr, each), "ping")
        return {"each_ns": list(each), "wall_ns": time.perf_counter_ns() - began}

    def do_file(self, path: str, chunk_bytes: int, direct: bool) -> dict[str, Any]:
        """Read a file front to back by pread."""
        fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        try:
            cost = ffi.new("struct touch_cost *")
            size_bytes = os.fstat(fd).st_size
            checked(self._lib.touch_file(fd, size_bytes, chunk_bytes, cost), f"reading {path}")
            return {"cost": cost_of(cost)}
        finally:
            os.close(fd)

    def do_library(self, place: str, chunk_bytes: int) -> dict[str, Any]:
        """Read an image front to back with Disk.read, as Python programs do."""
        with connect(self._uri) as backend, backend.open(place) as disk:
            began = time.perf_counter_ns()
            for offset in range(0, disk.size_bytes, chunk_bytes):
                disk.read(offset, min(chunk_bytes, disk.size_bytes - offset))
            return {"cost": {"wall_ns": time.perf_counter_ns() - began}}

    def do_uncache(self, path: str) -> int:
        """Drop a file from the page cache; return how many of its pages are still cached."""
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            nr: int = self._lib.touch_cached_pages(fd, os.fstat(fd).st_size)
            return checked(nr, f"mincore of {path}")
        finally:
            os.close(fd)

    def do_clock(self) -> int:
        """Return the cost of one reading of the clock, in ns."""
        return int(self._lib.touch_clock_ns())

    def _map(self, side: str, place: str) -> Mapping:
        if side in _GUESTS:
            return GuestMapping(self._uri, place, wait_open=side == "open")
        if side == "huge":
            return HugeMapping(self._copy_in_memfd(place, "huge"))
        return PlainMapping(self._copy_in_memfd(place) if side == "memfd" else place)

    def _copy_in_memfd(self, path: str, kind: str = "") -> str:
        key = kind, path
        if key not in self._memfds:
            self._memfds[key] = fd = os.memfd_create("bench")
            with open(path, "rb") as file, open(fd, "wb", closefd=False) as copy:
                shutil.copyfileobj(file, copy, 1 << 20)
        return f"/proc/self/fd/{self._memfds[key]}"

    def _order(self, nr_pages: int, order: str, seed: int) -> array[int]:
        key = (nr_pages, order, seed)
        if key not in self._orders:
            if len(self._orders) > 8:
                self._orders.clear()
            self._orders[key] = page_order(*key)
        return self._orders[key]

    def _touch(self, mapping: Mapping, how: str, pages: array[int], advice: int) -> dict[str, int]:
        cost = ffi.new("struct touch_cost *")
        numbers = ffi.from_buffer("uint32_t[]", pages)
        checked(
            self._lib.touch_pages(
                mapping.base, numbers, len(pages), HOW[how], mapping.nr_bytes, advice, cost
            ),
            "touching pages",
        )
        return cost_of(cost)

    def _fault_thread(self) -> int:
        """Return the tid of the daemon's one fault thread: this guest is the only one."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:  # the thread names itself when it first runs
            for task in Path(f"/proc/{self._daemon_pid}/task").iterdir():
                if (task / "comm").read_text().strip() == "cow-faults":
                    return int(task.name)
        raise TimeoutError("the daemon has no thread cow-faults")

    def _daemon_since(self, before: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
        return {
            name: {key: value - before.get(name, {}).get(key, 0) for key, value in sums.items()}
            for name, sums in thread_times(self._daemon_pid).items()
        }

    def _guest_status(self, name: str) -> dict[str, Any]:
        guests = self._backend.request("status")["status"]["guests"]
        (guest,) = [guest for guest in guests if guest["name"] == name]
        return {
            "faults": guest["faults"],
            "misses": guest["misses"],
            "cow_breaks": guest["cow_breaks"],
        }

    def _start_pong(self) -> tuple[int, int, int]:
        there_read, to_fd = os.pipe()
        from_fd, there_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(to_fd)
            os.close(from_fd)
            self._lib.touch_pong(there_read, there_write)
            os._exit(0)
        os.close(there_read)
        os.close(there_write)
        return pid, to_fd, from_fd


def main() -> None:
    """Answer orders until stdin ends."""
    build_dir, uri, daemon_pid = sys.argv[1:]
    worker = Worker(Path(build_dir), uri, int(daemon_pid))
    print(json.dumps({"ok": os.getpid()}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = {"ok": getattr(worker, "do_" + order.pop("do"))(**order)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
