# SPDX-License-Identifier: Apache-2.0
"""Shared code of processes that tests control: their user, and their orders.

Imports nothing of cowshed: most guests of the tests need only the modules that they import.
"""

import ctypes
import json
import os
import sys
from collections.abc import Callable

PAGE_BYTES = 4096
PR_SET_DUMPABLE = 4


def become(uid: int) -> None:
    """Change to uid for good; as after an exec, /proc/self is the new user's."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def main(kind: Callable[[str], object]) -> None:
    """Make a script, then call the method that each line of stdin names, and print its result."""
    uri, *rest = sys.argv[1:]
    if rest:
        become(int(rest[0]))
    script = kind(uri)
    print(json.dumps({"ok": os.getpid()}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = {"ok": getattr(script, "do_" + order.pop("do"))(**order)}
        except Exception as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), flush=True)
