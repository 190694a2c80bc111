"""The page states the bytes that the declared shapes have."""

import pytest

from benchmarks.quantize import BEGIN, END, PAGE, bytes_table

pytestmark = pytest.mark.slow


def test_the_page_has_the_bytes_of_the_presets():
    inside = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    assert bytes_table() in inside
