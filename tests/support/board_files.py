# SPDX-License-Identifier: Apache-2.0
"""The files of dashboards/, parsed for tests: panels and queries, rules, pages."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = ROOT / "dashboards"
GENERATED = sorted((DASHBOARDS / "generated").glob("*.json"))
RUNBOOKS = ROOT / "docs/runbooks"

# The name of a metric or rule in PromQL, and the selector that follows it.
NAME = re.compile(
    r"(?<![\w:\"$])((?:cowshed|process|python)_\w+|(?:image|kind|instance):cowshed_[\w:]+|up|ALERTS)"
    r"(?![\w(])(\{[^}]*\})?"
)
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


@dataclass(frozen=True)
class Query:
    """A query, its place, and the legend of its series."""

    place: str
    expr: str
    legend: str = ""


def boards() -> dict[str, dict[str, Any]]:
    """Return each generated dashboard by its file's name."""
    return {path.stem: json.loads(path.read_text()) for path in GENERATED}


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a dashboard's panels without the rows."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def panel_queries() -> list[Query]:
    return [
        Query(
            f"{name}: {panel['title']}: {target['refId']}", target["expr"], target["legendFormat"]
        )
        for name, board in boards().items()
        for panel in panels(board)
        for target in panel["targets"]
    ]


def rules() -> list[dict[str, Any]]:
    """Return recording and alert rules of all files and groups."""
    found = []
    for path in sorted((DASHBOARDS / "rules").glob("*.yaml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            found += group["rules"]
    return found


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def records() -> dict[str, dict[str, Any]]:
    return {rule["record"]: rule for rule in rules() if "record" in rule}


def rule_queries() -> list[Query]:
    return [Query(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules()]


def blocks(page: Path, language: str) -> list[str]:
    """Return the lines of a page's fenced blocks of one language."""
    fenced = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [line for block in fenced for line in block.splitlines() if line.strip()]


def runbook_queries() -> list[Query]:
    pages = sorted(RUNBOOKS.glob("Cowshed*.md"))
    return [Query(page.stem, line) for page in pages for line in blocks(page, "promql")]


def names_in(expr: str) -> set[str]:
    """Return the metrics and recorded rules that a query names."""
    return {match[1] for match in NAME.finditer(expr)}


def selectors_in(expr: str) -> Iterator[tuple[str, str]]:
    """Return each metric of a query with its selector."""
    for match in NAME.finditer(expr):
        yield match[1], (match[2] or "{}")[1:-1]
