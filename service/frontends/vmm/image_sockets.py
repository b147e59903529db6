# SPDX-License-Identifier: Apache-2.0
"""Each image's own socket, RUN_DIR/images/NAME.sock, where VMMs hand over their userfaultfd.

A connection that sent a handshake is a guest until it closes or its process ends. Firecracker's
memory is populated by copy; Firecracker sends nothing more. A Nydus client's memory is populated by
copy under its policy Copy. Under Zerocopy the client is sent extents, which stay pinned as long as
it is connected, and gets copies of extents beyond the allowance for pins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import socket
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cowshed.accounting import Account, QuotaPolicy
from cowshed.accounting import Region as PlacedRegion
from cowshed.cache import CowshedError, Image, PeerError, UsageError
from cowshed.faults import FaultOptions, PopulateHandler
from cowshed.service.frontends.frontend_server import FrontendServer
from cowshed.service.frontends.vmm.handshake_peer import HandshakePeer
from cowshed.service.frontends.vmm.image_folders import make_image_folders
from cowshed.service.frontends.vmm.machine_records import Caller, MachineRecords, RestoredMachine
from cowshed.service.frontends.vmm.populator import Populator, check_regions, is_zerocopy
from cowshed.service.guests.guests import Guest, GuestProcess, Mapping, OpenRequest
from cowshed.service.guests.turned_away import what_failed
from cowshed.service.guests.userfaultfd import check_populated_uffd, open_pagemap
from cowshed.service.host import Host
from cowshed.service.operators.control import Control
from cowshed.service.reports.guest_states import log_state
from cowshed.service.runtime.logs import EventLog
from cowshed.service.runtime.loop import READ, WRITE
from cowshed.service.runtime.test_points import reach
from cowshed.service.settings.config import SOCKET_PATH_MAX_BYTES
from cowshed.service.settings.domains import Identity
from cowshed.service.settings.names import image_socket_path
from cowshed.transport.links.acceptor import Acceptor
from cowshed.transport.links.foreign_fds import close_foreign
from cowshed.transport.messages.fields import MovedError
from cowshed.transport.vmm.handshakes import (
    MemoryRegion,
    Range,
    StatRequest,
    VmmHandshake,
    range_replies,
    stat_reply,
)

__all__ = ["ImageSockets", "shown_ranges"]

_log = EventLog("cowshed.images")

_HANDSHAKE_SECONDS: Final = 10.0
_BACKLOG: Final = 128
# For a client that requested the size, until its handshake.
_IDLE_SECONDS: Final = 600.0


@dataclass
class _Machine:
    """A connection, and its guest once it has sent a handshake. The keeper holds it as group."""

    peer: HandshakePeer
    image: Image
    deadline: float | None
    group: str = ""
    mapping: Mapping | None = None
    handler: PopulateHandler | None = None
    regions: tuple[MemoryRegion, ...] = ()
    zerocopy_fd: int = -1

    @property
    def who(self) -> dict[str, object]:
        """The fields of a log line: the peer, its image, and its guest if there is one."""
        mapping = self.mapping
        return {
            "guest": mapping and mapping.name,
            "image": self.image.label,
            "pid": self.peer.pid,
            "uid": self.peer.uid,
        }


class ImageSockets(FrontendServer[_Machine]):
    """Listens for every image, in the loop; close() ends every connection and guest of theirs."""

    _LATE = "it sent no handshake in time"

    def __init__(
        self,
        host: Host,
        control: Control,
        populator: Populator,
        records: MachineRecords,
    ) -> None:
        """control decides whether guests are admitted."""
        super().__init__(host, _log)
        self._config: Final = host.config
        self._guests: Final = host.guests
        self._control = control
        self._populator = populator
        self._records = records
        self._opener = host.listeners
        self._acceptor: Final = Acceptor()
        self._listeners: dict[Path, socket.socket] = {}
        for image in host.store:
            self._listen(image, image_socket_path(host.config.run_dir, image))

    def close(self) -> None:
        """End all connections, detach their guests, remove the sockets; the loop has stopped."""
        for client in list(self._sessions.values()):
            self._end(client)
        for path, listener in self._listeners.items():
            listener.close()
            with contextlib.suppress(OSError):
                path.unlink()
        self._listeners.clear()
        self._acceptor.close()

    def nr_unfinished(self) -> int:
        """The number of connections in the middle of a message; the keeper holds the others."""
        return sum(client.peer.is_busy for client in self._sessions.values())

    def add(self, image: Image) -> None:
        """Listen for an image added later; a failure is logged."""
        config = self._config
        try:
            make_image_folders(config.run_dir, [image], config.domains)
            self._listen(image, image_socket_path(config.run_dir, image))
        except (CowshedError, OSError) as error:
            _log.warning("no-image-socket", str(error), image=image.label)

    def _listen(self, image: Image, path: Path) -> None:
        if len(os.fsencode(path)) > SOCKET_PATH_MAX_BYTES:
            _log.warning(
                "no-image-socket",
                f"socket path {str(path)!r} is over {SOCKET_PATH_MAX_BYTES} bytes: "
                "choose a shorter --run-dir",
                image=image.label,
            )
            return
        what = f"image/{image.domain}/{image.name}"
        listener = self._opener.open(what, lambda: _listening(path), path)
        self._listeners[path] = listener
        self._loop.watch(listener.fileno(), READ, lambda *_: self._on_connect(listener, image))

    def _on_connect(self, listener: socket.socket, image: Image) -> None:
        taken = self._acceptor.accept_any(listener)
        if taken is None:
            return
        reach("MACHINE_ACCEPTED")
        peer = HandshakePeer(taken[0])
        no_room = taken[2] or peer.no_room
        # Checked before any reply: even the size is only for peers that may use the image.
        if not no_room and (why := self._why_not(peer, image)):
            self._turn_away(peer, image, "handshake", why)
            return
        # Neither protocol has an error reply: only the log has the reason.
        if refusal := self._refusal(no_room, peer.uid):
            self._turn_away(peer, image, "limit", refusal)
            return
        try:
            group = self._records.keep_caller(peer, image)
        except OSError as error:  # no descriptor is left for its record
            self._admission.leave(peer.uid)
            self._turn_away(peer, image, "limit", what_failed(error)[1])
            return
        self._begin(Caller(peer, image, group))
        reach("MACHINE_CAME")

    def _begin(self, caller: Caller) -> _Machine:
        peer = caller.peer
        deadline = time.monotonic() + _HANDSHAKE_SECONDS
        client = _Machine(peer, caller.image, deadline, caller.group)
        self._sessions[peer.fileno()] = client
        self._loop.watch(peer.fileno(), READ, self._on_ready)
        return client

    def adopt(self, restored: Iterable[RestoredMachine], callers: Iterable[Caller]) -> None:
        """Continue connections that our predecessor had."""
        for machine in restored:
            self._admission.readmit(machine.peer.uid)
            client = self._begin(Caller(machine.peer, machine.mapping.image, machine.group))
            self._begin_populate(client, machine.mapping, machine.handshake)
        for caller in callers:
            self._admission.readmit(caller.peer.uid)
            self._begin(caller)

    def _why_not(self, peer: HandshakePeer, image: Image) -> str:
        """Return why a peer may not use the image; "" if it may."""
        identity = Identity(peer.uid, peer.gid)
        try:
            if self._control.find_guest_image(_full_name(image), identity) is image:
                return ""
        except MovedError as error:
            return str(error)
        except UsageError:  # it sees no such image
            pass
        return "it may not use this image"

    def _turn_away(self, peer: HandshakePeer, image: Image, reason: str, why: str) -> None:
        peer.close()
        # Before logging: a reader of the log may take the descriptor that the reserve needs.
        self._acceptor.refill()
        self._note_turned_away(
            why, {"image": image.label, "pid": peer.pid, "uid": peer.uid}, reason
        )

    def _on_ready(self, fd: int, events: int) -> None:
        client = self._sessions[fd]
        try:
            if events & READ:
                incoming = client.peer.receive()
                if incoming is None:
                    self._end(client)
                    return
                for no, (handshake, uffd) in enumerate(incoming):
                    try:
                        self._handle(client, handshake, uffd)
                    except BaseException:
                        close_foreign([later.fd for later in incoming[no + 1 :] if later.fd >= 0])
                        raise
                self._send(client)
                client.peer.take_seen()
            else:
                self._send(client)
        except (CowshedError, OSError) as error:
            of_ours, why = what_failed(error)
            self._drop(client, "limit" if of_ours else "protocol", why)

    def _handle(self, client: _Machine, message: object, uffd: int) -> None:
        if isinstance(message, StatRequest):
            client.peer.queue(stat_reply(client.image.map_bytes))
            if client.mapping is None:
                client.deadline = time.monotonic() + _IDLE_SECONDS
        elif isinstance(message, VmmHandshake):
            if client.mapping is not None:
                close_foreign([uffd])
                _log.warning("ignored", "a second handshake", guest=client.mapping.name)
                return
            try:
                self._attach(client, message, uffd)
            except BaseException:
                close_foreign([uffd])
                raise
        else:
            _log.warning("ignored", f"{message} is not a client's message", pid=client.peer.pid)

    def _attach(self, client: _Machine, handshake: VmmHandshake, uffd: int) -> None:
        """Make the connection's guest; takes uffd over on success only."""
        peer, image = client.peer, client.image
        self._control.check_open()  # it may have connected before the drain
        check_populated_uffd(uffd)
        check_regions(handshake, image.map_bytes)
        populate = self._populator.options(handshake, image)
        config = self._config
        request = OpenRequest(
            name=f"{'fc' if handshake.protocol == 'firecracker' else 'nydus'}-{peer.pid}",
            image=image,
            quota_bytes=config.default_quota_bytes,
            policy=QuotaPolicy[config.default_on_quota.upper()],
            options=FaultOptions(),
        )
        fds = [uffd]
        pagemap = open_pagemap(peer.pid, peer.pidfd)
        if pagemap is not None:
            fds.append(pagemap)
        who = GuestProcess(peer.pid, peer.uid, -1 if peer.pidfd is None else peer.pidfd)
        guest = self._reserve(request, who)
        shown = [
            PlacedRegion(one.address, one.offset, min(one.length, image.map_bytes - one.offset))
            for one in populate.regions
        ]
        caller = client.group

        def keep(account: Account) -> None:
            client.group = self._records.keep(guest, account, fds, peer, handshake)
            reach("MACHINE_HELD")

        try:
            mapping = self._guests.attach(
                guest,
                request.options,
                who,
                shown,
                fds,
                # Pages that are already present are private, too.
                inherited=pagemap is not None,
                transport=handshake.protocol,
                populate=populate,
                keep=keep,
            )
        except BaseException:
            if client.group != caller:
                self._records.release(client.group)
                client.group = caller
            for fd in fds[1:]:
                os.close(fd)
            self._guests.release(guest)
            raise
        reach("MACHINE_ATTACHED")
        self._records.release(caller)
        peer.close_record()
        self._begin_populate(client, mapping, handshake)
        _log.info(
            "attached",
            guest=guest.name,
            image=image.label,
            transport=handshake.protocol,
            pid=peer.pid,
            uid=peer.uid,
        )
        if pagemap is None:
            _log.notice(
                "unseen-memory",
                f"/proc/{peer.pid}/pagemap cannot be read, so audits cannot check this guest: "
                "run the daemon as root, or as its user",
                guest=guest.name,
            )

    def _begin_populate(self, client: _Machine, mapping: Mapping, handshake: VmmHandshake) -> None:
        """Make the connection its guest's, and watch for extents to announce and for its death."""
        client.mapping, client.regions, client.deadline = mapping, handshake.regions, None
        assert isinstance(mapping.handler, PopulateHandler)
        client.handler = mapping.handler
        if is_zerocopy(handshake):
            client.zerocopy_fd = client.handler.zerocopy_fd
            self._loop.watch(client.zerocopy_fd, READ, lambda *_: self._on_zerocopy(client))
        if client.peer.pidfd is not None:
            self._loop.watch(client.peer.pidfd, READ, lambda *_: self._end(client))

    def _reserve(self, request: OpenRequest, peer: GuestProcess) -> Guest:
        """Reserve the name, or NAME-2, NAME-3 ...: a process may have several connections."""
        name = request.name
        for no in itertools.count(2):
            try:
                return self._guests.reserve(request, peer)
            except UsageError:
                request = dataclasses.replace(request, name=f"{name}-{no}")
        raise AssertionError("there is always another number")

    def _on_zerocopy(self, client: _Machine) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(client.zerocopy_fd, 8)
        try:
            self._send(client)
        except PeerError as error:
            self._drop(client, "protocol", str(error))

    def _send(self, client: _Machine) -> None:
        """Send queued replies, then extents as long as the peer reads; the rest stays marked."""
        done = client.peer.flush()
        while done and client.handler is not None and client.zerocopy_fd >= 0:
            runs = client.handler.take_zerocopy()
            if not runs:
                break
            frames = client.image.guest_fd
            for text, nr_fds in range_replies(shown_ranges(runs, client.regions)):
                client.peer.queue(text, [frames] * nr_fds)
            done = client.peer.flush()
        self._loop.change(client.peer.fileno(), READ if done else READ | WRITE)

    def _end(self, client: _Machine) -> None:
        peer, mapping = client.peer, client.mapping
        if self._sessions.pop(peer.fileno(), None) is None:
            return
        self._loop.forget(peer.fileno())
        self._records.release(client.group)
        if mapping is not None:
            if client.zerocopy_fd >= 0:
                self._loop.forget(client.zerocopy_fd)
            if peer.pidfd is not None:
                self._loop.forget(peer.pidfd)
            self._guests.detach(mapping)
            self._guests.release(mapping.guest)
            _log.info(
                "detached", guest=mapping.name, image=client.image.label, pid=peer.pid, uid=peer.uid
            )
        self._admission.leave(peer.uid)
        peer.close()

    def _look_after(self) -> None:
        super()._look_after()
        self.log_states()

    def log_states(self) -> None:
        """Log each guest that stopped or resumed, once; drop those that broke."""
        for client in list(self._sessions.values()):
            if client.mapping is not None and (why := log_state(client.mapping)):
                self._drop(client, "broken", why)


def shown_ranges(runs: Iterable[tuple[int, int]], regions: Iterable[MemoryRegion]) -> list[Range]:
    """Intersect runs of the image (offset and length) with a client's regions."""
    regions = list(regions)
    ranges = []
    for offset, length in runs:
        for region in regions:
            start = max(offset, region.offset_bytes)
            end = min(offset + length, region.offset_bytes + region.length_bytes)
            if start < end:
                ranges.append(Range(start, end - start))
    return ranges


def _full_name(image: Image) -> str:
    return f"{image.domain}/{image.name}"


def _listening(path: Path) -> socket.socket:
    """Listen at a path for anybody; the caller must hold the run-dir's lock, as no other daemon."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.stat(path, follow_symlinks=False).st_mode):
                raise UsageError(f"cannot listen at {path}: it exists and is no socket; move it")
            path.unlink()
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(str(path))
        path.chmod(0o666)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise UsageError(f"cannot listen at {path}: {error.strerror}") from error
    except UsageError:
        sock.close()
        raise
    return sock
