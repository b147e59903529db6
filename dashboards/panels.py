# SPDX-License-Identifier: Apache-2.0
"""The kinds of panels that dashboards are made of, styled in one place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    table,
    timeseries,
)
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models import prometheus as query_models

__all__ = [
    "DATASOURCE",
    "Column",
    "Panel",
    "bars",
    "figure",
    "graph",
    "heat",
    "listing",
    "state",
]

Panel = timeseries.Panel | stat.Panel | table.Panel | heatmap.Panel | bargauge.Panel

DATASOURCE: Final = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
GREEN, YELLOW, RED, BLUE = "green", "yellow", "red", "blue"


@dataclass(frozen=True)
class Column:
    """A column of figures in a listing: its head, its query and its unit."""

    head: str
    expr: str
    unit: str


def _query(expr: str, legend: str, ref_id: str) -> prometheus.Dataquery:
    return (
        prometheus.Dataquery()
        .expr(expr)
        .legend_format(legend)
        .ref_id(ref_id)
        .datasource(DATASOURCE)
        .editor_mode(query_models.QueryEditorMode.CODE)
    )


def _ref_id(number: int) -> str:
    return chr(ord("A") + number)


def _thresholds(
    warn: float | None, bad: float | None, base: str = GREEN
) -> dashboard.ThresholdsConfig:
    steps = [models.Threshold(value=None, color=base)]
    if warn is not None:
        steps.append(models.Threshold(value=warn, color=YELLOW))
    if bad is not None:
        steps.append(models.Threshold(value=bad, color=RED))
    mode = models.ThresholdsMode.ABSOLUTE
    return dashboard.ThresholdsConfig().mode(mode).steps(steps)


def figure(
    title: str,
    about: str,
    unit: str,
    expr: str,
    *,
    span: int = 4,
    warn: float | None = None,
    bad: float | None = None,
) -> stat.Panel:
    """One number: yellow from warn on, red from bad on; blue if neither is given."""
    plain = warn is None and bad is None
    return (
        stat.Panel()
        .title(title)
        .description(about)
        .datasource(DATASOURCE)
        .unit(unit)
        .span(span)
        .height(4)
        .no_value("none")
        .thresholds(_thresholds(warn, bad, BLUE if plain else GREEN))
        .color_mode(shapes.BigValueColorMode.VALUE)
        .graph_mode(shapes.BigValueGraphMode.AREA)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(_query(expr, "", "A"))
    )


def state(
    title: str, about: str, expr: str, legend: str, states: Mapping[str, str], *, span: int
) -> stat.Panel:
    """A word for each series: value N shows the Nth of states, which maps words to colours."""
    mapping = models.ValueMap(
        options={
            str(value): models.ValueMappingResult(text=word, color=colour, index=value)
            for value, (word, colour) in enumerate(states.items())
        }
    )
    return (
        stat.Panel()
        .title(title)
        .description(about)
        .datasource(DATASOURCE)
        .unit("none")
        .span(span)
        .height(4)
        .no_value("none")
        .mappings([mapping])
        .color_mode(shapes.BigValueColorMode.VALUE)
        .graph_mode(shapes.BigValueGraphMode.NONE)
        .thresholds(_thresholds(None, None, BLUE))
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(_query(expr, legend, "A").instant())
    )


def graph(
    title: str,
    about: str,
    unit: str,
    queries: Mapping[str, str],
    *,
    span: int = 12,
    height: int = 8,
    stacked: bool = False,
    most: float | None = None,
) -> timeseries.Panel:
    """Lines over time, one query per legend; most is the top of the axis."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(about)
        .datasource(DATASOURCE)
        .unit(unit)
        .span(span)
        .height(height)
        .min(0)
        .line_width(1)
        .fill_opacity(30 if stacked else 10)
        .show_points(shapes.VisibilityMode.NEVER)
        .tooltip(
            common.VizTooltipOptions()
            .mode(shapes.TooltipDisplayMode.MULTI)
            .sort(shapes.SortOrder.DESCENDING)
        )
        .legend(
            common.VizLegendOptions()
            .display_mode(shapes.LegendDisplayMode.LIST)
            .placement(shapes.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
    )
    if stacked:
        panel.stacking(common.StackingConfig().mode(shapes.StackingMode.NORMAL))
    if most is not None:
        panel.max(most)
    for number, (legend, expr) in enumerate(queries.items()):
        panel.with_target(_query(expr, legend, _ref_id(number)))
    return panel


def bars(
    title: str,
    about: str,
    unit: str,
    expr: str,
    legend: str,
    *,
    span: int = 12,
    most: float | None = None,
    warn: float | None = None,
    bad: float | None = None,
) -> bargauge.Panel:
    """A bar for each series, as it is now."""
    panel = (
        bargauge.Panel()
        .title(title)
        .description(about)
        .datasource(DATASOURCE)
        .unit(unit)
        .span(span)
        .height(8)
        .min(0)
        .orientation(shapes.VizOrientation.HORIZONTAL)
        .display_mode(shapes.BarGaugeDisplayMode.BASIC)
        .thresholds(_thresholds(warn, bad))
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(_query(expr, legend, "A").instant())
    )
    return panel if most is None else panel.max(most)


def heat(title: str, about: str, unit: str, expr: str, *, span: int = 12) -> heatmap.Panel:
    """A histogram over time; expr returns its buckets by le."""
    return (
        heatmap.Panel()
        .title(title)
        .description(about)
        .datasource(DATASOURCE)
        .unit("short")
        .span(span)
        .height(8)
        .calculate(False)
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .color(
            heatmap.HeatmapColorOptions()
            .mode(heatmap_models.HeatmapColorMode.SCHEME)
            .scheme("Oranges")
            .steps(64)
        )
        .with_target(_query(expr, "{{le}}", "A").format(query_models.PromQueryFormat.HEATMAP))
    )


def listing(
    title: str,
    about: str,
    columns: Sequence[Column],
    *,
    span: int = 24,
    hide: Sequence[str] = (),
    link: tuple[str, str, str] | None = None,
) -> table.Panel:
    """A line for each set of labels, with columns of figures; hide names labels to leave out.

    All queries must return the same labels. link is (label, title, URL): links that label's cells.
    """
    panel = (
        table.Panel()
        .title(title)
        .description(about)
        .datasource(DATASOURCE)
        .unit("short")
        .span(span)
        .height(7)
        .no_value("nothing to show")
        .with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(
            models.DataTransformerConfig(
                id_val="organize", options={"excludeByName": dict.fromkeys(["Time", *hide], True)}
            )
        )
    )
    for number, column in enumerate(columns):
        ref_id = _ref_id(number)
        query = _query(column.expr, "", ref_id).instant()
        panel.with_target(query.format(query_models.PromQueryFormat.TABLE))
        panel.override_by_name(
            "Value" if len(columns) == 1 else f"Value #{ref_id}",
            [
                models.DynamicConfigValue(id_val="displayName", value=column.head),
                models.DynamicConfigValue(id_val="unit", value=column.unit),
            ],
        )
    if link is not None:
        label, link_title, url = link
        links = [{"title": link_title, "url": url}]
        panel.override_by_name(label, [models.DynamicConfigValue(id_val="links", value=links)])
    return panel
