"""Curves of mitigations as an SVG: gain kept over rise left."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 760, 430
LEFT, TOP, RIGHT, BOTTOM = 60, 40, 500, 380  # of the frame
X_RANGE, Y_RANGE = (-0.1, 1.3), (0.45, 1.12)  # what lies outside is drawn at the edge
# Colours that stay apart for readers who see fewer of them (Okabe and Ito 2008), twice.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def plot(
    title: str, curves: Mapping[str, Sequence[tuple[float, float]]], bound: tuple[float, float]
) -> str:
    """Returns the SVG.

    Args:
        title: of the plot.
        curves: {mitigation: (rise left, gain kept) at each strength}.
        bound: the corner (rise, gain) of the region that is asked for.
    """
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{html.escape(title)}: gain kept over rise left</title>",
        "<style>text { font: 12px sans-serif; fill: #333 } .axis { stroke: #bbb }</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT + 20}" y="22">{html.escape(title)}: the shaded corner is asked for</text>',
    ]
    corner, low = (x_of(bound[0]), y_of(bound[1])), (x_of(X_RANGE[0]), y_of(Y_RANGE[1]))
    parts.append(
        f'<rect x="{low[0]:.1f}" y="{low[1]:.1f}" width="{corner[0] - low[0]:.1f}" '
        f'height="{corner[1] - low[1]:.1f}" fill="#e3f2e1"/>'
    )
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = x_of(share)
        parts += [
            f'<line class="axis" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{BOTTOM}"/>',
            f'<text x="{x:.1f}" y="{BOTTOM + 16}" text-anchor="middle">{100 * share:.0f} %</text>',
        ]
    for share in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        y = y_of(share)
        parts += [
            f'<line class="axis" x1="{LEFT}" y1="{y:.1f}" x2="{RIGHT}" y2="{y:.1f}"/>',
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{100 * share:.0f} %</text>',
        ]
    parts += [
        f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 38}" text-anchor="middle">rise left</text>',
        f'<text x="{LEFT - 50}" y="{TOP - 4}">gain kept</text>',
    ]
    for number, (name, points) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        dashed = ' stroke-dasharray="5 3"' if number >= len(COLOURS) else ""
        places = [(x_of(rise), y_of(gain)) for rise, gain in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        style = f'fill="none" stroke="{colour}" stroke-width="1.8"{dashed}'
        y = TOP + 12 + 22 * number
        parts += [
            f'<polyline points="{line}" {style}/>',
            *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{colour}"/>' for x, y in places),
            f'<line x1="{RIGHT + 16}" y1="{y}" x2="{RIGHT + 44}" y2="{y}" {style}/>',
            f'<text x="{RIGHT + 50}" y="{y + 4}">{html.escape(name)}</text>',
        ]
    return "\n".join([*parts, "</svg>\n"])


def x_of(rise: float) -> float:
    """Returns where a share of the rise is drawn."""
    low, high = X_RANGE
    return LEFT + (min(max(rise, low), high) - low) / (high - low) * (RIGHT - LEFT)


def y_of(gain: float) -> float:
    """Returns where a share of the gain is drawn."""
    low, high = Y_RANGE
    return BOTTOM - (min(max(gain, low), high) - low) / (high - low) * (BOTTOM - TOP)
