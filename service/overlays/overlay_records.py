# SPDX-License-Identifier: Apache-2.0
"""The groups by which overlays outlive this backend, and finding those that we inherited.

Each overlay is a group of its own: a record, the ledger with its private bits, its quota, and the
memfd with its pages. Pages in files need not be held, but their ledger is: it has the bits of
writes that were acknowledged and not flushed yet.
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
    """The inherited descriptors of one overlay, by kind; ours until keep() or let_go()."""

    group: str
    record: OverlayRecord
    pages_id: str
    fds: dict[str, int]
    staged: str = ""  # by this handoff, and not admitted
    files: list[list[int]] | None = None  # OverlayFiles.identity(); None of older releases

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
        """Adopt its pages, under its account. InvariantError if they are not an overlay's."""
        pages = os.dup(self.fds["overlay"])
        try:
            return Overlay.adopt(account, pages)
        except BaseException:
            os.close(pages)
            raise


class OverlayRecords:
    """Has the keeper hold overlays. For any thread."""

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
        """Have the keeper hold an overlay, in its inherited group if it has one; return the group.

        fds are borrowed until release(). staged: until admit() it is valid only if the handoff of
        that name was committed. files is the identity of the files that its pages are in, if any.
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
        """Make an overlay that was held as staged valid from now on."""
        if group:
            record_close(self._records[group])

    def release(self, group: str) -> None:
        """Have the keeper release an overlay; must precede closing its descriptors."""
        if group:
            self._fd_store.release(group)
            os.close(self._records.pop(group))

    def take(self, inherited_fds: InheritedFds) -> dict[str, InheritedOverlay]:
        """Take the inherited overlays, by label; broken ones are released."""
        all_inherited = restore_groups(
            inherited_fds, _PREFIX, self._fd_store, _inherited, lost="overlay-lost"
        )
        return {each.record.label: each for each in all_inherited}

    def let_go(self, inherited: InheritedOverlay) -> None:
        """Release an inherited overlay that is not restored."""
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
