"""The choice of the next token from logits: temperature, top-k, top-p and min-p."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class SamplingParams(NamedTuple):
    """The parameters of the choice of the next token: traced scalars, so that changing them compiles nothing."""

    temperature: Any  # float32; 0 takes the most likely token
    top_k: Any  # int32; 0 is off
    top_p: Any  # float32; 1 is off
    min_p: Any  # float32; 0 is off
    seed: Any  # uint32
    vocab_size: Any  # int32; ids from here on are never chosen


def sample_token(
    logits_BV: jax.Array,
    key_B: jax.Array,
    *,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
) -> jax.Array:
    """Returns int32 ids [B] drawn from softmax(logits / temperature), restricted by top_k, then top_p, then min_p.

    logits_BV: float32 [B, V]. key_B: a key for each row. temperature: 0 takes the most likely id. All four parameters
    may be traced. Their order, and the ids that each of them keeps, are those of Hugging Face's generate(); see
    `filter_logits`.
    """
    # A temperature of 0 would divide by 0, although the result is not used then.
    scaled_BV = logits_BV / jnp.where(temperature > 0, temperature, 1.0)
    is_random = temperature > 0
    is_restricted = (top_k > 0) | (top_p < 1) | (min_p > 0)
    # lax.cond, not jnp.where: sorting the vocabulary can cost more than a small model.
    filtered_BV = jax.lax.cond(
        is_random & is_restricted,
        lambda x: filter_logits(x, top_k=top_k, top_p=top_p, min_p=min_p),
        lambda x: x,
        scaled_BV,
    )
    ids_B = jax.lax.cond(
        temperature > 0,
        lambda x: jax.vmap(jax.random.categorical)(key_B, x),
        lambda _: jnp.argmax(logits_BV, axis=-1),
        filtered_BV,
    )
    return ids_B.astype(jnp.int32)


def filter_logits(
    logits_BV: jax.Array,
    *,
    top_k: Any,
    top_p: Any,
    min_p: Any,
) -> jax.Array:
    """Returns float32 logits [B, V] with those set to -inf that are not among

    - the top_k largest (0: off),
    - and of these, renormalised, the fewest whose probabilities sum to at least top_p (1: off; Holtzman et al. 2020,
      "The Curious Case of Neural Text Degeneration", section 3.1),
    - and at least min_p times as probable as the most likely (0: off; Nguyen et al. 2024, "Min-p Sampling").

    The most likely id always stays; ids tied with the last one kept stay too.
    """
    V = logits_BV.shape[-1]
    descending_BV = -jnp.sort(-logits_BV, axis=-1)
    rank_BV = jax.lax.broadcasted_iota(jnp.int32, descending_BV.shape, 1)
    # Each filter becomes a threshold: the smallest logit that it keeps. Shapes do not depend on the traced parameters.
    k = jnp.where(top_k > 0, top_k, V)
    k = jnp.clip(k, 1, V)
    kth_B1 = jnp.take(descending_BV, k - 1, axis=-1)[:, None]
    # top_p: an id stays while the probabilities before it sum to less than top_p.
    in_top_k_BV = jnp.where(descending_BV >= kth_B1, descending_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(in_top_k_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    # top_p >= 1 is off exactly, where rounding of the sum could drop the last ids.
    in_nucleus_BV = (rank_BV == 0) | (before_BV < top_p) | (top_p >= 1)
    nucleus_BV = jnp.where(in_nucleus_BV, descending_BV, jnp.inf)
    smallest_B1 = jnp.min(nucleus_BV, axis=-1, keepdims=True)
    # min_p: a ratio of probabilities is a difference of logits; log(0) is -inf, which keeps all.
    least_B1 = descending_BV[:, :1] + jnp.log(min_p)
    threshold_B1 = jnp.maximum(kth_B1, smallest_B1)
    threshold_B1 = jnp.maximum(threshold_B1, least_B1)
    return jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)
