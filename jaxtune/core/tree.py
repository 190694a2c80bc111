"""Named parameter paths, label trees, and trees with holes.

A parameter tree is nested dicts of arrays. A leaf's path is its keys joined by `/`, such as
`blocks/attn/q_proj/kernel`. Rules are `(regex, label)` pairs; a regex must match the whole path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

Tree = Any
Rules = Sequence[tuple[str, str]]


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Returns {path: leaf} of a nested dict, in the order of the dict.

    >>> flatten({"a": {"b": 1}, "c": 2})
    {'a/b': 1, 'c': 2}
    """
    return dict(_walk(tree, prefix))


def _walk(tree: Tree, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _walk(value, f"{prefix}/{key}" if prefix else str(key))
    else:
        yield prefix, tree


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dict of {path: leaf}; the inverse of `flatten`.

    >>> unflatten({"a/b": 1, "c": 2})
    {'a': {'b': 1}, 'c': 2}
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def map_paths(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Returns the tree of `fn(path, leaf, *other_leaves)`; None holes stay holes."""
    others = [flatten(r) for r in rest]
    return unflatten(
        {
            path: None if leaf is None else fn(path, leaf, *(o[path] for o in others))
            for path, leaf in flatten(tree).items()
        }
    )


def label_tree(params: Tree, rules: Rules, *, unused: str = "error") -> Tree:
    """Returns a tree like `params` whose leaves are labels; the first matching rule wins.

    Args:
        params: nested dicts of arrays (or shapes).
        rules: `(regex, label)` pairs; a regex matches the whole path.
        unused: "error" refuses a rule that matches no path; "allow" lets it stand, for the
            rules that a method states for every model.

    Raises:
        ValueError: a path that no rule covers, or a rule that covers no path.

    >>> label_tree({"a": 1, "b": {"c": 2}}, [("b/.*", "trained"), (".*", "frozen")])
    {'a': 'frozen', 'b': {'c': 'trained'}}
    """
    compiled = [(re.compile(regex), label) for regex, label in rules]
    paths = list(flatten(params))
    matched = [any(r.fullmatch(p) for p in paths) for r, _ in compiled]
    if unused == "error" and not all(matched):
        dead = next(r for (r, _), hit in zip(rules, matched, strict=True) if not hit)
        raise ValueError(f"rule {dead!r} matches no parameter; the paths are {', '.join(paths)}")

    def label(path: str) -> str:
        for regex, name in compiled:
            if regex.fullmatch(path):
                return name
        raise ValueError(f"parameter {path!r} is covered by no rule")

    return unflatten({path: label(path) for path in paths})


def partition(tree: Tree, labels: Tree, chosen: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Returns (chosen, rest): two trees of the full structure with None where the other has a leaf.

    >>> partition({"a": 1, "b": 2}, {"a": "x", "b": "y"}, lambda label: label == "x")
    ({'a': 1, 'b': None}, {'a': None, 'b': 2})
    """
    flat, names = flatten(tree), flatten(labels)
    yes = {p: leaf if chosen(names[p]) else None for p, leaf in flat.items()}
    no = {p: None if chosen(names[p]) else leaf for p, leaf in flat.items()}
    return unflatten(yes), unflatten(no)


def combine(left: Tree, right: Tree) -> Tree:
    """Returns the tree that `partition` split: each leaf from the side that has it.

    >>> combine({"a": 1, "b": None}, {"a": None, "b": 2})
    {'a': 1, 'b': 2}
    """
    a, b = flatten(left), flatten(right)
    if a.keys() != b.keys():
        raise ValueError(f"the trees differ at {sorted(a.keys() ^ b.keys())}")
    both = [p for p in a if (a[p] is None) == (b[p] is None)]
    if both:
        raise ValueError(f"leaf {both[0]!r} must be in exactly one of the two trees")
    return unflatten({p: b[p] if a[p] is None else a[p] for p in a})


def without_holes(tree: Tree) -> dict[str, Any]:
    """Returns {path: leaf} of the leaves that are not None."""
    return {path: leaf for path, leaf in flatten(tree).items() if leaf is not None}


def size(tree: Tree) -> int:
    """Returns the number of elements in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def nbytes(tree: Tree) -> int:
    """Returns the bytes of all leaves, arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
