import jax
import numpy as np
import pytest

from jaxtune.core.errors import RequestError
from jaxtune.generate import scoring
from jaxtune.objectives import logprobs as chunked
from jaxtune.peft.registry import METHODS
from tests.generate.tiny_models import CONFIG, model, row_logits

ROWS = [[5, 9, 2, 40, 7], [3], [60, 1, 1, 17, 8, 30, 22, 4, 11, 50, 31], [12, 13]]
WIDTH = 13


def padded(side: str) -> tuple[np.ndarray, np.ndarray]:
    ids, mask = np.full((len(ROWS), WIDTH), 33), np.zeros((len(ROWS), WIDTH), int)
    for row, real in enumerate(ROWS):
        place = slice(WIDTH - len(real), None) if side == "left" else slice(len(real))
        ids[row, place], mask[row, place] = real, 1
    return ids, mask


@pytest.mark.parametrize("name", METHODS)
def test_logits_equal_each_row_alone_and_padding_sides_agree_in_every_bit(name):
    sides = {}
    for side in ("right", "left"):
        ids, mask = padded(side)
        out = scoring.logits(*model(name), ids, mask)
        assert out.shape == (len(ROWS), WIDTH, CONFIG.vocab_size) and out.dtype == np.float32
        out = np.asarray(out)
        assert np.all(out[mask == 0] == 0)
        sides[side] = out[mask == 1]
    np.testing.assert_array_equal(sides["left"], sides["right"])
    alone = np.concatenate([row_logits(name, row) for row in ROWS])
    np.testing.assert_allclose(sides["right"], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["full", "prompt", "prefix"])
@pytest.mark.parametrize("logits_bytes", [None, 1])
def test_logprobs_are_log_softmax_of_the_token_that_followed(name, logits_bytes, monkeypatch):
    scoring._programs.cache_clear()
    if logits_bytes is not None:
        scores = chunked.token_scores
        monkeypatch.setattr(
            scoring, "token_scores", lambda *a: scores(*a, logits_bytes=logits_bytes)
        )
    for side in ("right", "left"):
        ids, mask = padded(side)
        found = np.asarray(scoring.logprobs(*model(name), ids, mask))
        assert found.shape == (len(ROWS), WIDTH - 1)
        wanted = np.zeros_like(found)
        for row, real in enumerate(ROWS):
            start = WIDTH - len(real) if side == "left" else 0
            table = np.asarray(jax.nn.log_softmax(row_logits(name, real)))
            for place in range(len(real) - 1):
                wanted[row, start + place] = table[place, real[place + 1]]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    scoring._programs.cache_clear()


def test_without_a_mask_every_token_is_real():
    ids = np.asarray([ROWS[0], [1, 2, 3, 4, 5]])
    full = model("prompt")
    np.testing.assert_array_equal(
        scoring.logits(*full, ids), scoring.logits(*full, ids, np.ones_like(ids))
    )
    np.testing.assert_array_equal(
        scoring.logprobs(*full, ids.tolist()), scoring.logprobs(*full, ids)
    )


def test_padding_within_a_row_and_rows_of_padding():
    ids = np.asarray([[5, 33, 9, 2, 33], [33, 33, 33, 33, 33]])
    mask = np.asarray([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]])
    out = np.asarray(scoring.logits(*model("full"), ids, mask))
    np.testing.assert_allclose(out[0][mask[0] == 1], row_logits("full", [5, 9, 2]), atol=1e-4)
    assert np.all(out[1] == 0)
    found = np.asarray(scoring.logprobs(*model("full"), ids, mask))
    assert (found != 0).tolist() == [[False, True, True, False], [False] * 4]


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([1, 2], None, r"ids: must be integers \[B, T\]"),
        ([[1.0, 2.0]], None, "ids: must be integers"),
        ([[1, 2], [3]], None, "ids: rows differ in length"),
        ([[1, 2]], [[1]], r"mask: has shape \[1, 1\], the ids have \[1, 2\]"),
        ([[1, 61]], None, "token id 61"),
        ([[1] * 97], None, "row 0 needs 97 = 97 positions; the model has 96"),
    ],
)
def test_what_is_refused(ids, mask, message):
    for read in (scoring.logits, scoring.logprobs):
        with pytest.raises(RequestError, match=message):
            read(*model("full"), ids, mask)


def test_ids_under_padding_may_be_anything():
    ids, mask = np.asarray([[5, 9, -100]]), np.asarray([[1, 1, 0]])
    out = np.asarray(scoring.logits(*model("full"), ids, mask))
    np.testing.assert_allclose(out[0, :2], row_logits("full", [5, 9]), atol=1e-4)
