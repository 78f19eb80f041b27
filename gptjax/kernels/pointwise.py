"""LayerNorm and GELU that keep only their input for the backward pass, and compute in float32 whatever its dtype.

Left to differentiate itself, each keeps several float32 arrays of its input's size: half of all activation memory.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# The tanh form of GELU, which is GPT-2's: 0.5 x (1 + tanh(SCALE (x + CUBIC x^3))).
# It differs from the exact form by at most 5e-4.
SCALE = math.sqrt(2 / math.pi)
CUBIC = 0.044715


class NormResiduals(NamedTuple):
    """The arrays that layer_norm keeps for its backward pass."""

    x: jax.Array  # [..., D], in the dtype that it came in
    mean: jax.Array  # float32 [..., 1]
    inverse: jax.Array  # float32 [..., 1]: 1 / standard deviation
    scale_D: jax.Array
    bias_D: jax.Array | None


def _barrier_on_gpu(residuals: Any) -> Any:
    """Returns `residuals` behind an optimization barrier on GPUs.

    Without the barrier XLA keeps GELU's tanh, which forward and backward both compute, in float32: twice the bytes of
    x. It also recomputes LayerNorm's mean, which keeps it from summing over rows in the same pass. On a TPU the barrier
    would separate matmuls from the sums that XLA fuses with them.
    """
    # Decided when the program is lowered, not by the devices here: a plan compiles for GPUs that are not present.
    return jax.lax.platform_dependent(
        residuals,
        cuda=jax.lax.optimization_barrier,
        default=lambda residuals: residuals,
    )


def gelu(
    x: jax.Array,
    bias_F: jax.Array | None = None,
    *,
    approximate: bool = True,
) -> jax.Array:
    """Returns GELU of x + bias, in x's dtype; the backward pass keeps only x and the bias.

    x: [..., F], the product of a linear layer before its bias. bias_F: float32 [F].
    approximate: the tanh form; otherwise the exact one, x times the normal distribution function of x.

    Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", section 2.
    """
    return _gelu(x, bias_F, approximate)


# custom_vjp takes positional arguments only, hence this second function.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gelu(
    x: jax.Array,
    bias_F: jax.Array | None,
    approximate: bool,
) -> jax.Array:
    # The bias is added in x's dtype, as a linear layer would; only the activation is in float32.
    wide = add_bias(x, bias_F).astype(jnp.float32)
    return jax.nn.gelu(wide, approximate=approximate).astype(x.dtype)


def _gelu_backward(
    approximate: bool,
    residuals: Any,
    g: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    # The barrier holds the residuals and g together, so that XLA cannot start on the residuals in the forward pass.
    (x, bias_F), g = _barrier_on_gpu((residuals, g))
    wide = add_bias(x, bias_F).astype(jnp.float32)
    # In float32, like the forward pass.
    slope = _tanh_slope(wide) if approximate else _exact_slope(wide)
    x_g = slope * g.astype(jnp.float32)
    x_g = x_g.astype(x.dtype)
    if bias_F is None:
        return x_g, None
    # Summed in x's dtype, as the product's own bias would be: widened here, XLA writes a copy of x_g in float32.
    # jnp.sum would widen by itself, hence lax.reduce.
    leading = tuple(range(x.ndim - 1))
    zero = jnp.zeros((), x.dtype)
    bias_g = jax.lax.reduce(x_g, zero, jax.lax.add, leading)
    return x_g, bias_g.astype(bias_F.dtype)


def _tanh_slope(x: jax.Array) -> jax.Array:
    """Returns the derivative of the tanh form at float32 x."""
    tanh = jnp.tanh(SCALE * (x + CUBIC * x**3))
    # The product rule: x's own factor, and the derivative of tanh, which is 1 - tanh^2, times that of its argument.
    slope = 0.5 * (1 + tanh)
    return slope + 0.5 * x * (1 - tanh**2) * SCALE * (1 + 3 * CUBIC * x**2)


def _exact_slope(x: jax.Array) -> jax.Array:
    """Returns the derivative of the exact form at float32 x: the normal distribution function plus x times its density.

    The function comes from erfc, as in jax.nn.gelu: for large negative x, 1 + erf would lose all digits.
    """
    distribution = 0.5 * jax.lax.erfc(-x * math.sqrt(0.5))
    density = jnp.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
    return distribution + x * density


# The first function is the forward pass: (result, residuals).
_gelu.defvjp(
    lambda x, bias_F, approximate: (_gelu(x, bias_F, approximate), (x, bias_F)),
    _gelu_backward,
)


def add_bias(
    x: jax.Array,
    bias_F: jax.Array | None,
) -> jax.Array:
    """Returns x [..., *F] plus a bias [*F], in x's dtype; x itself if there is no bias."""
    if bias_F is None:
        return x
    # Broadcast explicitly: the tests raise on implicit promotion of ranks and dtypes.
    leading = (1,) * (x.ndim - bias_F.ndim)
    bias = bias_F.astype(x.dtype)
    return x + bias.reshape(leading + bias_F.shape)


