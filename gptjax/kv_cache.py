"""The KV cache of one layer: writing new keys and values, and the mask that goes with them."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """One layer's keys and values so far, and the positions that the next ones take.

    Heads come before positions, [B, N, S, H], as attention reads them.
    """

    k_BNSH: jax.Array  # in the compute dtype
    v_BNSH: jax.Array
    positions_BT: jax.Array  # int32; keys and values at position S or more are not stored


def extend_cache(
    cache: Cache,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
) -> tuple[Cache, jax.Array]:
    """Writes new keys and values, [B, T, N, H] in the cache's dtype, at the cache's positions.

    Returns (the extended cache, mask), where mask is bool [B, 1, T, S] and True for the keys that each new position
    attends to.
    """
    B, _, N, _ = k_BTNH.shape
    # The index arrays [B, 1, 1], [N, 1] and [B, 1, T] broadcast to [B, N, T]. If the second one were a slice, XLA would
    # transpose the full cache at each token.
    sequences = jnp.arange(B)[:, None, None]
    heads = jnp.arange(N)[:, None]
    slots = cache.positions_BT[:, None, :]
    at = (sequences, heads, slots)
    # "drop": padding of a prompt chunk has positions past the end of the cache.
    k_BNTH = jnp.swapaxes(k_BTNH, 1, 2)
    k_BNSH = cache.k_BNSH.at[at].set(k_BNTH, mode="drop")
    v_BNTH = jnp.swapaxes(v_BTNH, 1, 2)
    v_BNSH = cache.v_BNSH.at[at].set(v_BNTH, mode="drop")
    # The mask is causal within the chunk, too. It also hides stale entries after the query's position: when a row's
    # context is shortened, the cache is not cleared, only overwritten later.
    slots_S = jnp.arange(k_BNSH.shape[2])
    key_positions = slots_S[None, None, None, :]
    query_positions = cache.positions_BT[:, None, :, None]
    mask = key_positions <= query_positions
    return Cache(k_BNSH, v_BNSH, cache.positions_BT), mask
