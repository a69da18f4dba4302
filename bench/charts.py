"""Charts as SVG, by pygal. Pure: figures in, a document out, the same for the same figures.

They stand in documents that are shown dark on light or light on dark: no background, and colours that both bear.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from bench.latency import Latencies, duration

_GREY: Final = "#808080"
_FAINT: Final = "rgba(128, 128, 128, 0.4)"
_COLOURS: Final = ("#2f81d6", "#d9480f", "#2b9a4b", "#9256d9", "#c99a06", "#0f9ba8", "#d6457f", "#7a7a7a")
#: What the percentile chart marks; its axis counts nines, so that the tail has as much room as the rest.
_MARKS: Final = (0.0, 50.0, 90.0, 99.0, 99.9)
_STEPS: Final = (0, 10, 20, 30, 40, 50, 60, 70, 80, 85, 90, 93, 95, 97, 98, 99, 99.3, 99.5, 99.7, 99.8, 99.9)

Points = list[tuple[float, float]]


def latency_percentiles(title: str, latencies: Mapping[str, Latencies]) -> str:
    """One line for each server: so many percent of its requests took at most this long."""

    def nines(percentile: float) -> float:
        return -math.log10(1 - percentile / 100)

    points = {
        name: [(nines(step), latency_us) for step in _STEPS if (latency_us := each.percentile_us(step)) is not None]
        for name, each in latencies.items()
    }
    marks = {f"{mark:g} %": nines(mark) for mark in _MARKS}
    return lines(title, "percentile", points, marks, duration, dots=False)


def rate_by_depth(title: str, rates: Mapping[str, Mapping[int, float | None]]) -> str:
    """One line for each server."""
    points = {
        name: [(math.log2(depth), rate) for depth, rate in by_depth.items() if rate] for name, by_depth in rates.items()
    }
    depths = sorted({depth for by_depth in rates.values() for depth in by_depth})
    return lines(title, "depth", points, {str(depth): math.log2(depth) for depth in depths}, "{:,.0f}".format)


def lines(
    title: str, x_title: str, points: Mapping[str, Points], marks: Mapping[str, float], label: Any, *, dots: bool = True
) -> str:
    """Lines through points; the vertical axis is logarithmic (pygal's own way of that takes the other one along)."""
    import pygal
    from pygal.style import Style

    style = Style(
        background="transparent",
        plot_background="transparent",
        foreground=_GREY,
        foreground_strong=_GREY,
        foreground_subtle=_FAINT,
        guide_stroke_color=_FAINT,
        major_guide_stroke_color=_FAINT,
        colors=_COLOURS,
        font_family="sans-serif",
        opacity="1",
        opacity_hover="1",
    )
    chart = pygal.XY(
        style=style,
        js=[],
        width=900,
        height=440,
        title=title,
        x_title=x_title,
        x_labels=[{"label": text, "value": value} for text, value in marks.items()],
        y_labels=[{"label": label(value), "value": math.log10(value)} for value in _ticks(points.values())],
        show_x_guides=True,
        show_dots=dots,
        dots_size=3,
        stroke_style={"width": 2},
        truncate_legend=-1,
    )
    for name, line in points.items():
        chart.add(name, [(x, math.log10(y)) for x, y in line])
    chart.uuid = "bench"  # pygal's is another one each time
    text: str = chart.render(is_unicode=True, disable_xml_declaration=True)
    # Of the day it was made, and of scripts that nobody runs in a picture.
    text = re.sub(r"\s*<!--.*?-->", "", text, flags=re.DOTALL)
    return re.sub(r"\s*<script.*?</script>", "", text, flags=re.DOTALL).rstrip() + "\n"


def _ticks(lines: Iterable[Points]) -> list[float]:
    """1, 2, 5, 10, … around all values."""
    values = [y for points in lines for _, y in points]
    if not values:
        return [1.0]
    ticks = [digit * 10.0**power for power in range(-3, 10) for digit in (1, 2, 5)]
    first = max((tick for tick in ticks if tick <= min(values)), default=ticks[0])
    last = min((tick for tick in ticks if tick >= max(values)), default=ticks[-1])
    return [tick for tick in ticks if first <= tick <= last]
