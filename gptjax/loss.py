"""Cross-entropy, summed over tokens in float32, with logits that need never exist all at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LossSums(NamedTuple):
    """Sums over tokens, float32 scalars: divide by `tokens` once, at the very end."""

    loss: jax.Array  # nats, without z-loss
    z_loss: jax.Array  # sum of log Z squared
    tokens: jax.Array  # how many targets counted


def cross_entropy(
    x_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, *, vocab_size: int, chunk: int = 0
) -> LossSums:
    """Returns the summed cross-entropy of `targets_BT` under the logits x @ head.

    targets_BT: int32; a negative target has weight 0. vocab_size: columns of head_DV from there on are padding.
    chunk: positions per chunk, a divisor of T; 0 means all at once. In the backward pass each chunk's logits are
    computed again, so that at most B * chunk * V of them exist.
    """
    if chunk == 0 or chunk == x_BTD.shape[1]:
        return _sums(x_BTD, head_DV, targets_BT, vocab_size)
    chunks = x_BTD.shape[1] // chunk
    split = lambda a: jnp.moveaxis(a.reshape(a.shape[0], chunks, chunk, *a.shape[2:]), 1, 0)  # noqa: E731
    body = jax.checkpoint(lambda x, targets: _sums(x, head_DV, targets, vocab_size), prevent_cse=False)

    def add(total: LossSums, part: tuple[jax.Array, jax.Array]) -> tuple[LossSums, None]:
        return jax.tree.map(jnp.add, total, body(*part)), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add, LossSums(zero, zero, zero), (split(x_BTD), split(targets_BT)))[0]


def _sums(x_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, vocab_size: int) -> LossSums:
    logits_BTV = masked_logits(x_BTD, head_DV, vocab_size)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    # A comparison with iota, not a gather: it fuses into the same pass over the logits.
    column_V = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2)
    label_BT = jnp.sum(jnp.where(column_V == targets_BT[..., None], logits_BTV, 0.0), axis=-1)
    weight_BT = (targets_BT >= 0).astype(jnp.float32)
    return LossSums(
        loss=jnp.sum((log_z_BT - label_BT) * weight_BT),
        z_loss=jnp.sum(jnp.square(log_z_BT) * weight_BT),
        tokens=jnp.sum(weight_BT),
    )


def masked_logits(x_BTD: jax.Array, head_DV: jax.Array, vocab_size: int) -> jax.Array:
    """Returns x @ head in float32 [B, T, V], the padded columns at the lowest finite value."""
    logits_BTV = jnp.einsum("BTD,DV->BTV", x_BTD, head_DV.astype(x_BTD.dtype)).astype(jnp.float32)
    if head_DV.shape[1] == vocab_size:
        return logits_BTV
    column_V = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2)
    return jnp.where(column_V < vocab_size, logits_BTV, jnp.finfo(jnp.float32).min)
