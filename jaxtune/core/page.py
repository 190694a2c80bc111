"""Self-contained HTML pages: no script, no network, readable on a phone, light and dark."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence


class Markup(str):
    """Text that is markup already; everything else is escaped."""

    __slots__ = ()


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5d6570; --paper: #fff; --line: #dfe3e8;
  --block: #f5f7f9; --accent: #2563a8; --error: #b3261e; --warning: #8a5a00; --info: #2563a8;
  --c0: #2563a8; --c1: #b8520a; --c2: #1b7f5c; --c3: #8e3b8a; --c4: #8a6d00; --c5: #0b7fab;
  --c6: #a02c4b; --c7: #4a5058; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #9aa3ad; --paper: #15181b;
  --line: #31363c; --block: #1e2226; --accent: #7db2ee; --error: #ff8a80; --warning: #f0be62;
  --info: #7db2ee; --c0: #7db2ee; --c1: #f2a061; --c2: #5fcf9f; --c3: #d893d6; --c4: #e0c25a;
  --c5: #6fd0f0; --c6: #f090a8; --c7: #b4bbc3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; padding-top: .6rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); font-size: .9rem; }
code, pre { font-family: ui-monospace, monospace; font-size: .85em; }
pre { white-space: pre-wrap; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: normal; }
th { color: var(--soft); font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; } td code { overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr));
  gap: .6rem; margin: .8rem 0; }
.card { background: var(--block); border-radius: .5rem; padding: .6rem .8rem; }
.card b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .85rem; }
details { background: var(--block); border-radius: .5rem; padding: .5rem .8rem; margin: .5rem 0; }
summary { cursor: pointer; } summary b { margin: 0 .4rem; }
blockquote { margin: .4rem 0; padding-left: .7rem; border-left: 3px solid var(--line);
  font-size: .88rem; }
.error { color: var(--error); } .warning { color: var(--warning); } .info { color: var(--info); }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem;
  margin: .4rem 0 1.4rem; }
.beside > div { background: var(--block); border-radius: .5rem; padding: .4rem .7rem;
  font-size: .9rem; white-space: pre-wrap; }
.beside b { display: block; color: var(--soft); font-size: .85rem; }
svg { display: block; width: 100%; height: auto; max-width: 40rem; }
svg text { fill: var(--soft); font: 13px system-ui, sans-serif; paint-order: stroke;
  stroke: var(--paper); stroke-width: 4px; }
/* Drawings are scaled down to a phone's width, and their words must not be. */
@media (max-width: 40rem) { svg text { font-size: 21px; } }
svg .bar { fill: var(--accent); } svg .axis { stroke: var(--line); }
svg .curve { fill: none; stroke: currentColor; stroke-width: 1.8; }
svg .faint { opacity: .35; }
svg .mark { stroke: var(--error); stroke-dasharray: 4 3; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.c6 { color: var(--c6); } .c7 { color: var(--c7); } .others { color: var(--line); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .9rem; }
.legend span::before { content: ""; display: inline-block; width: 1.2em; height: .2em;
  margin-right: .4em; vertical-align: middle; background: currentColor; }
.legend .others { color: var(--soft); }
"""
COLOURS = 8  # of curves


def text(value: object) -> Markup:
    """Returns a value as text of a page, escaped; markup stays as it is.

    >>> text("a < b")
    'a &lt; b'
    """
    return value if isinstance(value, Markup) else Markup(html.escape(str(value), quote=True))


def without_directories(words: str) -> str:
    """Leaves the directories of paths out, for a narrow place.

    >>> without_directories("as data/train.jsonl:3")
    'as train.jsonl:3'
    """
    return " ".join(word.rpartition("/")[2] if "/" in word else word for word in words.split(" "))


def join(parts: Iterable[Markup]) -> Markup:
    """Returns parts of a page one after the other."""
    return Markup("\n".join(parts))


