"""Cross-entropy, summed over tokens in float32, optionally in chunks so that not all logits are in memory."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.collectives import (
    ONE_DEVICE,
    Parallel,
    all_gather_sequence,
    local_sequence,
    logsumexp_over_tensor,
    reduce_scatter_sequence,
    tensor_parallel_index,
)
from gptjax.errors import ConfigError

NOT_COUNTED = -1.0  # the loss reported for a token that does not count; a real loss is never negative


class LossSums(NamedTuple):
    """Sums over tokens, float32 scalars: divide by `tokens` once, at the very end."""

    loss: jax.Array  # nats, without z-loss
    z_loss: jax.Array  # sum of (log Z)**2
    tokens: jax.Array  # number of targets that count


def choose_loss(
    name: str,
    *,
    platform: str,
    tensor: int,
) -> str:
    """Returns the backend that compute.loss=`name` means on a platform, with `tensor` shards of the vocabulary.

    Raises:
        ConfigError: it cannot run there.
    """
    reason = ""
    if name == "triton" and platform not in ("gpu", "cuda"):
        reason = f"triton needs an NVIDIA GPU, and the mesh is on {platform}"
    elif name == "triton" and tensor > 1:
        reason = f"triton needs unsharded rows of logits, and mesh.tensor is {tensor}"
    if reason:
        raise ConfigError(
            reason,
            field="compute.loss",
            value=name,
            remedy="try compute.loss=xla",
        )
    return name


def cross_entropy(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    *,
    vocab_size: int,
    chunk: int = 0,
    backend: str = "xla",
    parallel: Parallel = ONE_DEVICE,
) -> LossSums:
    """Returns the summed cross-entropy of `targets_BT` under the logits x @ head.

    Under tensor parallelism x_BTD is the local sequence and head_DV the local vocabulary shard, and the sums are over
    the local sequence.

    x_BTD: [B, T, D] in the compute dtype. head_DV: float32 [D, V]. targets_BT: int32 [B, T], of all positions; a
    negative target has weight 0. vocab_size: columns of the unsharded head from there on are padding.
    chunk: positions per chunk, a divisor of T; 0 means all at once. The backward pass recomputes the logits of each
    chunk, so that at most B * chunk * V of them exist. backend: the result of choose_loss.
    """
    log_z_BT, nats_BT = _in_chunks(
        x_BTD,
        head_DV,
        targets_BT,
        vocab_size=vocab_size,
        chunk=chunk,
        backend=backend,
        parallel=parallel,
    )
    # A negative target matches no column, so its label logit is 0.
    # Its loss is finite, and the weight 0 removes it from the sums.
    counted_BT = local_sequence(targets_BT, parallel) >= 0
    weight_BT = counted_BT.astype(jnp.float32)
    # Sums, not means: micro-batches and devices may count different numbers of targets, and the caller divides once.
    return LossSums(
        loss=jnp.sum(nats_BT * weight_BT),
        z_loss=jnp.sum(jnp.square(log_z_BT) * weight_BT),
        tokens=jnp.sum(weight_BT),
    )


def token_losses(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    *,
    vocab_size: int,
    chunk: int = 0,
    backend: str = "xla",
    parallel: Parallel = ONE_DEVICE,
) -> jax.Array:
    """Returns the terms that cross_entropy sums, in nats, and NOT_COUNTED for a negative target: float32 [B, T].

    The arguments are those of cross_entropy. Under tensor parallelism the result is [B, T / tensor], the local
    sequence.
    """
    _, nats_BT = _in_chunks(
        x_BTD,
        head_DV,
        targets_BT,
        vocab_size=vocab_size,
        chunk=chunk,
        backend=backend,
        parallel=parallel,
    )
    # jnp.where, unlike a weight, also hides a NaN; nothing is differentiated here.
    counted_BT = local_sequence(targets_BT, parallel) >= 0
    return jnp.where(counted_BT, nats_BT, NOT_COUNTED)


def _in_chunks(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    *,
    vocab_size: int,
    chunk: int,
    backend: str,
    parallel: Parallel,
) -> tuple[jax.Array, jax.Array]:
    """Returns (log Z: logsumexp of the logits, the loss in nats) at each position of the local sequence."""

    # x is all-gathered before the split, so chunks cover all positions. Under tensor parallelism each device computes
    # the logits of all positions over its shard of the vocabulary.
    x_BTD = all_gather_sequence(x_BTD, parallel)

    def run(reduce_logits: Callable[..., tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, ...]:
        # A single chunk needs no loop, so XLA may save the logits for the backward pass instead of recomputing them.
        if chunk in (0, targets_BT.shape[1]):
            return reduce_logits(x_BTD, targets_BT)
        return _map_chunks(reduce_logits, x_BTD, targets_BT, chunk=chunk)

    if backend == "triton":
        # Its rows are whole, because `choose_loss` refuses tensor parallelism. Without z-loss the program has no use of
        # log Z, and the kernel's gradient then needs one term less.
        log_z_BT, nats_BT = run(
            lambda x_BTD, targets_BT: _log_z_and_nats_by_triton(
                x_BTD,
                head_DV,
                targets_BT,
                vocab_size=vocab_size,
            )
        )
        return log_z_BT, nats_BT
    log_z_BT, label_BT = run(
        lambda x_BTD, targets_BT: _log_z_and_label(
            x_BTD,
            head_DV,
            targets_BT,
            vocab_size=vocab_size,
            parallel=parallel,
        )
    )
    # Only two [B, T] arrays are reduced over `tensor`; logits are never sent. The label's logit is a plain sum: it is 0
    # on all devices except the one whose vocabulary shard has the target.
    log_z_BT = logsumexp_over_tensor(log_z_BT, parallel)
    label_BT = reduce_scatter_sequence(label_BT, parallel)
    return log_z_BT, log_z_BT - label_BT


def _map_chunks(
    function: Callable[..., tuple[jax.Array, jax.Array]],
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    *,
    chunk: int,
) -> tuple[jax.Array, ...]:
    """Applies `function` to one chunk of positions after the other, and joins the results to arrays [B, T]."""
    B, T = targets_BT.shape

    def split(a: jax.Array) -> jax.Array:
        chunks = a.reshape(B, T // chunk, chunk, *a.shape[2:])
        return jnp.moveaxis(chunks, 1, 0)  # lax.map runs over the leading dim

    def join(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a, 0, 1).reshape(B, T)  # from [T / chunk, B, chunk]

    # Without jax.checkpoint the loop would save every chunk's logits for the backward pass, as if there were no chunks.
    # The loop itself keeps XLA from merging the recomputation with the forward pass.
    body = jax.checkpoint(lambda part: function(*part), prevent_cse=False)
    found = jax.lax.map(body, (split(x_BTD), split(targets_BT)))
    return tuple(join(part) for part in found)


def _log_z_and_label(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    *,
    vocab_size: int,
    parallel: Parallel,
) -> tuple[jax.Array, jax.Array]:
    """Returns (logsumexp of the logits, the target's logit or 0 if the target is not in this vocabulary shard)."""
    logits_BTV = masked_logits(x_BTD, head_DV, vocab_size, parallel=parallel)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)  # over the local vocabulary shard only
    # A comparison with iota, not a gather: it fuses into the same pass over the logits. A gather's transpose would be a
    # scatter into an array of all logits.
    column_BTV = _columns(logits_BTV, parallel)
    # A target that another shard owns, or a negative one, matches no column.
    is_label_BTV = column_BTV == targets_BT[..., None]
    label_BTV = jnp.where(is_label_BTV, logits_BTV, 0.0)
    return log_z_BT, jnp.sum(label_BTV, axis=-1)


