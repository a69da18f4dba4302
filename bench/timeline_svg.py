"""A picture of who answered when, as SVG: one panel for each scenario, two lanes for each product. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

from tests.hosts.timeline import Span

_WIDTH, _LEFT, _RIGHT = 1000, 190, 20
_LANE, _GAP, _TITLE, _AXIS = 12, 10, 26, 24
_COLOURS: Final = {"node1": "#2a6fb0", "node2": "#e08a1e"}
_BOTH: Final = "#c81e1e"
_TEXT: Final = 'font-family="sans-serif" font-size="11"'
_SMALL: Final = 'font-family="sans-serif" font-size="9"'
_STEPS_S: Final = (1, 2, 5, 10, 20, 30, 60)
_MOST_STEPS = 14


@dataclass(frozen=True)
class Strip:
    """One product in one scenario; all times in seconds since the start."""

    product: str
    #: Node → when it had the address.
    held: dict[str, list[Span]]
    #: When the client had no answer.
    unanswered: list[Span]
    #: When both had the address, by moments.
    both: list[float]
    #: What was done.
    marks: list[tuple[float, str]]
    length_s: float


def picture(panels: Sequence[tuple[str, Sequence[Strip]]]) -> str:
    """The document; panels are (title, strips)."""
    parts: list[str] = []
    top = 10.0
    for title, strips in panels:
        longest = max((strip.length_s for strip in strips), default=1.0)
        scale = (_WIDTH - _LEFT - _RIGHT) / longest
        parts.append(f'<text x="10" y="{top + 14:g}" {_TEXT} font-weight="bold">{escape(title)}</text>')
        top += _TITLE
        for strip in strips:
            parts += _strip(strip, top, scale)
            top += 3 * _LANE + _GAP
        parts += _axis(longest, top, scale)
        top += _AXIS + _GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top:g}" width="{_WIDTH}" height="{top:g}">'
    return "\n".join([head, f'<rect width="{_WIDTH}" height="{top:g}" fill="white"/>', *parts, "</svg>", ""])


def _strip(strip: Strip, top: float, scale: float) -> list[str]:
    parts = [f'<text x="10" y="{top + 10:g}" {_TEXT}>{escape(strip.product)}</text>']
    for number, (node, colour) in enumerate(_COLOURS.items()):
        lane = top + number * _LANE
        parts.append(f'<text x="{_LEFT - 6}" y="{lane + 9:g}" {_TEXT} text-anchor="end" fill="{colour}">{node}</text>')
        parts += [_bar(span, lane, scale, colour) for span in strip.held.get(node, ())]
    lane = top + 2 * _LANE
    parts.append(f'<text x="{_LEFT - 6}" y="{lane + 9:g}" {_TEXT} text-anchor="end" fill="#666">no answer</text>')
    parts += [_bar(span, lane, scale, "#999") for span in strip.unanswered]
    parts += [_bar(Span(moment, moment), top - 3, scale, _BOTH, 2 * _LANE + 4, "0.5") for moment in strip.both]
    for moment, text in strip.marks:
        x = _LEFT + moment * scale
        parts.append(f'<path d="M{x:.1f} {top - 4:g}v{3 * _LANE + 4}" stroke="black" stroke-dasharray="2 2"/>')
        parts.append(f'<text x="{x + 2:.1f}" y="{top - 3:g}" {_SMALL}>{escape(text)}</text>')
    return parts


def _bar(span: Span, lane: float, scale: float, colour: str, height: float = _LANE - 3, opacity: str = "1") -> str:
    x, width = _LEFT + span.begin * scale, max(span.length_s * scale, 0.8)
    return (
        f'<rect x="{x:.1f}" y="{lane + 1:g}" width="{width:.1f}" height="{height:g}" '
        f'fill="{colour}" opacity="{opacity}"/>'
    )


def _axis(longest: float, top: float, scale: float) -> list[str]:
    step = next((step for step in _STEPS_S if longest / step <= _MOST_STEPS), _STEPS_S[-1])
    parts = [f'<path d="M{_LEFT} {top:g}H{_WIDTH - _RIGHT}" stroke="#888"/>']
    for second in range(0, int(longest) + 1, step):
        x = _LEFT + second * scale
        parts.append(f'<path d="M{x:.1f} {top:g}v4" stroke="#888"/>')
        parts.append(f'<text x="{x:.1f}" y="{top + 15:g}" {_TEXT} text-anchor="middle">{second} s</text>')
    return parts
