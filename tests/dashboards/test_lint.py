# SPDX-License-Identifier: Apache-2.0
"""What dashboard-linter of Grafana asks for, and our own rules, on the generated JSON."""

import copy
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from board_files import boards, names_in, panels, selectors_in

BOARDS = boards()
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COUNTER = re.compile(r"_(total|bucket|count)$")
RANGES = {
    "rate": "$__rate_interval",
    "increase": "$__range",
    "changes": "$__range",
    "deriv": "5m",
}
Board = dict[str, Any]


def complaints(board: Board) -> list[str]:
    """Everything that is wrong with a dashboard, a line each."""
    checks = [of_board, of_variables, of_rows, of_layout]
    found = list(itertools.chain.from_iterable(check(board) for check in checks))
    for panel in panels(board):
        found += [f"{panel['title']}: {wrong}" for wrong in of_panel(panel)]
    return found


def of_board(board: Board) -> Iterator[str]:
    for key in ("uid", "title", "description", "refresh"):
        if not board.get(key):
            yield f"no {key}"
    if board.get("editable") is not False:
        yield "can be edited in Grafana, where the change would be lost"
    if board.get("tags") != ["cowshed"]:
        yield "not tagged cowshed, so other dashboards do not link to it"
    for key in ("id", "title"):
        counts = Counter(panel[key] for panel in board["panels"])
        yield from (f"{nr} panels with {key} {value}" for value, nr in counts.items() if nr > 1)


def of_variables(board: Board) -> Iterator[str]:
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    if list(variables)[:3] != ["datasource", "job", "instance"]:
        yield "variables do not begin with datasource, job, instance"
    for name, variable in variables.items():
        if not variable.get("label"):
            yield f"${name}: no label"
        if name == "datasource":
            if (variable["type"], variable["query"]) != ("datasource", "prometheus"):
                yield "$datasource: not a choice of Prometheus data sources"
            continue
        query = variable["query"]["query"]
        if variable["datasource"] != DATASOURCE:
            yield f"${name}: does not ask $datasource"
        if not (variable["multi"] and variable["includeAll"] and variable["allValue"] == ".+"):
            yield f"${name}: cannot be several, or all by .+"
        if not re.fullmatch(rf"label_values\(cowshed_.*, {name}\)", query):
            yield f"${name}: is not the label's values: {query}"
        if name != "job" and 'job=~"$job"' not in query:
            yield f"${name}: not narrowed by $job"


def of_rows(board: Board) -> Iterator[str]:
    if board["panels"][0]["type"] != "row":
        yield "begins with a panel outside any row"
    for panel, following in itertools.pairwise([*board["panels"], {"type": "row"}]):
        if panel["type"] != "row":
            continue
        if not panel["title"].endswith("?"):
            yield f"row {panel['title']!r} is no question"
        if following["type"] == "row":
            yield f"row {panel['title']!r} has no answer"


def of_layout(board: Board) -> Iterator[str]:
    """Panels fill Grafana's 24 columns line by line, in order, without gaps or overlaps."""
    y = 0
    line: list[dict[str, int]] = []
    for panel in board["panels"]:
        grid = panel["gridPos"]
        if sum(place["w"] for place in line) == 24:
            y += line[0]["h"]
            line = []
        expected = {"x": sum(place["w"] for place in line), "y": y}
        if {"x": grid["x"], "y": grid["y"]} != expected:
            yield f"{panel['title']}: at {grid['x']}, {grid['y']} instead of {expected}"
        if line and grid["h"] != line[0]["h"]:
            yield f"{panel['title']}: not as high as the panel beside it"
        line.append(grid)
    if sum(place["w"] for place in line) != 24:
        yield "the last line is not full"


def of_panel(panel: dict[str, Any]) -> Iterator[str]:
    if not panel.get("description", "").endswith("."):
        yield "no description"
    if not panel["fieldConfig"]["defaults"].get("unit"):
        yield "no unit"
    if panel["datasource"] != DATASOURCE:
        yield "does not ask $datasource"
    targets = panel.get("targets", [])
    if not targets:
        yield "no query"
    if len({target["refId"] for target in targets}) != len(targets):
        yield "two queries of one refId"
    for target in targets:
        if target["datasource"] != DATASOURCE:
            yield f"{target['refId']} does not ask $datasource"
        if panel["type"] in ("timeseries", "bargauge") and not target["legendFormat"]:
            yield f"{target['refId']} has no legend"
        yield from of_expr(target["expr"])
        yield from of_labels(target["expr"], target["legendFormat"])


