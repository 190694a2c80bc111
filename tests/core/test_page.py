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
    ],
)
def test_drawings_are_well_formed_and_stay_inside(drawn):
    root = ElementTree.fromstring(drawn)
    _, _, width, height = map(float, root.get("viewBox").split())
    for item in root.iter():
        points = [tuple(map(float, p.split(","))) for p in item.get("points", "").split()]
        points += [(float(item.get("x", 0)), float(item.get("y", 0)))]
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
