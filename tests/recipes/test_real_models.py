"""`jaxtune.load` on the two real models gives the logits, text and NLL that their cards state."""

import gzip
import itertools
import json

import numpy as np
import pytest

import jaxtune

STORIES, CONTEXT = 20, 256


@pytest.fixture(scope="module", params=["stories260k", "babyllama105"])
def real(request, shared):
    """(language model in float32, its golden.json)."""
    directory = shared / "models" / request.param
    golden = json.loads((directory / "golden.json").read_text())
    return jaxtune.load(directory, dtype="float32"), golden


@pytest.fixture(scope="module")
def stories(shared):
    path = shared / "data/texts/tinystories_1000.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))[:STORIES]


def one_unknown(ids: list[int], unknown: int) -> list[int]:
    """Neighbouring <unk> as one: the stated NLL was made with SentencePiece, which fuses them.

    The tokenizer.json of babyllama105 says `fuse_unk: false`, so it gives two for a blank line.
    """
    kept = [ids[0]]
    kept += [b for a, b in itertools.pairwise(ids) if not a == b == unknown]
    return kept


def test_logits(real):
    lm, golden = real
    assert (
        lm.tokenizer.encode(golden["prompt"])[: len(golden["prompt_ids"])] == (golden["prompt_ids"])
    )
    logits = np.asarray(lm.logits([golden["prompt_ids"]]))[0]
    np.testing.assert_allclose(logits[:, :8], golden["logits_first8"], atol=1e-3)
    np.testing.assert_array_equal(logits.argmax(-1), golden["argmax"])


def test_greedy_text(real):
    lm, golden = real
    wanted = golden["greedy_from_bos_ids"]
    assert lm.generate([wanted[:1]], max_new_tokens=len(wanted) - 1) == [wanted[1:]]
    assert lm.decode(wanted) == golden["greedy_text"]


def test_nll_of_twenty_stories(real, stories):
    lm, golden = real
    stated = golden["eval"]
    per_story, mean, count = story_nll(lm, stories)
    assert count == stated["tokens"]
    np.testing.assert_allclose(per_story, stated["per_story_mean_nll"], atol=1e-3)
    assert mean == pytest.approx(stated["mean_nll_per_token"], abs=1e-3)


# Of 1.339. Measured: 0.0025 less and 0.102 more; 260 thousand weights have few to spare.
@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.005), ("nf4", 0.11)])
def test_nll_of_a_quantised_model(kind, bound, shared, stories):
    directory = shared / "models" / "stories260k"
    whole = json.loads((directory / "golden.json").read_text())["eval"]["mean_nll_per_token"]
    lm = jaxtune.load(directory, dtype="float32", quantize=kind)
    assert lm.params["blocks"]["mlp"]["down_proj"]["kernel"]["absmax"].shape == (5, 2, 64)
    assert 1e-3 < abs(story_nll(lm, stories)[1] - whole) < bound


def story_nll(lm, stories) -> tuple[np.ndarray, float, int]:
    """(mean NLL of each story, of all, tokens)."""
    unknown = lm.tokenizer.hf.unk_token_id
    rows = [one_unknown(lm.tokenizer.encode(text), unknown)[:CONTEXT] for text in stories]
    ids, mask = (np.zeros((STORIES, CONTEXT), np.int32) for _ in range(2))
    for row, found in enumerate(rows):
        ids[row, : len(found)], mask[row, : len(found)] = found, 1
    nll = -np.asarray(lm.logprobs(ids, mask), np.float64)
    targets = mask[:, 1:].sum(1)
    return nll.sum(1) / targets, float(nll.sum() / targets.sum()), int(targets.sum())
