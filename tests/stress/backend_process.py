# SPDX-License-Identifier: Apache-2.0
"""The driver's end of backend.py: starts it, gives it orders beside the product's own, ends it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from rounds import Round

from cowshed.transport import Backend, connect

HERE = Path(__file__).parent


class StressError(Exception):
    """What the stress test found."""


class BackendProcess:
    """A daemon for one round; env is added to its environment. For use by any thread."""

    def __init__(self, of: Round, run_dir: Path, env: dict[str, str], patience: float) -> None:
        self.uri = f"unix://{run_dir}/cowshed.sock"
        self.log_path = run_dir / "log"
        self._patience = patience
        self._lock = threading.Lock()
        config = run_dir / "config.toml"
        images = "".join(
            f'[[image]]\nname = "{name}"\nsource = "{run_dir}/{name}.raw"\n'
            f"extent = {of.extent_of(name)}\n"
            for name in of.sizes
        )
        config.write_text(
            f'capacity = {of.capacity_bytes}\nrun_dir = "{run_dir}"\n'
            f"extent = {of.extent_bytes}\nloaders = {of.loaders}\n{images}"
        )
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "backend.py"), str(config)],
                env={**os.environ, "COWSHED_TEST_POINTS": "1", **env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self.pid = self._process.pid
        try:
            self.order("wait_idle")
            self.connect().close()  # the loop answers, so it runs
        except BaseException:
            self.kill()
            raise

    def check_alive(self) -> None:
        if (status := self._process.poll()) is not None:
            raise StressError(f"the backend ended with status {status}")

    def connect(self) -> Backend:
        return connect(self.uri)

    def order(self, do: str, **fields: Any) -> Any:
        """Give an order of backend.py's Channel and wait for its answer."""
        with self._lock:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
                self._process.stdin.flush()
            answer = self._answer(f"order {do!r}")
        if "error" in answer:
            raise StressError(f"order {do!r}: {answer['error']}")
        return answer["ok"]

    def _answer(self, what: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], self._patience)[0]:
            raise StressError(f"the backend does not answer: {what}")
        line = self._process.stdout.readline()
        if not line:
            raise StressError(f"the backend ended with status {self._process.wait()}: {what}")
        return dict(json.loads(line))

    def begin_stop(self) -> None:
        """Tell it to end, and no more."""
        self._process.send_signal(signal.SIGTERM)

    def ends_within(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> dict[str, Any]:
        """End it as an operator would; what it had and has of descriptors and the like."""
        self.begin_stop()
        assert self._process.stdin is not None
        self._process.stdin.close()
        left = self._answer("stopping")
        status = self._process.wait(self._patience)
        if status:
            raise StressError(f"the backend ended with status {status}")
        return left

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
