# SPDX-License-Identifier: Apache-2.0
"""Fixtures of a real daemon in a process of its own, and of guest processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import pytest

from cowshed.transport import Backend, connect

SUPPORT = Path(__file__).parent
NOBODY = 65534
ANSWER_SECONDS = 60
_NR_LOOKS = 2  # threads that may check the source and the sockets in a daemon of one image
# In the daemon's log, in either format, once it listens.
SERVING = re.compile(rb'event=serving |"event": "serving"')


def command(*arguments: str, uid: int | None = None) -> list[str]:
    """Return the command line of a cowshed command, to be run as uid."""
    if uid is None:
        return [sys.executable, "-m", "cowshed.service.cli", *arguments]
    return [sys.executable, str(SUPPORT / "as_user.py"), str(uid), *arguments]


def cowshed(
    *arguments: str | Path, uid: int | None = None, before: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a cowshed command that ends by itself; before is a command that runs it."""
    return subprocess.run(
        [*before, *command(*map(str, arguments), uid=uid)],
        capture_output=True,
        text=True,
        timeout=ANSWER_SECONDS,
        check=False,
    )


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Poll for a condition that sends no event; AssertionError if it does not hold in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        select.select([], [], [], 0.01)


def listens(path: Path) -> bool:
    """Return whether a server can be reached at a path, which exists before it listens there."""
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        with socket.socket(socket.AF_UNIX, kind) as sock, contextlib.suppress(OSError):
            sock.connect(str(path))
            return True
    return False


def is_stopped(pid: int) -> bool:
    """Return whether each thread of a process has stopped: a signal stops them one by one."""
    with contextlib.suppress(OSError):
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return {(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks} == {
            "T"
        }
    return False


def stop(pid: int) -> None:
    """Stop a process; on return each thread of it has stopped, which os.kill does not wait for."""
    os.kill(pid, signal.SIGSTOP)
    until(lambda: is_stopped(pid))


@contextlib.contextmanager
def paused(pid: int) -> Iterator[None]:
    """Stop a process for the block."""
    try:
        stop(pid)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def serving(run_dir: Path) -> list[int]:
    """Return the processes of `cowshed serve` with that run-dir, keepers and backends."""
    words = b"serve\0--run-dir\0" + os.fsencode(run_dir) + b"\0"
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if words in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


class Daemon:
    """A `cowshed serve` as uid, run by the command before. Its log is at log_path.

    pid is the backend's, or, with a keeper, the keeper's.
    """

    def __init__(
        self,
        run_dir: Path,
        arguments: list[str],
        uid: int | None = None,
        before: Sequence[str] = (),
        kept: bool = False,
    ) -> None:
        keeper = () if kept else ("--no-keeper",)
        self._kept = kept
        self.run_dir = run_dir
        self.uri = f"unix://{run_dir}/cowshed.sock"
        self.log_path = run_dir / "log"
        self.log_path.write_bytes(b"")
        # Appended: other processes write to it too, such as one that takes over.
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *before,
                    *command("serve", "--run-dir", str(run_dir), *keeper, *arguments, uid=uid),
                ],
                stderr=log,
                stdout=log,
            )
        self.pid = self.process.pid
        self._nr_sockets = 0

    def wait_ready(self) -> None:
        """Wait until it listens; fails with its log if it ends instead."""
        pidfd = os.pidfd_open(self.pid)
        try:
            while not SERVING.search(self.log_path.read_bytes()):
                ended, _, _ = select.select([pidfd], [], [], 0.005)
                assert not ended, f"the daemon ended: {self.log_path.read_text()}"
        finally:
            os.close(pidfd)
        self._nr_sockets = self._links().count("socket")

    def log(self) -> str:
        return self.log_path.read_text()

    def wait_logged(self, text: str, nr_times: int | None = None) -> None:
        """Wait for text in its log, exactly nr_times if given: a line follows the action."""
        until(lambda: self.log().count(text) >= (1 if nr_times is None else nr_times))
        assert nr_times is None or self.log().count(text) == nr_times

    def nr_fds(self) -> int:
        """Return its number of descriptors once it has closed its connections."""
        until(lambda: self._links().count("socket") == self._nr_sockets)
        return len(self._links())

    def _links(self) -> list[str]:
        """Return its descriptors' kinds, the text before the colon of each link."""
        links = []
        for fd in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                links.append(os.readlink(fd).partition(":")[0])
        return links

    def nr_fds_now(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def nr_threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def until_threads_end(self, nr_before: int) -> None:
        """Wait until it has no more threads than before.

        Does not count the threads that check the image's source and the sockets: one thread may do
        both, or one each, as the two checks overlap.
        """
        until(lambda: self.nr_threads() <= nr_before + _NR_LOOKS)

    def resident_set_bytes(self) -> int:
        """Return its own memory, without the images' frames."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return 1024 * int(text.split("RssAnon:")[1].split()[0])

    def frames_path(self) -> Path:
        """Return the path of its first image's frames; os.stat() of it shows their memory."""
        fds = Path(f"/proc/{self.pid}/fd")
        for fd in sorted(os.listdir(fds), key=int):
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(fds / fd).startswith("/memfd:cowshed-image"):
                    return fds / fd
        raise AssertionError("the daemon has no image open")

    def connect(self) -> Backend:
        return connect(self.uri)

    def request(self, op: str, **fields: Any) -> dict[str, Any]:
        with self.connect() as backend:
            return dict(backend.request(op, **fields))

    def status(self) -> dict[str, Any]:
        return dict(self.request("status")["status"])

    def guest_status(self, name: str) -> dict[str, Any]:
        (guest,) = [guest for guest in self.status()["guests"] if guest["name"] == name]
        return dict(guest)

    def mismatches(self) -> list[Any]:
        return list(self.request("audit")["mismatches"])

    def stop(self) -> int:
        """Stop it by SIGTERM; return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(ANSWER_SECONDS)

    def kill(self) -> None:
        """Kill the process that was started: the keeper, if there is one."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """End all its processes: a backend whose keeper was killed has another by now."""
        if self._kept:
            with contextlib.suppress(OSError, ValueError):
                backend = os.pidfd_open(int((self.run_dir / "lock").read_text()))
                signal.pidfd_send_signal(backend, signal.SIGTERM)
                select.select([backend], [], [], ANSWER_SECONDS)
                os.close(backend)
        self.kill()
        if self._kept:
            until(lambda: not self._kill_left())

    def _kill_left(self) -> list[int]:
        """Kill what is left, since a keeper or a backend may have started another; return pids."""
        left = serving(self.run_dir)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return left


def kill_backend(kept: Daemon, number: signal.Signals = signal.SIGKILL) -> None:
    """Kill the backend, or send the keeper another signal; return once a successor serves."""
    # A backend logs that it serves, and then notifies its keeper: one that dies between the two has
    # no successor. A backend that answers has notified it.
    kept.connect().close()
    pid = int((kept.run_dir / "lock").read_text())
    os.kill(pid if number == signal.SIGKILL else kept.pid, number)
    try:
        until(lambda: kept.status()["pid"] != pid)
    except AssertionError as error:
        raise AssertionError(f"no successor of {pid}: {kept.log()[-4000:]}") from error


def plain_environment() -> dict[str, str]:
    """Return the environment without the variables of a sanitized core (tools/sanitize.sh)."""
    if "LD_PRELOAD" not in os.environ:
        return dict(os.environ)
    return {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "PYTHONPATH")}


class Guest:
    """A scripted_guest.py process; call(order) waits, start(order) and finish() do not."""

    def __init__(
        self,
        uri: str,
        uid: int | None = None,
        script: str = "scripted_guest.py",
        before: Sequence[str] = (),
    ) -> None:
        words = [*before, sys.executable, str(SUPPORT / script), uri]
        self._run(words + ([] if uid is None else [str(uid)]), plain_environment())

    def _run(self, words: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.pid = self.process.pid
        self.finish()

    @classmethod
    def of(cls, words: list[str], environment: dict[str, str] | None = None) -> Self:
        """Start a command that takes the same orders, as a Guest."""
        guest = cls.__new__(cls)
        guest._run(words, plain_environment() if environment is None else environment)
        return guest

    def start(self, do: str, **fields: Any) -> None:
        """Send an order without waiting for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
        self.process.stdin.flush()

    def answered(self, seconds: float = 0.0) -> bool:
        """Return whether the answer to the last order has come, or comes within seconds."""
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], seconds)[0])

    def finish(self) -> Any:
        """Wait for the answer to the last order; raises AssertionError for a failure there."""
        assert self.answered(ANSWER_SECONDS), "the guest does not answer: is its fault unanswered?"
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the guest ended with status {self.process.wait()}"
        answer = json.loads(line)
        assert "error" not in answer, f"{answer['error']}: {answer['message']}"
        return answer["ok"]

    def call(self, do: str, **fields: Any) -> Any:
        self.start(do, **fields)
        return self.finish()

    def kill(self) -> None:
        self.process.kill()
        self.close()

    def close(self) -> None:
        """End it if it still runs, and reap it."""
        with contextlib.suppress(OSError):
            self.process.kill()
        self.process.communicate()


