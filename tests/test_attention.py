"""Attention: the plain one against NumPy, the fused ones against the plain one, and which one is chosen."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import attention
from gptjax.attention import (
    SHORTEST_IN_BLOCKS,
    causal_attention,
    choose_backend,
    masked_attention,
    query_blocks,
    splash_attention,
)
from gptjax.compute import ResolvedCompute
from gptjax.config import GPTConfig
from gptjax.errors import ConfigError
from gptjax.model import GPT
from gptjax.remat import REMAT_POLICIES, recomputed
from tests.helpers import raises, random_params


def make_qkv(B, T, N, H):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((B, T, N, H)), jnp.float32) for _ in range(3)]


def naive_attention(q_BTNH, k_BTNH, v_BTNH, segments_BT=None):
    """One query at a time, over the keys that it may see, in float64."""
    q_BTNH, k_BTNH, v_BTNH = (np.asarray(x, np.float64) for x in (q_BTNH, k_BTNH, v_BTNH))
    B, T, N, H = q_BTNH.shape
    y_BTNH = np.zeros_like(q_BTNH)
    for b, t, n in np.ndindex(B, T, N):
        seen = [s for s in range(t + 1) if segments_BT is None or segments_BT[b, s] == segments_BT[b, t]]
        weights = np.exp(k_BTNH[b, seen, n] @ q_BTNH[b, t, n] / math.sqrt(H))
        y_BTNH[b, t, n] = weights @ v_BTNH[b, seen, n] / weights.sum()
    return y_BTNH


@pytest.mark.parametrize("documents", [False, True])
def test_xla_equals_a_naive_softmax(documents):
    q_BTNH, k_BTNH, v_BTNH = make_qkv(2, 9, 3, 5)
    segments_BT = np.asarray([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 8 + [1]], np.int32) if documents else None
    y_BTNH = causal_attention(q_BTNH, k_BTNH, v_BTNH, backend="xla", segments_BT=segments_BT)
    expected_BTNH = naive_attention(q_BTNH, k_BTNH, v_BTNH, segments_BT)
    assert documents == (not np.allclose(expected_BTNH, naive_attention(q_BTNH, k_BTNH, v_BTNH)))
    np.testing.assert_allclose(y_BTNH, expected_BTNH, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("documents", [False, True])
def test_blocks_of_queries_equal_a_naive_softmax(documents):
    B, T = 2, SHORTEST_IN_BLOCKS
    assert [query_blocks(*of) for of in ((T, 0.0), (T, 0.1), (T + 1, 0.0), (T // 2, 0.0))] == [4, 1, 1, 1]
    q_BTNH, k_BTNH, v_BTNH = make_qkv(B, T, 2, 4)
    segments_BT = np.repeat(np.arange(8, dtype=np.int32), T // 8)[None].repeat(B, 0) // (2 if documents else 8)
    attended = causal_attention(q_BTNH, k_BTNH, v_BTNH, backend="xla", segments_BT=segments_BT if documents else None)
    expected = naive_attention(q_BTNH, k_BTNH, v_BTNH, segments_BT if documents else None)
    np.testing.assert_allclose(attended, expected, rtol=1e-5, atol=1e-6)


def test_softmax_is_computed_in_float32():
    """Scores of a few hundred differ by less than bfloat16 can say, and softmax must still tell them apart."""
    k_BSNH = jnp.asarray([[[[256.0, 0.5]], [[256.0, 0.0]]]], jnp.bfloat16)
    q_BTNH = jnp.ones((1, 2, 1, 2), jnp.bfloat16)
    v_BSNH = jnp.asarray([[[[1.0, 1.0]], [[0.0, 0.0]]]], jnp.bfloat16)
    y_BTNH = causal_attention(q_BTNH, k_BSNH, v_BSNH, backend="xla")
    assert y_BTNH.dtype == jnp.bfloat16
    expected = 1 / (1 + math.exp(-0.5 / math.sqrt(2)))
    assert expected > 0.58
    assert float(y_BTNH[0, 1, 0, 0]) == pytest.approx(expected, abs=2**-8)


def test_a_masked_key_has_no_weight_however_large():
    q_BTNH, k_BTNH, v_BTNH = make_qkv(1, 3, 1, 4)
    loud_BTNH = k_BTNH.at[:, 1:].multiply(1e6)
    mask = jnp.asarray([True, False, False])[None, None, None]
    k_BNSH, loud_BNSH, v_BNSH = (jnp.swapaxes(x, 1, 2) for x in (k_BTNH, loud_BTNH, v_BTNH))
    quiet = masked_attention(q_BTNH, k_BNSH, v_BNSH, mask=mask)
    np.testing.assert_array_equal(masked_attention(q_BTNH, loud_BNSH, v_BNSH, mask=mask), quiet)
    np.testing.assert_allclose(quiet, jnp.broadcast_to(v_BTNH[:, :1], quiet.shape), rtol=1e-6)


def test_dropout_keeps_the_expectation_and_drops_its_rate():
    T, rate = 8, 0.25
    q_BTNH, k_BTNH, _ = make_qkv(1, T, 1, T)
    v_BTNH = jnp.eye(T)[None, :, None, :]  # the output is the row of attention weights itself
    attend = functools.partial(causal_attention, q_BTNH, k_BTNH, v_BTNH, backend="xla", dropout=rate)
    weights_TS = np.asarray(attend())[0, :, 0]
    keys = jax.random.split(jax.random.key(0), 4000)
    samples_KTS = np.asarray(jax.jit(jax.vmap(lambda key: attend(dropout_key=key)))(keys))[:, 0, :, 0]
    seen_TS = np.tril(np.ones((T, T), bool))
    assert not samples_KTS[:, ~seen_TS].any()
    dropped = (samples_KTS == 0)[:, seen_TS].mean()
    assert dropped == pytest.approx(rate, abs=5 * math.sqrt(rate * (1 - rate) / (4000 * seen_TS.sum())))
    kept_KTS = np.where(samples_KTS == 0, weights_TS / (1 - rate), samples_KTS)
    np.testing.assert_allclose(kept_KTS, np.broadcast_to(weights_TS / (1 - rate), kept_KTS.shape), rtol=1e-5)
    sigma_TS = weights_TS * math.sqrt(rate / (1 - rate) / 4000)
    assert (np.abs(samples_KTS.mean(axis=0) - weights_TS) <= 5 * sigma_TS + 1e-6).all()


# The choice


def choose(name, **changes):
    situation = {"platform": "tpu", "dtype": jnp.dtype(jnp.bfloat16), "has_bfloat16": True, "dropout": 0.0}
    situation |= {"document_mask": False, "head_width": 64, "block_size": 1024}
    return choose_backend(name, **(situation | changes))


@pytest.mark.parametrize(
    ("platform", "backend"), [("cpu", "xla"), ("tpu", "splash"), ("gpu", "cudnn"), ("cuda", "cudnn"), ("rocm", "xla")]
)
def test_auto_takes_the_fused_kernel_of_the_platform(platform, backend):
    assert choose("auto", platform=platform) == (backend, "")
    assert choose("auto", platform=platform, document_mask=True)[0] == ("splash" if backend == "splash" else "xla")


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_xla_attention_is_allowed_everywhere(platform):
    assert choose("xla", platform=platform, dropout=0.1, document_mask=True, block_size=100) == ("xla", "")


@pytest.mark.parametrize(
    ("platform", "name", "changes", "reason"),
    [
        ("gpu", "cudnn", {"dtype": jnp.dtype(jnp.float32)}, "compute.dtype is float32"),
        ("gpu", "cudnn", {"has_bfloat16": False}, "compute capability 8.0"),
        ("gpu", "cudnn", {"dropout": 0.1}, "model.dropout"),
        ("cuda", "cudnn", {"document_mask": True}, "causal flag only"),
        ("gpu", "cudnn", {"head_width": 60}, "up to 128, and it is 60"),
        ("gpu", "cudnn", {"head_width": 256}, "up to 128, and it is 256"),
        ("tpu", "splash", {"dropout": 0.1}, "model.dropout"),
        ("tpu", "splash", {"block_size": 1000}, "multiple of 128, and it is 1000"),
    ],
)
def test_unfit_kernel_is_refused_by_name_but_skipped_by_auto(platform, name, changes, reason):
    assert choose(name, platform=platform) == (name, "")
    backend, why = choose("auto", platform=platform, **changes)
    assert backend == "xla"
    assert reason in why
    with raises(ConfigError, "compute.attention", value=name, remedy="compute.attention=auto", match=reason):
        choose(name, platform=platform, **changes)


@pytest.mark.parametrize(("name", "platform"), [("cudnn", "tpu"), ("cudnn", "cpu"), ("splash", "gpu")])
def test_a_kernel_of_another_platform_is_refused(name, platform):
    with raises(ConfigError, "compute.attention", value=name, remedy="auto", match=f"on {platform}"):
        choose(name, platform=platform)


# The TPU kernel, interpreted


@pytest.fixture(scope="module")
def long_qkv():
    return make_qkv(2, 256, 2, 64)


SEGMENTS_BT = np.asarray([[0] * 50 + [1] * 206, [0] * 255 + [1]], np.int32)


@pytest.mark.parametrize(("documents", "most_fused"), [(True, 2), (False, 2), (False, 1)])
def test_splash_and_its_gradients_equal_xla(long_qkv, documents, most_fused, monkeypatch):
    """With heads narrower than the lanes, and two blocks, over which the gradient of q is summed if it is fused."""
    monkeypatch.setattr(attention, "MOST_FUSED_BLOCKS", most_fused)
    segments_BT = jnp.asarray(SEGMENTS_BT) if documents else None
    weight_BTNH = jnp.asarray(np.random.default_rng(1).standard_normal(long_qkv[0].shape), jnp.float32)

    def with_gradients(attend):
        def weighted(qkv):
            y_BTNH = attend(*qkv, segments_BT=segments_BT)
            return jnp.sum(y_BTNH * weight_BTNH), y_BTNH

        (_, y_BTNH), gradients = jax.value_and_grad(weighted, has_aux=True)(long_qkv)
        return y_BTNH, *gradients

    splash = with_gradients(functools.partial(splash_attention, largest_block=128, interpret=True))
    xla = with_gradients(functools.partial(causal_attention, backend="xla"))
    for found, expected in zip(splash, xla, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    if documents:
        whole_BTNH = causal_attention(*long_qkv, backend="xla")
        assert not np.allclose(splash[0], whole_BTNH, atol=1e-3)


def test_splash_keeps_the_product_of_q_k_and_v_and_not_the_three(long_qkv):
    """For the backward pass, under the checkpoint of a layer that saves everything else."""
    qkv_BT3D = jnp.stack([x.reshape(2, 256, 128) for x in long_qkv], axis=2)

    def attend(qkv_BT3D, mark=recomputed):
        heads = mark(lambda x: [x[..., n, :].reshape(2, 256, 2, 64) for n in range(3)])(qkv_BT3D)
        return splash_attention(*heads, largest_block=128, interpret=True)

    def residuals(attend):
        _, backward = jax.vjp(attend, qkv_BT3D)
        return [x.shape for x in jax.tree.leaves(backward)]

    heads_BNTH = (2, 2, 256, 64)
    kept = jax.checkpoint(attend, policy=REMAT_POLICIES["none"])
    assert residuals(attend).count(heads_BNTH) == 4
    assert residuals(kept).count(heads_BNTH) == 1  # the result
    assert residuals(kept).count(qkv_BT3D.shape) == 1
    plain = functools.partial(attend, mark=lambda split: split)
    gradient, expected = (jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(qkv_BT3D) for f in (kept, plain))
    np.testing.assert_array_equal(gradient, expected)


def test_loop_with_splash_attention_stacks_no_q_k_and_v():
    config = GPTConfig(n_layer=3, n_head=2, n_embd=128, block_size=128, vocab_size=20)
    model = GPT(config, ResolvedCompute(attention="splash", scan_unroll=1))
    params = random_params(config)

    def loss(params, tokens_BT):
        return jnp.sum(model.apply({"params": params}, tokens_BT, method="hidden"))

    text = str(jax.make_jaxpr(jax.grad(loss))(params, jnp.zeros((1, 128), jnp.int32)))
    stacked = set(re.findall(r"(\w+):f32\[3,1,2,128,64\]", text))
    assert len(stacked) == 1, "only the result of attention"
    assert "f32[3,1,128,2,64]" not in text, "nor as slices of the product"
