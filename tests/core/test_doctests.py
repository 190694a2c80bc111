"""The examples in docstrings are true."""

import doctest
import importlib
import pkgutil

import pytest

import jaxtune

MODULES = [
    module.name
    for module in pkgutil.walk_packages(jaxtune.__path__, "jaxtune.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    failures, _ = doctest.testmod(importlib.import_module(name))
    assert failures == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    found = [t for name in MODULES for t in finder.find(importlib.import_module(name))]
    assert sum(bool(test.examples) for test in found) >= 15
