"""GPT-2 as defined: its names, its numbers against the NumPy oracle, and every way to compute the same."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive

from gptjax.compute import ResolvedCompute
from gptjax.documents import EndOfText
from gptjax.examples import document_starts, position_ids
from gptjax.kv_cache import Cache
from gptjax.loss import cross_entropy
from gptjax.model import GPT, Block, unembedding
from gptjax.remat import REMAT_POLICIES
from gptjax.sharding import path_name
from tests import reference_gpt2
from tests.helpers import TINY, abstract_params, assert_near, jit, random_params, shapes_of, tiny

B, T = 2, 16


def make_batch():
    """Tokens, targets (some of weight 0) and document starts, at the first position, inside, and at the last."""
    rng = np.random.default_rng(1)
    tokens_BT, targets_BT = rng.integers(TINY["vocab_size"], size=(2, B, T))
    targets_BT[1, 2:5] = -1
    starts_BT = np.zeros((B, T), bool)
    starts_BT[:, 0] = starts_BT[0, 5] = starts_BT[1, [3, T - 1]] = True
    return tokens_BT.astype(np.int32), targets_BT.astype(np.int32), starts_BT


def mean_loss(config, compute=ResolvedCompute(), chunk=0):  # noqa: B008
    def loss(params, tokens_BT, targets_BT, starts_BT):
        x_BTD = GPT(config, compute).apply({"params": params}, tokens_BT, starts_BT, method="hidden")
        sums = cross_entropy(x_BTD, unembedding(params), targets_BT, vocab_size=config.vocab_size, chunk=chunk)
        return sums.loss / sums.tokens

    return loss


# Names and initial values


def test_tree_has_gpt2s_names_and_layers_stacked():
    L, D, F = 2, 16, 64
    expected = {
        "wte/embedding": (128, D), "wpe/embedding": (16, D), "ln_f/scale": (D,), "ln_f/bias": (D,),
        "h/ln_1/scale": (L, D), "h/ln_1/bias": (L, D), "h/ln_2/scale": (L, D), "h/ln_2/bias": (L, D),
        "h/attn/c_attn/kernel": (L, D, 3, D), "h/attn/c_attn/bias": (L, 3, D),
        "h/attn/c_proj/kernel": (L, D, D), "h/attn/c_proj/bias": (L, D),
        "h/mlp/c_fc/kernel": (L, D, F), "h/mlp/c_fc/bias": (L, F),
        "h/mlp/c_proj/kernel": (L, F, D), "h/mlp/c_proj/bias": (L, D),
    }  # fmt: skip
    assert shapes_of(abstract_params(tiny())) == expected
    assert shapes_of(abstract_params(tiny(tie_embeddings=False))) == expected | {"lm_head/kernel": (D, 128)}
    without = {path: shape for path, shape in expected.items() if not path.endswith("bias")}
    assert shapes_of(abstract_params(tiny(bias=False))) == without


def test_initial_values_follow_gpt2():
    config = tiny(n_embd=64, n_layer=8, vocab_size=128)
    params = jit(GPT(config).init)(jax.random.key(0), jnp.zeros((1, 16), jnp.int32))["params"]
    std = {path_name(path): float(np.std(leaf)) for path, leaf in jax.tree.leaves_with_path(params)}
    residual = 0.02 / math.sqrt(2 * 8)
    for path in ("wte/embedding", "wpe/embedding", "h/attn/c_attn/kernel", "h/mlp/c_fc/kernel"):
        assert std[path] == pytest.approx(0.02, rel=0.1), path
    for path in ("h/attn/c_proj/kernel", "h/mlp/c_proj/kernel"):
        assert std[path] == pytest.approx(residual, rel=0.1), path
    for path, leaf in jax.tree.leaves_with_path(params):
        if path[-1].key in ("bias", "scale"):
            assert (leaf == (1.0 if path[-1].key == "scale" else 0.0)).all(), path
    kernel_LDF = params["h"]["mlp"]["c_fc"]["kernel"]
    assert not (kernel_LDF[0] == kernel_LDF[1]).any(), "layers start alike"


# The function


@functools.cache
def tiny_logits():
    params = random_params(tiny())
    return jit(lambda tokens_BT: GPT(tiny()).apply({"params": params}, tokens_BT))


def test_token_change_affects_no_earlier_prediction():
    """Reading a text with one word replaced, every prediction before that word stays, to the last bit."""
    text_BT, _, _ = make_batch()
    predictions_BTV = tiny_logits()(text_BT)
    for word in (0, 7, T - 1):
        replaced_BT = text_BT.copy()
        replaced_BT[:, word] = (replaced_BT[:, word] + 1) % TINY["vocab_size"]
        change_BT = np.abs(tiny_logits()(replaced_BT) - predictions_BTV).max(axis=-1)
        assert (change_BT[:, :word] == 0).all(), "the past heard of the future"
        assert (change_BT[:, word:] > 1e-4).all(), "the future ignored the past"


def test_rows_of_a_batch_do_not_see_each_other():
    text_BT, _, _ = make_batch()
    replaced_BT = text_BT.copy()
    replaced_BT[0] = (replaced_BT[0] + 1) % TINY["vocab_size"]
    change_BTV = np.abs(tiny_logits()(replaced_BT) - tiny_logits()(text_BT))
    assert (change_BTV[0].max(axis=-1) > 1e-4).all()
    assert (change_BTV[1] == 0).all()


def unpad(params):
    """Returns the parameters without the padding of the vocabulary, as the oracle takes them."""
    params = jax.tree.map(np.asarray, params)
    params["wte"]["embedding"] = params["wte"]["embedding"][: TINY["vocab_size"]]
    if "lm_head" in params:
        params["lm_head"]["kernel"] = params["lm_head"]["kernel"][:, : TINY["vocab_size"]]
    return params


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_equal_the_numpy_oracle(tied, bias):
    config = tiny(tie_embeddings=tied, bias=bias)
    params = random_params(config)
    tokens_BT, targets_BT, starts_BT = make_batch()
    one_document_BT = np.zeros_like(starts_BT)
    one_document_BT[:, 0] = True
    compiled = compiled_variant("looped")[1] if config == tiny() else jit(jax.value_and_grad(mean_loss(config)))
    for documents_BT in (one_document_BT, starts_BT):
        expected, expected_grads = reference_gpt2.loss_and_grads(
            unpad(params), tokens_BT, targets_BT, n_head=2, document_starts_BT=documents_BT
        )
        value, grads = compiled(params, tokens_BT, targets_BT, documents_BT)
        assert float(value) == pytest.approx(expected, rel=1e-5)
        assert_near(unpad(grads), expected_grads)
        assert not grads["wte"]["embedding"][TINY["vocab_size"] :].any(), "padding was trained"
        assert tied or not grads["lm_head"]["kernel"][:, TINY["vocab_size"] :].any(), "padding was trained"


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_the_numpy_oracle(tied):
    params = random_params(tiny(tie_embeddings=tied))
    tokens_BT, _, _ = make_batch()
    logits_BTV = jit(GPT(tiny(tie_embeddings=tied)).apply)({"params": params}, tokens_BT)
    assert logits_BTV.shape == (B, T, TINY["vocab_size"])
    assert logits_BTV.dtype == jnp.float32
    assert_near(logits_BTV, reference_gpt2.logits(unpad(params), tokens_BT, n_head=2))


def test_vocabulary_padding_is_invisible():
    params, (tokens_BT, targets_BT, starts_BT) = random_params(tiny()), make_batch()
    table_VD = params["wte"]["embedding"]
    loud = params | {"wte": {"embedding": table_VD.at[TINY["vocab_size"] :].set(1e3)}}
    assert not jnp.array_equal(loud["wte"]["embedding"], table_VD)
    loss_and_grads = compiled_variant("looped")[1]
    quiet = loss_and_grads(params, tokens_BT, targets_BT, starts_BT)
    assert all(map(jnp.array_equal, *map(jax.tree.leaves, (loss_and_grads(loud, *make_batch()), quiet))))


# Ways to compute it

VARIANTS = {
    "looped": ResolvedCompute(),
    "not flat, remat dots": ResolvedCompute(flatten_tokens=False, remat="dots"),
    "unrolled": ResolvedCompute(scan_unroll=2),
    "unrolled, remat full": ResolvedCompute(scan_unroll=2, remat="full"),
    "remat full": ResolvedCompute(remat="full"),
    "remat dots_no_batch": ResolvedCompute(remat="dots_no_batch"),
}


@functools.cache
def compiled_variant(name):
    """Returns (jaxpr as text, executable) of the loss and its gradient."""
    tokens_BT, targets_BT, starts_BT = make_batch()
    function = jit(jax.value_and_grad(mean_loss(tiny(), VARIANTS[name])))
    traced = function.trace(random_params(tiny()), tokens_BT, targets_BT, starts_BT)
    return str(traced.jaxpr), traced.lower().compile()


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "looped"])
def test_compute_options_do_not_change_loss_or_gradients(name):
    assert {compute.remat for compute in VARIANTS.values()} == {"none", *REMAT_POLICIES}
    (plain_jaxpr, plain), (jaxpr, variant) = compiled_variant("looped"), compiled_variant(name)
    assert jaxpr != plain_jaxpr
    assert ("checkpoint" in jaxpr or "remat" in jaxpr) == (VARIANTS[name].remat != "none")
    arguments = random_params(tiny()), *make_batch()
    assert_near(variant(*arguments), plain(*arguments))


def test_remat_none_saves_all_but_gathered_weights():
    """Known by the primitive itself: one that only has its name is another, and JAX may rename its own."""
    call = lambda x: jax.custom_derivatives.linear_call(lambda _, x: x, lambda _, g: g, None, x)  # noqa: E731
    [equation] = jax.make_jaxpr(call)(1.0).eqns
    saves = REMAT_POLICIES["none"]
    assert not saves(equation.primitive)
    assert saves(Primitive(equation.primitive.name))
    assert saves(jax.make_jaxpr(jnp.sin)(1.0).eqns[0].primitive)


def test_remat_full_keeps_less_in_a_loop():
    plain, full = (compiled_variant(name)[1].memory_analysis().temp_size_in_bytes for name in ("looped", "remat full"))
    assert full < 0.7 * plain


def test_parameter_tree_does_not_depend_on_compute_options():
    expected = shapes_of(abstract_params(tiny()))
    for compute in VARIANTS.values():
        model = GPT(tiny(), compute)
        tree = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, T), jnp.int32))["params"]
        assert shapes_of(tree) == expected


def test_bfloat16_keeps_float32_parameters_and_nearly_the_logits():
    model = GPT(tiny(), ResolvedCompute(dtype=jnp.bfloat16))
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, T), jnp.int32))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    tokens_BT, _, _ = make_batch()
    logits_BTV = jit(model.apply)({"params": random_params(tiny())}, tokens_BT)
    exact_BTV = tiny_logits()(tokens_BT)
    assert logits_BTV.dtype == jnp.float32
    assert not jnp.array_equal(logits_BTV, exact_BTV)
    assert_near(logits_BTV, exact_BTV, tolerance=0.05)


@pytest.mark.parametrize("rows", ["all at once", "in pieces"])
def test_cached_attention_equals_uncached(rows):
    """A text read in pieces, each row at its own pace, over a cache of leftovers, gives what reading it whole does."""
    config = tiny()
    params = jax.tree.map(lambda leaf: leaf[0], random_params(config)["h"])
    x_BTD = jnp.asarray(np.random.default_rng(2).standard_normal((B, T, 16)), jnp.float32)
    block = Block(config, ResolvedCompute())
    whole_BTD = jit(lambda x_BTD: block.apply({"params": params}, x_BTD)[0])(x_BTD)
    leftovers_BNSH = jnp.full((B, 2, T, 8), 7.0)
    cache = Cache(leftovers_BNSH, leftovers_BNSH, jnp.zeros((B, T), jnp.int32))
    read = jit(lambda x_BCD, cache: block.apply({"params": params}, x_BCD, cache=cache))
    if rows == "all at once":
        y_BTD, cache = read(x_BTD, Cache(cache.k_BNSH, cache.v_BNSH, position_ids((B, T), None)))
        assert_near(y_BTD, whole_BTD)
        return
    done_B, size = np.array([0, 3]), 4
    for _ in range(5):
        at_BC = np.minimum(done_B[:, None], T) + np.arange(size)  # positions from T on are dropped
        x_BCD = np.take_along_axis(np.asarray(x_BTD), np.minimum(at_BC, T - 1)[..., None], axis=1)
        x_BCD = np.where(at_BC[..., None] < T, x_BCD, 9 * x_BCD[..., ::-1])
        if done_B[0] == 0:  # the second row's first three tokens are read before, with the first row out of range
            first_BC = np.stack([np.full(size, T), np.arange(size)])
            early_BCD = np.broadcast_to(np.asarray(x_BTD)[1:, :size], x_BCD.shape)
            _, cache = read(early_BCD, Cache(cache.k_BNSH, cache.v_BNSH, jnp.asarray(first_BC)))
        y_BCD, cache = read(x_BCD, Cache(cache.k_BNSH, cache.v_BNSH, jnp.asarray(at_BC)))
        for row in range(B):
            for i, t in enumerate(at_BC[row]):
                if t < T:
                    assert_near(y_BCD[row, i], whole_BTD[row, t])
        done_B = done_B + size
    assert (done_B >= T).all()


# Dropout


def test_dropout_is_on_only_with_a_key():
    params, (tokens_BT, _, _) = random_params(tiny()), make_batch()

    def logits(config):
        return jit(lambda key: GPT(config).apply({"params": params}, tokens_BT, key))

    with_rate, without_rate = logits(tiny(dropout=0.5)), logits(tiny())
    key, other = (jax.random.key(seed) for seed in (0, 1))
    assert str(with_rate.trace(None).jaxpr) == str(without_rate.trace(None).jaxpr)
    assert str(with_rate.trace(None).jaxpr) != str(with_rate.trace(key).jaxpr)
    first_BTV, again_BTV, other_BTV = with_rate(key), with_rate(key), with_rate(other)
    np.testing.assert_array_equal(first_BTV, again_BTV)
    assert not jnp.array_equal(first_BTV, tiny_logits()(tokens_BT))
    assert not jnp.array_equal(first_BTV, other_BTV)


def test_each_residual_branch_has_an_independent_dropout_mask():
    """Every residual branch is made to add its own power of 4, so that the sum tells which branches were dropped."""
    L, D, rate = 4, 16, 0.25
    config = tiny(n_layer=L, dropout=rate)
    params = jax.tree.map(jnp.zeros_like, random_params(config))
    powers_L2 = 4.0 ** np.arange(2 * L).reshape(L, 2)
    params["h"]["attn"]["c_proj"]["bias"] = jnp.broadcast_to(jnp.float32(powers_L2[:, :1]), (L, D))
    params["h"]["mlp"]["c_proj"]["bias"] = jnp.broadcast_to(jnp.float32(powers_L2[:, 1:]), (L, D))
    x_BTD = jnp.zeros((64, T, D))
    run = jit(lambda key: GPT(config).apply({"params": params}, x_BTD, None, key, method="layers"))
    sums_MD = np.rint(np.asarray(run(jax.random.key(0))) * (1 - rate)).astype(np.int64).reshape(-1, D)
    kept = [sums_MD // int(power) % 4 for power in powers_L2.flat]
    assert set(np.unique(kept)) == {0, 1}, "what is kept is scaled by 1 / (1 - rate)"
    sigma = math.sqrt(rate * (1 - rate) / x_BTD.size)
    for mask_MD in kept:
        assert abs(mask_MD.mean() - (1 - rate)) < 5 * sigma
    for i, mask_MD in enumerate(kept):
        for other_MD in kept[:i]:
            assert abs((mask_MD == other_MD).mean() - (rate**2 + (1 - rate) ** 2)) < 0.02, "two branches drop alike"


def test_embedding_has_dropout():
    config = tiny(dropout=0.25)
    params = jax.tree.map(jnp.zeros_like, random_params(config))
    params["wte"]["embedding"] = jnp.ones_like(params["wte"]["embedding"])
    params["ln_f"]["scale"] = jnp.ones_like(params["ln_f"]["scale"])
    tokens_BT = jnp.zeros((128, T), jnp.int32)
    hidden = jit(lambda key: GPT(config).apply({"params": params}, tokens_BT, None, key, method="hidden"))
    dropped = float((hidden(jax.random.key(0)) < 0).mean())  # LayerNorm puts what was dropped below the mean
    assert abs(dropped - 0.25) < 0.02


def test_dropout_masks_equal_those_of_earlier_versions():
    """Else a run with dropout would go on with other masks after an upgrade. The values are those of commit 51fa121."""
    config, (tokens_BT, _, _) = tiny(dropout=0.25), make_batch()
    x_BTD = GPT(config).apply({"params": random_params(config)}, tokens_BT, None, jax.random.key(7), method="hidden")
    expected = [[-0.3383678, -1.3323858, 1.0994959, -1.2021239], [-0.9072971, -0.1071184, -0.6497994, 0.9384297]]
    np.testing.assert_allclose(x_BTD[:, -1, :4], expected, rtol=1e-5)


# Documents


def test_documents_start_after_or_at_the_end_of_text():
    eot = 9
    tokens_BT = jnp.asarray([[1, eot, 2, 3, eot], [eot, 4, eot, eot, 5]])
    last = document_starts(tokens_BT, EndOfText(eot, "last"))
    first = document_starts(tokens_BT, EndOfText(eot, "first"))
    assert last.astype(int).tolist() == [[1, 0, 1, 0, 0], [1, 1, 0, 1, 1]]
    assert first.astype(int).tolist() == [[1, 1, 0, 0, 1], [1, 0, 1, 1, 0]]
    assert position_ids((2, 5), last).tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 0, 0]]
    assert position_ids((2, 5), first).tolist() == [[0, 0, 1, 2, 0], [0, 1, 0, 0, 1]]
    assert position_ids((2, 5), None).tolist() == [[0, 1, 2, 3, 4]] * 2
