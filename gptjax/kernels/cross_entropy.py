"""Pallas kernels for what XLA's own programs do not do as well; each has plain JAX beside it that it must equal."""

import functools
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

CHUNK = 4096  # logits of a row that a program holds at a time
WARPS = 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def log_z_and_label(
    logits_NV: jax.Array, targets_N: jax.Array, vocab_size: int, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Returns each row's log of the sum of exponentials, and its target's logit, 0 for a target that is no column.

    In float32, from one pass over the logits, with the maximum of what was read so far; XLA reads them for the maximum
    and once more for the sum. Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax",
    algorithm 3.

    vocab_size: columns from there on are padding. interpret: run the kernel in plain JAX, anywhere.
    """
    N, V = logits_NV.shape
    row, one = pl.BlockSpec((1, V), lambda n: (n, 0)), pl.BlockSpec((1,), lambda n: (n,))
    width = min(CHUNK, pl.next_power_of_2(V))
    return pl.pallas_call(
        functools.partial(_log_z_kernel, width=width, vocab_size=min(vocab_size, V)),
        grid=(N,),
        in_specs=[row, one],
        out_specs=(one, one),
        out_shape=(jax.ShapeDtypeStruct((N,), jnp.float32),) * 2,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=2),
        interpret=interpret,
        name="log_z_and_label",
    )(logits_NV, targets_N)


def _log_z_kernel(
    logits_ref: Any, target_ref: Any, log_z_ref: Any, label_ref: Any, *, width: int, vocab_size: int
) -> None:
    target = target_ref[0]

    def add_chunk(chunk: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        highest, total, label = carry
        column_W = chunk * width + jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
        place = logits_ref.at[pl.ds(0, 1), pl.ds(chunk * width, width)]
        x_W = triton.load(place, mask=column_W < vocab_size, other=0.0).astype(jnp.float32)
        x_W = jnp.where(column_W < vocab_size, x_W, -jnp.inf)
        higher = jnp.maximum(highest, jnp.max(x_W))
        total = total * jnp.exp(highest - higher) + jnp.sum(jnp.exp(x_W - higher))
        return higher, total, label + jnp.sum(jnp.where(column_W == target, x_W, 0.0))

    start = (jnp.float32(jnp.finfo(jnp.float32).min), jnp.float32(0.0), jnp.float32(0.0))
    highest, total, label = jax.lax.fori_loop(0, pl.cdiv(vocab_size, width), add_chunk, start)
    log_z_ref[0], label_ref[0] = highest + jnp.log(total), label


def _log_z_forward(logits_NV: jax.Array, targets_N: jax.Array, vocab_size: int, interpret: bool) -> Any:
    log_z_N, label_N = typing.cast(Any, log_z_and_label(logits_NV, targets_N, vocab_size, interpret))
    return (log_z_N, label_N), (logits_NV, targets_N, log_z_N)


def _log_z_backward(vocab_size: int, interpret: bool, kept: Any, g: Any) -> tuple[jax.Array, None]:
    """Returns the gradient of the logits, which XLA computes in one pass over them, to where the products read it."""
    logits_NV, targets_N, log_z_N = kept
    log_z_g_N, label_g_N = g
    column_NV = jax.lax.broadcasted_iota(jnp.int32, logits_NV.shape, 1)
    grad_NV = jnp.exp(logits_NV.astype(jnp.float32) - log_z_N[:, None]) * log_z_g_N[:, None]
    grad_NV += jnp.where(column_NV == targets_N[:, None], label_g_N[:, None], 0.0)
    return jnp.where(column_NV < vocab_size, grad_NV, 0.0).astype(logits_NV.dtype), None


log_z_and_label.defvjp(_log_z_forward, _log_z_backward)
