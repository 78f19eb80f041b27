"""The Pallas kernels against plain JAX, run by its interpreter: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from gptjax import loss
from gptjax.errors import ConfigError
from gptjax.kernels import cross_entropy as kernel
from tests.helpers import raises

M, D = 6, 8
SHAPES = {  # (columns, vocabulary size): the rest is padding; a chunk has 4096
    "less than a chunk": (100, 100),
    "padded": (128, 101),
    "a chunk": (4096, 4096),
    "three chunks, the last one short": (9000, 8200),
    "a chunk of padding": (9000, 4096),
}
Z_WEIGHTS = [0.0, 0.1]


def plain(x_MD, head_DV, targets_M, *, vocab_size):
    """The same in float32 by JAX's own functions."""
    # Without the barrier, XLA leaves out the rounding of the product to bfloat16.
    logits_MV = jax.lax.optimization_barrier(x_MD @ head_DV).astype(jnp.float32)
    column_1V = jnp.arange(head_DV.shape[1])[None]
    logits_MV = jnp.where(column_1V < vocab_size, logits_MV, -jnp.inf)
    label_M = jnp.sum(jnp.where(column_1V == targets_M[:, None], logits_MV, 0.0), axis=1)
    log_z_M = jax.nn.logsumexp(logits_MV, axis=1)
    return log_z_M - label_M, log_z_M


interpreted = functools.partial(kernel.linear_cross_entropy, interpret=True)


def results(function, x_MD, head_DV, targets_M, *, vocab_size, z_weight=0.1):
    """Returns ((nats, log Z), gradients of x and of the head), where row n of M has weight n + 1."""
    weights_M = jnp.arange(1.0, len(targets_M) + 1)

    def weighed(x_MD, head_DV):
        nats_M, log_z_M = function(x_MD, head_DV, targets_M, vocab_size=vocab_size)
        total = jnp.sum((nats_M + z_weight * jnp.square(log_z_M)) * weights_M)
        return total, (nats_M, log_z_M)

    (_, values), grads = jax.jit(jax.value_and_grad(weighed, argnums=(0, 1), has_aux=True))(x_MD, head_DV)
    return values, grads


