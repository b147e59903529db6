# SPDX-License-Identifier: Apache-2.0
"""What a guest's overlay needs to outlive us, and finding what our predecessor left of overlays.

Each overlay is a group of its own: a record, the ledger with its private bits, its quota, and the
memfd with its pages. Pages in files need no holding; their ledger is held all the same, since it
knows of writes that were acknowledged and not flushed yet.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Final

from cowshed.accounting import Account, Overlay
from cowshed.service.overlays.files import OverlayRecord, overlay_record
from cowshed.service.persist.fd_store import FdStore
from cowshed.service.persist.inherited import (
    InheritedFds,
    Kinds,
    record_close,
    record_is_open,
    record_make,
    record_read,
)
from cowshed.service.persist.restoring import has_kinds, let_go, new_group, restore_groups

__all__ = ["InheritedOverlay", "OverlayRecords"]

_PREFIX: Final = "overlay/"
_KINDS: Final = {"record", "ledger", "quota"}


@dataclass(frozen=True)
class InheritedOverlay:
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


class OverlayRecords:
    """Has the supervisor hold overlays. For any thread."""

    def __init__(self, fd_store: FdStore) -> None:
        self._fd_store = fd_store
        self._records: dict[str, int] = {}

    def keep(
        self,
        record: OverlayRecord,
        pages_id: str,
        fds: list[int],
        inherited: InheritedOverlay | None,
        staged: str = "",
        files: list[list[int]] | None = None,
    ) -> str:
        """Have an overlay outlive us, as the one that was left if it is that; the group's name.

        fds are borrowed until release(). staged: until admit() it counts
        only if the handoff of that name does. files are those that its pages are in, if they are.
        """
        if inherited is not None:
            self._records[inherited.group] = inherited.fds["record"]
            for kind in inherited.fds.keys() - {"record"}:
                os.close(inherited.fds[kind])
            self._fd_store.keep(inherited.group, [inherited.fds["record"], *fds])
            return inherited.group
        group = new_group(_PREFIX)
        more = {"pages_id": pages_id, "staged": staged, "files": files}
        made = record_make({**asdict(record), **more})
        self._records[group] = made
        self._fd_store.keep(group, [made, *fds], overlay=record.label)
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

    def take(self, inherited_fds: InheritedFds) -> dict[str, InheritedOverlay]:
        """Take what was left of overlays, by label; what is broken is let go."""
        all_inherited = restore_groups(
            inherited_fds, _PREFIX, self._fd_store, _inherited, lost="overlay-lost"
        )
        return {each.record.label: each for each in all_inherited}

    def let_go(self, inherited: InheritedOverlay) -> None:
        """Give up what was left of an overlay."""
        let_go(self._fd_store, inherited.group, inherited.fds)


def _inherited(group: str, fds: Kinds) -> InheritedOverlay | None:
    if not has_kinds(fds, _KINDS, {"overlay"}):
        raise ValueError(f"it has {', '.join(sorted(fds))}")
    fields = record_read(fds["record"])
    return InheritedOverlay(
        group,
        overlay_record(fields),
        str(fields["pages_id"]),
        fds,
        str(fields.get("staged", "")) if record_is_open(fds["record"]) else "",
        fields.get("files"),
    )
