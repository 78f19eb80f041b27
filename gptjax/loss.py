"""Cross-entropy, summed over tokens in float32, with logits that need never exist all at once."""

import typing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax import kernels
from gptjax.errors import ConfigError
from gptjax.parallel import gather_positions, own_positions, sum_of_logs, sum_positions, tensor_index, tensor_parts

NOT_COUNTED = -1.0  # as the loss of a token that has none: a real one is not below 0


class LossSums(NamedTuple):
    """Sums over tokens, float32 scalars: divide by `tokens` once, at the very end."""

    loss: jax.Array  # nats, without z-loss
    z_loss: jax.Array  # sum of log Z squared
    tokens: jax.Array  # how many targets counted


def choose_loss(name: str, *, platform: str, tensor: int) -> str:
    """Returns the backend that `name` means on a platform, with the vocabulary cut in so many parts.

    Raises:
        ConfigError: it cannot run there.
    """
    reason = ""
    if name == "triton" and platform not in ("gpu", "cuda"):
        reason = f"triton needs an NVIDIA GPU, and the mesh is on {platform}"
    elif name == "triton" and tensor > 1:
        reason = f"triton needs whole rows of logits, and mesh.tensor is {tensor}"
    if reason:
        raise ConfigError(f"compute.loss={name!r}: {reason}; try compute.loss='xla'")
    return name


def cross_entropy(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    *,
    vocab_size: int,
    chunk: int = 0,
    backend: str = "xla",
) -> LossSums:
    """Returns the summed cross-entropy of `targets_BT` under the logits x @ head.

    Of a step cut by hand over `tensor` x_BTD has this device's positions and head_DV its part of the vocabulary, and
    the sums are over those positions.

    targets_BT: int32, of all positions; a negative target has weight 0. vocab_size: columns of the whole head from
    there on are padding. chunk: positions per chunk, a divisor of T; 0 means all at once. In the backward pass each
    chunk's logits are computed again, so that at most B * chunk * V of them exist. backend: of choose_loss.
    """
    log_z_BT, label_BT = _in_chunks(x_BTD, head_DV, targets_BT, vocab_size, chunk, backend)
    weight_BT = (own_positions(targets_BT) >= 0).astype(jnp.float32)
    return LossSums(
        loss=jnp.sum((log_z_BT - label_BT) * weight_BT),
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
) -> jax.Array:
    """Returns what cross_entropy sums, token by token, in nats, and NOT_COUNTED for a negative target: float32 [B, T].

    Of a step cut by hand over `tensor` those of this device's positions.
    """
    log_z_BT, label_BT = _in_chunks(x_BTD, head_DV, targets_BT, vocab_size, chunk, backend)
    return jnp.where(own_positions(targets_BT) >= 0, log_z_BT - label_BT, NOT_COUNTED)


def _in_chunks(
    x_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, vocab_size: int, chunk: int, backend: str
) -> tuple[jax.Array, jax.Array]:
    """Returns the log of the sum of exponentials and the target's logit of each of this device's positions."""
    x_BTD = gather_positions(x_BTD)
    B, T = targets_BT.shape
    log_z_and_label = _log_z_and_label if backend == "xla" else _log_z_and_label_by_triton
    if chunk in (0, T):
        log_z_BT, label_BT = log_z_and_label(x_BTD, head_DV, targets_BT, vocab_size)
    else:
        split = lambda a: jnp.moveaxis(a.reshape(B, T // chunk, chunk, *a.shape[2:]), 1, 0)  # noqa: E731
        body = jax.checkpoint(lambda part: log_z_and_label(part[0], head_DV, part[1], vocab_size), prevent_cse=False)
        found = jax.lax.map(body, (split(x_BTD), split(targets_BT)))
        log_z_BT, label_BT = (jnp.moveaxis(part, 0, 1).reshape(B, T) for part in found)
    return sum_of_logs(log_z_BT), sum_positions(label_BT)


def _log_z_and_label(
    x_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the log of the sum of exponentials, and the target's logit, 0 for one that is not among the columns."""
    logits_BTV = masked_logits(x_BTD, head_DV, vocab_size)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    # A comparison with iota, not a gather: it fuses into the same pass over the logits.
    label_BT = jnp.sum(jnp.where(_columns(logits_BTV) == targets_BT[..., None], logits_BTV, 0.0), axis=-1)
    return log_z_BT, label_BT


def _log_z_and_label_by_triton(
    x_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    logits_BTV = _logits(x_BTD, head_DV)
    rows_NV = logits_BTV.reshape(-1, logits_BTV.shape[2])
    log_z_N, label_N = typing.cast(Any, kernels.log_z_and_label(rows_NV, targets_BT.reshape(-1), vocab_size))
    return log_z_N.reshape(targets_BT.shape), label_N.reshape(targets_BT.shape)


def _logits(x_BTD: jax.Array, head_DV: jax.Array) -> jax.Array:
    return jnp.einsum("BTD,DV->BTV", x_BTD, head_DV.astype(x_BTD.dtype))


def masked_logits(x_BTD: jax.Array, head_DV: jax.Array, vocab_size: int) -> jax.Array:
    """Returns x @ head in float32 [B, T, V], the padded columns at the lowest finite value."""
    logits_BTV = _logits(x_BTD, head_DV).astype(jnp.float32)
    if head_DV.shape[1] * tensor_parts() == vocab_size:
        return logits_BTV
    return jnp.where(_columns(logits_BTV) < vocab_size, logits_BTV, jnp.finfo(jnp.float32).min)


def _columns(logits_BTV: jax.Array) -> jax.Array:
    """Returns the token id of each logit."""
    column_V = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2)
    return column_V + tensor_index() * logits_BTV.shape[2] if tensor_parts() > 1 else column_V
