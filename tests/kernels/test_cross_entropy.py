"""The Pallas kernels against plain JAX, run by its interpreter: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import loss
from gptjax.errors import ConfigError
from gptjax.kernels import cross_entropy as kernel
from tests.helpers import raises

M = 6
SHAPES = {  # columns, of which so many are no padding
    "less than a chunk": (100, 100),
    "padded": (128, 101),
    "a chunk": (4096, 4096),
    "three chunks, the last one short": (9000, 8200),
    "a chunk of padding": (9000, 4096),
}


def plain(logits_MV, targets_M, vocab_size):
    """The same in float32 by JAX's own functions."""
    column_1V = jnp.arange(logits_MV.shape[1])[None]
    wide_MV = jnp.where(column_1V < vocab_size, logits_MV.astype(jnp.float32), -jnp.inf)
    label_M = jnp.sum(jnp.where(column_1V == targets_M[:, None], wide_MV, 0.0), axis=1)
    return jax.nn.logsumexp(wide_MV, axis=1), label_M


@pytest.fixture(params=SHAPES)
def rows(request):
    """(logits, targets, vocab_size): logits of all sizes, the first, the last and no target, padding that is huge."""
    V, vocab_size = SHAPES[request.param]
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(M, V)) * np.array([[0.1], [3], [30], [3], [3], [100]])
    logits[:, vocab_size:] = 1e4
    logits[4] -= 50
    targets = np.array([0, vocab_size - 1, vocab_size // 2, -1, 7, 1], np.int32)
    return logits, jnp.asarray(targets), vocab_size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_equal_plain_jax(rows, dtype):
    logits, targets_M, vocab_size = rows
    logits_MV = jnp.asarray(logits, dtype)
    found = kernel.log_z_and_label(logits_MV, targets_M, vocab_size=vocab_size, interpret=True)
    for one, expected in zip(found, plain(logits_MV, targets_M, vocab_size), strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, expected, rtol=1e-6, atol=1e-6)


def test_gradients_equal_plain_jax(rows):
    logits, targets_M, vocab_size = rows
    logits_MV = jnp.asarray(logits, jnp.float32)

    def weighed(of, logits_MV):
        log_z_M, label_M = of(logits_MV, targets_M, vocab_size)
        return jnp.sum(log_z_M * jnp.arange(1.0, M + 1)) - jnp.sum(label_M * jnp.arange(2.0, M + 2))

    def interpreted(logits_MV, targets_M, vocab_size):
        return kernel.log_z_and_label(logits_MV, targets_M, vocab_size=vocab_size, interpret=True)

    grad_MV, expected_MV = (jax.grad(functools.partial(weighed, of))(logits_MV) for of in (interpreted, plain))
    np.testing.assert_allclose(grad_MV, expected_MV, rtol=1e-5, atol=1e-6)
    assert not np.asarray(grad_MV)[:, vocab_size:].any()


def test_gradient_has_the_dtype_of_the_logits():
    logits_MV, targets_M = jnp.ones((2, 10), jnp.bfloat16), jnp.array([1, 2])
    log_z = lambda x: kernel.log_z_and_label(x, targets_M, vocab_size=10, interpret=True)[0].sum()  # noqa: E731
    grad_MV = jax.grad(log_z)(logits_MV)
    assert grad_MV.dtype == jnp.bfloat16


def test_nan_logit_gives_a_nan_log_z():
    logits_MV = jnp.ones((2, 9000)).at[1, 3].set(jnp.nan)
    log_z_M, _ = kernel.log_z_and_label(logits_MV, jnp.array([1, 2]), vocab_size=9000, interpret=True)
    assert np.isnan(log_z_M).tolist() == [False, True]


@pytest.mark.parametrize("chunk", [0, 4])
def test_loss_with_the_kernel_equals_loss_with_xla(monkeypatch, chunk):
    by_kernel, shapes = kernel.log_z_and_label, []

    def interpreted(logits_MV, targets_M, *, vocab_size):
        shapes.append(logits_MV.shape)
        return by_kernel(logits_MV, targets_M, vocab_size=vocab_size, interpret=True)

    monkeypatch.setattr(kernel, "log_z_and_label", interpreted)
    keys = jax.random.split(jax.random.key(0), 3)
    x_BTD, head_DV = jax.random.normal(keys[0], (2, 8, 16)), jax.random.normal(keys[1], (16, 128))
    targets_BT = jax.random.randint(keys[2], (2, 8), 0, 101).at[1, 3].set(-1)

    def summed(backend, *of):
        sums = loss.cross_entropy(*of, targets_BT, vocab_size=101, chunk=chunk, backend=backend)
        return sums.loss + 0.1 * sums.z_loss, sums

    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(summed, backend), argnums=(0, 1), has_aux=True))(x_BTD, head_DV)
        for backend in ("triton", "xla")
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-5)
    by_token, by_xla = (
        loss.token_losses(x_BTD, head_DV, targets_BT, vocab_size=101, chunk=chunk, backend=backend)
        for backend in ("triton", "xla")
    )
    np.testing.assert_allclose(by_token, by_xla, rtol=1e-5, atol=1e-5)
    assert set(shapes) == {(2 * (chunk or 8), 128)}


@pytest.mark.parametrize(
    ("platform", "tensor", "named"), [("cpu", 1, " cpu"), ("tpu", 1, " tpu"), ("cuda", 2, r"mesh\.tensor .*2")]
)
def test_triton_loss_is_refused_where_it_cannot_run(platform, tensor, named):
    with raises(ConfigError, "compute.loss", value="triton", remedy="compute.loss=xla", match=named):
        loss.choose_loss("triton", platform=platform, tensor=tensor)


def test_choose_loss_accepts_supported_backends():
    assert loss.choose_loss("triton", platform="cuda", tensor=1) == "triton"
    assert loss.choose_loss("xla", platform="tpu", tensor=8) == "xla"