def element(tag: str, *content: Markup, css: str = "") -> Markup:
    """Returns an element with the given class.

    >>> element("p", text("one"), css="soft")
    '<p class="soft">one</p>'
    """
    name = f' class="{html.escape(css, quote=True)}"' if css else ""
    return Markup(f"<{tag}{name}>{''.join(content)}</{tag}>")


def heading(words: str, level: int = 2) -> Markup:
    """Returns a heading."""
    return element(f"h{level}", text(words))


def paragraph(words: str, *, soft: bool = False) -> Markup:
    """Returns a paragraph; soft ones stand back."""
    return element("p", text(words), css="soft" if soft else "")


def cards(figures: Sequence[tuple[str, str]]) -> Markup:
    """Returns (name, value) figures as cards that flow."""
    made = [
        element("div", element("b", text(value)), element("span", text(name)), css="card")
        for name, value in figures
    ]
    return element("div", *made, css="cards")


def table(
    header: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[int] = ()
) -> Markup:
    """Returns a table that scrolls sideways where the screen is narrow.

    Args:
        header: names of columns.
        rows: cells; Markup stays as it is, all else is escaped.
        numbers: columns that hold numbers, which stand to the right.
    """

    def cell(tag: str, at: int, value: object) -> Markup:
        return element(tag, text(value), css="number" if at in numbers else "")

    head = element("tr", *(cell("th", i, name) for i, name in enumerate(header)))
    body = [element("tr", *(cell("td", i, v) for i, v in enumerate(row))) for row in rows]
    inner = element("table", element("thead", head), element("tbody", *body))
    return element("div", inner, css="scroll")


def folded(summary: Markup, *content: Markup, opened: bool = False) -> Markup:
    """Returns a part that opens at a click."""
    inner = "".join([element("summary", summary), *content])
    return Markup(f"<details{' open' if opened else ''}>{inner}</details>")


def beside(parts: Sequence[tuple[str, str]]) -> Markup:
    """Returns (title, text) blocks side by side; below each other where there is no room."""
    made = [element("div", element("b", text(name)), text(words)) for name, words in parts]
    return element("div", *made, css="beside")


def histogram(
    edges: Sequence[float], counts: Sequence[int], label: str, mark: float | None = None
) -> Markup:
    """Returns bars as SVG.

    Args:
        edges: [bins + 1] borders of the bins.
        counts: [bins].
        label: what is counted, for those who cannot see it.
        mark: a place to mark with a line, if it is within the edges.
    """
    width, height, base = 600, 154, 130
    most, span = max(max(counts), 1), edges[-1] - edges[0]
    bars = []
    for at, count in enumerate(counts):
        left = (edges[at] - edges[0]) / span * width
        wide = (edges[at + 1] - edges[at]) / span * width
        tall = count / most * (base - 24)
        bars.append(
            f'<rect class="bar" x="{left + 0.5:.1f}" y="{base - tall:.1f}" '
            f'width="{max(wide - 1, 0.5):.1f}" height="{tall:.1f}">'
            f"<title>{edges[at]:,} to {edges[at + 1] - 1:,}: {count:,}</title></rect>"
        )
    if mark is not None and edges[0] <= mark <= edges[-1]:
        x = (mark - edges[0]) / span * width
        bars.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{base}"/>')
    ends = (
        f'<text x="0" y="{height - 4}">{edges[0]:,}</text>'
        f'<text x="{width}" y="{height - 4}" text-anchor="end">{edges[-1]:,}</text>'
        f'<text x="0" y="18">{most:,}</text>'
    )
    return _svg(width, height, base, label, [*bars, ends])


