"""How much a model's logits change when another program computes the other form of GELU."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.compute import ResolvedCompute
from gptjax.convert.weights import Weights, read_leaves, read_tensors
from gptjax.model import GPT
from gptjax.sharding import nest

PROBE_TOKENS = 64


def largest_logit_difference(weights: Weights, activation: str) -> float:
    """Returns the largest absolute difference of a logit between the model and the same weights with `activation`.

    Both are computed in float32 on PROBE_TOKENS random tokens, always the same ones, in rows of at most block_size. All
    parameters are in memory at once; dropout is off. The result is NaN where a logit is not finite.

    Raises:
        DataError: a tensor is damaged.
    """
    config = weights.config
    tensors = read_tensors(weights, allow_nonfinite=True)  # the conversion itself refuses them
    leaves = read_leaves(weights, tensors)
    params = nest((path, jnp.asarray(leaf)) for path, leaf in leaves)
    length = min(PROBE_TOKENS, config.block_size)
    rows = math.ceil(PROBE_TOKENS / length)
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length), dtype=np.int32)
    own_BTV = _logits(weights, config.activation, params, tokens_BT)
    other_BTV = _logits(weights, activation, params, tokens_BT)
    # Rows of fewer than 64 positions may hold a few tokens more than 64.
    difference = np.abs(own_BTV - other_BTV).reshape(-1, config.vocab_size)[:PROBE_TOKENS]
    return float(difference.max())


def _logits(
    weights: Weights,
    activation: str,
    params: object,
    tokens_BT: np.ndarray,
) -> np.ndarray:
    config = dataclasses.replace(weights.config, activation=activation)
    model = GPT(config, ResolvedCompute())
    apply = jax.jit(lambda params: model.apply({"params": params}, tokens_BT))
    return np.asarray(apply(params))
