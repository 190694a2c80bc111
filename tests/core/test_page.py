"""The parts of HTML pages."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from jaxtune.core import page


def test_everything_but_markup_is_escaped():
    words = '<script>"&'
    whole = page.page(words, page.paragraph(words), page.table(["<a>"], [[words, 3]], numbers=[1]))
    assert "<script>" not in whole and whole.count("&lt;script&gt;&quot;&amp;") == 4
    cell = page.element("b", page.text("x<y"))
    assert "<td><b>x&lt;y</b></td>" in page.table(["a"], [[cell]])


@pytest.mark.parametrize(
    "drawn",
    [
        page.histogram([0, 10, 20], [3, 7], "rows & more", mark=12),
        page.lines([("loss", [0, 1, 2], [3.0, 2.0, 2.5]), ("eval", [0, 2], [3.0, 2.2])], "loss"),
        page.lines([("flat", [1], [1.0])], "one point"),
        page.parallel(
            [("a.b", [(0.0, "1"), (1.0, "2")]), ("c", [(0.5, "x"), (0.52, "y")])], "both"
        ),
    ],
)
def test_drawings_are_well_formed_and_stay_inside(drawn):
    root = ElementTree.fromstring(drawn)
    _, _, width, height = map(float, root.get("viewBox").split())
    for item in root.iter():
        points = [tuple(map(float, p.split(","))) for p in item.get("points", "").split()]
        points += [(float(item.get("x", 0)), float(item.get("y", 0)))]
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)


def test_a_legend_names_each_curve_in_its_colour():
    curves = [(f"trial {at}", [0, 1], [at, at]) for at in range(page.COLOURS + 2)]
    drawn = ElementTree.fromstring(page.lines(curves, "many"))
    colour = {
        line.find("title").text: line.get("class").split()[-1] for line in drawn.iter("polyline")
    }
    told = ElementTree.fromstring(page.legend([name for name, *_ in curves]))
    told = {span.text: span.get("class") for span in told}
    assert colour["trial 9"] == told.pop("others") == colour["trial 8"]
    assert told == {name: css for name, css in colour.items() if css != colour["trial 9"]}
    assert len(set(colour.values())) == page.COLOURS + 1
