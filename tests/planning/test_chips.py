"""The table of chips, and what the flags say about it."""

import json

import pytest

from jaxtune.core.errors import RequestError
from jaxtune.planning import chips, topology


def test_every_chip_has_figures_in_their_units_and_sources():
    for chip in chips.CHIPS.values():
        assert 1e14 < chip.flops < 1e16 and 1e11 < chip.hbm_rate < 1e13, chip.name
        assert 1e10 < chip.hbm_bytes < 1e12
        assert 1e9 < chip.net_rate < chip.link_rate < chip.hbm_rate < chip.flops / 50
        assert chips.usable_bytes(chip) < chip.hbm_bytes
        assert chip.specification.startswith("https://") and chip.kinds
        assert (chip.price is None) == (chip.price_source is None)
    assert len(chips.DATE) == 10


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [
        ("8xH100", 8, "H100"),
        ("h100", 1, "H100"),
        ("16 x v5litepod", 16, "v5e"),
        ("2xRTX 4090", 2, "RTX4090"),
        ("4xA100-80GB", 4, "A100-80"),
        ("4xa100", 4, "A100-80"),
        ("8xv7x", 8, "tpu7x"),
    ],
)
def test_devices_by_name(text, count, name):
    found, chip = chips.parse_devices(text)
    assert (found, chip.name) == (count, name)


@pytest.mark.parametrize("text", ["8xH10", "0xH100", "8x", "", "eight"])
def test_other_devices_are_refused(text):
    with pytest.raises(RequestError, match="--devices"):
        chips.parse_devices(text)


def test_the_device_that_jax_names_is_found():
    assert chips.of_device_kind("TPU v5 lite").name == "v5e"
    assert chips.of_device_kind("NVIDIA H100 80GB HBM3").name == "H100"
    assert chips.of_device_kind("cpu") is None


def test_a_price_is_a_number_or_in_a_file(tmp_path):
    chip = chips.find("H100")
    assert chips.with_price(chip, None) is chip and chip.price > 0
    assert chips.with_price(chip, "1.5").price == 1.5
    table = tmp_path / "prices.json"
    table.write_text(json.dumps({"h100": 2.0, "v5e": 1}))
    priced = chips.with_price(chip, str(table))
    assert (priced.price, priced.price_source) == (2.0, str(table))
    table = tmp_path / "prices.yaml"
    table.write_text("H100: 2.5\n")
    assert chips.with_price(chip, str(table)).price == 2.5


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "{"),
        ("b.yaml", "a: [1"),
        ("c.json", "[1]"),
        ("d.json", '{"v5e": 1}'),
        ("e.json", '{"H1000000": 1}'),
    ],
)
def test_other_prices_are_refused(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    for price in (str(path), "cheap", "-1", "nan"):
        with pytest.raises(RequestError, match="--price"):
            chips.with_price(chips.find("H100"), price)


def test_topologies_by_name():
    chip, name = topology.parse("v5e:4x4")
    assert (chip.name, name) == ("v5e", "v5e:4x4")
    assert topology.parse("v5litepod:2x2")[1] == "v5e:2x2"
    assert topology.parse("v7x:2x2x1")[1] == "tpu7x:2x2x1"


@pytest.mark.parametrize("text", ["v5e", "v5e:16", "v9:2x2", "H100:2x4", "v5e:4x4x4x4"])
def test_other_topologies_are_refused(text):
    with pytest.raises(RequestError, match="--topology"):
        topology.parse(text)


def test_without_libtpu_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r'pip install "jax\[tpu\]"'):
        topology.prepare()
