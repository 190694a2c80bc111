"""C20: every method but prefix tuning starts as the base model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.core.tree import flatten, unflatten
from jaxtune.models.decoder import abstract_params, hidden_states, init_params
from jaxtune.peft.adapter import Adapter
from jaxtune.peft.bitfit import BitFit
from jaxtune.peft.full import Full
from jaxtune.peft.ia3 import Ia3
from jaxtune.peft.lora import Lora, principal_factors
from jaxtune.peft.prefix import Prefix
from jaxtune.peft.prompt import Prompt
from tests.checkpoints.world import BASE, CONFIG, assert_same_logits, batch_of, logits_of, probe
from tests.checkpoints.world import random_params as random_base

KEY = jax.random.key(0)
IDENTITIES = {
    "full": Full(),
    "lora": Lora(rank=4, dropout=0.5),
    "rslora": Lora(rank=4, variant="rslora"),
    "dora": Lora(rank=4, variant="dora"),
    "pissa": Lora(rank=4, variant="pissa"),
    "houlsby": Adapter(bottleneck=4, placement="houlsby"),
    "pfeiffer": Adapter(bottleneck=4, placement="pfeiffer"),
    "parallel": Adapter(bottleneck=4, placement="parallel", activation="relu"),
    "ia3": Ia3(),
    "bitfit": BitFit(),
}


def probe_of(ids):
    """A stand-in for the base's keys and values: any arrays of the right shape."""
    shape = (CONFIG.num_layers, ids.shape[1], CONFIG.num_kv_heads * CONFIG.head_dim)
    keys = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    return keys, keys + ids[0, :, None]


def started(method, base):
    """What a run begins with: the base's weights, fresh slots, the method's start."""
    fresh = init_params(CONFIG, method, jax.random.key(1))
    return method.start(unflatten(flatten(fresh) | flatten(base)), jax.random.key(2), probe_of)


@pytest.mark.parametrize("name", IDENTITIES)
def test_step_0_is_the_base(name):
    base, rows = random_base(CONFIG, BASE), probe()
    params = started(IDENTITIES[name], base)
    assert flatten(params).keys() == flatten(abstract_params(CONFIG, IDENTITIES[name])).keys()
    for path, leaf in flatten(base).items():
        assert np.array_equal(flatten(params)[path], leaf), path  # the base is as it was
    assert_same_logits(
        logits_of(CONFIG, IDENTITIES[name], params, rows), logits_of(CONFIG, BASE, base, rows)
    )


def test_dropout_needs_a_key():
    method, rows = IDENTITIES["lora"], probe()
    params = random_base(CONFIG, method)  # B is not 0, so that dropout is seen
    found, wanted = (logits_of(CONFIG, m, params, rows) for m in (method, Lora(rank=4)))
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
    batch = batch_of(method, rows)
    drawn = [hidden_states(CONFIG, method, params, batch, key=k)[0] for k in (None, KEY)]
    assert not np.array_equal(*drawn)


def test_prompt_starts_from_the_vocabulary():
    """C31."""
    base = random_base(CONFIG, BASE)
    table = np.asarray(base["embed"]["embedding"])
    rows = np.asarray(started(Prompt(num_tokens=5), base)["prompt"]["embedding"])
    assert all((table == row).all(-1).any() for row in rows)
    text = started(Prompt(num_tokens=5, init="text", init_ids=(7, 3)), base)
    assert np.array_equal(text["prompt"]["embedding"], table[[7, 3, 7, 3, 7]])


def test_prefix_starts_from_real_activations():
    params = started(Prefix(num_tokens=5), random_base(CONFIG, BASE))
    prefix = params["blocks"]["attn"]["prefix"]
    assert np.array_equal(prefix["key"], probe_of(np.zeros((1, 5), int))[0])
    ids = np.asarray(prefix["value"] - prefix["key"])[0, :, 0]
    assert np.all((ids >= 0) & (ids < CONFIG.vocab_size))


def test_pissa_starts_at_the_largest_singular_directions():
    """Against the full decomposition."""
    kernel = np.asarray(random_base(CONFIG, BASE)["blocks"]["mlp"]["up_proj"]["kernel"])
    method = Lora(rank=4, alpha=6.0, variant="pissa")
    lora = started(method, random_base(CONFIG, BASE))["blocks"]["mlp"]["up_proj"]["lora"]
    u, s, vt = np.linalg.svd(kernel)
    best = (u[..., :4] * s[..., None, :4]) @ vt[..., :4, :]
    product = method.scale * np.asarray(lora["a"] @ lora["b"])
    np.testing.assert_allclose(product, best, atol=2e-3)
    # each side carries the root of the singular values (PiSSA, equations 2 and 3)
    for factor, axis in ((lora["a"], -2), (lora["b"], -1)):
        norms = np.square(np.linalg.norm(factor, axis=axis)) * method.scale
        np.testing.assert_allclose(norms, s[..., :4], rtol=1e-3)
    a, b = principal_factors(jnp.asarray(best), 4, jax.random.key(0))
    np.testing.assert_allclose(a @ b, best, atol=1e-4)


def test_dora_starts_at_the_column_norms():
    base = random_base(CONFIG, BASE)
    lora = started(Lora(rank=2, variant="dora"), base)["blocks"]["attn"]["q_proj"]["lora"]
    kernel = np.asarray(base["blocks"]["attn"]["q_proj"]["kernel"])
    np.testing.assert_allclose(lora["magnitude"], np.linalg.norm(kernel, axis=1), rtol=1e-5)
