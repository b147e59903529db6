# SPDX-License-Identifier: Apache-2.0
"""The compose file of the examples names what is there: configuration, rules, dashboards."""

from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/monitoring.compose.yaml"


@pytest.fixture
def services() -> dict[str, Any]:
    services = yaml.safe_load(EXAMPLE.read_text())["services"]
    assert isinstance(services, dict)
    return services


def on_host(service: dict[str, Any], inside: str) -> Path:
    """Where a path of the container's comes from."""
    for volume in service["volumes"]:
        source, target = volume.split(":")[:2]
        if source.startswith(".") and PurePosixPath(inside).is_relative_to(target):
            return EXAMPLE.parent / source / PurePosixPath(inside).relative_to(target)
    raise AssertionError(f"{inside} is mounted from nowhere")


def test_prometheus_finds_its_configuration_and_rules(services: dict[str, Any]) -> None:
    (config,) = [
        word.removeprefix("--config.file=")
        for word in services["prometheus"]["command"]
        if word.startswith("--config.file=")
    ]
    path = on_host(services["prometheus"], config)
    for pattern in yaml.safe_load(path.read_text())["rule_files"]:
        assert list(path.parent.glob(pattern))


def test_grafana_finds_its_provisioning_and_dashboards(services: dict[str, Any]) -> None:
    environment = services["grafana"]["environment"]
    provisioning = on_host(services["grafana"], environment["GF_PATHS_PROVISIONING"])
    assert sorted(path.name for path in provisioning.iterdir()) == ["dashboards", "datasources"]
    assert list(on_host(services["grafana"], environment["COWSHED_DASHBOARDS"]).glob("*.json"))
    (source,) = yaml.safe_load((provisioning / "datasources/cowshed.yaml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://localhost:9090", "Prometheus is on the host's network too"


def test_every_image_is_pinned_and_every_mount_is_read_only_or_named(
    services: dict[str, Any],
) -> None:
    for service in services.values():
        assert service["image"].rpartition(":")[2] != "latest"
        assert service["network_mode"] == "host"
        for volume in service["volumes"]:
            source, _, mode = (*volume.split(":"), "")[:3]
            assert not source.startswith(".") or mode == "ro"
