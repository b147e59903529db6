# SPDX-License-Identifier: Apache-2.0
"""NBD: cowshed's server against nbdkit's file plugin and qemu-nbd, on one file, with one client.

The file is in the page cache for the peers, and in frames for cowshed. Rows that write start the
peers anew, so that each write is the first to its page; a cowshed guest gets a new overlay instead.

The limit is a server without a disk (core/nbd_limit.c): the most that the client and the socket can
do. No server exceeds it, whatever multiple of a peer is the aim.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from backend import BenchError
from cases import Bench, CaseResult, Row, Side
from native import nbd_limit
from stats import Aim

__all__ = ["nbd"]

READ_AIM = Aim(1.3, at_least=True)
OVERLAY_AIM = Aim(2.0, at_least=True)
WRITE_AIM = Aim(3.0, at_least=True)
START_SECONDS = 10.0
MIB = 1 << 20
_TICK_US = 1e6 / os.sysconf("SC_CLK_TCK")

# fio's parameters for a row, which also decide whether its figure is MiB/s or requests a second.
_SEQUENTIAL = ("read", "256k")
_RANDOM = ("randread", "4k")
_WRITES = ("randwrite", "4k")


class Peer:
    """Another project's server at a socket, started when the block is entered."""

    def __init__(self, *words: str, socket: Path) -> None:
        self.uri = f"nbd+unix:///?socket={socket}"
        self._words = words
        self._socket = socket

    @contextmanager
    def running(self) -> Iterator[int]:
        """Run it for the length of the block; yield its pid."""
        with subprocess.Popen(
            self._words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            try:
                deadline = time.monotonic() + START_SECONDS
                while not self._socket.exists():
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise BenchError(f"{self._words[0]} does not listen")
                    time.sleep(0.01)
                yield process.pid
            finally:
                process.send_signal(signal.SIGTERM)
                process.communicate()
                self._socket.unlink(missing_ok=True)


def nbd(bench: Bench) -> CaseResult:
    """Measure reads of an image, reads of a private copy, and first writes to one."""
    for program in ("nbdkit", "qemu-nbd", "fio"):
        if shutil.which(program) is None:
            raise BenchError(f"the case nbd needs {program}: `make setup` as root installs it")
    bench.served.request("warm", image="warm")
    bench.worker.call("file", path=str(bench.warm), chunk_bytes=MIB, direct=False)
    rows = []
    with tempfile.TemporaryDirectory(prefix="cowshed-nbd-") as name, ExitStack() as stack:
        folder = Path(name)
        plain = _peers(bench.warm, folder, cow=False)
        cow = _peers(bench.warm, folder, cow=True)
        everybody = (*plain.values(), *cow.values())
        limit = _limit(bench, folder)
        pids = {peer: stack.enter_context(peer.running()) for peer in (*everybody, limit)}
        for how, what in ((_SEQUENTIAL, "sequential 256K"), (_RANDOM, "random 4K")):
            for depth, connections in itertools.product((1, 16), (1, 4)):
                where = f"depth {depth}, {connections} conn"
                sides = {"cowshed": _ours(bench, "warm", how, depth, connections)}
                for kind, peer in plain.items():
                    sides[kind] = _side(bench, peer.uri, pids[peer], how, depth, connections)
                sides["limit"] = _side(bench, limit.uri, pids[limit], how, depth, connections)
                rows.append(_row(bench, f"{what}, {where}", how, sides, READ_AIM))
        sides = {"cowshed": _ours(bench, "warm@reader", _RANDOM, 16, 1)}
        for kind, peer in cow.items():
            sides[kind] = _side(bench, peer.uri, pids[peer], _RANDOM, 16, 1)
        sides["limit"] = _side(bench, limit.uri, pids[limit], _RANDOM, 16, 1)
        rows.append(_row(bench, "private copy, random 4K, depth 16", _RANDOM, sides, OVERLAY_AIM))
    with tempfile.TemporaryDirectory(prefix="cowshed-nbd-") as name:
        cow = _peers(bench.warm, Path(name), cow=True) | {"limit": _limit(bench, Path(name))}
        for depth in (1, 16):
            sides = {"cowshed": _our_writes(bench, depth)}
            sides |= {kind: _peer_writes(bench, peer, depth) for kind, peer in cow.items()}
            what = f"first writes, random 4K, depth {depth}"
            rows.append(_row(bench, what, _WRITES, sides, WRITE_AIM if depth == 16 else None))
    return CaseResult(
        "NBD server, against nbdkit file (+ cow) and qemu-nbd (--snapshot), client fio",
        rows,
        [
            "the same raw file for all, in the page cache and in cowshed's frames; unix sockets",
            "us_cpu: CPU time of the server for each request, in steps of a clock tick in all",
            "limit: a server without a disk; what fio and a socket do at most",
            "each connection is a thread of fio's with the depth given",
        ],
    )


def _limit(bench: Bench, folder: Path) -> Peer:
    socket = folder / "limit.sock"
    size_bytes = bench.warm.stat().st_size
    return Peer(str(nbd_limit(bench.build_dir)), str(socket), str(size_bytes), socket=socket)


def _peers(image: Path, folder: Path, *, cow: bool) -> dict[str, Peer]:
    return {kind: _peer(kind, image, folder, cow=cow) for kind in ("nbdkit", "qemu-nbd")}


def _peer(kind: str, image: Path, folder: Path, *, cow: bool) -> Peer:
    socket = folder / f"{kind}{'-cow' if cow else ''}.sock"
    if kind == "nbdkit":
        words = ["nbdkit", "-f", "-U", str(socket), *(["--filter=cow"] if cow else ["-r"])]
        return Peer(*words, "file", str(image), socket=socket)
    words = ["qemu-nbd", "-t", "-e", "16", "-k", str(socket), "-f", "raw"]
    return Peer(*words, "--snapshot" if cow else "-r", str(image), socket=socket)


def _row(
    bench: Bench, name: str, how: tuple[str, str], sides: dict[str, Side], aim: Aim | None
) -> Row:
    unit = "MiB/s" if how is _SEQUENTIAL else "IOPS"
    ratios = [("cowshed", kind, aim) for kind in ("nbdkit", "qemu-nbd")]
    ratios += [("cowshed", "limit", None)]
    return Row.measure(bench, name, unit, sides, ratios)


def _ours(bench: Bench, export: str, how: tuple[str, str], depth: int, connections: int) -> Side:
    uri = f"nbd+unix:///{export}?socket={bench.served.run_dir}/nbd.sock"
    return _side(bench, uri, _our_pid(bench), how, depth, connections)


def _side(
    bench: Bench, uri: str, pid: int, how: tuple[str, str], depth: int, connections: int
) -> Side:
    seconds = 0.3 if bench.quick else 1.0
    timed = ["--time_based", f"--runtime={int(seconds * 1000)}ms"]
    return lambda: _fio(bench, uri, pid, how, depth, connections, timed)


def _our_pid(bench: Bench) -> int:
    """Return the backend's pid: the process that was started may be its keeper."""
    return int(bench.served.request("status")["status"]["pid"])


def _our_writes(bench: Bench, depth: int) -> Side:
    numbers, pid = itertools.count(), _our_pid(bench)

    def measure() -> tuple[float, dict[str, float]]:
        export = f"warm@writer-{depth}-{next(numbers)}"
        uri = f"nbd+unix:///{export}?socket={bench.served.run_dir}/nbd.sock"
        result = _fio(bench, uri, pid, _WRITES, depth, 1, [])
        _discard(bench, export)
        return result

    return measure


def _discard(bench: Bench, export: str) -> None:
    """Discard an overlay; retries while its last client disconnects."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            bench.served.request("discard", overlay=export)
        except Exception as error:
            if time.monotonic() > deadline:
                raise BenchError(f"cannot discard {export}: {error}") from error
            time.sleep(0.01)
        else:
            return


def _peer_writes(bench: Bench, peer: Peer, depth: int) -> Side:
    def measure() -> tuple[float, dict[str, float]]:
        with peer.running() as pid:
            return _fio(bench, peer.uri, pid, _WRITES, depth, 1, [])

    return measure


def _fio(
    bench: Bench,
    uri: str,
    pid: int,
    how: tuple[str, str],
    depth: int,
    connections: int,
    more: list[str],
) -> tuple[float, dict[str, float]]:
    direction, block = how
    words = ["fio", "--name=nbd", "--ioengine=nbd", f"--uri={uri}", "--thread", "--group_reporting"]
    words += [
        f"--rw={direction}",
        f"--bs={block}",
        f"--iodepth={depth}",
        f"--numjobs={connections}",
    ]
    words += [f"--size={bench.warm.stat().st_size}", "--output-format=json", *more]
    before = _cpu_us(pid)
    done = subprocess.run(words, capture_output=True, text=True, cwd=bench.build_dir, check=False)
    cpu_us = _cpu_us(pid) - before
    if done.returncode:
        raise BenchError(f"fio failed on {uri}: {done.stderr.strip() or done.stdout[-300:]}")
    # fio's library may print lines before the JSON.
    (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    figures = job["write" if "write" in direction else "read"]
    sample = figures["bw_bytes"] / MIB if how is _SEQUENTIAL else figures["iops"]
    nr_requests = max(1, figures["total_ios"])
    return float(sample), {
        "us_cpu": cpu_us / nr_requests,
        "us_mean": figures["lat_ns"]["mean"] / 1e3,
    }


def _cpu_us(pid: int) -> float:
    """Return the CPU time of a process, all its threads, in microseconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_US
