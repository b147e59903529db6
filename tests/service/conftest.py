# SPDX-License-Identifier: Apache-2.0
"""What a daemon would say, and one that says it."""

import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cowshed.transport import Connection, listen

Body = dict[str, Any]


def make_guest(name: str, **changes: object) -> Body:
    return {
        "name": name,
        "image": "debian-12",
        "domain": "default",
        "transport": "unix",
        "mappings": 1,
        "state": "running",
        "pid": 41234,
        "uid": 1000,
        "granted_bytes": 512 << 20,
        "private_bytes": 12 << 20,
        "quota_bytes": 64 << 20,
        "hits": 120345,
        "misses": 234,
        "cow_breaks": 3072,
        "policy": "stop",
        "poisoned_pages": 0,
        "quota_stops": 0,
        "stopped_seconds": 0.0,
        **changes,
    }


def make_use() -> list[Body]:
    return [
        {
            "window_seconds": seconds,
            "hit_rate": {"value": 0.75, "low": 0.71, "high": 0.8},
            "working_set_bytes": {"value": 700 << 20, "low": 600 << 20, "high": 800 << 20},
            "hit_rate_at": {"0.5": 0.5, "1": 0.75, "2": 0.9},
        }
        for seconds in (10, 60, 300)
    ]


@pytest.fixture
def new_guest() -> Callable[..., Body]:
    return make_guest


@pytest.fixture
def status() -> Body:
    """A status object as a busy daemon gives it: a stopped guest, an odd name, a changed source."""
    return {
        "pid": 4242,
        "version": "0.1.0",
        "run_dir": "/run/cowshed",
        "uptime_seconds": 3725.5,
        "generation": 4,
        "restarts": {"crash": 1, "reload": 0, "takeover": 2},
        "keeper": "own",
        "not_held": 0,
        "adoption_seconds": 0.0123,
        "capacity_bytes": 2 << 30,
        "resident_bytes": 1288490188,
        "standby": {
            "bytes": 100 << 20,
            "limit_bytes": 400 << 20,
            "victims": 5432,
            "victim_hits": 4321,
            "samples": 654,
            "sample_hits": 456,
        },
        "use": make_use(),
        "use_unknown_because": "no guest used anything",
        "hits": 1234567,
        "misses": 2345,
        "evicted_extents": 123,
        "evictions": {"pressure": 100, "request": 23},
        "loads": 2345,
        "load_bytes": 2345 << 16,
        "load_errors": 7,
        "cow_breaks": 24567,
        "saved_bytes": 5800000000,
        "faults": {"missing": 12345, "minor": 1200000, "write": 24567},
        "latency_us": {
            "hit": {"p50": 3.1, "p90": 12, "p99": 85, "max": 1210, "count": 1234567},
            "miss": {"p50": 140, "p90": 420, "p99": 1900, "max": 25300, "count": 2345},
            "write": {"p50": 0, "p90": 0, "p99": 0, "max": 0, "count": 0},
        },
        "images": [
            {
                "name": "debian-12",
                "domain": "default",
                "use": make_use(),
                "size_bytes": 2 << 30,
                "resident_bytes": 1 << 30,
                "digest": "sha256:" + "ab12cd34" * 8,
                "source": "/srv/images/debian-12-generic-amd64-20240102.raw",
                "pinned_bytes": 64 << 20,
                "source_changed": False,
                "warming": None,
                "saved_bytes": 5800000000,
                "working_set_bytes": 700 << 20,
                "loads": 2000,
                "load_errors": 0,
            },
            {
                "name": "alpine",
                "domain": "default",
                "size_bytes": 5 << 20,
                "resident_bytes": 0,
                "digest": "",
                "source": "/srv/alpine.raw",
                "pinned_bytes": 0,
                "source_changed": True,
                "warming": None,
                "saved_bytes": 0,
                "working_set_bytes": 0,
                "loads": 345,
                "load_errors": 7,
            },
        ],
        "guests": [
            make_guest("web-1"),
            make_guest(
                "build-7", state="stopped-quota", private_bytes=64 << 20, stopped_seconds=192.4
            ),
            make_guest("sandbox-0a1b2c3d4e5f", quota_bytes=None, state="detached"),
            make_guest("evil\x1b[2J[red]\u202e", policy="kill", hits=0, misses=0, image="alpine"),
        ],
    }


class StandIn:
    """Listens in a run-dir and gives each operation its replies, then waits for the next client.

    `asked` are the requests it was sent; an operation without replies is a hang-up.
    """

    def __init__(self, run_dir: Path, replies: dict[str, list[Body]]) -> None:
        self.run_dir = run_dir
        self.replies = replies
        self.asked: list[Body] = []
        self._listener = listen(f"unix://{run_dir}/cowshed.sock")
        self._end, self._ended = socket.socketpair()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._end.close()
        self._thread.join()
        self._ended.close()
        self._listener.close()

    def _wait(self, fd: int) -> bool:
        """Wait until a descriptor can be read; False if the end comes first."""
        return self._ended not in select.select([fd, self._ended], [], [])[0]

    def _serve(self) -> None:
        while self._wait(self._listener.fileno()):
            connection = self._listener.accept()
            if connection is not None:
                self._answer(connection)
                connection.close()

    def _answer(self, connection: Connection) -> None:
        hello: Body = {"ok": True, "version": 1, "features": [], "pid": 1}
        while self._wait(connection.fileno()):
            try:
                body, _, tag = connection.recv(timeout=1)
            except Exception:  # the client is done
                return
            if body["op"] != "hello":
                self.asked.append(body)
            replies = self.replies.get(body["op"], [hello] if body["op"] == "hello" else [])
            for reply in replies:
                connection.send(reply, tag=tag)
            if not replies:
                return


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[Callable[..., StandIn]]:
    """Start a StandIn in tmp_path with the replies given by operation."""
    started: list[StandIn] = []

    def start(**replies: list[Body]) -> StandIn:
        started.append(StandIn(tmp_path, replies))
        return started[-1]

    yield start
    for peer in started:
        peer.close()
