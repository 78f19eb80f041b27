"""Cross-entropy against values by hand, whole and in chunks."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.loss import NOT_COUNTED, cross_entropy, masked_logits, token_losses

B, T, D, V = 2, 8, 4, 6


def make_inputs(vocab=V, length=T):
    rng = np.random.default_rng(0)
    x_BTD = jnp.asarray(rng.standard_normal((B, length, D)), jnp.float32)
    head_DV = jnp.asarray(rng.standard_normal((D, vocab)), jnp.float32)
    targets_BT = rng.integers(V, size=(B, length))
    targets_BT[0, 3] = targets_BT[1, 5:7] = -1
    return x_BTD, head_DV, jnp.asarray(targets_BT, jnp.int32)


def test_cross_entropy_equals_values_by_hand():
    """Probabilities 1/2, 1/4, 1/4 and 1/8, 1/8, 3/4 as logits of logarithms: the losses are theirs, and so is log Z."""
    x_BTD = jnp.eye(2)[None]
    head_DV = jnp.log(jnp.asarray([[2.0, 1.0, 1.0], [1.0, 1.0, 6.0]]))
    sums = cross_entropy(x_BTD, head_DV, jnp.asarray([[0, 2]]), vocab_size=3)
    assert float(sums.loss) == pytest.approx(math.log(2) + math.log(8 / 6), rel=1e-6)
    assert float(sums.z_loss) == pytest.approx(math.log(4) ** 2 + math.log(8) ** 2, rel=1e-6)
    assert float(sums.tokens) == 2


def test_cross_entropy_equals_numpy_with_ignored_targets():
    x_BTD, head_DV, targets_BT = make_inputs()
    sums = cross_entropy(x_BTD, head_DV, targets_BT, vocab_size=V)
    logits_BTV = np.asarray(x_BTD, np.float64) @ np.asarray(head_DV, np.float64)
    log_z_BT = np.log(np.exp(logits_BTV).sum(axis=-1))
    counted = [(b, t) for b in range(B) for t in range(T) if targets_BT[b, t] >= 0]
    assert len(counted) == B * T - 3
    assert float(sums.tokens) == len(counted)
    expected = sum(log_z_BT[b, t] - logits_BTV[b, t, targets_BT[b, t]] for b, t in counted)
    assert float(sums.loss) == pytest.approx(expected, rel=1e-5)
    assert float(sums.z_loss) == pytest.approx(sum(log_z_BT[b, t] ** 2 for b, t in counted), rel=1e-5)


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("target", [-1, -100])
def test_no_target_at_all_gives_zeros_and_no_nan(chunk, target):
    x_BTD, head_DV, targets_BT = make_inputs()

    def loss(x_BTD, head_DV):
        sums = cross_entropy(x_BTD, head_DV, jnp.full_like(targets_BT, target), vocab_size=V, chunk=chunk)
        return sums.loss + sums.z_loss, sums

    (_, sums), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x_BTD, head_DV)
    assert [float(s) for s in sums] == [0.0, 0.0, 0.0]
    assert not any(grad.any() or jnp.isnan(grad).any() for grad in grads)


def test_sums_are_float32_from_bfloat16():
    x_BTD, head_DV, targets_BT = make_inputs()
    sums = cross_entropy(x_BTD.astype(jnp.bfloat16), head_DV, targets_BT, vocab_size=V)
    exact = cross_entropy(x_BTD, head_DV, targets_BT, vocab_size=V)
    assert {s.dtype for s in sums} == {jnp.dtype(jnp.float32)}
    assert sums.loss != exact.loss
    assert float(sums.loss) == pytest.approx(float(exact.loss), rel=0.02)


def test_padding_columns_do_not_affect_loss_or_gradient():
    x_BTD, head_DV, targets_BT = make_inputs()
    padded_DV = jnp.concatenate([head_DV, jnp.full((D, 2), 50.0)], axis=1)

    def loss(head_DV, vocab_size):
        sums = cross_entropy(x_BTD, head_DV, targets_BT, vocab_size=vocab_size)
        return sums.loss + sums.z_loss

    value, grad_DV = jax.value_and_grad(loss)(padded_DV, V)
    assert float(loss(padded_DV, V + 2)) > float(value) + 1
    assert float(value) == pytest.approx(float(loss(head_DV, V)), rel=1e-6)
    assert not grad_DV[:, V:].any()
    assert grad_DV[:, :V].all()
    logits_BTV = masked_logits(x_BTD, padded_DV, V)
    assert logits_BTV.dtype == jnp.float32
    assert (logits_BTV[..., V:] == jnp.finfo(jnp.float32).min).all()
    assert not jax.nn.softmax(logits_BTV)[..., V:].any()


# In chunks


def value_and_grads(chunk, vocab=V, length=T):
    x_BTD, head_DV, targets_BT = make_inputs(vocab, length)

    def loss(x_BTD, head_DV):
        sums = cross_entropy(x_BTD, head_DV, targets_BT, vocab_size=V, chunk=chunk)
        return sums.loss + 0.1 * sums.z_loss, sums

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)).trace(x_BTD, head_DV), (x_BTD, head_DV)


@functools.cache
def unchunked():
    traced, arguments = value_and_grads(0, vocab=8)
    return str(traced.jaxpr), traced.lower().compile()(*arguments)


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_chunks_change_neither_value_nor_gradient(chunk):
    traced, arguments = value_and_grads(chunk, vocab=8)
    jaxpr, expected = unchunked()
    assert str(traced.jaxpr) != jaxpr
    assert "scan" in str(traced.jaxpr)
    found = traced.lower().compile()(*arguments)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)


def test_chunk_of_full_length_gives_the_unchunked_program():
    traced, _ = value_and_grads(T, vocab=8)
    assert str(traced.jaxpr) == unchunked()[0]


def largest_float32(chunk):
    """Returns the elements of the largest float32 array in the compiled program, and its temporary bytes."""
    compiled = value_and_grads(chunk, vocab=512, length=64)[0].lower().compile()
    shapes = re.findall(r"\bf32\[([\d,]+)\]", compiled.as_text())
    sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
    return max(sizes), compiled.memory_analysis().temp_size_in_bytes


def test_the_full_logits_never_exist_in_chunks():
    whole, whole_bytes = largest_float32(0)
    chunked, chunked_bytes = largest_float32(8)
    assert whole == B * 64 * 512
    assert whole_bytes >= 4 * B * 64 * 512
    assert chunked <= B * 8 * 512
    assert chunked_bytes < whole_bytes / 2


@pytest.mark.parametrize("chunk", [0, 4])
def test_token_losses_sum_to_the_cross_entropy(chunk):
    x_BTD, head_DV, targets_BT = make_inputs()
    sums = cross_entropy(x_BTD, head_DV, targets_BT, vocab_size=V)
    losses_BT = token_losses(x_BTD, head_DV, targets_BT, vocab_size=V, chunk=chunk)
    counted = np.asarray(targets_BT) >= 0
    assert losses_BT.shape == (B, T)
    assert set(np.asarray(losses_BT)[~counted].tolist()) == {NOT_COUNTED}
    assert np.asarray(losses_BT)[counted].sum() == pytest.approx(float(sums.loss), rel=1e-6)
    assert np.asarray(losses_BT)[counted].min() > 0
    assert len(set(np.asarray(losses_BT)[counted].tolist())) == counted.sum()
