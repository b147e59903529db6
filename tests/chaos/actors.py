# SPDX-License-Identifier: Apache-2.0
"""Guests of the chaos test: a process each, and a thread here that gives it orders and checks it.

An actor reads, writes and discards without pause and compares every byte with its model. It may be
killed, and be told that its backend gave it away: it then comes again, and knows what it may find.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import select
import subprocess
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, Final

from chaos_machine import FIRECRACKER, HUNG_UP, ZEROCOPY
from domains import SUPPORT, command, plain_environment
from page_model import PAGE, PageModel

from cowshed.cache.errors import PeerError

if TYPE_CHECKING:
    from world import World
from two_hosts import Host

IMAGE: Final = "d"
HANG_SECONDS: Final = 90.0


class EndedError(Exception):
    """The guest's process ended; args: its wait status."""


class RefusedError(Exception):
    """An order failed; args: what kind, errno or 0, message."""

    @property
    def number(self) -> int:
        return int(self.args[1])


class OverError(Exception):
    """The test is over."""


class Actor(threading.Thread):
    """One guest. Invariant: the model is what its bytes may be, once no order is under way.

    The process and the model are this thread's; others may kill() and relocate() it, and look.
    """

    maps = False

    def __init__(self, world: World, name: str, rng: random.Random) -> None:
        super().__init__(name=name, daemon=True)
        self.world = world
        self.rng = rng
        self.token = f"token-of-{name}"
        self.model = PageModel(world.content)
        self.nr_done = 0
        self.doing = "begins"
        self.host: Host | None = None
        self.is_open = False
        self.is_stopped = False
        self._look_wanted = False
        self._expected_end = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._lock = threading.Lock()

    def can_move(self, *, is_same_host: bool) -> bool:
        """Whether a drain takes it along."""
        return True

    # What others do to it.

    def kill(self, why: str) -> bool:
        """End its process by SIGKILL, if it has one that is open; it comes again."""
        with self._lock:
            if not self.is_open or self._expected_end or self._process is None:
                return False
            self._expected_end = why
            self._process.kill()
            return True

    def look_at_all(self) -> None:
        """Have it compare every byte, before it does anything else."""
        self._look_wanted = True

    @property
    def pid(self) -> int:
        process = self._process
        return process.pid if process else 0

    @property
    def is_to_end(self) -> bool:
        """Whether it was killed, and has not come again yet."""
        return bool(self._expected_end)

    @property
    def state(self) -> str:
        """Where it is, in a word or two, for a report."""
        if self.is_stopped:
            return "over"
        where = f"at {self.host.name}" if self.host else "nowhere yet"
        expected = f", whose end is expected ({self._expected_end})" if self._expected_end else ""
        return f"{'open' if self.is_open else 'not open'} {where}{expected}"

    # Its life.

    def run(self) -> None:
        try:
            self._revive("")
            while self.world.pass_gate(self):
                if self._look_wanted:
                    self._look_wanted = False
                    self._look_at_all()
                self._step_or_revive()
            self._look_at_all()
            self._leave()
        except OverError:
            pass
        except BaseException as error:
            self.world.fail(f"{self.name}, at {self.doing}: {traceback.format_exc()}", error)
        finally:
            self.is_stopped = True
            self._end_process()

    def _look_at_all(self) -> None:
        """Every byte."""
        step = 64 * PAGE
        for offset in range(0, self.model.size_bytes, step):
            while not self._try(lambda o=offset: self._read(o, step)):  # type: ignore[misc]
                pass

    def _leave(self) -> None:
        self.doing = "closing"
        with contextlib.suppress(EndedError, RefusedError):
            self._call("close")

    def _step_or_revive(self) -> None:
        length = min(self.model.size_bytes, self.rng.choice((1, 700, PAGE, 3 * PAGE, 16 * PAGE)))
        offset = self.rng.randrange(self.model.size_bytes - length + 1)
        kind = self.rng.random()
        if kind < 0.55:
            self._try(lambda: self._read(offset, length))
        elif kind < 0.92:
            data = self.rng.randbytes(length)
            while not self._try(lambda: self._write(offset, data)):
                pass
        else:
            first, nr = offset // PAGE, self.rng.randrange(1, 9)
            nr = min(nr, self.model.size_bytes // PAGE - first)
            while not self._try(lambda: self._discard(first, nr)):
                pass
        self.nr_done += 1

    def _try(self, order: Any) -> bool:
        """Whether it was done. Raises what may not be."""
        began = time.monotonic()
        try:
            order()
            return True
        except EndedError as ended:
            self._revive(self._why_ended(ended))
        except RefusedError as error:
            self._recover(error, began)
        return False

    def _why_ended(self, ended: EndedError) -> str:
        with self._lock:
            self.is_open = False
            why = self._expected_end
        assert why, f"its process ended with status {ended.args[0]}, and nobody killed it"
        return why

    def _recover(self, error: RefusedError, began: float) -> None:
        """Have what failed be tried again, if the design allows that it fails."""
        if error.number in (errno.EIO, errno.ENOMEM) and self.world.excuses("source", began):
            self.world.mend()
        elif error.number == errno.ENOSPC and self.world.excuses("space", began):
            self.world.pause()
        else:
            raise error

    def _read(self, offset: int, length: int) -> None:
        self.doing = f"read {offset}+{length}"
        found = bytes.fromhex(self._call("read", offset=offset, length=length))
        assert len(found) == length
        problem = self.model.wrong(offset, found)
        assert not problem, f"WRONG BYTES: {problem}"

    def _write(self, offset: int, data: bytes) -> None:
        self.doing = f"write {offset}+{len(data)}"
        try:
            self._call("write", offset=offset, hex=data.hex())
        except (EndedError, RefusedError):
            self.model.write(offset, data, unsure=True, torn=self.maps)
            raise
        self.model.write(offset, data)

    def _discard(self, first: int, nr: int) -> None:
        self.doing = f"discard of pages {first}+{nr}"
        try:
            self._call("discard", offset=first * PAGE, length=nr * PAGE)
        except (EndedError, RefusedError):
            self.model.discard(first, nr, unsure=True)
            raise
        self.model.discard(first, nr)

    # Its process.

    def _revive(self, why: str) -> None:
        """Come again after an end of that kind; "" the first time."""
        self._end_process()
        if why == "killed":
            self._forget()
        self.doing = f"coming again after {why!r}"
        deadline = 0.0
        while True:
            self.host = self.world.home()
            deadline = deadline or time.monotonic() + HANG_SECONDS  # a move may take as long itself
            try:
                self._start(self.host)
                break
            except (EndedError, RefusedError) as error:
                self._end_process()
                if time.monotonic() > deadline:
                    raise AssertionError(f"it never came in again: {error!r}") from error
                self.world.note(f"{self.name} is not let in: {error}")
                self.world.pause()
        with self._lock:
            self._expected_end = ""
            self.is_open = True

    def _forget(self) -> None:
        """Its death took its private pages along, or did not."""

    def _start(self, host: Host) -> None:
        raise NotImplementedError

    def _spawn(self, words: list[str], environment: dict[str, str] | None = None) -> None:
        self._buffer = b""
        self._process = subprocess.Popen(
            words,
            env=environment or plain_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.world.guest_log,
        )
        self._answer()

    def _end_process(self) -> None:
        with self._lock:
            self.is_open = False
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _call(self, do: str, **fields: Any) -> Any:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise EndedError(process.wait()) from None
        return self._answer()

    def _answer(self) -> Any:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        began = time.monotonic()
        fd = process.stdout.fileno()
        while b"\n" not in self._buffer:
            if not select.select([fd], [], [], 0.5)[0]:
                if self.world.failed:
                    raise OverError
                if not self.world.has_patience(self):
                    began = time.monotonic()
                assert time.monotonic() - began < HANG_SECONDS, "HANG: no answer"
                continue
            piece = os.read(fd, 1 << 20)
            if not piece:
                raise EndedError(process.wait())
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            found = re.search(r"\[Errno (\d+)\]", answer["message"])
            number = answer.get("errno") or (int(found[1]) if found else 0)
            raise RefusedError(answer["error"], number, answer["message"])
        return answer["ok"]


class MappedActor(Actor):
    """Maps the image, over the unix socket. Its private pages are its process's memory.

    follows: its mapping goes with it when its backend gives it away; otherwise it is ended, and
    another process finds its pages.
    """

    maps = True

    def __init__(self, world: World, name: str, rng: random.Random, *, follows: bool) -> None:
        super().__init__(world, name, rng)
        self.follows = follows

    def _start(self, host: Host) -> None:
        self._spawn([sys.executable, str(SUPPORT / "scripted_guest.py"), host.unix])
        terms = {"image": IMAGE, "guest": self.name, "token": self.token}
        self._call("open", follow_moves=self.follows, **terms)

    def _recover(self, error: RefusedError, began: float) -> None:
        # Its memory gave way to bytes in an earlier drain; bytes cannot follow to a unix socket.
        if self.follows and error.args[0] == "MovedError" and self.world.excuses("move", began):
            self.world.note(f"{self.name} opens anew: {error}")
            self._revive("a move")
        else:
            super()._recover(error, began)

    def _forget(self) -> None:
        self.model.forget()


class FarActor(Actor):
    """Reads and writes by bytes, over tcp or tls; the library reconnects by itself."""

    def __init__(self, world: World, name: str, rng: random.Random, scheme: str) -> None:
        super().__init__(world, name, rng)
        self.scheme = scheme

    def _start(self, host: Host) -> None:
        self._wait_until_away(host)
        uri = self.world.far_uri(host, self.scheme)
        self._spawn([sys.executable, str(SUPPORT / "scripted_guest.py"), uri])
        self._call("open", image=IMAGE, guest=self.name, token=self.token)

    def _wait_until_away(self, host: Host) -> None:
        """A request of a process that was killed is done, or never will be."""

        def is_away() -> bool:
            try:
                guests = self.world.status(host)["guests"]
            except PeerError:
                return False  # the backend died over it: its successor is to say
            return all(guest["state"] == "away" for guest in guests if guest["name"] == self.name)

        self.world.wait(is_away, f"{self.name} counts as away")

    def _recover(self, error: RefusedError, began: float) -> None:
        kinds = ("PeerError", "PeerGoneError", "MovedError", "UsageError")
        if error.args[0] in kinds and self.world.excuses("move", began):
            self.world.note(f"{self.name} opens anew: {error}")
            self._revive("a move")
        else:
            super()._recover(error, began)


class BlockActor(FarActor):
    """libnbd's client, which does not reconnect by itself."""

    def __init__(self, world: World, name: str, rng: random.Random) -> None:
        super().__init__(world, name, rng, "nbd")

    def _start(self, host: Host) -> None:
        self._wait_until_away(host)
        self._spawn(["/usr/bin/python3", str(SUPPORT / "block_guest.py")], dict(os.environ))
        uri = f"nbd+unix:///{IMAGE}@{self.name}?socket={host.run_dir}/nbd.sock"
        self._call("open", uri=uri)

    def _recover(self, error: RefusedError, began: float) -> None:
        if error.number in (errno.EIO, errno.ENOMEM, errno.ENOSPC) and (
            self.world.excuses("source", began) or self.world.excuses("space", began)
        ):
            super()._recover(error, began)
        elif self.world.excuses("death", began) or self.world.excuses("move", began):
            self._revive("a lost connection")
        else:
            raise error


class AttachedActor(Actor):
    """A program under `cowshed attach`. It ends before a drain over a network."""

    maps = True

    def __init__(self, world: World, name: str, rng: random.Random) -> None:
        super().__init__(world, name, rng)
        self.nr_lives = 0

    def can_move(self, *, is_same_host: bool) -> bool:
        return is_same_host

    def _start(self, host: Host) -> None:
        self.nr_lives += 1
        name = f"{self.name}-{self.nr_lives}"
        self._spawn(
            command(
                *("attach", IMAGE, "--run-dir", str(host.run_dir), "--guest", name, "--"),
                *("python3", str(SUPPORT / "attached_guest.py"), "{image}"),
            )
        )
        self.model.forget()

    def _why_ended(self, ended: EndedError) -> str:
        if ended.args[0] == -7 and self.world.excuses("source", 0):
            return "killed"
        return super()._why_ended(ended)

    def _forget(self) -> None:
        self.model.forget()


class MachineActor(Actor):
    """A machine monitor at the image's own socket. It cannot be moved: it ends before a drain.

    policy: Firecracker's protocol, or Nydus' with copies or with frames that it maps itself, which
    it can only read.
    """

    maps = True

    def __init__(self, world: World, name: str, rng: random.Random, policy: int) -> None:
        super().__init__(world, name, rng)
        self.policy = policy
        self._began = 0.0
        self._is_kept = False

    def can_move(self, *, is_same_host: bool) -> bool:
        return False

    def _start(self, host: Host) -> None:
        self._began, self._is_kept = time.monotonic(), False
        path = str(host.run_dir / "images" / f"{IMAGE}.sock")
        self._spawn([sys.executable, str(SUPPORT / "chaos_machine.py"), path])
        size = self.model.size_bytes
        self._call("begin", image=str(host.image), size=size, policy=self.policy)
        self.model.forget()

    def _step_or_revive(self) -> None:
        if self.policy == ZEROCOPY:
            length = self.rng.choice((1, 700, PAGE, 3 * PAGE, 16 * PAGE))
            offset = self.rng.randrange(self.model.size_bytes - length + 1)
            self._try(lambda: self._read(offset, length))
            self.nr_done += 1
        else:
            super()._step_or_revive()

    def _read(self, offset: int, length: int) -> None:
        super()._read(offset, length)
        self._is_kept = True  # its handshake was answered, so whoever succeeds has it

    def _discard(self, first: int, nr: int) -> None:
        if self.policy != FIRECRACKER:
            super()._discard(first, nr)
            return
        self.doing = f"discard of pages {first}+{nr}"
        self._call("discard", offset=first * PAGE, length=nr * PAGE)
        self.model.zero(first, nr)

    def _why_ended(self, ended: EndedError) -> str:
        # A connection is held once it is accepted and seen, and not in the instant before.
        is_early = ended.args[0] == HUNG_UP and not self._is_kept
        if is_early and self.world.excuses("death", self._began):
            return "killed"
        return super()._why_ended(ended)

    def _recover(self, error: RefusedError, began: float) -> None:
        # What could not be loaded is SIGBUS for a machine, of which it dies.
        if error.number == errno.EFAULT and self.world.excuses("source", began):
            self._revive("killed")
        else:
            raise error

    def _forget(self) -> None:
        self.model.forget()
