# SPDX-License-Identifier: Apache-2.0
"""Descriptors that outlive this process, by systemd's protocol (sd_notify(3), sd_listen_fds(3)).

Whoever supervises us (systemd, or our own keeper) is sent groups of descriptors, each under a
name, and passes them to our successor. What each one of a group is, the successor reads off the
descriptor itself, so a group needs no order. Both ends of the protocol are here.

Sources: sd_notify(3) for FDSTORE, FDNAME, FDSTOREREMOVE, FDPOLL, READY, STOPPING; sd_listen_fds(3)
for LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import threading
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cowshed.cache.errors import UsageError

__all__ = [
    "FIRST_FD",
    "FdStore",
    "Groups",
    "Notice",
    "kind_of",
    "listen_environment",
    "take_inherited",
]

FIRST_FD: Final = 3  # SD_LISTEN_FDS_START
_MAX_NAME: Final = 255
_MAX_FDS: Final = 253  # SCM_MAX_FD
_SEND_SECONDS: Final = 5
# Control characters and ':' are systemd's to refuse; what is not ASCII too.
_NAME: Final = re.compile(r"[!-9;-~]{1,255}")

_MEMFD: Final = re.compile(r"/memfd:cowshed-([a-z]+)( \(deleted\))?")
_PAGES_FILE: Final = re.compile(r"/.*\.pages( \(deleted\))?")
_PROC_FILE: Final = re.compile(r"/(pagemap|mem)( \(deleted\))?$")

Groups = dict[str, list[int]]


@dataclass(frozen=True)
class Notice:
    """One datagram of a service to its supervisor: NAME=VALUE lines."""

    fields: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, datagram: bytes) -> Notice:
        """Read a datagram; lines without '=' say nothing, of two with one name the last counts."""
        lines = datagram.decode("utf-8", errors="replace").split("\n")
        return cls(dict(line.split("=", 1) for line in lines if "=" in line))

    def encode(self) -> bytes:
        """Give the datagram."""
        return "\n".join(f"{name}={value}" for name, value in self.fields.items()).encode()


class FdStore:
    """The groups held for our successor, and the supervisor that holds them; None: nobody does.

    held is what it held for our predecessor and so for us. Invariant: groups is what the supervisor
    was told to hold, by name, and what another does from copy_to() to end_copy(). Descriptors are
    borrowed. For any thread.
    """

    def __init__(self, address: str | None, held: Groups | None = None) -> None:
        self._lock = threading.Lock()
        self.groups: Final[Groups] = {name: list(fds) for name, fds in (held or {}).items()}
        self._address = None if address is None else _socket_address(address)
        self._copy_address: bytes | None = None
        # One that tells nobody need not be closed.
        self._socket = None if address is None else _new_socket()

    def close(self) -> None:
        """Stop speaking to the supervisor; it goes on holding what it holds."""
        if self._socket is not None:
            self._socket.close()

    @property
    def kept(self) -> bool:
        """Whether anybody holds what we give."""
        return self._address is not None

    @property
    def address(self) -> str:
        """Where the supervisor is told; "" if there is none."""
        return "" if self._address is None else os.fsdecode(self._address.replace(b"\0", b"@", 1))

    def move(self, address: str) -> None:
        """From now on another supervisor holds: tell it all that the last one was told."""
        with self._lock:
            self._address = _socket_address(address)
            for name, fds in self.groups.items():
                self._send_to(self._address, _store(name), fds)

    def copy_to(self, address: str) -> int:
        """Have another hold all the same until end_copy(), besides the supervisor; how many groups.

        OSError if it does not listen: then it is told no more.
        """
        with self._lock:
            copy_address = _socket_address(address)
            for name, fds in self.groups.items():
                self._send_to(copy_address, _store(name), fds)
            self._copy_address = copy_address
            return len(self.groups)

    def end_copy(self) -> None:
        """Tell that other no more; what it holds already is its own affair."""
        with self._lock:
            self._copy_address = None

    def tell_copy(self, **fields: str) -> None:
        """Tell that other how we are. OSError if it does not listen, or is told no more."""
        if self._copy_address is None:
            raise ConnectionRefusedError("nobody holds a copy")
        self._send_to(self._copy_address, fields)

    def hold(self, name: str, fds: Sequence[int]) -> None:
        """Have a group held under a name of its own until release(name).

        Once it returns, our death does not lose the group. One that was held for our predecessor
        is held already. OSError if the supervisor does not listen.
        """
        assert _NAME.fullmatch(name)
        assert 0 < len(fds) <= _MAX_FDS
        with self._lock:
            if name not in self.groups:
                self._send(_store(name), fds)
            self.groups[name] = list(fds)

    def release(self, name: str) -> None:
        """Have a group held no more; nothing if it is not."""
        with self._lock:
            if self.groups.pop(name, None) is not None:
                self._send({"FDSTOREREMOVE": "1", "FDNAME": name})

    def tell(self, **fields: str) -> None:
        """Tell the supervisor how we are: tell(READY="1")."""
        if self._address is not None:
            self._send_to(self._address, fields)

    def _send(self, fields: Mapping[str, str], fds: Sequence[int] = ()) -> None:
        if self._copy_address is not None:
            try:
                self._send_to(self._copy_address, fields, fds)
            except OSError:
                self._copy_address = None  # who wanted to follow us; it is found out there
        if self._address is not None:
            self._send_to(self._address, fields, fds)

    def _send_to(self, address: bytes, fields: Mapping[str, str], fds: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _int_array(fds))] if fds else []
        if self._socket is None:  # the first who is told, under the lock
            self._socket = _new_socket()
        self._socket.sendmsg([Notice(fields).encode()], rights, 0, address)


def _store(name: str) -> dict[str, str]:
    return {"FDSTORE": "1", "FDNAME": name, "FDPOLL": "0"}


def _new_socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    # A supervisor that reads nothing must not hold us up for ever.
    sock.settimeout(_SEND_SECONDS)
    return sock


def _int_array(fds: Sequence[int]) -> bytes:
    return b"".join(fd.to_bytes(4, "little") for fd in fds)


def _socket_address(text: str) -> bytes:
    """Give the address that a NOTIFY_SOCKET stands for; '@' begins an abstract one."""
    if text.startswith("@"):
        return b"\0" + os.fsencode(text[1:])
    if text.startswith("/"):
        return os.fsencode(text)
    raise UsageError(f"NOTIFY_SOCKET is {text!r}; it must begin with '/' or '@'")


def take_inherited(environment: MutableMapping[str, str]) -> Groups:
    """Take the descriptors that a supervisor passed to this very process, by name.

    They become ours (close-on-exec), and the environment forgets them. UsageError if what it says
    makes no sense.
    """
    said = {key: environment.pop(key, "") for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")}
    if said["LISTEN_PID"] != str(os.getpid()) or not said["LISTEN_FDS"]:
        return {}
    names = said["LISTEN_FDNAMES"].split(":") if said["LISTEN_FDNAMES"] else []
    if not said["LISTEN_FDS"].isdecimal() or len(names) != int(said["LISTEN_FDS"]):
        raise UsageError(
            f"LISTEN_FDS is {said['LISTEN_FDS']!r} and LISTEN_FDNAMES names {len(names)}; "
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
    the name of a memfd of ours; "uffd", "pagemap", "mem", "socket"; or "" for anything else.
    """
    link = ""
    with contextlib.suppress(OSError):
        link = os.readlink(f"/proc/self/fd/{fd}")
    if found := _MEMFD.fullmatch(link):
        if found[1] == "image" and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            return "guest"
        return found[1]
    if link == "anon_inode:[userfaultfd]":
        return "uffd"
    if link.startswith("socket:"):
        return "socket"
    if _PAGES_FILE.fullmatch(link):
        return "pages"
    found = _PROC_FILE.search(link)
    return found[1] if found else ""
