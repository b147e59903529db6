# SPDX-License-Identifier: Apache-2.0
"""Stop a backend in the middle of a handoff, for tests: COWSHED_TEST_STOP_AT=PHASE[,PHASE].

A process that reaches such a phase stops itself with SIGSTOP, before it acts on the phase; the test
kills or continues it.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Final

__all__ = ["stop_at"]

_STOPS: Final = frozenset(os.environ.get("COWSHED_TEST_STOP_AT", "").split(",")) - {""}


def stop_at(phase: str) -> None:
    """Stop this process if the variable names phase; this thread goes on only after SIGCONT.

    A signal to the process might be taken by another thread, and this one would go on meanwhile.
    """
    if phase in _STOPS:
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
