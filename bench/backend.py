# SPDX-License-Identifier: Apache-2.0
"""The other processes of a benchmark: its `cowshed serve`, and the worker that measures."""

from __future__ import annotations

import json
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from cowshed.transport import connect

__all__ = ["BENCH", "BenchError", "Served", "WorkerProcess"]

BENCH = Path(__file__).resolve().parent
START_SECONDS = 60.0


class BenchError(Exception):
    """A measurement could not be made; the message says why."""


class Served:
    """A running daemon that serves these images; idle, since all digests are done.

    images are sources by name, which may have options as `--image` takes them; options are further
    ones of `cowshed serve`.
    """

    def __init__(
        self, images: dict[str, Path | str], capacity_bytes: int, options: Sequence[str] = ()
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="cowshed-bench-")
        run_dir = self.run_dir = Path(self._folder.name)
        self.uri = f"unix://{run_dir}/cowshed.sock"
        self._log_path = run_dir / "log"
        command = [sys.executable, "-m", "cowshed.service.cli", "serve"]
        command += ["--no-keeper", "--run-dir", str(run_dir), "--capacity", str(capacity_bytes)]
        command += options
        for name, source in images.items():
            command += ["--image", f"{name}={source}"]
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self.pid = self._process.pid
        try:
            self._wait_for_line("event=serving ")
            self._wait_for_digests()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_for_line(self, line: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while line not in (log := self._log_path.read_text()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"the daemon does not serve; its log:\n{log}")
            time.sleep(0.02)

    def _wait_for_digests(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not all(image["digest"] for image in self.request("status")["status"]["images"]):
            if time.monotonic() > deadline:
                log = self._log_path.read_text()
                raise BenchError(f"the daemon computed no digests; its log:\n{log}")
            time.sleep(0.02)

    def request(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send the daemon one request, as an operator."""
        with connect(self.uri) as backend:
            return dict(backend.request(op, **fields))

    @property
    def metrics_url(self) -> str:
        """The address of its metrics, if an option asked for them."""
        found = re.search(r"url=(http://\S+)", self._log_path.read_text())
        if not found:
            raise BenchError("the daemon exports no metrics")
        return found[1]

    def evict(self, image: str) -> None:
        """Evict all of an image; BenchError if some of it stayed."""
        kept = self.request("evict", image=image)["kept_bytes"]
        if kept:
            raise BenchError(f"{kept} bytes of {image} could not be evicted")

    def image_status(self, name: str) -> dict[str, Any]:
        """Return one image's part of the status."""
        (image,) = [i for i in self.request("status")["status"]["images"] if i["name"] == name]
        return dict(image)

    def close(self) -> None:
        """End the daemon and remove its run-dir."""
        self._process.terminate()
        try:
            self._process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()


class WorkerProcess:
    """A worker.py; call() sends it an order and waits for the answer."""

    def __init__(self, build_dir: Path, served: Served, answer_seconds: float = 120.0) -> None:
        self._answer_seconds = answer_seconds
        self._process = subprocess.Popen(
            [sys.executable, str(BENCH / "worker.py"), str(build_dir), served.uri, str(served.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.pid = self._process.pid
        self._answer("start")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def call(self, do: str, **fields: Any) -> Any:
        """Send an order and return its answer; BenchError if it fails there or takes too long."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer(do)

    def _answer(self, do: str) -> Any:
        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], self._answer_seconds)[0]:
            raise BenchError(f"{do!r} is not done after {self._answer_seconds:g} s")
        line = stdout.readline()
        if not line:
            raise BenchError(f"the worker ended at {do!r} with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{do!r} failed: {answer['error']}")
        return answer["ok"]
