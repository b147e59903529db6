# SPDX-License-Identifier: Apache-2.0
"""Where tests kill a backend in the middle of a handoff: COWSHED_TEST_STOP_AT=PHASE[,PHASE].

For tests alone. A process that reaches such a phase, just before it does what the phase asks for,
stops itself with SIGSTOP, and is killed or let go on from outside.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Final

__all__ = ["stop_at"]

_STOPS: Final = frozenset(os.environ.get("COWSHED_TEST_STOP_AT", "").split(",")) - {""}


def stop_at(phase: str) -> None:
    """Stop this process if it is to stop here; this thread goes no instruction further.

    A signal to the process would be another thread's to take, and this one might go on meanwhile.
    """
    if phase in _STOPS:
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
