# SPDX-License-Identifier: Apache-2.0
"""Descriptors that outlive this process, by systemd's protocol (sd_notify(3), sd_listen_fds(3)).

The backend sends groups of descriptors, each under a name, to its supervisor (systemd, or our
keeper), which passes them to the successor. The successor finds out each descriptor's kind from the
descriptor itself, so a group needs no order. If the supervisor is gone or busy, the groups are sent
later: FdStore.groups has what should be held, fd_keeper.py what of it is not.

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
# How long a slow supervisor may delay the caller; the rest is sent later.
_SEND_SECONDS: Final = 0.1
_TELL_COPY_SECONDS: Final = 1.0
_COPY_SECONDS: Final = 5.0
# systemd refuses control characters, ':' and anything that is not ASCII.
_NAME: Final = re.compile(r"[!-9;-~]{1,255}")

# Memfd names are frozen for other releases; these map them to the kinds used here.
_KINDS: Final = {"purse": "quota", "tallies": "counters"}

_MEMFD: Final = re.compile(r"/memfd:cowshed-([a-z]+)( \(deleted\))?")
_PAGES_FILE: Final = re.compile(r"/.*\.pages( \(deleted\))?")
_PROC_FILE: Final = re.compile(r"/(pagemap|mem)( \(deleted\))?$")


class FdStore:
    """The groups held for our successor, and the supervisor that holds them.

    address None: there is no supervisor. held are the groups it already held for our predecessor.
    When a group could not be sent, on_unsent is called, in any thread; the owner must then call
    reconcile() until that returns True. Descriptors are borrowed until release(). For any thread.

    Invariant: groups has all that should be held, by name; an FdKeeper knows what of it is not.
    """

    def __init__(self, address: str | None, held: Groups | None = None) -> None:
        self._lock = threading.Lock()
        self.groups: Final[Groups] = {name: list(fds) for name, fds in (held or {}).items()}
        self._keeper = None if address is None else FdKeeper(address, self.groups)
        self._copy: FdKeeper | None = None
        self._is_kept = address is not None
        self.on_unsent: Callable[[], None] = _nothing

    def check(self) -> None:
        """Raise InvariantError for a group with a closed descriptor."""
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
        """Close the sockets to the supervisors; they keep what they hold."""
        with self._lock:
            for keeper in self._keepers():
                keeper.close()
            self._keeper = self._copy = None

    @property
    def kept(self) -> bool:
        """Whether there is, or should be, a supervisor."""
        return self._is_kept

    @property
    def address(self) -> str:
        """The supervisor's address; "" if there is none."""
        keeper = self._keeper
        return "" if keeper is None else keeper.address

    @property
    def nr_not_held(self) -> int:
        """The number of groups that a successor would lack if we died now; 0 if none are kept."""
        with self._lock:
            if not self._is_kept:
                return 0
            return len(self.groups) if self._keeper is None else self._keeper.nr_unsent

    def lose(self) -> None:
        """Record that the supervisor is gone: nothing is held until move()."""
        with self._lock:
            if self._keeper is not None:
                self._keeper.close()
            self._keeper = None

    def move(self, address: str) -> None:
        """Have another supervisor hold everything from now on; reconcile() sends it."""
        with self._lock:
            if self._keeper is not None:
                self._keeper.close()
            self._keeper = FdKeeper(address)
            self._keeper.want(self.groups)
            self._is_kept = True

    def reconcile(self, seconds: float = 0.0) -> bool:
        """Send each keeper what it lacks, waiting at most so long; True if all is sent.

        The caller must call it again when a full keeper takes more (keeper_fd()), or after a while.
        """
        with self._lock:
            for keeper in self._keepers():
                keeper.is_slow &= not seconds
                keeper.send(self.groups, seconds)
            return self._is_all_sent()

    @property
    def is_keeper_full(self) -> bool:
        """Whether the supervisor takes no more now; keeper_fd() is writable once it does."""
        with self._lock:
            return self._keeper is not None and self._keeper.is_full and not self._keeper.is_done

    @property
    def needs_time(self) -> bool:
        """Whether reconcile() must be called after a while, since no descriptor shows when.

        Other threads may close a copy's socket (end_copy()), so it must not be watched.
        """
        with self._lock:
            waits = [each for each in self._keepers() if not each.is_done]
            is_away = self._is_kept and self._keeper is None
            return is_away or any(each is self._copy or not each.is_full for each in waits)

    def keeper_fd(self) -> int:
        """Return the socket to the supervisor, -1 if there is none.

        It is readable when the supervisor has answered (take_refused()), writable when it takes
        more.
        """
        return -1 if self._keeper is None else self._keeper.fileno()

    def take_refused(self) -> list[str]:
        """Return groups that the supervisor reported it cannot hold; reconcile() resends them."""
        with self._lock:
            return [] if self._keeper is None else self._keeper.refused()

    def copy_to(self, address: str) -> int:
        """Have a second supervisor hold the same until end_copy(); return the number of groups.

        OSError if it does not listen, or takes nothing for _COPY_SECONDS.
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
        """Send the second supervisor nothing more; it keeps what it holds."""
        with self._lock:
            copy, self._copy = self._copy, None
            if copy is not None:
                copy.close()

    def notify_copy(self, **fields: str) -> None:
        """Notify the second supervisor of our state. OSError if it is gone, or after end_copy()."""
        with self._lock:
            if self._copy is None:
                raise ConnectionRefusedError("there is no second supervisor")
            self._copy.note(fields)
            self._copy.is_slow = False
            error = self._copy.send(self.groups, _TELL_COPY_SECONDS)
        if error is not None:
            raise error

    def keep(self, name: str, fds: Sequence[int], **about: Any) -> bool:
        """Have a group held under its own name until release(name); True if that was sent.

        A held group survives our death. If sending failed, that is logged with the fields `about`,
        and the group is sent as soon as possible. True also for a group that was held for our
        predecessor, and if there is no supervisor.
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
                f"{error.strerror or error}; until it is held, the backend's death would lose it",
                group=name,
                **about,
            )
            self.on_unsent()
        return error is None

    def release(self, name: str) -> None:
        """Have a group dropped, if it is held; must precede the close of its descriptors."""
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
        """Notify the supervisor of our state, as notify(READY="1"), after all groups.

        True if all was sent; if not, it is sent as soon as possible, but dropped if the supervisor
        is gone.
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
        """Send everything queued; return the error for the supervisor, or None."""
        if self._copy is not None:
            self._copy.send(self.groups)
        if self._keeper is not None:
            return self._keeper.send(self.groups, _SEND_SECONDS)
        return ConnectionRefusedError("there is no keeper just now") if self._is_kept else None


def _nothing() -> None:
    pass


def take_supervisor(environment: MutableMapping[str, str]) -> str | None:
    """Take the supervisor's address out of the environment; None if there is none.

    An empty one counts as none: shells and containers unset a variable in that way.
    """
    return environment.pop("NOTIFY_SOCKET", "") or None


def has_supervisor(environment: Mapping[str, str]) -> bool:
    """Whether a supervisor that holds descriptors, as systemd does, started us."""
    return bool(environment.get("NOTIFY_SOCKET"))


def take_inherited(environment: MutableMapping[str, str]) -> Groups:
    """Take the descriptors that a supervisor passed to this process, by group name.

    They become close-on-exec, and their variables are removed. UsageError if the variables are
    inconsistent, or name a closed descriptor.
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
            "the supervisor must pass one name for each descriptor"
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
    """Return the variables for a process with pid, and the descriptors to become its 3, 4, ..."""
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
    """Return a descriptor's kind; asks no file system.

    By the name of a memfd of ours: "image", "guest" (an image read-only), "extents", "ledger", ...
    Else "uffd", "pagemap", "mem", "socket" or "pages"; for another file with a path "file", or
    "direct" if it is open for O_DIRECT; "" for anything else.
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
