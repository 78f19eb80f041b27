"""LayerNorm and GELU with their own backward passes, beside what JAX derives."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.kernels.pointwise import gelu, layer_norm

ACTIVATIONS = {"gelu_new": True, "gelu": False}


def arrays(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    x, g = (jax.random.normal(key, (6, 5, 16)).astype(dtype) for key in keys[:2])
    return x, *(jax.random.normal(key, (16,)) for key in keys[2:]), g


def plain_gelu(x, bias_F, *, approximate):
    return jax.nn.gelu(x + (0 if bias_F is None else bias_F[None, None]), approximate=approximate)


FORMS = {name: functools.partial(gelu, approximate=approximate) for name, approximate in ACTIVATIONS.items()}


def plain_layer_norm(x, scale_D, bias_D):
    mean, var = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
    y = (x - mean) / jnp.sqrt(var + 1e-5) * scale_D[None, None]
    return y if bias_D is None else y + bias_D[None, None]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("biased", [True, False])
def test_gelu_and_its_gradients_equal_plain_jax(biased, name):
    x, bias_F, _, g = arrays()
    given = (x, bias_F if biased else None)
    plain = functools.partial(plain_gelu, approximate=ACTIVATIONS[name])
    (y, back), (expected, plain_back) = jax.vjp(FORMS[name], *given), jax.vjp(plain, *given)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(back(g)), jax.tree.leaves(plain_back(g)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_both_forms_of_gelu_have_their_own_values_and_slopes():
    """By the formulas, in float64: x Phi(x) with the error function, and its tanh form."""
    x = np.linspace(-9, 9, 1801)
    phi = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])
    exact = x * phi, phi + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    tanh = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    approximate = 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * inner
    assert 4e-4 < np.abs(exact[0] - approximate[0]).max() < 5e-4
    # 1 + tanh has few digits left where tanh is near -1, and x multiplies what it lacks.
    for name, (value, slope), lost in (("gelu", exact, 1e-6), ("gelu_new", approximate, 5e-6)):
        y, back = jax.vjp(FORMS[name], jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(y, value, rtol=0, atol=lost)
        np.testing.assert_allclose(back(jnp.ones_like(y))[0], slope, rtol=0, atol=lost)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gelu_bias_equals_a_separate_bfloat16_addition(name):
    gelu = FORMS[name]
    x, bias_F, _, g = arrays(jnp.bfloat16)
    (y, back) = jax.vjp(gelu, x, bias_F)
    (separate, back_separate) = jax.vjp(lambda x, b: gelu(x + b.astype(x.dtype)[None, None]), x, bias_F)
    np.testing.assert_array_equal(y, separate)
    for ours, theirs in zip(back(g), back_separate(g), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [one.dtype for one in back(g)] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("platform", ["cpu", "default"])
@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm_and_its_gradients_equal_plain_jax(biased, platform, monkeypatch):
    """With the sums of a CPU, and with those of the other platforms, computed on this CPU."""
    barrier = {"cuda": None, "cpu": lambda residuals: residuals}
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, **forms: (barrier | forms)[platform](*a))
    x, scale_D, bias_D, g = arrays()
    given = (x, scale_D, bias_D if biased else None)
    (y, back) = jax.vjp(lambda *a: layer_norm(*a, epsilon=1e-5), *given)
    (expected, plain_back) = jax.vjp(plain_layer_norm, *given)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(back(g)), jax.tree.leaves(plain_back(g)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [*FORMS.values(), lambda x, b: layer_norm(x, b, b, epsilon=1e-5)])
def test_residuals_pass_an_optimization_barrier_only_on_gpu(function):
    x, bias_F, _, _ = arrays()
    gradient = jax.jit(jax.grad(lambda x, b: jnp.sum(function(x, b)), argnums=(0, 1)))
    lowered = {name: gradient.trace(x, bias_F).lower(lowering_platforms=(name,)).as_text() for name in ("cuda", "tpu")}
    assert "optimization_barrier" in lowered["cuda"]
    assert "optimization_barrier" not in lowered["tpu"]
