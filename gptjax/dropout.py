"""Dropout with masks that are the same on every mesh."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32

from gptjax.collectives import Parallel, data_parallel_index, tensor_parallel_index

# One constant per place where dropout is applied, folded into the dropout key of the model (the first) or of a layer.
# In earlier versions Flax derived these numbers from module names. Runs of those versions resume with the same masks.
DROP_EMBEDDING = 0xBF8B4530
DROP_ATTENTION_WEIGHTS = 0xF34AFBCC
DROP_ATTENTION = 0xE804A324
DROP_MLP = 0x7D8AF291


def fold_key(
    key: jax.Array | None,
    place: int,
) -> jax.Array | None:
    """Returns the dropout key of one place, or None where `key` is None (no dropout).

    key: a scalar threefry key. place: one of the constants above.
    """
    if key is None:
        return None
    return jax.random.fold_in(key, place)


def dropout(
    x_BTD: jax.Array,
    rate: float,
    key: jax.Array | None,
    *,
    parallel: Parallel,
) -> jax.Array:
    """Returns x_BTD with entries set to 0 with probability `rate`, and the others divided by 1 - rate.

    The shape [B, T, D] and the dtype stay the same. Without a key it returns x_BTD itself.
    """
    if key is None or not rate:
        return x_BTD
    keep_BTD = dropout_mask(key, rate, x_BTD.shape, parallel=parallel)
    # Inverted dropout: scaling in training keeps the expectation, so evaluation and sampling need no scaling.
    scaled_BTD = x_BTD / (1 - rate)
    zero = jnp.zeros((), x_BTD.dtype)
    return jnp.where(keep_BTD, scaled_BTD, zero)


def dropout_mask(
    key: jax.Array,
    rate: float,
    shape: tuple[int, ...],
    *,
    parallel: Parallel,
) -> jax.Array:
    """Returns a bool array of `shape`, each entry False with probability `rate`, the same on every mesh.

    key: a scalar threefry key. shape: of this device's shard. Dim 0 is the sequence, which the batch axes shard. Dim 1
    holds positions or heads, which `tensor` shards. The other dims are not sharded.
    """
    # Under shard_map jax.random.bernoulli sees only a shard's shape, and would give every shard the same mask. Here
    # each entry is a hash of the key and of the entry's own index in the global array.
    width = math.prod(shape[2:])
    entries = (shape[0], shape[1], width)
    row = jax.lax.broadcasted_iota(jnp.uint32, entries, 0)
    index = jax.lax.broadcasted_iota(jnp.uint32, entries, 1)
    column = jax.lax.broadcasted_iota(jnp.uint32, entries, 2)
    row += jnp.uint32(data_parallel_index(parallel) * shape[0])
    index += jnp.uint32(tensor_parallel_index(parallel) * shape[1])
    # threefry hashes a pair of 32-bit counters: the global index of the sequence, and the index of the entry within it.
    # uint32 wraps around, so a mask repeats only within a sequence of more than 2**32 entries.
    key_data = jax.random.key_data(key)
    counters = jnp.stack([row, index * width + column])
    high, low = threefry_2x32(key_data, counters)
    bits = high ^ low  # one word of two; another choice would change the masks of existing runs
    # The cast rounds down, so the probability is exact to 2**-32.
    threshold = np.uint32((1 - rate) * 2**32)
    return (bits < threshold).reshape(shape)
