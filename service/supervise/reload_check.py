# SPDX-License-Identifier: Apache-2.0
"""Before a reload: have the program as it is installed now check whether it could go on.

It runs with --check in a process of its own, whose end is polled: its configuration may be on a
disk that hangs, and nothing here must wait for that. It answers in a memfd that it is given: its
memory layouts, and the text of the configuration that it has read and found valid.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import Final

from cowshed.cache.errors import UsageError
from cowshed.service.supervise.serve_command import serve_command

__all__ = ["ReloadCheck", "answer_check"]

_ANSWER_FD: Final = "COWSHED_CHECK_FD"
_CHECK_SECONDS: Final = 60.0


class ReloadCheck:
    """One running check. fd is readable when it has ended.

    The owner must call end() then, or once is_late(). UsageError if it cannot be started.
    """

    def __init__(self) -> None:
        with contextlib.ExitStack() as undo:
            try:
                self._answer = os.memfd_create("cowshed-check", 0)
                undo.callback(os.close, self._answer)
                self._output = os.memfd_create("cowshed-said", os.MFD_CLOEXEC)
                undo.callback(os.close, self._output)
                self._child = subprocess.Popen(
                    [*serve_command(), "--check"],
                    stdin=subprocess.DEVNULL,
                    stdout=self._output,
                    stderr=self._output,
                    pass_fds=[self._answer],
                    env={**os.environ, _ANSWER_FD: str(self._answer)},
                )
                undo.callback(self._child.kill)
                self.fd = os.pidfd_open(self._child.pid)
            except OSError as error:
                raise UsageError(f"cannot start {sys.executable}: {error.strerror}") from error
            undo.pop_all()
        self._deadline = time.monotonic() + _CHECK_SECONDS

    @property
    def seconds_left(self) -> float:
        """How long the check may still take."""
        return max(0.0, self._deadline - time.monotonic())

    def is_late(self) -> bool:
        """Whether the check has taken too long."""
        return self.seconds_left == 0

    def end(self, layouts: str) -> str | None:
        """Return the text of the valid configuration, None if there is no file; closes all.

        layouts are all of the running daemon's. UsageError says why the program cannot go on.
        """
        status = self._child.poll()
        if status is None:
            self.cancel()
            raise UsageError(f"its --check did not end within {_CHECK_SECONDS:.0f} s")
        output, answer = _read(self._output), _read(self._answer)
        self.close()
        if status:
            why = output.strip().removeprefix("cowshed: ")
            raise UsageError(why or f"its --check ended with status {status}")
        try:
            fields = json.loads(answer)
            theirs = fields.get("all_layouts", fields["layouts"])
            text = fields["text"]
        except (ValueError, KeyError, TypeError, AttributeError):
            theirs, text = "an unknown one", None
        if theirs != layouts:
            raise UsageError(
                f"the daemon keeps its ledger in layout {layouts}, and the program that is "
                f"installed now in {theirs}: hand its guests to a daemon of that program with "
                "'cowshed drain' instead"
            )
        return None if text is None else str(text)

    def cancel(self) -> None:
        """Kill the check and close all; never waits, as it may hang: subprocess reaps it later."""
        self._child.send_signal(signal.SIGKILL)
        self.close()

    def close(self) -> None:
        """Close its descriptors; also for a forked child."""
        for fd in (self.fd, self._answer, self._output):
            os.close(fd)


def answer_check(layouts: str, all_layouts: str, text: str | None) -> None:
    """Write the answer in the checking process, if a daemon asked.

    The caller must have checked everything before.
    """
    fd = os.environ.get(_ANSWER_FD, "")
    if fd:
        answer = {"layouts": layouts, "all_layouts": all_layouts, "text": text}
        os.write(int(fd), json.dumps(answer).encode())


def _read(fd: int) -> str:
    return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")
