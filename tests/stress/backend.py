# SPDX-License-Identifier: Apache-2.0
"""The daemon under stress: the product's own, with a channel beside it for what no product offers.

    backend.py CONFIG

The daemon runs as ever in the main thread. A second thread takes JSON orders from stdin, a line
each, and answers on stdout: points of the core are armed, invariants recomputed, leftovers counted.
A third samples what is resident, all the time. The last line is what was left after everything
was closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from cowshed.cache import ExtentState
from cowshed.cache._core import lib
from cowshed.service import daemon as product
from cowshed.service.runtime.logs import logging_begin
from cowshed.service.settings.config import config_load

_BETWEEN_SAMPLES_SECONDS = 0.003
_PATIENCE_SECONDS = 60.0


class Sampler:
    """Watches that neither the ledger nor the kernel ever shows more than the capacity.

    Two images are read one after the other, so a sum counts only if no extent changed meanwhile.
    """

    def __init__(self, daemon: product.Daemon) -> None:
        self._store = daemon.host.store
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self.nr_samples = 0
        self.most_bytes = 0
        self.violations: list[str] = []
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_BETWEEN_SAMPLES_SECONDS):
            self._sample()

    def _sample(self) -> None:
        images = list(self._store)
        capacity = self._store.capacity_bytes
        generations = [image.generation for image in images]
        resident = [image.resident_bytes for image in images]
        blocks = [os.fstat(image.frames_fd).st_blocks * 512 for image in images]
        blocks.append(os.fstat(self._store.standby_fd).st_blocks * 512)
        counters = self._store.counters()
        taken = counters.reserved_extents + counters.standby_extents + counters.standby_moving
        quiet = generations == [image.generation for image in images]
        worst = max(max(resident), max(blocks))
        if quiet:
            self.nr_samples += 1
            worst = max(sum(resident), sum(blocks))
            self.most_bytes = max(self.most_bytes, worst)
        if worst > capacity or taken > counters.capacity_extents:
            self.violations.append(
                f"capacity {capacity}: resident {resident}, st_blocks {blocks}, {counters}"
            )


class Channel:
    """The orders: methods that begin with do_."""

    def __init__(self, daemon: product.Daemon, sampler: Sampler) -> None:
        self._daemon = daemon
        self._sampler = sampler
        self._store = daemon.host.store
        self._evictor = daemon.host.evictor

    def run(self) -> None:
        for line in sys.stdin:
            order = json.loads(line)
            try:
                answer = {"ok": getattr(self, "do_" + order.pop("do"))(**order)}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            say(answer)
        os.kill(os.getpid(), signal.SIGTERM)  # nobody is there to ask any more

    def do_arm(self, point: str, action: str, arg: int, nr_times: int) -> int:
        return int(
            lib.point_arm(
                getattr(lib, f"POINT_{point}"), getattr(lib, f"POINT_{action}"), arg, nr_times
            )
        )

    def do_wait_point(self, point: str, nr_threads: int) -> bool:
        """Wait until so many threads are at an armed point."""
        timeout_ms = int(_PATIENCE_SECONDS * 1000)
        return bool(lib.point_wait(getattr(lib, f"POINT_{point}"), nr_threads, timeout_ms) == 0)

    def do_release(self, point: str) -> int:
        return int(lib.point_release(getattr(lib, f"POINT_{point}")))

    def do_release_all(self) -> None:
        for point in range(lib.POINT_NR):
            lib.point_release(point)

    def do_sampled(self) -> dict[str, Any]:
        return {
            "nr_samples": self._sampler.nr_samples,
            "most_bytes": self._sampler.most_bytes,
            "violations": self._sampler.violations[:5],
        }

    def do_wait_idle(self) -> bool:
        """Wait until no load is queued or running."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline:
            counters = self._store.counters()
            if not counters.loading_extents and not counters.queued_loads:
                return True
            time.sleep(0.005)
        return False

    def do_queued(self) -> int:
        return self._store.counters().queued_loads

    def do_wait_digests(self) -> bool:
        """Wait until all are known, and the threads that computed them have ended."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not all(image.digest for image in self._store) or any(
            thread.name == "in-time" for thread in threading.enumerate()
        ):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def do_check(self, pins: dict[str, dict[str, int]], pinned_stay: bool) -> list[str]:
        """Recompute what can be, in a quiet moment; what is wrong."""
        problems = []
        counters = self._store.counters()
        nr_resident = nr_out = 0
        with self._evictor._lock:
            self._evictor._admit()
            policy = self._evictor._policy
            policy.check()
            for image in self._store:
                pinned = dict.fromkeys(range(image.nr_extents), 0)
                pinned.update({int(extent): nr for extent, nr in pins[image.name].items()})
                for extent, (state, nr_pins, refs) in enumerate(
                    zip(image.states(), image.pins(), image.refs(), strict=True)
                ):
                    where = f"extent {extent} of {image.name}"
                    resident = state == ExtentState.RESIDENT
                    nr_resident += image.room_of(extent) if resident else 0
                    tracked = (image.image_no, extent) in policy
                    nr_out += tracked and not resident  # as a sample
                    if resident and not tracked:
                        problems.append(f"{where}: resident, and the policy thinks otherwise")
                    if refs and not resident:
                        problems.append(f"{where}: {refs} grants, and in state {state}")
                    if nr_pins != pinned[extent]:
                        problems.append(f"{where}: {nr_pins} pins, must be {pinned[extent]}")
                    if nr_pins and not resident and pinned_stay:
                        problems.append(f"{where}: pinned, and in state {state}")
        if nr_out > counters.standby_extents:
            problems.append(f"the policy tracks {nr_out} extents that are away, and {counters}")
        if counters.reserved_extents != nr_resident:
            problems.append(f"room of {nr_resident} is resident, and {counters}")
        self._store.check()
        return problems[:20]

    def do_left(self) -> dict[str, Any]:
        """What guests may leave behind: descriptors, threads, grants."""
        refs = sum(sum(image.refs()) for image in self._store)
        return {"refs": refs, "guests": len(self._daemon.guests), **count_own()}

    def do_frames_bytes(self) -> int:
        return sum(os.fstat(image.frames_fd).st_blocks * 512 for image in self._store)


def count_own() -> dict[str, Any]:
    """This process's descriptors by what they are, threads by name, and mappings of ours."""
    descriptors: dict[str, int] = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            link = os.readlink(f"/proc/self/fd/{name}")
            kind = link.split(":")[0] + ":" if link.startswith(("socket:", "pipe:")) else link
            if kind == "socket:" and _is_listening(int(name)):
                kind = "listening"
            if not kind.startswith("/proc/"):
                descriptors[kind] = descriptors.get(kind, 0) + 1
            elif "/fd" not in kind:
                descriptors["/proc"] = descriptors.get("/proc", 0) + 1
    threads: dict[str, int] = {}
    for task in set(os.listdir("/proc/self/task")) - _pool_tasks():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            name = Path(f"/proc/self/task/{task}/comm").read_text().strip()
            threads[name] = threads.get(name, 0) + 1
    mappings = Path("/proc/self/maps").read_text().count("memfd:cowshed")
    return {"descriptors": descriptors, "threads": threads, "mappings": mappings}


