# SPDX-License-Identifier: Apache-2.0
"""What a start is spared: modules that take long to import, and are not needed for what is done.

Each list is of what was once imported there in vain. Together they were half of a command's time,
and a third of a daemon's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from domains import MakeImage, StartDaemon, command, kill_backend

PRINTING = {"rich", "rich.console"}
SCRAPING = {"prometheus_client", "http.server", "cowshed.service.web.http_server"}
METADATA = {"importlib.metadata", "email", "email.message", "zipfile"}
TLS = {"ssl", "cowshed.transport.links.tls", "hashlib"}
OTHERS = {"asyncio", "tomllib", "fractions"}
DAEMON = {"cowshed.service.daemon", "cowshed.accounting", "sortedcontainers", "zstandard"}


def imported(log: str) -> set[str]:
    """The modules in a log of -X importtime."""
    lines = [line for line in log.splitlines() if line.startswith("import time:")]
    assert len(lines) > 50, log
    return {line.rpartition("|")[2].strip() for line in lines}


def imported_by(*words: str) -> set[str]:
    """The modules that a program imports, which ends with status 0."""
    ended = subprocess.run(
        words,
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    return imported(ended.stderr)


def test_a_guest_imports_neither_tls_nor_what_is_the_daemons() -> None:
    modules = imported_by(sys.executable, "-c", "import cowshed.transport")
    assert "cowshed.transport.guest.client" in modules
    assert modules & (PRINTING | SCRAPING | METADATA | TLS | OTHERS | DAEMON) == set()
    assert modules & {"click", "logging", "cowshed.service"} == set()


def test_a_command_imports_neither_the_daemon_nor_what_it_does_not_print(
    start_daemon: StartDaemon, make_image: MakeImage
) -> None:
    daemon = start_daemon("--image", f"d={make_image(65536)}")
    for words in (("status", "--json"), ("warm", "d"), ("export", f"{daemon.run_dir}/state")):
        modules = imported_by(*command(*words, "--run-dir", str(daemon.run_dir)))
        assert "cowshed.service.operators.control_client" in modules
        unneeded = PRINTING | SCRAPING | METADATA | TLS | OTHERS | DAEMON
        assert modules & unneeded == set(), words
    modules = imported_by(*command("status", "--run-dir", str(daemon.run_dir)))
    assert modules & PRINTING == PRINTING
    assert modules & (SCRAPING | METADATA | TLS | DAEMON) == set()


@pytest.mark.parametrize("kept", [False, True], ids=["alone", "kept"])
def test_a_daemon_imports_what_its_configuration_needs(
    kept: bool,
    start_daemon: StartDaemon,
    make_image: MakeImage,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    image = make_image(65536)
    modules = imported(start_daemon("--image", f"d={image}", kept=kept).log())
    assert "cowshed.service.daemon" in modules
    assert modules & (PRINTING | SCRAPING | METADATA | OTHERS) == set()

    scraped = start_daemon(
        *("--image", f"d={image}", "--metrics", "127.0.0.1:0"),
        at=Path(tmp_path_factory.mktemp("s")),
        kept=kept,
    )
    modules = imported(scraped.log())
    assert "prometheus_client" in modules
    assert modules & PRINTING == set()


def test_a_successor_imports_nothing_itself(
    start_daemon: StartDaemon, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead backend's guests wait for it, so it is forked with all that it needs."""
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    image = make_image(65536)
    daemon = start_daemon("--image", f"d={image}", "--metrics", "127.0.0.1:0", kept=True)
    kill_backend(daemon)
    _, died, log = daemon.log().partition("event=backend-died")
    assert died
    assert "event=metrics" in log
    assert "import time:" not in log
