# SPDX-License-Identifier: Apache-2.0
"""Descriptors that outlive this process, by systemd's protocol (sd_notify(3), sd_listen_fds(3)).

Whoever supervises us (systemd, or our own keeper) is sent groups of descriptors, each under a
name, and passes them to our successor. What each one of a group is, the successor reads off the
descriptor itself, so a group needs no order. A supervisor that is away or busy is told later: what
should be held is remembered (FdStore.groups), and what of it is not (fd_keeper.py).

Sources: sd_notify(3) for FDSTORE, FDNAME, FDSTOREREMOVE, FDPOLL, READY, STOPPING; sd_listen_fds(3)
for LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import threading
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Final

from cowshed.cache.errors import InvariantError, UsageError
from cowshed.service.persist.fd_keeper import FdKeeper
from cowshed.service.persist.notice import Groups
from cowshed.service.runtime.logs import EventLog

__all__ = [
    "FIRST_FD",
    "FdStore",
    "Groups",
    "has_supervisor",
    "kind_of",
    "listen_environment",
    "take_inherited",
    "take_supervisor",
]

_log = EventLog("cowshed.survival")

FIRST_FD: Final = 3  # SD_LISTEN_FDS_START
_MAX_FDS: Final = 253  # SCM_MAX_FD
# How long one who reads slowly may hold up whoever calls; the rest is sent later.
_SEND_SECONDS: Final = 0.1
_TELL_COPY_SECONDS: Final = 1.0
_COPY_SECONDS: Final = 5.0
# Control characters and ':' are systemd's to refuse; what is not ASCII too.
_NAME: Final = re.compile(r"[!-9;-~]{1,255}")

# Memfds keep the names that other releases gave them; the kinds they are known by here.
_KINDS: Final = {"purse": "quota", "tallies": "counters"}

_MEMFD: Final = re.compile(r"/memfd:cowshed-([a-z]+)( \(deleted\))?")
_PAGES_FILE: Final = re.compile(r"/.*\.pages( \(deleted\))?")
_PROC_FILE: Final = re.compile(r"/(pagemap|mem)( \(deleted\))?$")


class FdStore:
    """The groups held for our successor, and the supervisor that holds them; None: nobody does.

    held is what it held for our predecessor and so for us. What could not be held is sent later:
    on_unsent is called, in any thread, when there is such, and then reconcile() is to be called
    until it says that all is sent. Descriptors are borrowed until release(). For any thread.

    Invariant: groups is what should be held, by name; an FdKeeper knows what of it is not.
    """

    def __init__(self, address: str | None, held: Groups | None = None) -> None:
        self._lock = threading.Lock()
        self.groups: Final[Groups] = {name: list(fds) for name, fds in (held or {}).items()}
        self._keeper = None if address is None else FdKeeper(address, self.groups)
        self._copy: FdKeeper | None = None
        self._is_kept = address is not None
        self.on_unsent: Callable[[], None] = _nothing

    def check(self) -> None:
        """Raise InvariantError for a group that has a descriptor which is not open."""
        with self._lock:
            for name, fds in self.groups.items():
                for fd in fds:
                    try:
                        os.fstat(fd)
                    except OSError as error:
                        raise InvariantError(
                            f"groups: {name} has descriptor {fd}, which is closed"
                        ) from error

    def close(self) -> None:
        """Stop speaking to the supervisor; it goes on holding what it holds."""
        with self._lock:
            for keeper in self._keepers():
                keeper.close()
            self._keeper = self._copy = None

    @property
    def kept(self) -> bool:
        """Whether anybody is to hold what we give."""
        return self._is_kept

    @property
    def address(self) -> str:
        """Where the supervisor is told; "" if there is none."""
        keeper = self._keeper
        return "" if keeper is None else keeper.address

    @property
    def nr_not_held(self) -> int:
        """How many groups would not outlive us now, and should; 0 if nobody is to hold any."""
        with self._lock:
            if not self._is_kept:
                return 0
            return len(self.groups) if self._keeper is None else self._keeper.nr_unsent

    def lose(self) -> None:
        """The supervisor is gone: nothing is held until move()."""
        with self._lock:
            if self._keeper is not None:
                self._keeper.close()
            self._keeper = None

    def move(self, address: str) -> None:
        """From now on another supervisor is to hold everything; reconcile() tells it."""
        with self._lock:
            if self._keeper is not None:
                self._keeper.close()
            self._keeper = FdKeeper(address)
            self._keeper.want(self.groups)
            self._is_kept = True

    def reconcile(self, seconds: float = 0.0) -> bool:
        """Tell each keeper what it has not been told, waiting at most so long; whether it was all.

        Call it again when a keeper that is full takes more (keeper_fd()), or after a while.
        """
        with self._lock:
            for keeper in self._keepers():
                keeper.is_slow &= not seconds
                keeper.send(self.groups, seconds)
            return self._is_all_sent()

    @property
    def is_keeper_full(self) -> bool:
        """Whether the supervisor takes no more just now: then keeper_fd() says when it does."""
        with self._lock:
            return self._keeper is not None and self._keeper.is_full and not self._keeper.is_done

    @property
    def needs_time(self) -> bool:
        """Whether no descriptor says when there is more to send to whom.

        A copy's socket is closed by other threads (end_copy()), so nobody may watch it.
        """
        with self._lock:
            waits = [each for each in self._keepers() if not each.is_done]
            is_away = self._is_kept and self._keeper is None
            return is_away or any(each is self._copy or not each.is_full for each in waits)

    def keeper_fd(self) -> int:
        """Of the supervisor's socket, -1 if there is none.

        Ready to read when it has said something (take_refused()), to write once it takes more.
        """
        return -1 if self._keeper is None else self._keeper.fileno()

    def take_refused(self) -> list[str]:
        """Groups that the supervisor has just said it cannot hold: they are to be sent again."""
        with self._lock:
            return [] if self._keeper is None else self._keeper.refused()

    def copy_to(self, address: str) -> int:
        """Have another hold all the same until end_copy(), besides the supervisor; how many groups.

        OSError if it does not listen, or takes nothing for a while.
        """
        keeper = FdKeeper(address)
        with self._lock:
            keeper.want(self.groups)
            self._copy = keeper
        while True:
            with self._lock:
                error = keeper.send(self.groups)
                if error is None:
                    return len(self.groups)
                is_full = keeper.is_full
            if not is_full or not select.select([], [keeper], [], _COPY_SECONDS)[1]:
                self.end_copy()
                raise error

    def end_copy(self) -> None:
        """Tell that other no more; what it holds already is its own affair."""
        with self._lock:
            copy, self._copy = self._copy, None
            if copy is not None:
                copy.close()

    def notify_copy(self, **fields: str) -> None:
        """Tell that other how we are. OSError if it does not listen, or is told no more."""
        with self._lock:
            if self._copy is None:
                raise ConnectionRefusedError("nobody holds a copy")
            self._copy.note(fields)
            self._copy.is_slow = False
            error = self._copy.send(self.groups, _TELL_COPY_SECONDS)
        if error is not None:
            raise error

    def keep(self, name: str, fds: Sequence[int], **about: Any) -> bool:
        """Have a group held under a name of its own until release(name); whether it is by now.

        Then our death does not lose the group. If not, it is held as soon as it can be, which is
        in the log, with what the group is about. One that was held for our predecessor is held
        already. If nobody is to hold anything, that is as it should be.
        """
        assert _NAME.fullmatch(name)
        assert 0 < len(fds) <= _MAX_FDS
        with self._lock:
            is_new = name not in self.groups
            self.groups[name] = list(fds)
            if not is_new:
                return True
            for keeper in self._keepers():
                keeper.want([name])
            error = self._send_all()
        if error is not None:
            _log.error(
                "not-held",
                f"{error.strerror or error}; until it is, the backend's death would be its end",
                group=name,
                **about,
            )
            self.on_unsent()
        return error is None

    def release(self, name: str) -> None:
        """Have a group held no more; nothing if it is not. Before its descriptors are closed."""
        with self._lock:
            if self.groups.pop(name, None) is None:
                return
            for keeper in self._keepers():
                keeper.drop(name)
            self._send_all()
            is_all_sent = self._is_all_sent()
        if not is_all_sent:
            self.on_unsent()

    def notify(self, **fields: str) -> bool:
        """Tell the supervisor how we are: notify(READY="1"); whether it was by now, and by all that
        is held before it. If not, it is told as soon as it can be.
        """
        with self._lock:
            if self._keeper is None:
                return not self._is_kept
            self._keeper.note(fields)
            is_sent = self._keeper.send(self.groups, _SEND_SECONDS) is None
        if not is_sent:
            self.on_unsent()
        return is_sent

    def _keepers(self) -> list[FdKeeper]:
        return [keeper for keeper in (self._keeper, self._copy) if keeper is not None]

    def _is_all_sent(self) -> bool:
        lacks_keeper = self._is_kept and self._keeper is None
        return not lacks_keeper and all(keeper.is_done for keeper in self._keepers())

    def _send_all(self) -> OSError | None:
        """Send what waits; why the supervisor does not have it all, if it does not."""
        if self._copy is not None:
            self._copy.send(self.groups)
        if self._keeper is not None:
            return self._keeper.send(self.groups, _SEND_SECONDS)
        return ConnectionRefusedError("there is no keeper just now") if self._is_kept else None


def _nothing() -> None:
    pass


def take_supervisor(environment: MutableMapping[str, str]) -> str | None:
    """Take the address of the supervisor that started us; None if none did.

    An empty one is as none: that is how shells and containers unset a variable for a command.
    """
    return environment.pop("NOTIFY_SOCKET", "") or None


def has_supervisor(environment: Mapping[str, str]) -> bool:
    """Whether a supervisor started us that holds descriptors, as systemd does."""
    return bool(environment.get("NOTIFY_SOCKET"))


def take_inherited(environment: MutableMapping[str, str]) -> Groups:
    """Take the descriptors that a supervisor passed to this very process, by name.

    They become ours (close-on-exec), and the environment forgets them. UsageError if what it says
    makes no sense.
    """
    given = {
        key: environment.pop(key, "") for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
    }
    if given["LISTEN_PID"] != str(os.getpid()) or not given["LISTEN_FDS"]:
        return {}
    names = given["LISTEN_FDNAMES"].split(":") if given["LISTEN_FDNAMES"] else []
    if not given["LISTEN_FDS"].isdecimal() or len(names) != int(given["LISTEN_FDS"]):
        raise UsageError(
            f"LISTEN_FDS is {given['LISTEN_FDS']!r} and LISTEN_FDNAMES names {len(names)}; "
            "have the supervisor pass one name for each descriptor"
        )
    groups: Groups = {}
    for fd, name in enumerate(names, FIRST_FD):
        try:
            os.set_inheritable(fd, False)
        except OSError as error:
            raise UsageError(f"the supervisor passed no descriptor {fd} ({name})") from error
        groups.setdefault(name, []).append(fd)
    return groups


def listen_environment(groups: Groups, pid: int) -> tuple[dict[str, str], list[int]]:
    """Give the variables for a process with pid, and the descriptors to be its 3, 4, ..."""
    names = [name for name, fds in groups.items() for _ in fds]
    fds = [fd for group in groups.values() for fd in group]
    if not fds:
        return {}, []
    variables = {
        "LISTEN_PID": str(pid),
        "LISTEN_FDS": str(len(fds)),
        "LISTEN_FDNAMES": ":".join(names),
    }
    return variables, fds


def kind_of(fd: int) -> str:
    """Say what a descriptor is: "image", "guest" (an image read-only), "extents", "ledger", ... by
    the name of a memfd of ours; "uffd", "pagemap", "mem", "socket"; "file" for another with a path,
    "direct" if that is open for O_DIRECT; or "" for anything else. Asks no file system.
    """
    link = ""
    with contextlib.suppress(OSError):
        link = os.readlink(f"/proc/self/fd/{fd}")
    if found := _MEMFD.fullmatch(link):
        if found[1] == "image" and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            return "guest"
        return _KINDS.get(found[1], found[1])
    if link == "anon_inode:[userfaultfd]":
        return "uffd"
    if link.startswith("socket:"):
        return "socket"
    if not link.startswith("/") or link.startswith("/memfd:"):
        return ""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
        return "direct"
    if _PAGES_FILE.fullmatch(link):
        return "pages"
    if found := _PROC_FILE.search(link):
        return found[1]
    return "file"