def of_expr(expr: str) -> Iterator[str]:
    if not names_in(expr):
        yield f"asks for no metric: {expr}"
    for name, matchers in selectors_in(expr):
        if 'job=~"$job"' not in matchers or 'instance=~"$instance' not in matchers:
            yield f"{name} is not narrowed by $job and $instance"
    called = re.findall(r"(\w+)\(([a-z_]+)\{[^}]*\}\[([^]]*)\]\)", expr)
    for function, name, time_range in called:
        if time_range != RANGES.get(function):
            yield f"{function} over {time_range}: use {RANGES.get(function)}"
        if bool(COUNTER.search(name)) != (function in ("rate", "increase")):
            yield f"{function} of {name}"
    raw = Counter(name for name, _ in selectors_in(expr) if COUNTER.search(name))
    if raw != Counter(name for _, name, _ in called if COUNTER.search(name)):
        yield f"a counter as such, which starts again at 0 with the backend: {expr}"


def of_labels(expr: str, legend: str) -> Iterator[str]:
    """Names of images are unique within a domain only."""
    for labels in re.findall(r"by \(([^)]*)\)", expr):
        if "image" in labels.split(", ") and "domain" not in labels.split(", "):
            yield f"by ({labels}) adds up images of several domains"
    if "{{image}}" in legend and "{{domain}}/{{image}}" not in legend:
        yield f"legend {legend} does not tell domains apart"


@pytest.mark.parametrize("name", BOARDS)
def test_dashboard_has_no_complaints(name: str) -> None:
    assert complaints(BOARDS[name]) == []


def test_dashboards_do_not_share_uids_or_titles() -> None:
    assert len({board["uid"] for board in BOARDS.values()}) == len(BOARDS) == 4
    assert len({board["title"] for board in BOARDS.values()}) == len(BOARDS)


def test_links_between_dashboards_lead_somewhere() -> None:
    uids = {board["uid"] for board in BOARDS.values()}
    linked = set(re.findall(r"/d/([\w-]+)", str(BOARDS)))
    assert linked == {"cowshed-image"} <= uids


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (["editable"], True, "can be edited"),
        (["panels", 1, "id"], 1, "2 panels with id 1"),
        (["panels", 0, "title"], "Health", "is no question"),
        (["panels", 1, "description"], "", "no description"),
        (["panels", 1, "fieldConfig", "defaults", "unit"], "", "no unit"),
        (["panels", 1, "datasource", "uid"], "prom", r"does not ask \$datasource"),
        (["panels", 1, "gridPos", "x"], 1, "at 1, 1 instead"),
        (["panels", 1, "gridPos", "h"], 5, "not as high"),
        (["panels", 1, "targets"], [], "no query"),
        (["panels", 1, "targets", 0, "datasource", "uid"], "prom", r"A does not ask"),
        (["panels", 1, "targets", 0, "expr"], "vector(0)", "asks for no metric"),
        (["panels", 1, "targets", 0, "expr"], "cowshed_guests", "cowshed_guests is not narrowed"),
        (["templating", "list", 1, "allValue"], ".*", r"\$job: cannot be several"),
        (["templating", "list", 2, "query", "query"], "label_values(x)", r"\$instance: is not"),
    ],
)
def test_lint_notices(path: list[Any], value: object, complaint: str) -> None:
    board = copy.deepcopy(BOARDS["overview"])
    place: Any = board
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert re.search(complaint, "\n".join(complaints(board)))


SCOPE = '{job=~"$job", instance=~"$instance"}'


@pytest.mark.parametrize(
    ("expr", "complaint"),
    [
        (f"sum(rate(cowshed_hits_total{SCOPE}[5m]))", "rate over 5m"),
        (f"sum(rate(cowshed_guests{SCOPE}[$__rate_interval]))", "rate of cowshed_guests"),
        (f"sum(deriv(cowshed_hits_total{SCOPE}[5m]))", "deriv of cowshed_hits_total"),
        (f"sum(cowshed_hits_total{SCOPE})", "a counter as such"),
        ("rate(cowshed_hits_total[$__rate_interval])", "is not narrowed"),
    ],
)
def test_lint_notices_in_queries(expr: str, complaint: str) -> None:
    assert any(complaint in wrong for wrong in of_expr(expr))


def test_lint_notices_images_without_their_domain() -> None:
    assert list(of_labels("sum by (instance, image) (x)", "{{image}}")) == [
        "by (instance, image) adds up images of several domains",
        "legend {{image}} does not tell domains apart",
    ]
    assert list(of_labels("sum by (domain, image) (x)", "{{domain}}/{{image}}")) == []