def lines(curves: Sequence[tuple[str, Sequence[float], Sequence[float]]], label: str) -> Markup:
    """Returns curves (name, x, y) as SVG, on common axes; `legend` says which is which.

    Raises:
        ValueError: there is no point.
    """
    width, height, base, top = 600, 224, 200, 26
    xs = [x for _, px, _ in curves for x in px]
    ys = [y for _, _, py in curves for y in py]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    wide, tall = (x1 - x0) or 1.0, (y1 - y0) or 1.0
    parts = []
    for at, (name, px, py) in enumerate(curves):
        points = " ".join(
            f"{(x - x0) / wide * width:.1f},{base - (y - y0) / tall * (base - top):.1f}"
            for x, y in zip(px, py, strict=True)
        )
        title = f"<title>{text(name)}</title>"
        parts.append(f'<polyline class="curve {_colour(at)}" points="{points}">{title}</polyline>')
    parts.reverse()  # so that the first lies over the others
    parts.append(
        f'<text x="0" y="{height - 4}">{x0:g}</text>'
        f'<text x="{width}" y="{height - 4}" text-anchor="end">{x1:g}</text>'
        f'<text x="0" y="18">{y1:.4g}</text><text x="0" y="{base - 4}">{y0:.4g}</text>'
    )
    return _svg(width, height, base, label, parts)


def legend(names: Sequence[str]) -> Markup:
    """Returns the names of curves in the colours that `lines` gives them."""
    shown = [
        element("span", text(name), css=_colour(at)) for at, name in enumerate(names[:COLOURS])
    ]
    if len(names) > COLOURS:
        shown.append(element("span", text("others"), css=_colour(COLOURS)))
    return element("p", *shown, css="legend")


def _colour(at: int) -> str:
    return f"c{at}" if at < COLOURS else "others"


def parallel(axes: Sequence[tuple[str, Sequence[tuple[float, str]]]], label: str) -> Markup:
    """Returns parallel coordinates as SVG: a line for each item over all axes.

    Args:
        axes: (name, (height in 0..1, label) of each item); the first item is drawn strongest.
        label: what is shown, for those who cannot see it.
    """
    width, height, base, top, row = 600, 260, 205, 26, 24
    step = (width - 140) / max(len(axes) - 1, 1)  # room for the last axis' labels
    xs = [40 + number * step for number in range(len(axes))]
    parts, words = [], []
    for number, (x, (name, items)) in enumerate(zip(xs, axes, strict=True)):
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{base}"/>')
        below = base + row * (1 + number % 2)  # names side by side need room
        words.append(
            f'<text x="{x:.1f}" y="{below}" text-anchor="middle">{text(name.rpartition(".")[2])}'
            f"<title>{text(name)}</title></text>"
        )
        for place, word in apart(dict(items), row / (base - top)):
            y = base - place * (base - top)
            words.append(f'<text x="{x + 4:.1f}" y="{y - 2:.1f}">{text(word)}</text>')
    for item in reversed(range(len(axes[0][1]))):
        points = " ".join(
            f"{x:.1f},{base - items[item][0] * (base - top):.1f}"
            for x, (_, items) in zip(xs, axes, strict=True)
        )
        css = "curve c0" if item == 0 else "curve c0 faint"
        parts.append(f'<polyline class="{css}" points="{points}"/>')
    return _svg(width, height, base, label, parts + words)


def apart(labels: Mapping[float, str], least: float) -> list[tuple[float, str]]:
    """Returns the (place, label) of an axis that leave each other room; both ends always do.

    >>> apart({0.0: "1", 0.05: "1.1", 0.5: "2", 0.97: "2.9", 1.0: "3"}, 0.1)
    [(0.0, '1'), (1.0, '3'), (0.5, '2')]
    """
    kept: list[tuple[float, str]] = []
    for place in sorted(labels, key=lambda at: (at not in (min(labels), max(labels)), at)):
        if all(abs(place - other) >= least for other, _ in kept):
            kept.append((place, labels[place]))
    return kept


def _svg(width: int, height: int, base: int, label: str, parts: Sequence[str]) -> Markup:
    axis = f'<line class="axis" x1="0" x2="{width}" y1="{base}" y2="{base}"/>'
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{text(label)}">'
        f"{axis}{''.join(parts)}</svg>"
    )


def page(title: str, *content: Markup) -> str:
    """Returns a whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"{element('h1', text(title))}\n{join(content)}\n</body>\n</html>\n"
    )
