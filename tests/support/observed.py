# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus with this repository's configuration, and a real backend for it to scrape."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import yaml
from board_files import DASHBOARDS
from domains import until
from places import take_port

SCRAPES_APART = "250ms"


def free_port() -> int:
    """Return a loopback port that is free, and that the kernel assigns to no other socket."""
    with take_port() as server:
        return int(server.getsockname()[1])


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return str(answer.read().decode())


def program(name: str) -> str:
    """Return the path of a program of the system or of `make setup`."""
    path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    assert path, f"{name} is missing: run make setup"
    return path


class Prometheus:
    """A server that runs dashboards/prometheus.yml, with other targets and more scrapes."""

    def __init__(self, folder: Path, target: str) -> None:
        config = yaml.safe_load((DASHBOARDS / "prometheus.yml").read_text())
        config["global"] = dict.fromkeys(config["global"], SCRAPES_APART)
        config["rule_files"] = [str(DASHBOARDS / path) for path in config["rule_files"]]
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log_path = folder / "prometheus.log"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    program("prometheus"),
                    f"--config.file={folder}/prometheus.yml",
                    f"--storage.tsdb.path={folder}/prometheus",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=log,
                stderr=log,
                env={**os.environ, "GOMAXPROCS": "1"},
            )

    def wait_ready(self) -> None:
        until(self._ready)

    def _ready(self) -> bool:
        assert self.process.poll() is None, f"it ended: {self.log_path.read_text()}"
        try:
            return "ready" in get(f"{self.url}/-/ready").lower()
        except OSError:
            return False

    def api(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer; AssertionError with Prometheus's message for an error."""
        query = urllib.parse.urlencode(parameters)
        try:
            answer = json.loads(get(f"{self.url}/api/v1/{path}?{query}"))
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error
        assert answer["status"] == "success", answer
        assert not answer.get("warnings"), answer
        return answer["data"]

    def values(self, expr: str) -> list[float]:
        """Return the values of a query's series, now."""
        return [float(series["value"][1]) for series in self.series(expr)]

    def series(self, expr: str) -> list[dict[str, Any]]:
        """Return the series of a query, now: each has its labels as metric, and its value."""
        data = self.api("query", query=expr)
        assert data["resultType"] == "vector", f"{expr} gives a {data['resultType']}"
        return list(data["result"])

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self.api("rules")["groups"] for rule in group["rules"]]

    def alert_states(self) -> dict[str, str]:
        """Return firing, pending or inactive for each alert."""
        return {rule["name"]: rule["state"] for rule in self.rules() if rule["type"] == "alerting"}

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
