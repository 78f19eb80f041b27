"""Pallas kernels where XLA's own programs are slower; each has an equivalent in plain JAX that it must equal."""

import functools
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

Carry = typing.TypeVar("Carry")

CHUNK = 8192  # logits of a row that a program holds at a time
LOGITS_PER_WARP = 512  # of a chunk: 16 for each of its 32 threads


def linear_cross_entropy(
    x_MD: jax.Array,
    head_DV: jax.Array,
    targets_M: jax.Array,
    *,
    vocab_size: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns each row's loss in nats, and its log of the sum of exponentials: both float32 [M].

    The loss of a row is that log minus the target's logit, and the logit of a negative target is 0.

    If it is differentiated, the forward pass replaces the logits by the gradient of the loss, softmax minus one-hot, in
    the same memory. The backward pass consists of the two matmuls that read this gradient. The cotangents are one
    number per row, so they scale rows of x and of its gradient, and not the [M, V] gradient. Otherwise no gradient is
    written.

    x_MD: [M, D] in the compute dtype. head_DV: [D, V] in the same dtype. targets_M: int32 [M], below vocab_size.
    vocab_size: columns from there on are padding. interpret: run the kernel in plain JAX, on any platform.

    Sources: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3; Hsu and others 2024,
    "Liger Kernel: Efficient Triton Kernels for LLM Training", which writes the gradient in place of the logits, too.
    """
    return typing.cast(Any, _linear_cross_entropy(x_MD, head_DV, targets_M, vocab_size, interpret))


# JAX cannot differentiate a Pallas kernel. custom_vjp takes positional arguments only, hence this second function.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _linear_cross_entropy(
    x_MD: jax.Array,
    head_DV: jax.Array,
    targets_M: jax.Array,
    vocab_size: int,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    logits_MV = _matmul(x_MD, head_DV)
    log_z_M, label_M = _reduce_rows(logits_MV, targets_M, vocab_size=vocab_size, interpret=interpret)
    return log_z_M - label_M, log_z_M


def _forward(
    x: Any,
    head: Any,
    targets: Any,
    vocab_size: int,
    interpret: bool,
) -> Any:
    # With symbolic_zeros, an argument comes with a flag that says whether it is differentiated.
    # The logits have no other use, so XLA does not copy them before the kernel overwrites them.
    x_MD, head_DV, targets_M = x.value, head.value, targets.value
    logits_MV = _matmul(x_MD, head_DV)
    log_z_M, label_M, grad_MV = _reduce_rows(
        logits_MV,
        targets_M,
        vocab_size=vocab_size,
        with_gradient=True,
        interpret=interpret,
    )
    return (log_z_M - label_M, log_z_M), (x_MD, head_DV, targets_M, grad_MV)


def _backward(
    vocab_size: int,
    interpret: bool,
    residuals: Any,
    cotangents: Any,
) -> tuple[jax.Array, jax.Array, None]:
    """Returns the gradients of x [M, D] and of the head [D, V], in their dtypes."""
    x_MD, head_DV, targets_M, grad_MV = residuals
    loss_g_M, log_z_g_M = cotangents
    has_log_z = not isinstance(log_z_g_M, SymbolicZero)
    # A derivative of log Z alone. The gradient of the loss then only serves to compute that of log Z.
    if isinstance(loss_g_M, SymbolicZero):
        loss_g_M = jnp.zeros(targets_M.shape)
    # The gradient of log Z is that of the loss plus one-hot of the target.
    scale_M = loss_g_M
    if has_log_z:
        scale_M = scale_M + log_z_g_M
    scaled_x_MD = _scale_rows(x_MD, scale_M)
    # The matmuls that JAX would derive, in the compute dtype.
    [x_grad_MD] = jax.linear_transpose(lambda x: _matmul(x, head_DV), x_MD)(grad_MV)
    [head_grad_DV] = jax.linear_transpose(lambda head: _matmul(scaled_x_MD, head), head_DV)(grad_MV)
    x_grad_MD = _scale_rows(x_grad_MD, scale_M)
    # The one-hot term is the gradient of the target's logit: M columns of the head, not all V. Without z-loss nothing
    # depends on log Z, JAX says so by SymbolicZero, and the program does not have this term.
    if has_log_z:
        _, label_vjp = jax.vjp(lambda x, head: _label_logits(x, head, targets_M), x_MD, head_DV)
        x_part_MD, head_part_DV = label_vjp(log_z_g_M)
        x_grad_MD = x_grad_MD + x_part_MD
        head_grad_DV = head_grad_DV + head_part_DV
    # Both matmuls before the rest of the backward pass. XLA would compute the head's gradient last, and the [M, V]
    # gradient would take memory until then.
    x_grad_MD, head_grad_DV = jax.lax.optimization_barrier((x_grad_MD, head_grad_DV))
    return x_grad_MD, head_grad_DV, None


_linear_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _matmul(x_MD: jax.Array, head_DV: jax.Array) -> jax.Array:
    return jnp.einsum("MD,DV->MV", x_MD, head_DV)


def _scale_rows(x_MD: jax.Array, scale_M: jax.Array) -> jax.Array:
    # The product is in float32, and is rounded once. A scale of 1 or 0, as in training without z-loss, is exact.
    scaled_MD = x_MD.astype(jnp.float32) * scale_M[:, None]
    return scaled_MD.astype(x_MD.dtype)


def _label_logits(x_MD: jax.Array, head_DV: jax.Array, targets_M: jax.Array) -> jax.Array:
    """Returns each target's logit, float32 [M], and 0 for a negative target."""
    # Float32 before the lookup: its transpose then adds the gradients of frequent tokens in float32.
    head_VD = head_DV.astype(jnp.float32).T
    head_MD = head_VD[jnp.maximum(targets_M, 0)]
    label_M = jnp.sum(x_MD.astype(jnp.float32) * head_MD, axis=1)
    return jnp.where(targets_M >= 0, label_M, 0.0)


def _reduce_rows(
    logits_MV: jax.Array,
    targets_M: jax.Array,
    *,
    vocab_size: int,
    with_gradient: bool = False,
    interpret: bool,
) -> Any:
    """Returns (log Z, label's logit) of each row, float32 [M], and the gradient [M, V] if it is asked for.

    The gradient takes the memory of the logits. Memory is read once if the second read of a row finds it in the L2
    cache.
    """
    M, V = logits_MV.shape
    # One program per row: it gets the row of logits, and one entry of each vector.
    row = pl.BlockSpec((1, V), lambda n: (n, 0))
    one = pl.BlockSpec((1,), lambda n: (n,))
    width = min(CHUNK, pl.next_power_of_2(vocab_size))  # Triton takes powers of 2 only
    result = jax.ShapeDtypeStruct((M,), jnp.float32)
    out_specs, out_shape, aliases = (one, one), (result, result), {}
    if with_gradient:
        out_specs += (row,)
        out_shape += (jax.ShapeDtypeStruct((M, V), logits_MV.dtype),)
        aliases = {0: 2}  # the third result is written to the memory of the first argument
    # Many warps share a row, so that few rows are in work at a time. With GPT-2's vocabulary the H200 compiler gives a
    # thread 50 or 59 registers. That is 2 rows on each of 132 multiprocessors: 27 MB of 50 MB of L2.
    warps = max(1, width // LOGITS_PER_WARP)
    call = pl.pallas_call(
        functools.partial(_kernel, width=width, vocab_size=min(vocab_size, V)),
        grid=(M,),
        in_specs=[row, one],
        out_specs=out_specs,
        out_shape=out_shape,
        input_output_aliases=aliases,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=2),
        interpret=interpret,
        name="cross_entropy_with_gradient" if with_gradient else "cross_entropy",
    )
    return call(logits_MV, targets_M)


def _kernel(
    logits_ref: Any,
    target_ref: Any,
    log_z_ref: Any,
    label_ref: Any,
    grad_ref: Any = None,
    *,
    width: int,
    vocab_size: int,
) -> None:
    """Reduces one row, and then writes its gradient to grad_ref, which is the memory of logits_ref."""
    target = target_ref[0]  # negative for padding: equal to no column, so its label stays 0

    def load(
        first: jax.Array,
        size: int,
        is_padded: bool,
    ) -> tuple[tuple[Any, Any], jax.Array, jax.Array]:
        """Returns the place of `size` logits from column `first` on, their columns, and the logits in float32."""
        place = (pl.ds(0, 1), pl.ds(first, size))
        column_W = first + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
        if not is_padded:
            return place, column_W, triton.load(logits_ref.at[place]).astype(jnp.float32)
        # The mask keeps the load within the row, and -inf has exponential 0.
        mask_W = column_W < vocab_size
        x_W = triton.load(logits_ref.at[place], mask=mask_W, other=0.0)
        return place, column_W, jnp.where(mask_W, x_W.astype(jnp.float32), -jnp.inf)

    def add_chunk(
        first: jax.Array,
        size: int,
        is_padded: bool,
        carry: tuple[jax.Array, ...],
    ) -> tuple[jax.Array, ...]:
        highest, total, label = carry
        _, column_W, x_W = load(first, size, is_padded)
        # `total` is relative to the maximum so far, and is rescaled whenever that grows.
        higher = jnp.maximum(highest, jnp.max(x_W))
        rescaled = total * jnp.exp(highest - higher)
        total = rescaled + jnp.sum(jnp.exp(x_W - higher))
        found = jnp.where(column_W == target, x_W, 0.0)
        return higher, total, label + jnp.sum(found)

    # The lowest finite value, not -inf: exp(-inf - -inf) would be NaN.
    lowest = jnp.float32(jnp.finfo(jnp.float32).min)
    start = (lowest, jnp.float32(0.0), jnp.float32(0.0))
    over_chunks = functools.partial(_over_chunks, width=width, vocab_size=vocab_size)
    highest, total, label = over_chunks(add_chunk, start, end=vocab_size)  # padding is not read
    log_z_ref[0] = highest + jnp.log(total)
    label_ref[0] = label
    # An evaluation ends here.
    if grad_ref is None:
        return
    inverse = 1.0 / total

    def write_chunk(
        first: jax.Array,
        size: int,
        is_padded: bool,
        carry: int,
    ) -> int:
        place, column_W, x_W = load(first, size, is_padded)
        # Relative to the maximum, not to log Z: log Z of large logits has few digits after the point.
        softmax_W = jnp.exp(x_W - highest) * inverse
        grad_W = jnp.where(column_W == target, softmax_W - 1.0, softmax_W)
        grad_W = grad_W.astype(grad_ref.dtype)
        # The gradient of the padding is 0, the exponential of its -inf. It is written too, because matmuls read it.
        mask_W = column_W < grad_ref.shape[1] if is_padded else None
        triton.store(grad_ref.at[place], grad_W, mask=mask_W)
        return carry

    # The sums above have waited for all loads of the row, so no logit is overwritten before it was read.
    # The last chunk comes first, because it is the most likely to be in a cache.
    over_chunks(write_chunk, 0, end=grad_ref.shape[1], backwards=True)


def _over_chunks(
    body: Callable[..., Carry],
    carry: Carry,
    *,
    width: int,
    vocab_size: int,
    end: int,
    backwards: bool = False,
) -> Carry:
    """Runs body(first column, number of columns, is_padded, carry) over the chunks of a row, up to column `end`.

    Only chunks that have padding or reach beyond the row need masks. They are outside of the loop over the others.
    """
    whole = vocab_size // width
    rest = end - whole * width
    # Usually one chunk, and smaller than the others: 1,152 columns of GPT-2's 50,304. A loop, because Pallas refuses
    # slices known to reach beyond an array, masked or not.
    size = min(width, pl.next_power_of_2(max(1, rest)))

    def run_whole(n: jax.Array, carry: Carry) -> Carry:
        chunk = whole - 1 - n if backwards else n
        return body(chunk * width, width, False, carry)

    def run_rest(n: jax.Array, carry: Carry) -> Carry:
        return body(whole * width + n * size, size, True, carry)

    loops = [(whole, run_whole), (pl.cdiv(rest, size), run_rest)]
    for count, run in reversed(loops) if backwards else loops:
        carry = jax.lax.fori_loop(0, count, run, carry) if count else carry
    return carry
