"""LayerNorm and GELU that keep only their input for the backward pass, and compute in float32 whatever its dtype.

Left to differentiate itself, each keeps several float32 arrays of its input's size: half of all activation memory.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

SCALE = math.sqrt(2 / math.pi)
CUBIC = 0.044715


def _as_given(kept: Any) -> Any:
    """Returns `kept`, of which XLA's GPU compiler may not see where it comes from.

    Else it keeps GELU's tanh, which forward and backward both compute, in float32: twice the bytes of x; and computes
    LayerNorm's mean again, which hinders it from summing over rows in the same pass. On a TPU this would cut products
    from the sums that XLA computes with them.
    """
    return jax.lax.platform_dependent(kept, cuda=jax.lax.optimization_barrier, default=lambda kept: kept)


@jax.custom_vjp
def gelu(x: jax.Array, bias_F: jax.Array | None = None) -> jax.Array:
    """Returns GELU of `x` [..., F] plus a bias, by its tanh form; what is kept is `x`, as the product gave it.

    Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", section 2.
    """
    return jax.nn.gelu(_add(x, bias_F).astype(jnp.float32), approximate=True).astype(x.dtype)


def _gelu_backward(kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    (x, bias_F), g = _as_given((kept, g))
    wide = _add(x, bias_F).astype(jnp.float32)
    tanh = jnp.tanh(SCALE * (wide + CUBIC * wide**3))
    slope = 0.5 * (1 + tanh) + 0.5 * wide * (1 - tanh**2) * SCALE * (1 + 3 * CUBIC * wide**2)
    x_g = (slope * g.astype(jnp.float32)).astype(x.dtype)
    if bias_F is None:
        return x_g, None
    # In x's dtype, as the product's own bias would be: widened here, XLA writes a copy of x_g in float32.
    return x_g, jax.lax.reduce(x_g, jnp.zeros((), x.dtype), jax.lax.add, tuple(range(x.ndim - 1))).astype(bias_F.dtype)


def _add(x: jax.Array, bias_F: jax.Array | None) -> jax.Array:
    return x if bias_F is None else x + bias_F.astype(x.dtype).reshape((1,) * (x.ndim - 1) + bias_F.shape)


gelu.defvjp(lambda x, bias_F=None: (gelu(x, bias_F), (x, bias_F)), _gelu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, epsilon: float) -> jax.Array:
    """Returns `x` [..., D] with mean 0 and variance 1 along D, scaled and shifted; in x's dtype.

    The variance in two passes: real GPT-2 weights make activations whose squares cancel badly in one.
    """
    return _normalize(x, scale_D, bias_D, epsilon)[0]


def _normalize(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, epsilon: float) -> tuple[jax.Array, Any]:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True) + epsilon)
    y = (wide - mean) * (inverse * _last(scale_D, x))
    y = y if bias_D is None else y + _last(bias_D, x)
    return y.astype(x.dtype), (x, mean, inverse, scale_D, bias_D)


def _layer_norm_backward(epsilon: float, kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    x, mean, inverse, scale_D, bias_D = kept
    x, mean, inverse, g = _as_given((x, mean, inverse, g))
    wide, normed = g.astype(jnp.float32), (x.astype(jnp.float32) - mean) * inverse
    scaled, rows = wide * _last(scale_D, x), tuple(range(x.ndim - 1))
    along = jnp.mean(scaled * normed, axis=-1, keepdims=True)
    x_g = inverse * (scaled - jnp.mean(scaled, axis=-1, keepdims=True) - normed * along)
    return x_g.astype(x.dtype), jnp.sum(wide * normed, rows), None if bias_D is None else jnp.sum(wide, rows)


def _last(vector_D: jax.Array, x: jax.Array) -> jax.Array:
    return vector_D.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + vector_D.shape)


layer_norm.defvjp(_normalize, _layer_norm_backward)
