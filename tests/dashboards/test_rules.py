# SPDX-License-Identifier: Apache-2.0
"""Alert rules do what their tests say, and each has its page; operators' files are valid."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from board_files import DASHBOARDS, ROOT, RUNBOOKS, alerts, blocks, names_in, records, rules

from cowshed.service.cli import cli

ALERTS = alerts()
UNIT_TESTS = Path(__file__).parent / "rules"
HEADINGS = [
    "What it means",
    "Look",
    "Do",
    "What if I evict, drain or raise a quota?",
]


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["promtool", *map(str, arguments)],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_prometheus_takes_the_configuration_and_its_rules() -> None:
    done = promtool("check", "config", DASHBOARDS / "prometheus.yml")
    assert done.returncode == 0, done.stderr
    assert "2 rule files found" in done.stdout


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_does_what_its_unit_tests_say(alert: str) -> None:
    done = promtool("test", "rules", UNIT_TESTS / f"{alert}.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_recorded_rules_are_what_their_unit_tests_say() -> None:
    path = UNIT_TESTS / "records.yaml"
    done = promtool("test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr
    (case,) = yaml.safe_load(path.read_text())["tests"]
    asked = set().union(*(names_in(look["expr"]) for look in case["promql_expr_test"]))
    assert asked == set(records())


@pytest.mark.parametrize("alert", ALERTS)
def test_unit_tests_of_alert_see_it_fire_recover_and_stay_quiet(alert: str) -> None:
    cases = yaml.safe_load((UNIT_TESTS / f"{alert}.yaml").read_text())["tests"]
    fired = {}
    for case in cases:
        looks = case["alert_rule_test"]
        assert {look["alertname"] for look in looks} == {alert}
        fired[case["name"]] = [bool(look["exp_alerts"]) for look in looks]
    assert any(True in seen for seen in fired.values())
    assert any(False in seen[seen.index(True) :] for seen in fired.values() if True in seen)
    assert any(True not in seen and name.startswith("does not") for name, seen in fired.items())


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_says_how_bad_it_is_and_where_to_read_on(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    page = ROOT / rule["annotations"]["runbook_url"]
    assert page == RUNBOOKS / f"{alert}.md"
    text = page.read_text()
    assert text.startswith(f"# {alert}\n\nSeverity: {rule['labels']['severity']}.\n")
    assert re.findall("^## (.*)", text, re.MULTILINE) == HEADINGS
    assert all(text.split(f"## {heading}\n")[1].split("\n## ")[0].strip() for heading in HEADINGS)
    assert blocks(page, "sh")
    assert blocks(page, "promql")


def test_every_page_and_unit_test_has_its_alert() -> None:
    assert {page.stem for page in RUNBOOKS.glob("Cowshed*.md")} == set(ALERTS)
    assert {path.stem for path in UNIT_TESTS.iterdir()} == {*ALERTS, "records"}
    index = (RUNBOOKS / "README.md").read_text()
    lines = {(alert, f"({alert}.md)", rule["labels"]["severity"]) for alert, rule in ALERTS.items()}
    assert set(re.findall(r"\| \[(\w+)\](\(\w+\.md\)) \| (\w+) \|", index)) == lines


@pytest.mark.parametrize("page", sorted(RUNBOOKS.glob("*.md")), ids=lambda page: page.stem)
def test_links_and_commands_of_a_page_exist(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / link).exists()
    # `drain` is spoken of as what later versions have.
    said = set(re.findall(r"`cowshed ([a-z]+)", text)) - {"drain"}
    said |= {line.split()[1] for line in blocks(page, "sh") if line.startswith("cowshed ")}
    assert said <= set(cli.commands)


def test_rules_ask_only_for_recorded_rules_that_exist() -> None:
    asked = {name for rule in rules() for name in names_in(rule["expr"]) if ":" in name}
    assert asked <= set(records())


def test_rules_keep_labels_that_dashboards_choose_by() -> None:
    for rule in rules():
        for group in re.findall(r"by \(([^)]*)\)", rule["expr"]):
            labels = set(group.split(", "))
            assert {"job", "instance"} <= labels, rule
            assert ("image" in labels) == ("domain" in labels), rule


def test_grafana_is_told_where_everything_is() -> None:
    (path,) = (DASHBOARDS / "provisioning/datasources").iterdir()
    (source,) = yaml.safe_load(path.read_text())["datasources"]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    prometheus = yaml.safe_load((DASHBOARDS / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    (path,) = (DASHBOARDS / "provisioning/dashboards").iterdir()
    (provider,) = yaml.safe_load(path.read_text())["providers"]
    assert (provider["type"], provider["allowUiUpdates"]) == ("file", False)
    variable = provider["options"]["path"].removeprefix("$")
    guide = (ROOT / "docs/dashboards.md").read_text()
    assert f"{variable}=$PWD/dashboards/generated" in guide
    assert "GF_PATHS_PROVISIONING=$PWD/dashboards/provisioning" in guide


def test_guide_starts_the_backend_where_prometheus_looks_for_it() -> None:
    prometheus = yaml.safe_load((DASHBOARDS / "prometheus.yml").read_text())
    (scrape,) = prometheus["scrape_configs"]
    assert f'up{{job="{scrape["job_name"]}"}}' in ALERTS["CowshedBackendDown"]["expr"]
    ((target,),) = [each["targets"] for each in scrape["static_configs"]]
    assert f"--metrics {target}" in (ROOT / "docs/dashboards.md").read_text()
