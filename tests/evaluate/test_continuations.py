"""Scores of continuations against the model run whole on each of them."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.evaluate import continuations, shapes
from jaxtune.evaluate.continuations import Request, Score, positions, score
from jaxtune.generate.scoring import logits
from jaxtune.models.decoder import param_axes
from jaxtune.parallel.mesh import make_mesh
from jaxtune.parallel.rules import shardings
from tests.generate.tiny_models import model

pytestmark = pytest.mark.slow

ONE = make_mesh({}, jax.devices()[:1])


def oracle(name: str, asked: list[Request]) -> list[tuple[float, int, bool]]:
    """(log-likelihood, the likeliest last token, greedy) of each request, run whole."""
    config, method, params = model(name)
    room = positions(config, method)
    rows = [[*context, *continuation][-(room + 1) :] for context, continuation in asked]
    ids, mask = np.zeros((2, len(rows), room), np.int32)
    for number, row in enumerate(rows):
        ids[number, : len(row) - 1], mask[number, : len(row) - 1] = row[:-1], 1
    found = []
    for row, request, scores in zip(
        rows, asked, np.asarray(logits(config, method, params, ids, mask)), strict=True
    ):
        count = len(request.continuation)
        chosen = scores[len(row) - 1 - count : len(row) - 1].astype(np.float64)
        chosen -= np.log(np.exp(chosen).sum(axis=-1, keepdims=True))
        best, targets = chosen.argmax(axis=-1), np.asarray(row[-count:])
        total = chosen[np.arange(count), targets].sum()
        found.append((float(total), int(best[-1]), bool((best == targets).all())))
    return found


def check(name: str, asked: list[Request], found: list[Score]) -> None:
    expected = oracle(name, asked)
    np.testing.assert_allclose([f.logprob for f in found], [e[0] for e in expected], atol=1e-4)
    assert [f.greedy for f in found] == [e[2] for e in expected]


@functools.cache
def requests(name: str) -> list[Request]:
    """Contexts with several continuations, with one, equal requests, texts too long, a greedy one.

    Of prompt tuning, the model reads three tokens less.
    """
    rng = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        return rng.integers(0, 61, count).tolist()

    first, second, long = ids(30), ids(3), ids(120)
    found = [Request(first, ids(n)) for n in (1, 1, 4, 9)]
    found += [Request(second, ids(n)) for n in (2, 5)]
    found += [Request(long, ids(n)) for n in (1, 3, 12)]
    found += [Request([7], ids(60)), Request(ids(20), ids(5)), Request(ids(2), [4]), found[2]]
    ((_, best, _),) = oracle(name, [Request(first, [0])])
    return [*found, Request(first, [best])]


@pytest.mark.parametrize("name", ["full", "prompt", "prefix"])
def test_a_continuation_scores_as_it_does_alone(name):
    config, method, params = model(name)
    asked = requests(name)
    found = score(config, method, params, ONE, asked)
    check(name, asked, found)
    assert found[2] == found[-2] and found[-1].greedy


def test_the_result_depends_neither_on_the_batch_size_nor_on_the_attention():
    config, method, params = model("full")
    config = dataclasses.replace(config, attention="heads")
    asked = requests("full")
    check("full", asked, score(config, method, params, ONE, asked, rows=2))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_sharded_parameters_give_the_same_scores():
    config, method, params = model("full")
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    spread = jax.device_put(params, shardings(param_axes(config, method), params, mesh))
    asked = requests("full")
    check("full", asked, score(config, method, spread, mesh, asked))


def test_equal_contexts_are_computed_once():
    config, method, _ = model("full")
    costs = continuations.spending(config, method)
    context = list(range(40))
    several = [Request(context, [n, n + 1, n + 2]) for n in range(4)]
    (row,) = continuations.plan(config, several, 90, costs)
    assert row.stem == tuple(context) and len(row.tips) == 4
    letters = [Request(context, [n]) for n in range(4)]
    (row,) = continuations.plan(config, letters, 90, costs)
    assert row.tips == () and len(row.asked) == 4
    assert row.shape.tokens == 48


def test_lengths_of_all_kinds_compile_a_handful_of_programs(monkeypatch):
    config, method, params = model("full")
    run = continuations._programs(config, method, 1)
    for program in run:
        program.clear_cache()
    # Padding is never preferred to compiling, so that only the limit holds.
    monkeypatch.setattr(shapes, "PROGRAMS", 3)
    monkeypatch.setattr(continuations, "COMPILING", {jax.default_backend(): 0.0})
    rng = np.random.default_rng(1)
    asked = []
    for _ in range(60):
        context = rng.integers(0, 61, rng.integers(2, 80)).tolist()
        tips = [
            rng.integers(0, 61, rng.integers(1, 30)).tolist() for _ in range(rng.integers(1, 5))
        ]
        asked += [Request(context, tip) for tip in tips]
    told: list[int] = []
    score(config, method, params, ONE, asked, progress=told.append)
    compiled = sum(program._cache_size() for program in run)
    assert 2 <= compiled <= 3
    assert sum(told) == len(asked)


def test_a_model_that_reads_less_sees_the_last_tokens():
    config, method, params = model("full")
    assert positions(config, method) == 96
    request = Request(list(range(50)), [3, 4])
    (found,) = score(config, method, params, ONE, [request], max_length=10)
    (expected,) = score(config, method, params, ONE, [Request(list(range(41, 50)), [3, 4])])
    assert found.logprob == pytest.approx(expected.logprob, abs=1e-5)


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (Request([], [1]), "context"),
        (Request([1], []), "tokens"),
        (Request([1], [2] * 97), "97"),
        (Request([1], [61]), "vocabulary of 61"),
        (Request([-1], [6]), "vocabulary of 61"),
    ],
)
def test_a_request_that_cannot_be_scored_is_refused(request_, text):
    config, method, params = model("full")
    with pytest.raises(RequestError, match=text):
        score(config, method, params, ONE, [request_])


def test_no_requests_have_no_scores():
    config, method, params = model("full")
    assert score(config, method, params, ONE, []) == []
