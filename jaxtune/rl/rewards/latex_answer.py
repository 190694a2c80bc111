"""Whether LaTeX answers are equal, by math-verify, which sympy stands behind."""

from __future__ import annotations

import json

from jaxtune.rl.rewards import sandbox

# In a process of its own: a power tower keeps sympy busy for ever, with Python's lock held.
_PROGRAM = """
import json
from math_verify import LatexExtractionConfig, parse, verify

def read(text):
    return parse(f"${text}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)

def check(pair):
    gold, said = map(read, json.loads(pair))
    assert gold and said and verify(gold, said, timeout_seconds=None)
"""
_SECONDS_A_PAIR, _SECONDS_TO_START = 0.5, 10.0
_LONGEST = 500


def equal(pairs: list[tuple[str, str]]) -> list[bool]:
    """Returns which pairs (the record's answer, the completion's) are equal.

    What cannot be read, is longer than 500 characters, or takes longer than 10 seconds is not.
    """
    short = [i for i, pair in enumerate(pairs) if max(map(len, pair)) <= _LONGEST]
    found = [False] * len(pairs)
    passed = _check([pairs[i] for i in short])
    if passed is None:  # one of them took the process along
        passed = [bool((_check([pairs[i]]) or [False])[0]) for i in short]
    for i, fine in zip(short, passed, strict=True):
        found[i] = fine
    return found


def _check(pairs: list[tuple[str, str]]) -> list[bool] | None:
    """Compares pairs in one process; None: it did not come to its end."""
    tests = [f"check({json.dumps(pair)!r})" for pair in pairs]
    limits = sandbox.Limits(_SECONDS_TO_START + _SECONDS_A_PAIR * len(pairs), memory=1024)
    outcome = sandbox.run(_PROGRAM, tests, limits, sandbox.strongest())
    return [why is None for why in outcome.failures] if outcome.finished else None
