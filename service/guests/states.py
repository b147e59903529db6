# SPDX-License-Identifier: Apache-2.0
"""A guest's state, from those of its accounts, and its name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from cowshed.accounting import AccountState

__all__ = ["STATE_WORDS", "joint_state"]

STATE_WORDS: Final[Mapping[AccountState, str]] = {
    AccountState.RUNNING: "running",
    AccountState.STOPPED: "stopped-quota",
    AccountState.FROZEN: "frozen",
    AccountState.BROKEN: "detached",
}


def joint_state(states: Collection[AccountState]) -> AccountState:
    """Return the state of a guest whose mappings have these states, as add_statuses() does.

    BROKEN if all are, else FROZEN or STOPPED if one is, else RUNNING.
    """
    if states and all(state is AccountState.BROKEN for state in states):
        return AccountState.BROKEN
    for state in (AccountState.FROZEN, AccountState.STOPPED):
        if state in states:
            return state
    return AccountState.RUNNING