StartDaemon = Callable[..., Daemon]
StartGuest = Callable[..., Guest]
MakeImage = Callable[..., Path]


@contextlib.contextmanager
def new_run_dir() -> Iterator[Path]:
    """Yield a directory that any user may enter, with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="cowshed-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A run-dir for one test."""
    with new_run_dir() as folder:
        yield folder


@pytest.fixture
def start_daemon(run_dir: Path) -> Iterator[StartDaemon]:
    """Start `cowshed serve` with these additional arguments; ready on return."""
    daemons: list[Daemon] = []

    def start(*arguments: str, at: Path = run_dir, **how: Any) -> Daemon:
        daemon = Daemon(at, list(arguments), **how)
        daemons.append(daemon)
        daemon.wait_ready()
        return daemon

    yield start
    for daemon in daemons:
        daemon.end()


@pytest.fixture
def start_guest() -> Iterator[StartGuest]:
    """Start a guest process: start_guest(uri, uid=None, script=..., before=...)."""
    guests: list[Guest] = []

    def start(uri: str, uid: int | None = None, **how: Any) -> Guest:
        guest = Guest(uri, uid, **how)
        guests.append(guest)
        return guest

    yield start
    for guest in guests:
        guest.close()


def write_image(path: Path, size_bytes: int) -> Path:
    """Make a file whose every page differs."""
    with path.open("wb") as file:
        for page in range((size_bytes + 4095) // 4096):
            file.write((page * 2654435761 % (1 << 64)).to_bytes(8, "little") * 512)
        file.truncate(size_bytes)
    return path


@pytest.fixture
def make_image(run_dir: Path) -> MakeImage:
    """Make a file, readable by all, whose every page differs: make_image(size_bytes, name=...)."""

    def make(size_bytes: int, name: str = "image.raw") -> Path:
        return write_image(run_dir / name, size_bytes)

    return make


def in_thread(call: Callable[[], Any]) -> threading.Thread:
    """Run a call in a new thread; return the started thread."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread
