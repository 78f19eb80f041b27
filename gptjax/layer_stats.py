"""Statistics of each layer: the RMS of parameters, gradients, updates and residual stream, and the largest logit."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.collectives import Parallel, all_gather_embeddings, all_gather_layer, on_shards, psum_all
from gptjax.config import Config, GPTConfig
from gptjax.dispatch import Tokens, last_batch
from gptjax.documents import EndOfText
from gptjax.examples import make_examples, position_ids
from gptjax.kernels.pointwise import add_bias
from gptjax.log_tags import STATS
from gptjax.model import GPT, Block
from gptjax.params import Param, PyTree, find, padded_vocab_size, rows
from gptjax.sharding import path_name

UPDATE_STATS = "layer_stats"  # the metric of the train step that holds those of an update
QUERY_BLOCK = 512  # queries whose scores are in memory at a time
EMBEDDED = "embedding"  # the residual stream before the first layer
# (params, tokens_ABT, or the tokens of a dispatch) -> {"param_rms": [parts], "residual_rms": [L+1],
# "attention_logit": [L]}
StatsFn = Callable[[PyTree, Any], dict[str, jax.Array]]


def part_names(config: GPTConfig) -> list[str]:
    """Returns the parts of the parameters: the layers, and then each module outside of them.

    >>> part_names(GPTConfig(n_layer=2))
    ['h0', 'h1', 'wte', 'wpe', 'ln_f']
    """
    layers = [f"h{layer}" for layer in range(config.n_layer)]
    return layers + list(dict.fromkeys(_module(param) for param in rows(config) if not param.layered))


def _module(param: Param) -> str:
    return param.path.split("/")[0]


def norm_and_rms(tree: PyTree, config: Config) -> tuple[jax.Array, jax.Array | None]:
    """Returns (the global norm of a tree, the RMS of each part), as float32 [] and [parts].

    Without train.stats_every the second is None, and the first is Optax's. Otherwise the norm is the root of the sum of
    the parts, so that statistics read the tree no second time. The two norms differ in their last bits.
    """
    if not config.train.stats_every:
        return optax.tree.norm(tree), None
    return _norm_and_rms(tree, config.model)


def _norm_and_rms(tree: PyTree, config: GPTConfig) -> tuple[jax.Array, jax.Array]:
    """Returns (global norm, RMS of each part in the order of `part_names`), as float32 [] and [parts].

    tree: the parameters, or gradients or updates of them: global arrays, not this device's shards.
    """
    total = jnp.zeros((), jnp.float32)
    squares: dict[str, list[jax.Array]] = {}  # float32 [L] of the layers, [] of other modules
    counts: dict[str, int] = {}  # values in one layer, or in one other module
    padding = padded_vocab_size(config) - config.vocab_size
    for path, leaf in jax.tree.leaves_with_path(tree):
        param = find(path_name(path))
        first_axis = int(param.layered)
        # Without the barrier XLA fuses the sums of all leaves into one loop over L, which a CPU does not divide among
        # its cores: 115 ms instead of 16 for 124M parameters.
        square = jax.lax.optimization_barrier(_square_sum(leaf, range(first_axis, leaf.ndim)))
        count = math.prod(leaf.shape[first_axis:])
        total += jnp.sum(square)
        if "V" in param.dims and padding:
            # No token uses the rows of padding, so they count in the norm alone. A slice of all other rows would copy
            # the table.
            axis = param.dims.index("V")
            unused = jax.lax.slice_in_dim(leaf, config.vocab_size, None, axis=axis)
            square = jnp.maximum(square - _square_sum(unused, range(leaf.ndim)), 0.0)
            count -= unused.size
        part = _module(param)
        squares.setdefault(part, []).append(square)
        counts[part] = counts.get(part, 0) + count
    modules = ["h", *part_names(config)[config.n_layer :]]
    means = [jnp.atleast_1d(sum(squares[module]) / counts[module]) for module in modules]
    return jnp.sqrt(total), jnp.sqrt(jnp.concatenate(means))


def _square_sum(x: jax.Array, axes: Iterable[int]) -> jax.Array:
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(axes))


def make_stats_step(model: GPT, config: Config, *, eot: EndOfText) -> StatsFn:
    """Returns stats_step(params, tokens_ABT), which looks at the parameters and at one forward pass, without dropout.

    The pass is over all of tokens_ABT, int32 [A, B, T+1], so that the results do not depend on how many micro-batches
    it is divided into. All are float32.
    """
    observe = functools.partial(_observe, model=model, config=config, eot=eot)
    forward = on_shards(observe, model.parallel, out_specs=lambda _: P())

    def stats_step(params: PyTree, tokens_ABT: jax.Array) -> dict[str, jax.Array]:
        replicated = jnp.zeros((), jnp.int32)  # `on_shards` passes such an argument, and `_observe` ignores it
        seen = forward(params, tokens_ABT, replicated)
        return {"param_rms": _norm_and_rms(params, config.model)[1], **seen}

    return stats_step


def jit_stats_step(model: GPT, config: Config, *, eot: EndOfText, sharding: NamedSharding) -> StatsFn:
    """Returns the stats step jitted, with all results in `sharding`. It takes the tokens of a dispatch.

    The batch of the dispatch's last step is looked at.
    """
    stats_step = make_stats_step(model, config, eot=eot)

    def of_dispatch(params: PyTree, tokens: Tokens) -> dict[str, jax.Array]:
        return stats_step(params, last_batch(tokens))

    return jax.jit(of_dispatch, out_shardings=sharding)


def _observe(
    params: PyTree, tokens_ABT: jax.Array, _: jax.Array, *, model: GPT, config: Config, eot: EndOfText
) -> dict[str, jax.Array]:
    parallel = model.parallel
    params = all_gather_embeddings(params, parallel)

    def observe_microbatch(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _observe_microbatch(params, tokens, model=model, config=config, eot=eot)

    # A loop, as the train step has it: one micro-batch is in memory.
    square_AL, logit_AL = jax.lax.map(observe_microbatch, tokens_ABT)
    num_sequences, positions = tokens_ABT.shape[0] * tokens_ABT.shape[1], tokens_ABT.shape[2] - 1
    count = jnp.float32(num_sequences * positions // parallel.tensor * config.model.n_embd)  # on this device
    square_L, count = psum_all((jnp.sum(square_AL, axis=0), count), parallel)
    return {
        "residual_rms": jnp.sqrt(square_L / count),
        "attention_logit": _largest(jnp.max(logit_AL, axis=0), parallel),
    }


def _observe_microbatch(
    params: PyTree, tokens: jax.Array, *, model: GPT, config: Config, eot: EndOfText
) -> tuple[jax.Array, jax.Array]:
    """Returns (squares of the residual stream, summed: before the first layer and after each; largest logits).

    params: with the embedding tables all-gathered. tokens: int32 [B, T+1], this device's sequences. Results are float32
    [L+1] and [L], of this device.
    """
    inputs_BT, starts_BT, _ = make_examples(tokens, config, eot=eot)
    segments_BT = None if starts_BT is None else jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32)
    position_BT = position_ids(inputs_BT.shape, starts_BT)
    x_BTD: Any = model.apply({"params": params}, inputs_BT, position_BT, method="embed")
    block = Block(config.model, model.compute, model.parallel)

    # The same loop over the layers as in GPT.layers, with the run's own kernels. What it sees of the inside of a layer
    # Flax captures, so that the model has no line for it.
    def layer(x_BTD: jax.Array, params: PyTree) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        variables = {"params": all_gather_layer(params, model.parallel)}
        result: Any = block.apply(
            variables,
            x_BTD,
            segments_BT,
            capture_intermediates=lambda module, _: module.name == "c_attn",
            mutable=["intermediates"],
        )
        (y_BTD, _), seen = result
        [qkv] = seen["intermediates"]["attn"]["c_attn"]["__call__"]
        logit = _largest_logit(add_bias(*qkv), segments_BT, head_width=config.model.n_embd // config.model.n_head)
        return y_BTD, (_square_sum(y_BTD, range(3)), logit)

    embedded = _square_sum(x_BTD, range(3))
    _, (square_L, logit_L) = jax.lax.scan(layer, x_BTD, params["h"])
    return jnp.concatenate([embedded[None], square_L]), logit_L


def _largest(x: jax.Array, parallel: Parallel) -> jax.Array:
    """Returns the maximum of x, float32, over all devices; NaN if it is NaN on any of them."""
    axes = parallel.axes()
    if not axes:
        return x
    # pmax leaves NaN out.
    is_nan = jax.lax.psum(jnp.isnan(x).astype(jnp.int32), axes) > 0
    return jnp.where(is_nan, jnp.nan, jax.lax.pmax(x, axes))


def _largest_logit(qkv_BT3D: jax.Array, segments_BT: jax.Array | None, *, head_width: int) -> jax.Array:
    """Returns the largest score q k / sqrt(H) that a query gives to a key it attends to: float32, of this device.

    segments_BT: int32 segment ids; None means one document per row.
    """
    T = qkv_BT3D.shape[1]
    size = min(T, QUERY_BLOCK)
    num_blocks = -(-T // size)  # rounded up
    index_T = jnp.arange(T)

    def of_sequence(sequence: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        qkv_T3D, segments_T = sequence
        q_TNH = qkv_T3D[:, 0].reshape(T, -1, head_width)
        k_SNH = qkv_T3D[:, 1].reshape(T, -1, head_width)

        def of_block(block: jax.Array) -> jax.Array:
            # The last block begins earlier where it would be shorter: queries may be looked at twice.
            start = jnp.minimum(block * size, T - size)
            q = jax.lax.dynamic_slice_in_dim(q_TNH, start, size)
            scores_NTS = jnp.einsum("TNH,SNH->NTS", q, k_SNH, preferred_element_type=jnp.float32)
            mask = (start + jnp.arange(size))[:, None] >= index_T[None, :]
            if segments_T is not None:
                mask &= jax.lax.dynamic_slice_in_dim(segments_T, start, size)[:, None] == segments_T[None, :]
            return jnp.max(jnp.where(mask[None], scores_NTS, -jnp.inf))

        return jnp.max(jax.lax.map(of_block, jnp.arange(num_blocks)))

    # A block of one sequence at a time: where a fused kernel is used, the scores of a whole batch may not fit.
    return jnp.max(jax.lax.map(of_sequence, (qkv_BT3D, segments_BT))) / math.sqrt(head_width)


def last_update(metrics: Mapping[str, Any], count: int) -> dict[str, np.ndarray]:
    """Returns the statistics of the last update of a dispatch, float32 [parts] each, from its metrics.

    count: the number of its steps.
    """
    # The arrays are [parts], or [K, parts] for up to K steps per dispatch.
    return {name: np.atleast_2d(np.asarray(value))[count - 1] for name, value in metrics[UPDATE_STATS].items()}


def as_row(found: Mapping[str, Any], config: GPTConfig) -> dict[str, float]:
    """Returns statistics as metrics, such as {"stats/grad_rms/h0": 0.01, ...}.

    found: of `last_update`, or the result of a stats step.
    """
    layers = part_names(config)[: config.n_layer]
    names = {"residual_rms": [EMBEDDED, *layers], "attention_logit": layers}
    row = {}
    for statistic, values in found.items():
        for part, value in zip(names.get(statistic, part_names(config)), np.asarray(values).tolist(), strict=True):
            row[f"{STATS}{statistic}/{part}"] = value
    return row
