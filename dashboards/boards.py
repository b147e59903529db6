# SPDX-License-Identifier: Apache-2.0
"""A dashboard: its variables, and rows of panels.

A row is one question and the panels that answer it, laid out in order, left to right, on Grafana's
24 columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models import dashboard as models

from dashboards.panels import DATASOURCE, Panel

__all__ = ["IMAGE_VARIABLES", "Row", "assemble", "variable"]

TAG: Final = "cowshed"


@dataclass(frozen=True)
class Row:
    """A question, and the panels that answer it."""

    question: str
    panels: Sequence[Panel]


def variable(name: str, label: str, metric: str) -> dashboard.QueryVariable:
    """A variable over the values of a label; multi-select, all by default."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(DATASOURCE)
        .query({"query": f"label_values({metric}, {name})", "refId": f"variable-{name}"})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".+")
        .current(models.VariableOption(text="All", value="$__all", selected=True))
    )


_INFO: Final = 'cowshed_image_info{job=~"$job", instance=~"$instance"'
# The domain comes first, since image names are unique only within one.
IMAGE_VARIABLES: Final = (
    variable("domain", "Domain", f"{_INFO}}}"),
    variable("image", "Image", f'{_INFO}, domain=~"$domain"}}'),
)


def assemble(
    name: str,
    about: str,
    rows: Sequence[Row],
    variables: Sequence[dashboard.QueryVariable] = (),
) -> dashboard.Dashboard:
    """The dashboard `cowshed / name`, for any backends; variables come after job and instance."""
    board = (
        dashboard.Dashboard(f"cowshed / {name}")
        .uid(f"cowshed-{name.lower()}")
        .description(about)
        .tags([TAG])
        .readonly()
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("cowshed dashboards")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
        .with_variable(variable("job", "Job", "cowshed_build_info"))
        .with_variable(variable("instance", "Instance", 'cowshed_build_info{job=~"$job"}'))
    )
    for extra in variables:
        board.with_variable(extra)
    panel_id = 0
    for row in rows:
        panel_id += 1
        board.with_row(dashboard.Row(row.question).id(panel_id))
        for panel in row.panels:
            panel_id += 1
            board.with_panel(panel.id(panel_id))
    return board
