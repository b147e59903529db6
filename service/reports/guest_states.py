# SPDX-License-Identifier: Apache-2.0
"""Log each time that a guest stops at its quota, resumes, or cannot be served any more."""

from __future__ import annotations

from cowshed.service.guests.guests import Mapping
from cowshed.service.reports.status import broken_why, guest_state
from cowshed.service.runtime.logs import EventLog
from cowshed.service.runtime.sizes import format_bytes

__all__ = ["log_state"]

_log = EventLog("cowshed")


def log_state(mapping: Mapping) -> str:
    """Log a mapping's state if it changed; return why the mapping must be dropped, or ""."""
    status = mapping.account.status()
    state = guest_state(status)
    if state in (mapping.logged_state, "frozen"):  # a freeze is logged where it begins
        return ""
    mapping.logged_state = state
    if state == "detached":
        return broken_why(status)
    _log_quota(mapping, state)
    return ""


def _log_quota(mapping: Mapping, state: str) -> None:
    who = {"guest": mapping.name, "image": mapping.image.label}
    who_else = {"pid": mapping.pid, "uid": mapping.uid}
    if state == "running":
        _log.notice("quota-resume", **who, **who_else)
        return
    _log.warning(
        "quota-stop",
        "its writes wait until 'cowshed quota GUEST SIZE' raises its quota",
        **who,
        quota=format_bytes(mapping.guest.quota_bytes or 0),
        **who_else,
    )
