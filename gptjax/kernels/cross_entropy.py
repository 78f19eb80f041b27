"""Pallas kernels where XLA's own programs are slower; each has an equivalent in plain JAX that it must equal."""

import functools
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

CHUNK = 4096  # logits of a row that a program holds at a time
WARPS = 8  # of 32 threads each, which share a chunk


def log_z_and_label(
    logits_MV: jax.Array,
    targets_M: jax.Array,
    *,
    vocab_size: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns each row's log of the sum of exponentials, and its target's logit: both float32 [M].

    The logit is 0 for a target that is no column. One pass reads the logits, with the maximum of those read so far; XLA
    reads them for the maximum and a second time for the sum. Source: Milakov and Gimelshein 2018, "Online normalizer
    calculation for softmax", algorithm 3.

    logits_MV: [M, V] in the compute dtype. targets_M: int32 [M]. vocab_size: columns from there on are padding.
    interpret: run the kernel in plain JAX, anywhere.
    """
    return typing.cast(Any, _log_z_and_label(logits_MV, targets_M, vocab_size, interpret))


# JAX cannot differentiate a Pallas kernel. custom_vjp takes positional arguments only, hence this second function.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _log_z_and_label(
    logits_MV: jax.Array,
    targets_M: jax.Array,
    vocab_size: int,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    M, V = logits_MV.shape
    # One program per row: it gets the row of logits, and one entry of each vector.
    row = pl.BlockSpec((1, V), lambda n: (n, 0))
    one = pl.BlockSpec((1,), lambda n: (n,))
    width = min(CHUNK, pl.next_power_of_2(V))  # Triton takes powers of 2 only
    kernel = functools.partial(
        _log_z_kernel,
        width=width,
        vocab_size=min(vocab_size, V),
    )
    result = jax.ShapeDtypeStruct((M,), jnp.float32)
    call = pl.pallas_call(
        kernel,
        grid=(M,),
        in_specs=[row, one],
        out_specs=(one, one),
        out_shape=(result, result),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=2),
        interpret=interpret,
        name="log_z_and_label",
    )
    return call(logits_MV, targets_M)


def _log_z_kernel(
    logits_ref: Any,
    target_ref: Any,
    log_z_ref: Any,
    label_ref: Any,
    *,
    width: int,
    vocab_size: int,
) -> None:
    target = target_ref[0]  # negative for padding: equal to no column, so its label stays 0

    def add_chunk(
        chunk: jax.Array,
        carry: tuple[jax.Array, ...],
    ) -> tuple[jax.Array, ...]:
        highest, total, label = carry
        first = chunk * width
        column_W = first + jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
        place = logits_ref.at[pl.ds(0, 1), pl.ds(chunk * width, width)]
        # The last chunk may reach beyond the row: the mask keeps the load within it, and -inf has exponential 0.
        x_W = triton.load(place, mask=column_W < vocab_size, other=0.0)
        x_W = x_W.astype(jnp.float32)
        x_W = jnp.where(column_W < vocab_size, x_W, -jnp.inf)
        # `total` is relative to the maximum so far, and is rescaled whenever that grows.
        higher = jnp.maximum(highest, jnp.max(x_W))
        rescaled = total * jnp.exp(highest - higher)
        total = rescaled + jnp.sum(jnp.exp(x_W - higher))
        found = jnp.where(column_W == target, x_W, 0.0)
        return higher, total, label + jnp.sum(found)

    # The lowest finite value, not -inf: exp(-inf - -inf) would be NaN.
    lowest = jnp.float32(jnp.finfo(jnp.float32).min)
    start = (lowest, jnp.float32(0.0), jnp.float32(0.0))
    chunks = pl.cdiv(vocab_size, width)
    # Chunks that hold nothing but padding are not read.
    highest, total, label = jax.lax.fori_loop(0, chunks, add_chunk, start)
    log_z_ref[0] = highest + jnp.log(total)
    label_ref[0] = label


def _log_z_forward(
    logits_MV: jax.Array,
    targets_M: jax.Array,
    vocab_size: int,
    interpret: bool,
) -> Any:
    result = _log_z_and_label(logits_MV, targets_M, vocab_size, interpret)
    log_z_M, label_M = typing.cast(Any, result)
    # The logits are kept as they came, in the compute dtype; probabilities follow from them and log_z.
    return (log_z_M, label_M), (logits_MV, targets_M, log_z_M)


def _log_z_backward(
    vocab_size: int,
    interpret: bool,
    residuals: Any,
    g: Any,
) -> tuple[jax.Array, None]:
    """Returns the gradient of the logits, [M, V] in their dtype. XLA computes it in one pass over the logits."""
    # Plain JAX is enough: one element-wise pass, whose result two matmuls read. The log of the sum of exponentials has
    # the softmax as its gradient, the label's logit a one-hot row.
    logits_MV, targets_M, log_z_M = residuals
    log_z_g_M, label_g_M = g
    column_MV = jax.lax.broadcasted_iota(jnp.int32, logits_MV.shape, 1)
    softmax_MV = jnp.exp(logits_MV.astype(jnp.float32) - log_z_M[:, None])
    grad_MV = softmax_MV * log_z_g_M[:, None]
    is_label_MV = column_MV == targets_M[:, None]
    grad_MV += jnp.where(is_label_MV, label_g_M[:, None], 0.0)
    # The padding was not part of the sum; its softmax here is not 0.
    grad_MV = jnp.where(column_MV < vocab_size, grad_MV, 0.0)
    return grad_MV.astype(logits_MV.dtype), None


_log_z_and_label.defvjp(_log_z_forward, _log_z_backward)
