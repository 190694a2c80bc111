"""Paths, labels, and trees with holes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.core import tree

NAMES = st.sampled_from(["a", "b", "kernel", "q_proj", "0"])


def level(inner):
    return st.dictionaries(NAMES, inner, min_size=1, max_size=3)


TREES = level(st.integers(0, 9) | level(st.integers(0, 9) | level(st.integers(0, 9))))


def slow_paths(node, prefix=""):
    """The paths of the leaves, one recursion a level."""
    if not isinstance(node, dict):
        return [(prefix, node)]
    return [
        found
        for key, child in node.items()
        for found in slow_paths(child, f"{prefix}/{key}" if prefix else key)
    ]


@settings(deadline=None, max_examples=50)
@given(TREES)
def test_flatten_and_unflatten_are_inverse(nested):
    flat = tree.flatten(nested)
    assert list(flat.items()) == slow_paths(nested)
    assert tree.unflatten(flat) == nested


@settings(deadline=None, max_examples=50)
@given(TREES, st.data())
def test_combine_is_the_inverse_of_partition(nested, data):
    labels = tree.map_paths(lambda path, leaf: data.draw(st.sampled_from("xyz")), nested)
    chosen = data.draw(st.sets(st.sampled_from("xyz")))
    left, right = tree.partition(nested, labels, chosen.__contains__)
    assert tree.flatten(left).keys() == tree.flatten(right).keys() == tree.flatten(nested).keys()
    kinds = tree.flatten(labels)
    for path, leaf in tree.flatten(nested).items():
        here, there = (left, right) if kinds[path] in chosen else (right, left)
        assert tree.flatten(here)[path] == leaf
        assert tree.flatten(there)[path] is None
    assert tree.combine(left, right) == tree.combine(right, left) == nested
    assert tree.without_holes(left).keys() | tree.without_holes(right).keys() == kinds.keys()


def test_combine_refuses_trees_that_are_no_partition():
    with pytest.raises(ValueError, match="differ at"):
        tree.combine({"a": 1}, {"b": None})
    with pytest.raises(ValueError, match="'a' must be in exactly one"):
        tree.combine({"a": 1}, {"a": 2})
    with pytest.raises(ValueError, match="'a' must be in exactly one"):
        tree.combine({"a": None}, {"a": None})


def test_the_first_rule_that_matches_the_whole_path_counts():
    params = {"a": {"kernel": 0, "bias": 0}, "ab": 0}
    rules = [("a/kernel", "one"), ("a", "part of a path only"), ("a.*", "two"), (".*", "three")]
    labels = tree.label_tree(params, rules, unused="allow")
    assert tree.flatten(labels) == {"a/kernel": "one", "a/bias": "two", "ab": "two"}


def test_an_uncovered_path_is_an_error():
    with pytest.raises(ValueError, match="'b' is covered by no rule"):
        tree.label_tree({"a": 0, "b": 0}, [("a", "x")])


def test_a_rule_that_covers_nothing_is_an_error():
    with pytest.raises(ValueError, match="rule 'c' matches no parameter; the paths are a, b"):
        tree.label_tree({"a": 0, "b": 0}, [("c", "x"), (".*", "y")])
    assert tree.label_tree({"a": 0}, [("c", "x"), (".*", "y")], unused="allow") == {"a": "y"}


def test_holes_stay_holes():
    params = {"a": np.zeros((2, 3), np.float32), "b": None, "c": {"d": np.zeros(4, np.int8)}}
    doubled = tree.map_paths(lambda path, leaf: (path, leaf.size), params)
    assert doubled == {"a": ("a", 6), "b": None, "c": {"d": ("c/d", 4)}}
    assert tree.size(params) == 10
    assert tree.nbytes(params) == 28
    assert list(tree.without_holes(params)) == ["a", "c/d"]