def layer_norm(
    x: jax.Array,
    scale_D: jax.Array,
    bias_D: jax.Array | None,
    *,
    epsilon: float,
) -> jax.Array:
    """Returns x [..., D] with mean 0 and variance 1 along D, scaled and shifted; in x's dtype.

    scale_D, bias_D: float32 [D]. The variance takes two passes: real GPT-2 weights make activations whose squares
    cancel badly in one.
    """
    return _layer_norm(x, scale_D, bias_D, epsilon)


# custom_vjp takes positional arguments only, hence this second function.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(
    x: jax.Array,
    scale_D: jax.Array,
    bias_D: jax.Array | None,
    epsilon: float,
) -> jax.Array:
    y, _ = _normalize(x, scale_D, bias_D, epsilon)
    return y


def _normalize(
    x: jax.Array,
    scale_D: jax.Array,
    bias_D: jax.Array | None,
    epsilon: float,
) -> tuple[jax.Array, NormResiduals]:
    wide = x.astype(jnp.float32)
    mean = _row_means(wide)
    squares = jnp.square(wide - mean)
    variance = _row_means(squares)
    inverse = jax.lax.rsqrt(variance + epsilon)
    # The order of these products is part of a run's bits.
    y = (wide - mean) * (inverse * _broadcast(scale_D, x))
    if bias_D is not None:
        y = y + _broadcast(bias_D, x)
    # x is kept in its own dtype, and mean and inverse are D times smaller: normalised values are recomputed.
    residuals = NormResiduals(x, mean, inverse, scale_D, bias_D)
    return y.astype(x.dtype), residuals


def _layer_norm_backward(
    epsilon: float,
    residuals: NormResiduals,
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    x, mean, inverse, scale_D, bias_D = residuals
    x, mean, inverse, g = _barrier_on_gpu((x, mean, inverse, g))
    wide_g = g.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean) * inverse
    normed_g = wide_g * _broadcast(scale_D, x)
    # The gradient of x has no part along the two directions that normalisation removes: the mean, and x itself.
    # A program is lowered for one platform, and has that form alone.
    along_mean, along_x = jax.lax.platform_dependent(
        wide_g,
        normed,
        scale_D,
        cpu=_gradient_means_on_cpu,
        default=_gradient_means,
    )
    x_g = inverse * (normed_g - along_mean - normed * along_x)
    x_g = x_g.astype(x.dtype)
    # Parameters are float32, and so are the sums over all tokens.
    leading = tuple(range(x.ndim - 1))
    scale_g = jnp.sum(wide_g * normed, leading)
    if bias_D is None:
        return x_g, scale_g, None
    return x_g, scale_g, jnp.sum(wide_g, leading)


def _gradient_means(
    g: jax.Array,
    normed: jax.Array,
    scale_D: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the means along D of g * scale and of g * scale * normed, float32 [..., 1]; all arrays are float32."""
    # XLA fuses this product with both sums on GPUs and TPUs.
    normed_g = g * _broadcast(scale_D, g)
    along_mean = jnp.mean(normed_g, axis=-1, keepdims=True)
    along_x = jnp.mean(normed_g * normed, axis=-1, keepdims=True)
    return along_mean, along_x


def _gradient_means_on_cpu(
    g: jax.Array,
    normed: jax.Array,
    scale_D: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the same as `_gradient_means`, as products with the scale."""
    # g * normed is stored once: the gradient of the scale is its sum over all tokens. g * scale is not stored: the
    # product with the scale is its sum.
    return _row_products(g, scale_D) / len(scale_D), _row_products(g * normed, scale_D) / len(scale_D)


def _row_means(x: jax.Array) -> jax.Array:
    """Returns the means of float32 x [..., D] along D, [..., 1]."""
    # The two forms differ in the order of their sums, and so in the last bits.
    return jax.lax.platform_dependent(
        x,
        cpu=lambda x: _row_products(x, jnp.ones(x.shape[-1])) / x.shape[-1],
        default=lambda x: jnp.mean(x, axis=-1, keepdims=True),
    )


def _row_products(
    x: jax.Array,
    vector_D: jax.Array,
) -> jax.Array:
    """Returns the products of the rows of x [..., D] with a vector, [..., 1].

    On a CPU these are twice as fast as sums along D, which XLA computes without vector instructions.
    """
    # The last dimension is contracted; there are no batch dimensions, so this is one product for all rows.
    contracting = ((x.ndim - 1,), (0,))
    no_batch = ((), ())
    return jax.lax.dot_general(x, vector_D, (contracting, no_batch))[..., None]


def _broadcast(
    vector_D: jax.Array,
    x: jax.Array,
) -> jax.Array:
    leading = (1,) * (x.ndim - 1)  # ranks are never promoted implicitly
    return vector_D.astype(jnp.float32).reshape(leading + vector_D.shape)


_layer_norm.defvjp(_normalize, _layer_norm_backward)