def assert_near(found, expected, limit):
    """Compares arrays by their largest entry."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.abs(found - expected).max() <= limit * max(1.0, np.abs(expected).max())


def equations(jaxpr):
    """Yields those of a jaxpr and of all within it that contain no others; a Pallas kernel is one of them."""
    for equation in jaxpr.eqns:
        is_one = equation.primitive.name in ("pallas_call", "scatter-add")
        inner = [] if is_one else list(jaxprs_in_params(equation.params))
        for one in inner:
            yield from equations(one)
        if not inner:
            yield equation


def kernel_calls(jaxpr):
    return [one for one in equations(jaxpr) if one.primitive.name == "pallas_call"]


@pytest.fixture(params=SHAPES)
def rows(request, monkeypatch):
    """(x, head, targets, vocab_size): logits of all sizes, the first, the last and no target, padding that is huge."""
    monkeypatch.setattr(kernel, "CHUNK", 4096)
    V, vocab_size = SHAPES[request.param]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(M, D)) * np.array([[0.1], [1], [10], [1], [1], [3]])
    head = rng.normal(size=(D, V))
    x[:, 0], head[0] = [0, 0, 0, 0, -50, 0], 1
    head[:, vocab_size:] = 1e4
    targets = np.array([0, vocab_size - 1, vocab_size // 2, -1, 7, 1], np.int32)
    return jnp.asarray(x, jnp.float32), jnp.asarray(head, jnp.float32), jnp.asarray(targets), vocab_size


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("bfloat16", 3 * 2**-8)])
def test_values_and_gradients_equal_plain_jax(rows, dtype, limit):
    x_MD, head_DV, targets_M, vocab_size = rows
    if dtype == "float32":
        # Multiples of 1/16 have exact products and sums, so that the logits do not depend on the order of the matmul.
        x_MD, head_DV = jnp.round(16 * x_MD) / 16, jnp.round(16 * head_DV) / 16
    arrays = x_MD.astype(dtype), head_DV.astype(dtype), targets_M
    values, grads = results(interpreted, *arrays, vocab_size=vocab_size)
    expected_values, expected_grads = results(plain, *arrays, vocab_size=vocab_size)
    alone = interpreted(*arrays, vocab_size=vocab_size)  # without the gradient
    for found in (values, alone):
        for one, expected in zip(found, expected_values, strict=True):
            assert one.dtype == jnp.float32
            np.testing.assert_allclose(one, expected, rtol=1e-6, atol=1e-6)
    for one, expected in zip(grads, expected_grads, strict=True):
        assert one.dtype == dtype
        assert_near(one, expected, limit)
    assert not np.asarray(grads[1])[:, vocab_size:].any()


def test_gradient_of_log_z_alone_equals_plain_jax():
    x_MD, head_DV = jnp.ones((2, 3)), jnp.arange(30.0).reshape(3, 10) / 10

    def log_z(function, x_MD):
        return function(x_MD, head_DV, jnp.array([1, -1]), vocab_size=9)[1].sum()

    found, expected = (jax.grad(functools.partial(log_z, function))(x_MD) for function in (interpreted, plain))
    assert_near(found, expected, 1e-6)


def test_z_loss_of_a_frequent_token_is_summed_in_float32():
    """In bfloat16, 256 is the largest sum of ones."""
    rows = 2048
    x_MD, head_DV = jnp.ones((rows, 1), jnp.bfloat16), jnp.zeros((1, 2), jnp.bfloat16)

    def log_z(head_DV):
        return interpreted(x_MD, head_DV, jnp.zeros(rows, jnp.int32), vocab_size=2)[1].sum()

    np.testing.assert_allclose(jax.grad(log_z)(head_DV).astype(jnp.float32), [[rows / 2, rows / 2]], rtol=2**-8)


def test_nan_logit_gives_nan_only_in_its_row():
    x_MD, head_DV = jnp.ones((2, 1)).at[1].set(jnp.nan), jnp.ones((1, 9000))
    arguments = head_DV, jnp.array([1, 2])
    (nats_M, log_z_M), vjp = jax.vjp(lambda x: interpreted(x, *arguments, vocab_size=9000), x_MD)
    [grad_MD] = vjp((jnp.ones(2), jnp.ones(2)))
    for found in (nats_M, log_z_M, grad_MD[:, 0]):
        assert np.isnan(found).tolist() == [False, True]


@pytest.fixture
def batch():
    """(x, head, targets): two targets do not count."""
    keys = jax.random.split(jax.random.key(0), 3)
    x_BTD, head_DV = jax.random.normal(keys[0], (2, 8, 24)), jax.random.normal(keys[1], (24, 128))
    return x_BTD, head_DV, jax.random.randint(keys[2], (2, 8), 0, 101).at[1, 3:5].set(-1)


def objective(backend, z_weight, x_BTD, head_DV, targets_BT, *, chunk):
    sums = loss.cross_entropy(x_BTD, head_DV, targets_BT, vocab_size=101, chunk=chunk, backend=backend)
    return sums.loss + z_weight * sums.z_loss if z_weight else sums.loss, sums


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("z_weight", Z_WEIGHTS)
def test_loss_with_the_kernel_equals_loss_with_xla(monkeypatch, batch, chunk, z_weight):
    shapes = []

    def recorded(x_MD, *others, vocab_size):
        shapes.append(x_MD.shape)
        return interpreted(x_MD, *others, vocab_size=vocab_size)

    monkeypatch.setattr(kernel, "linear_cross_entropy", recorded)
    found, expected = (
        jax.jit(
            jax.value_and_grad(
                functools.partial(objective, backend, z_weight, chunk=chunk), argnums=(0, 1), has_aux=True
            )
        )(*batch)
        for backend in ("triton", "xla")
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        assert_near(one, other, 1e-6)
    grad_BTD = found[1][0]
    assert not np.asarray(grad_BTD)[1, 3:5].any(), "targets that do not count"
    by_token, by_xla = (
        loss.token_losses(*batch, vocab_size=101, chunk=chunk, backend=backend) for backend in ("triton", "xla")
    )
    assert_near(by_token, by_xla, 1e-6)
    assert set(shapes) == {(2 * (chunk or 8), 24)}


@pytest.mark.parametrize("chunk", [0, 4])
def test_backward_pass_reads_the_gradient_in_two_matmuls_only(batch, chunk):
    """No other operation has an array of the logits' size; without z-loss nothing looks tokens up in the head."""
    size = 2 * (chunk or 8) * 128
    for z_weight in Z_WEIGHTS:
        function = functools.partial(objective, "triton", z_weight, chunk=chunk)
        jaxpr = jax.make_jaxpr(jax.grad(function, argnums=(0, 1), has_aux=True))(*batch).jaxpr
        logits = [
            one.primitive.name
            for one in equations(jaxpr)
            if any((v.aval.size, 128 in v.aval.shape) == (size, True) for v in (*one.invars, *one.outvars))
        ]
        # In chunks the logits are computed twice.
        assert logits == ["dot_general", "pallas_call"] * (2 if chunk else 1) + ["dot_general"] * 2
        lookups = [one for one in equations(jaxpr) if one.primitive.name in ("gather", "scatter-add")]
        assert len(lookups) == (2 if z_weight else 0)


def test_gradient_is_written_in_place_and_only_if_asked_for(batch):
    function = functools.partial(objective, "triton", 0.0, chunk=0)
    jaxpr = jax.make_jaxpr(jax.grad(function, has_aux=True))(*batch).jaxpr
    [call] = kernel_calls(jaxpr)
    assert call.params["input_output_aliases"] == ((0, 2),)
    assert call.outvars[2].aval.shape == call.invars[0].aval.shape == (16, 128)
    for function in (loss.cross_entropy, loss.token_losses):
        jaxpr = jax.make_jaxpr(functools.partial(function, vocab_size=101, backend="triton"))(*batch).jaxpr
        [call] = kernel_calls(jaxpr)
        assert [one.aval.shape for one in call.outvars] == [(16,), (16,)]


@pytest.mark.parametrize(
    ("platform", "tensor", "named"), [("cpu", 1, " cpu"), ("tpu", 1, " tpu"), ("cuda", 2, r"mesh\.tensor .*2")]
)
def test_triton_loss_is_refused_where_it_cannot_run(platform, tensor, named):
    with raises(ConfigError, "compute.loss", value="triton", remedy="compute.loss=xla", match=named):
        loss.choose_loss("triton", platform=platform, tensor=tensor)


def test_choose_loss_accepts_supported_backends():
    assert loss.choose_loss("triton", platform="cuda", tensor=1) == "triton"
    assert loss.choose_loss("xla", platform="tpu", tensor=8) == "xla"
