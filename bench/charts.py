"""Charts as SVG, by pygal. Pure: figures in, a document out, the same for the same figures.

They stand in documents that are shown dark on light or light on dark: no background, and colours that both bear.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from bench.latency import Latencies

_GREY: Final = "#808080"
_COLOURS: Final = ("#2f81d6", "#d9480f", "#2b9a4b", "#9256d9", "#c99a06", "#0f9ba8", "#d6457f", "#7a7a7a")
#: What the percentile chart marks; its axis counts nines, so that the tail has as much room as the rest.
_MARKS: Final = (0.0, 50.0, 90.0, 99.0, 99.9)
_STEPS: Final = (0, 10, 20, 30, 40, 50, 60, 70, 80, 85, 90, 93, 95, 97, 98, 99, 99.3, 99.5, 99.7, 99.8, 99.9)


def latency_percentiles(title: str, latencies: Mapping[str, Latencies]) -> str:
    """One line for each server: so many percent of its requests took at most this long."""

    def place(percentile: float) -> float:
        return -math.log10(1 - percentile / 100)

    chart = _chart(
        "XY",
        title=title,
        x_title="percentile",
        y_title="µs",
        logarithmic=True,
        x_labels=[{"label": f"{mark:g} %", "value": place(mark)} for mark in _MARKS],
        show_dots=False,
    )
    for name, each in latencies.items():
        points = [(place(step), each.percentile_us(step)) for step in _STEPS]
        chart.add(name, [point for point in points if point[1]])
    return _render(chart)


def rate_by_depth(title: str, rates: Mapping[str, Mapping[int, float | None]]) -> str:
    """One line for each server."""
    depths = sorted({depth for by_depth in rates.values() for depth in by_depth})
    chart = _chart("Line", title=title, x_title="depth", logarithmic=True, x_labels=[str(depth) for depth in depths])
    for name, by_depth in rates.items():
        chart.add(name, [by_depth.get(depth) for depth in depths])
    return _render(chart)


def lines(title: str, x_title: str, y_title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Points (x, y), joined."""
    chart = _chart("XY", title=title, x_title=x_title, y_title=y_title)
    for name, points in series.items():
        chart.add(name, list(points))
    return _render(chart)


def _chart(kind: str, **settings: Any) -> Any:
    import pygal
    from pygal.style import Style

    style = Style(
        background="transparent",
        plot_background="transparent",
        foreground=_GREY,
        foreground_strong=_GREY,
        foreground_subtle=f"{_GREY}60",
        colors=_COLOURS,
        font_family="sans-serif",
        opacity="1",
        opacity_hover="1",
    )
    return getattr(pygal, kind)(
        style=style,
        js=[],
        no_prefix=True,
        width=900,
        height=480,
        legend_at_bottom=True,
        legend_at_bottom_columns=4,
        dots_size=3,
        stroke_style={"width": 2},
        truncate_legend=-1,
        **settings,
    )


def _render(chart: Any) -> str:
    text: str = chart.render(is_unicode=True, disable_xml_declaration=True, pretty_print=True)
    # Of the day it was made, and of scripts that nobody runs in a picture.
    text = re.sub(r"\s*<!--.*?-->", "", text, flags=re.DOTALL)
    return re.sub(r"\s*<script.*?</script>", "", text, flags=re.DOTALL).rstrip() + "\n"
