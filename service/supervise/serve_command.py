# SPDX-License-Identifier: Apache-2.0
"""The command that started this program to serve, to start it again."""

from __future__ import annotations

import sys
from typing import Final

__all__ = ["KEEPER_OF", "serve_command"]

KEEPER_OF: Final = "--keeper-of"


def serve_command() -> list[str]:
    """Return the command, without --keeper-of PID and --takeover."""
    words = [sys.executable, *(word for word in sys.orig_argv[1:] if word != "--takeover")]
    while KEEPER_OF in words:
        at = words.index(KEEPER_OF)
        del words[at : at + 2]
    return words
