# SPDX-License-Identifier: Apache-2.0
"""Before a reload: whether the program as it is installed now could go on, asked of itself.

It runs with --check in a process of its own, whose end is polled: its configuration may be on a
disk that hangs, and nobody else waits for that. It answers in a memfd that it is given: which
layouts it keeps memory in, and the text of the configuration that it has read and found right.
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
    """One check under way. fd is ready when it has ended; then, or when is_late(), call end().

    UsageError if it cannot be started.
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
        """How long it may go on."""
        return max(0.0, self._deadline - time.monotonic())

    def is_late(self) -> bool:
        """Whether it takes longer than any check should."""
        return self.seconds_left == 0

    def end(self, layouts: str) -> str | None:
        """The text of the configuration that is right, None if there is no file; closes all.

        layouts are those in which memory is kept now. UsageError says why it would not do.
        """
        status = self._child.poll()
        if status is None:
            self.cancel()
            raise UsageError(f"the check of it did not end within {_CHECK_SECONDS:.0f} s")
        output, answer = _read(self._output), _read(self._answer)
        self.close()
        if status:
            why = output.strip().removeprefix("cowshed: ")
            raise UsageError(why or f"the check of it ended with status {status}")
        try:
            fields = json.loads(answer)
            theirs, text = fields["layouts"], fields["text"]
        except (ValueError, KeyError, TypeError):
            theirs, text = "one it does not say", None
        if theirs != layouts:
            raise UsageError(
                f"the daemon keeps its ledger in layout {layouts}, and the program that is "
                f"installed now in {theirs}: hand its guests to a daemon of that program with "
                "'cowshed drain' instead"
            )
        return None if text is None else str(text)

    def cancel(self) -> None:
        """Have it end unheard. Not waited for, as it may hang: subprocess reaps it in time."""
        self._child.send_signal(signal.SIGKILL)
        self.close()

    def close(self) -> None:
        """Close what it has here; in a forked child too."""
        for fd in (self.fd, self._answer, self._output):
            os.close(fd)


def answer_check(layouts: str, text: str | None) -> None:
    """In the process that checks: give the answer, if a daemon asks; only if all is right."""
    fd = os.environ.get(_ANSWER_FD, "")
    if fd:
        os.write(int(fd), json.dumps({"layouts": layouts, "text": text}).encode())


def _read(fd: int) -> str:
    return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")
