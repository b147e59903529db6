# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium, driven by chromedriver over WebDriver, which is HTTP and JSON."""

from __future__ import annotations

import base64
import contextlib
import json
import select
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ANSWER_SECONDS = 60
PROGRAMS = ("chromium", "chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)

needs_browser = pytest.mark.skipif(
    any(shutil.which(program) is None for program in PROGRAMS),
    reason="needs chromium and chromedriver (Debian's chromium and chromium-driver)",
)


class Browser:
    """One window; new_browser() makes it."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._session = ""
        options = {"args": [*FLAGS], "binary": shutil.which("chromium")}
        capabilities = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        wanted = {"capabilities": {"alwaysMatch": capabilities}}
        self._session = f"/session/{self._ask('POST', '', wanted, '/session')['sessionId']}"

    def open(self, url: str) -> None:
        self._ask("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a function body in the page and return its value."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def until(self, script: str, *arguments: Any) -> Any:
        """Wait until the function body returns a true value, and return it."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while not (value := self.run(script, *arguments)):
            assert time.monotonic() < deadline, f"never: {script}\n{self.complaints()}"
            select.select([], [], [], 0.05)
        return value

    def become(self, columns: int, lines: int, *, dark: bool = False, ratio: float = 1.0) -> None:
        """Set the window's size in pixels, and light or dark colours."""
        metrics = {"width": columns, "height": lines, "deviceScaleFactor": ratio, "mobile": False}
        self._devtools("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._devtools("Emulation.setEmulatedMedia", {"features": [scheme]})

    def point(self, x: float, y: float) -> None:
        """Move the mouse there."""
        self._devtools("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})

    def screenshot(self, path: Path) -> None:
        """Write the whole page to a PNG file."""
        height = self.run("return document.documentElement.scrollHeight")
        width = self.run("return window.innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        taken = self._devtools(
            "Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True}
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def complaints(self) -> list[str]:
        """Return the console's messages since the last call: errors, policy violations.

        Without messages about rendering speed, which tests that read pixels cause.
        """
        entries = self._ask("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["source"] != "rendering"]

    def quit(self) -> None:
        self._ask("DELETE", "")

    def _devtools(self, cmd: str, params: dict[str, Any]) -> Any:
        return self._ask("POST", "/goog/cdp/execute", {"cmd": cmd, "params": params})

    def _ask(self, method: str, path: str, body: Any = None, session: str | None = None) -> Any:
        url = self._address + (self._session if session is None else session) + path
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {error.read().decode()}") from error


@contextlib.contextmanager
def new_browser() -> Iterator[Browser]:
    """Yield a browser; ends it with all its processes."""
    with tempfile.TemporaryDirectory(prefix="cowshed-browser-") as folder:
        driver = subprocess.Popen(
            ["chromedriver", "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": folder, "TMPDIR": folder},
            text=True,
        )
        try:
            assert driver.stdout is not None
            for line in driver.stdout:
                if "started successfully on port" in line:
                    break
            port = int(line.rpartition("port")[2].strip(" .\n"))
            browser = Browser(f"http://127.0.0.1:{port}")
            try:
                yield browser
            finally:
                browser.quit()
        finally:
            driver.terminate()
            driver.communicate()
