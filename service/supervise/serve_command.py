# SPDX-License-Identifier: Apache-2.0
"""How this program was started to serve, to be started so again."""

from __future__ import annotations

import sys
from typing import Final

__all__ = ["KEEPER_OF", "serve_command"]

KEEPER_OF: Final = "--keeper-of"


def serve_command() -> list[str]:
    """The words: not whom it was to keep, if it is a later keeper, nor that it was to take over."""
    words = [sys.executable, *(word for word in sys.orig_argv[1:] if word != "--takeover")]
    while KEEPER_OF in words:
        at = words.index(KEEPER_OF)
        del words[at : at + 2]
    return words
