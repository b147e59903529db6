# SPDX-License-Identifier: Apache-2.0
"""What the Drain dashboard says of drains: its queries, on series that promtool makes up."""

import math
import subprocess
from pathlib import Path

import pytest
import yaml
from board_files import panel_queries
from observed import program

BACKEND = '{job="cowshed", instance="host:9432"}'
STATES = ("none", "draining", "done", "failed")


def asks(place: str) -> str:
    (expr,) = [query.expr for query in panel_queries() if query.place == f"drain: {place}: A"]
    return expr.replace("$job", ".+").replace("$instance", ".+")


def check(folder: Path, state: str, progress: str, expected: dict[str, float]) -> None:
    """Assert what panels show after 20 minutes in state with progress, a value a minute."""
    series = {f"cowshed_drain_progress_ratio{BACKEND}": progress}
    for name in STATES:
        labels = BACKEND.replace("}", f', state="{name}"}}')
        series[f"cowshed_drain_state{labels}"] = f"{int(name == state)}x20"
    looks = []
    for place, value in expected.items():
        expr = f"max({asks(place)})"
        sample = {"labels": "{}", "value": value}
        looks.append({"expr": expr, "eval_time": "20m", "exp_samples": [sample]})
    case = {
        "interval": "1m",
        "input_series": [{"series": name, "values": value} for name, value in series.items()],
        "promql_expr_test": looks,
    }
    path = folder / "drain.yaml"
    path.write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": [case]}))
    done = subprocess.run(
        [program("promtool"), "test", "rules", path],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("state", "progress", "shown", "left"),
    [
        ("none", "0x20", 0, 0),
        # A 32nd a minute: 20 of 32 are done, 12 minutes are left.
        ("draining", "0+0.03125x20", 1, 720),
        ("draining", "0.5x20", 1, math.inf),
        ("done", "1x20", 2, 0),
        ("failed", "0.5x20", 3, 0),
    ],
)
def test_state_and_time_left(
    tmp_path: Path, state: str, progress: str, shown: int, left: float
) -> None:
    check(tmp_path, state, progress, {"State": shown, "Time left": left})
