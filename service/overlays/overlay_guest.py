# SPDX-License-Identifier: Apache-2.0
"""A guest whose private pages the backend keeps, and its owner."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass, field

from cowshed.accounting import Account, AccountStatus, Overlay, Quota
from cowshed.cache import Image
from cowshed.service.guests.guests import OpenRequest
from cowshed.service.overlays.files import OverlayRecord
from cowshed.transport.nbd.serving import NbdExport

__all__ = ["OverlayGuest"]


@dataclass(eq=False)
class OverlayGuest:
    """A guest whose private pages the backend keeps. Invariant: nr_clients are connected now.

    pages_id identifies these private pages. Pages in files get another identifier when a daemon
    opens them without inheriting them: writes that were not flushed may be lost then, and only the
    guest knows which.
    """

    request: OpenRequest
    owner: str
    counted_as: int | str
    transport: str
    uid: int
    pid: int
    quota: Quota
    account: Account
    overlay: Overlay
    export: NbdExport
    quota_bytes: int | None
    # Pages made anew under the same guest's name get another identifier.
    pages_id: str = field(default_factory=lambda: secrets.token_hex(8))
    group: str = ""
    nr_clients: int = 0
    nr_users: int = 0  # see OverlayTable.using()
    record_lock: threading.Lock = field(default_factory=threading.Lock)  # for its record's file
    account_no: int = field(init=False)

    def __post_init__(self) -> None:
        self.account_no = self.account.number

    @property
    def name(self) -> str:
        """The guest's name, unique in its domain."""
        return self.request.name

    @property
    def domain(self) -> str:
        """The sharing domain: its image's."""
        return self.request.image.domain

    @property
    def image(self) -> Image:
        """The image it is a copy of."""
        return self.request.image

    @property
    def label(self) -> str:
        """The overlay's name for operators: IMAGE@GUEST, or DOMAIN/IMAGE@GUEST."""
        return f"{self.image.label}@{self.name}"

    @property
    def state(self) -> str:
        """ "running" while a client is connected, else "away"."""
        return "running" if self.nr_clients else "away"

    def granted_bytes(self, _: AccountStatus) -> int:
        """Return 0: it maps nothing."""
        return 0

    def record(self) -> OverlayRecord:
        """Return its record, for a successor."""
        return OverlayRecord(
            image=self.image.label,
            guest=self.name,
            owner=self.owner,
            counted_as=self.counted_as,
            transport=self.transport,
            uid=self.uid,
            quota_bytes=self.quota_bytes,
            policy=self.request.policy.name.lower(),
        )