def _log_z_and_nats_by_triton(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    *,
    vocab_size: int,
) -> tuple[jax.Array, jax.Array]:
    from gptjax.kernels import cross_entropy as kernel  # Pallas takes long to import, and few runs need it here

    # The kernel takes the head in the compute dtype, and masks the padded columns itself.
    nats_M, log_z_M = kernel.linear_cross_entropy(
        x_BTD.reshape(-1, x_BTD.shape[2]),
        head_DV.astype(x_BTD.dtype),
        targets_BT.reshape(-1),
        vocab_size=vocab_size,
    )
    return log_z_M.reshape(targets_BT.shape), nats_M.reshape(targets_BT.shape)


def _logits(x_BTD: jax.Array, head_DV: jax.Array) -> jax.Array:
    # Forward and backward matmuls are in the compute dtype: the float32 head is cast here, its gradient is cast back.
    head_DV = head_DV.astype(x_BTD.dtype)
    return jnp.einsum("BTD,DV->BTV", x_BTD, head_DV)


def masked_logits(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    vocab_size: int,
    *,
    parallel: Parallel = ONE_DEVICE,
) -> jax.Array:
    """Returns x @ head in float32 [B, T, V], the padded columns at the lowest finite value.

    x_BTD: [B, T, D] in the compute dtype. head_DV: float32 [D, V]. vocab_size: number of columns that are not padding.
    """
    # The product is rounded to the compute dtype; softmax and sums are in float32. XLA fuses the cast into their passes
    # over the logits, so that no float32 copy of them exists.
    logits_BTV = _logits(x_BTD, head_DV).astype(jnp.float32)
    padded_size = head_DV.shape[1] * parallel.tensor
    if padded_size == vocab_size:
        return logits_BTV
    # The lowest finite value, not -inf: a vocabulary shard may be all padding, and -inf - -inf is NaN. Over all
    # shards, the exponential and the gradient of the padding are exactly 0.
    column_BTV = _columns(logits_BTV, parallel)
    return jnp.where(column_BTV < vocab_size, logits_BTV, jnp.finfo(jnp.float32).min)


def _columns(logits_BTV: jax.Array, parallel: Parallel) -> jax.Array:
    """Returns the token id of each logit, int32 [B, T, V]; under tensor parallelism ids of the local shard."""
    column_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2)
    if parallel.tensor == 1:
        return column_BTV
    # Shards are contiguous: the local ones begin at index * size.
    return column_BTV + tensor_parallel_index(parallel) * logits_BTV.shape[2]
