# SPDX-License-Identifier: Apache-2.0
"""How a guest is, in one word, by its accounts."""

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
    """How a guest is whose mappings are so, as accounting.add_statuses sees it.

    Broken when all are, else frozen or stopped when one is.
    """
    if states and all(state is AccountState.BROKEN for state in states):
        return AccountState.BROKEN
    for state in (AccountState.FROZEN, AccountState.STOPPED):
        if state in states:
            return state
    return AccountState.RUNNING
