# SPDX-License-Identifier: Apache-2.0
"""A backend of the chaos test with its keeper: where it is reached, who its processes are."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from certificates import Authority
from domains import Daemon, command, cowshed, until

from cowshed.transport import connect

ENVIRONMENT = ("env", "COWSHED_TEST_POINTS=1", "PYTHONFAULTHANDLER=1")


class ChaosHost:
    """One backend of image "d", kept, which every transport reaches. points: faults injected."""

    def __init__(
        self, name: str, run_dir: Path, image: Path, authority: Authority, extent: str
    ) -> None:
        self.name = name
        self.run_dir = run_dir
        server = urlencode(authority.issue(f"server-{name}", "IP:127.0.0.1"))
        settings = run_dir / "chaos.toml"
        settings.write_text(f'extent = "{extent}"\n')
        arguments = [
            f"--image=d={image}",
            "--capacity=3M",
            f"--config={settings}",
            "--listen=tcp://127.0.0.1:0",
            f"--listen=tls://127.0.0.1:0?{server}",
            "--accept-handoff",
            "--metrics=127.0.0.1:0",
            "--verbose",
        ]
        self._arguments = arguments
        self._keeper_since = 0
        self._takers: list[subprocess.Popen[bytes]] = []
        self.image = image
        self.daemon = Daemon(run_dir, arguments, before=ENVIRONMENT, kept=True)
        self.daemon.wait_ready()
        self.far = {
            uri.partition(":")[0]: uri.partition("?")[0]
            for uri in re.findall(r"event=listening uri=\"?([^\"\s]+)", self.daemon.log())
        }
        self._held_at_first = _kinds(self.backend_pid)

    @property
    def unix(self) -> str:
        return f"unix://{self.run_dir}/cowshed.sock"

    @property
    def backend_pid(self) -> int:
        """Whoever serves, or is about to: the file is empty for an instant between two."""
        found: list[str] = []

        def is_said() -> bool:
            found[:] = [(self.run_dir / "lock").read_text()]
            return bool(found[0])

        until(is_said)
        return int(found[0])

    @property
    def keeper_pid(self) -> int:
        """The keeper is whose child, or whose watcher, the backend is."""
        log = self.daemon.log()[self._keeper_since :]
        changed = re.findall(r"event=keeper-changed pid=(\d+)", log)
        return int(changed[-1]) if changed else self.daemon.pid

    @property
    def nr_keepers(self) -> int:
        return self.daemon.log().count("event=keeper-changed")

    def kill_backend(self) -> int:
        """Kill whoever serves here, or is the next to; its number."""
        killed: list[int] = []

        def is_killed() -> bool:
            pid = self.backend_pid
            # One that has just left is named until the next has begun.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            return bool(killed)

        until(is_killed)
        return killed[0]

    def kill_keeper(self) -> None:
        os.kill(self.keeper_pid, signal.SIGKILL)
        self.daemon.process.poll()

    def reload(self) -> int:
        pid = self.backend_pid
        os.kill(self.keeper_pid, signal.SIGHUP)
        return pid

    def begin_takeover(self) -> subprocess.Popen[bytes]:
        """Start another program that is to serve on; it logs where ours does."""
        words = ["serve", "--run-dir", str(self.run_dir), "--takeover", *self._arguments]
        with self.daemon.log_path.open("ab") as log:
            taker = subprocess.Popen(
                [*ENVIRONMENT, *command(*words)], stdout=log, stderr=log, start_new_session=True
            )
        self._takers.append(taker)
        return taker

    def is_taken_over_by(self, taker: subprocess.Popen[bytes]) -> bool:
        """Whether that program's backend serves."""
        try:
            stat = Path(f"/proc/{self.backend_pid}/stat").read_text()
        except OSError:
            return False
        return int(stat.rpartition(")")[2].split()[1]) == taker.pid

    def end_takeover(self, taker: subprocess.Popen[bytes]) -> None:
        """It serves: it is the keeper that we know from now on; the last one ends."""
        self.daemon.process.wait(60)
        self._keeper_since = len(self.daemon.log())
        self.daemon.process, self.daemon.pid = taker, taker.pid

    def end(self) -> None:
        """Leave nothing of it, wherever it was."""
        self.daemon.end()
        for taker in self._takers:
            taker.kill()
            taker.wait()

    def request(self, op: str, **fields: Any) -> dict[str, Any]:
        with connect(self.unix) as backend:
            return dict(backend.request(op, **fields))

    def status(self) -> dict[str, Any]:
        return dict(self.request("status")["status"])

    def point(self, name: str, action: str, times: int = 1, **more: int) -> None:
        self.request("point", name=name, action=action, times=times, **more)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return cowshed(words[0], "--run-dir", str(self.run_dir), *words[1:])

    def leaked(self) -> str:
        """What guests and images are made of, by kind, that is too much; "" if nothing is.

        That is what the backend has beyond what it had before any guest came, and what the keeper
        has beyond the backend: it has what it was sent once it has read that.
        """
        backend, keeper = _kinds(self.backend_pid), _kinds(self.keeper_pid)
        more = {"backend": +(backend - self._held_at_first), "keeper": +(keeper - backend)}
        return "" if not any(more.values()) else f"{self.name}: {more}"

    def stop(self) -> None:
        """End it in order; AssertionError if processes of it are left."""
        backend = os.pidfd_open(self.backend_pid)
        signal.pidfd_send_signal(backend, signal.SIGTERM)
        ended = select.select([backend], [], [], 60)[0]
        os.close(backend)
        assert ended, f"{self.name}: the backend does not end"
        self.daemon.process.wait(60)


def _kinds(pid: int) -> Counter[str]:
    kinds: Counter[str] = Counter()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if target.startswith("/memfd:"):
            kinds[target.partition(" ")[0]] += 1
        elif target.startswith(("anon_inode:[userfaultfd]", "/proc/")):
            kinds[re.sub(r"\d+", "N", target)] += 1
    return kinds