def _is_listening(fd: int) -> bool:
    """Whether it is a socket at which peers may come; OSError if it has just been closed."""
    sock = socket.socket(fileno=fd)
    try:
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    finally:
        sock.detach()


def _pool_tasks() -> set[str]:
    """Threads that come when they are needed and stay, and the one that ends when all is warm."""
    return {
        str(thread.native_id)
        for thread in threading.enumerate()
        if thread.name.startswith(("looks", "orders", "side", "autowarm"))
    }


def say(answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    config = config_load(config_file=Path(sys.argv[1]))
    logging_begin(config.log_format, config.log_level)
    first = threading.Thread(target=len, args=("",))
    first.start()  # with the first thread, a sanitizer starts one of its own that stays
    first.join()
    while Path(f"/proc/self/task/{first.native_id}").exists():
        time.sleep(0.001)  # a thread that was joined is a task for some moments more
    before = count_own()
    with contextlib.ExitStack() as stack:
        daemon = product.Daemon(config, stack)
        sampler = Sampler(daemon)
        stack.callback(sampler.stop)
        channel = threading.Thread(target=Channel(daemon, sampler).run, daemon=True)
        channel.start()
        daemon.serve()
    channel.join(_PATIENCE_SECONDS)
    after = count_own()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while after != before and time.monotonic() < deadline:
        time.sleep(0.01)
        after = count_own()
    say({"before": before, "after": after})


if __name__ == "__main__":
    main()
