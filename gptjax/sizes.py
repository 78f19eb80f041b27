"""Analytic costs of a model: FLOPs per token, activation memory per sequence."""

import math
from typing import NamedTuple

import jax.numpy as jnp

from gptjax.attention import query_blocks
from gptjax.collectives import LANES
from gptjax.compute import ResolvedCompute
from gptjax.config import GPTConfig
from gptjax.params import leaf_shape, padded_vocab_size, rows


def train_flops_per_token(config: GPTConfig) -> int:
    """Returns the matmul FLOPs of forward and backward for one token, attention counted in full, remat not counted.

    Source: Chowdhery et al. 2022, "PaLM", appendix B: 6 N + 12 L D T, where N counts the matrices that multiply a
    token: 12 D^2 per layer, and the head over the padded vocabulary.
    """
    D = config.n_embd
    L = config.n_layer
    T = config.block_size
    # The head counts also where it is tied: the table multiplies each token, and the lookup is no matmul.
    matrices = D * padded_vocab_size(config)
    for row in rows(config):
        if row.role == "matrix":
            matrices += math.prod(leaf_shape(row, config))
    # 6: a multiplication and an addition, in the forward pass and for each of the two gradients.
    return 6 * matrices + 12 * L * D * T


class Widths(NamedTuple):
    """Widths per token of the arrays that one layer keeps for the backward pass, if nothing is recomputed."""

    norms: int  # outputs of the LayerNorms, which `tensor` does not shard
    inputs: int  # of the row-parallel products
    outputs: int  # of all products


def kept_widths(config: GPTConfig) -> Widths:
    """Returns the widths of a layer's products, from the table of parameters.

    GPT-2's are 2 D, 5 D (attention's output, GELU's) and 9 D (q, k, v, both branches, GELU's input).
    """
    norms = set()
    inputs = 0
    outputs = 0
    for row in rows(config):
        if row.role != "matrix":
            continue
        _, width, *features = leaf_shape(row, config)
        outputs += math.prod(features)
        # Column-parallel products of one branch read the same LayerNorm, which counts once.
        if row.spec[-1] == "tensor":
            norms.add(row.path.split("/")[1])
        else:
            inputs += width
    return Widths(len(norms) * config.n_embd, inputs, outputs)


def activation_bytes_per_sequence(
    config: GPTConfig,
    compute: ResolvedCompute,
    loss_chunk: int,
    *,
    tensor: int = 1,
) -> float:
    """Returns approximately the bytes that one sequence keeps on a device for the backward pass.

    Per token and layer: the layer's input, and the inputs and outputs of its products (`kept_widths`): 17 arrays of
    width D, all sharded by `tensor` except the LayerNorms' outputs. Splash keeps q, k, v and its output padded; plain
    attention adds the scores of its blocks, in float32 and in the compute dtype. Remat by dots keeps the outputs of the
    products, and the last of them is the next layer's input; full remat keeps the input, and all of one layer at a
    time. The logits are counted twice, with their gradient. Counted by reading the buffers of XLA's GPU and TPU
    compilers.
    """
    D = config.n_embd
    T = config.block_size
    size = jnp.dtype(compute.dtype).itemsize
    scores = 0
    if compute.attention == "xla":
        # k blocks of queries compute (k + 1) / 2k of all scores.
        blocks = query_blocks(T, config.dropout)
        scores = T * config.n_head * (4 + size) * (blocks + 1) / (2 * blocks)
    padding = 0
    if compute.attention == "splash":
        head_width = D // config.n_head
        # A kernel's operands [.., T, H] lie in tiles of 128 lanes, which a narrower head does not fill.
        padding = max(0, LANES / head_width - 1)
    widths = kept_widths(config)
    # Bytes per token of one layer. 4: q, k, v and the output of splash.
    sharded = D + widths.inputs + widths.outputs + 4 * padding * D
    everything = (widths.norms + sharded / tensor) * size + scores / tensor
    if compute.remat == "none":
        kept = everything
        recomputed = 0
    elif compute.remat == "full":
        kept = D * size / tensor
        recomputed = everything
    else:
        kept = widths.outputs * size / tensor + scores / tensor
        recomputed = everything
    logits = (loss_chunk or T) * padded_vocab_size(config) / tensor * 2 * size
    return T * (config.n_layer * kept + recomputed) + logits
