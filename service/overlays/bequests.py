# SPDX-License-Identifier: Apache-2.0
"""What a guest's overlay needs to outlive us, and finding what our predecessor left of overlays.

Each overlay is a group of its own: a record, the ledger with its private bits, its quota, and the
memfd with its pages. Pages in files need no holding; their ledger is held all the same, since it
knows of writes that were acknowledged and not flushed yet.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import asdict, dataclass
from typing import Final

from cowshed.accounting import Account, Overlay
from cowshed.cache import CowshedError
from cowshed.service.overlays.files import OverlayRecord, overlay_record
from cowshed.service.runtime.logs import EventLog
from cowshed.service.survival.fd_store import FdStore
from cowshed.service.survival.remains import (
    Remains,
    record_close,
    record_is_open,
    record_make,
    record_read,
)

__all__ = ["LeftOverlay", "OverlayBequests"]

_log = EventLog("cowshed.overlays")

_PREFIX: Final = "overlay/"
_KINDS: Final = {"record", "ledger", "quota"}


@dataclass(frozen=True)
class LeftOverlay:
    """What our predecessor left of one overlay; fds by kind, ours until hold() or let_go()."""

    group: str
    record: OverlayRecord
    pages_id: str
    fds: dict[str, int]
    staged: str = ""  # by this handoff, and not admitted
    files: list[list[int]] | None = None  # OverlayFiles.identity(); an older release says none

    @property
    def ledger(self) -> int:
        """The memfd of its account."""
        return self.fds["ledger"]

    @property
    def quota(self) -> int:
        """The memfd of its quota."""
        return self.fds["quota"]

    @property
    def has_pages(self) -> bool:
        """Whether its pages are in memory."""
        return "overlay" in self.fds

    def open_pages(self, account: Account) -> Overlay:
        """Go on with its pages, under its account. InvariantError if they are none."""
        pages = os.dup(self.fds["overlay"])
        try:
            return Overlay.adopt(account, pages)
        except BaseException:
            os.close(pages)
            raise


class OverlayBequests:
    """Has the supervisor hold overlays. For any thread."""

    def __init__(self, fd_store: FdStore) -> None:
        self._fd_store = fd_store
        self._records: dict[str, int] = {}

    def hold(
        self,
        record: OverlayRecord,
        pages_id: str,
        fds: list[int],
        left: LeftOverlay | None,
        staged: str = "",
        files: list[list[int]] | None = None,
    ) -> str:
        """Have an overlay outlive us, as the one that was left if it is that; the group's name.

        fds are borrowed until release(). staged: until admit() it counts
        only if the handoff of that name does. files are those that its pages are in, if they are.
        """
        if left is not None:
            self._records[left.group] = left.fds["record"]
            for kind in left.fds.keys() - {"record"}:
                os.close(left.fds[kind])
            self._fd_store.hold(left.group, [left.fds["record"], *fds])
            return left.group
        group = f"{_PREFIX}{secrets.token_hex(8)}"
        told = {"pages_id": pages_id, "staged": staged, "files": files}
        made = record_make({**asdict(record), **told})
        self._records[group] = made
        self._fd_store.hold(group, [made, *fds], overlay=record.label)
        return group

    def admit(self, group: str) -> None:
        """What was held as staged counts from now on."""
        if group:
            record_close(self._records[group])

    def release(self, group: str) -> None:
        """Have an overlay held no more; before its descriptors are closed."""
        if group:
            self._fd_store.release(group)
            os.close(self._records.pop(group))

    def lefts(self, remains: Remains) -> dict[str, LeftOverlay]:
        """Take what was left of overlays, by label; what is broken is let go."""
        lefts = {}
        for group, fds in remains.take_all(_PREFIX):
            try:
                if fds.keys() - {"overlay"} != _KINDS:
                    raise ValueError(f"it has {', '.join(sorted(fds))}")
                fields = record_read(fds["record"])
                staged = str(fields.get("staged", "")) if record_is_open(fds["record"]) else ""
                left = LeftOverlay(
                    group,
                    overlay_record(fields),
                    str(fields["pages_id"]),
                    fds,
                    staged,
                    fields.get("files"),
                )
            except (CowshedError, ValueError, KeyError, TypeError) as error:
                _log.error("overlay-lost", f"{group} is broken: {error}")
                self._close(group, fds)
            else:
                lefts[left.record.label] = left
        return lefts

    def let_go(self, left: LeftOverlay) -> None:
        """Give up what was left of an overlay."""
        self._close(left.group, left.fds)

    def _close(self, group: str, fds: dict[str, int]) -> None:
        self._fd_store.release(group)
        for fd in fds.values():
            os.close(fd)
