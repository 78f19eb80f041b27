"""The compiled programs of generation: a cached forward pass, the step that samples from it, and its caches.

The caches begin with SMALLEST_CONTEXT positions and grow on demand, up to block_size. One jitted step has two shapes:
prefill takes C prompt tokens, decoding takes one token and samples the next.
"""

import functools
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec as P

from gptjax import loss, sharding
from gptjax import model as gpt
from gptjax.kv_cache import Cache
from gptjax.sampling import SamplingParams, sample_token

SMALLEST_CONTEXT = 128  # positions of new caches; each token reads the full cache


@functools.lru_cache(maxsize=8)
def make_step(
    model: Any,
    options: tuple[tuple[str, Any], ...] = (),
    mesh: Any = None,
) -> Callable[..., Any]:
    """Returns, for a GPT, the jitted step(weights, caches, ids_B, tokens_BC, positions_BC, last_B, *, row_B, n, count,
    sampling) -> (caches, ids_B, new_KB), which consumes the caches; `options` are the compiler's.

    Feeds the chunk (int32 [B, C]) and samples the n-th new id of each row from the logits at its index last_B; a row
    whose last_B is negative keeps its id. tokens_BC: None feeds the ids of the step before, with C = 1, `count` times
    in a loop on the device: new_KB (int32 [K, B]) has the ids of each. row_B: numbers that with the seed determine a
    row's randomness.
    """
    extend = make_cached_forward(model, mesh)

    def step(
        weights: Any,
        caches: Any,
        ids_B: Any,
        tokens_BC: Any,
        positions_BC: Any,
        last_B: Any,
        *,
        row_B: Any,
        n: Any,
        count: int,
        sampling: SamplingParams,
    ) -> tuple[Any, jax.Array, jax.Array]:
        def one(state: Any, i: Any) -> tuple[Any, jax.Array]:
            # In a burst, a row that is not decoding stays at its position past the end: nothing is stored for it.
            at_BC = positions_BC + i * (last_B >= 0)[:, None]
            state = _decode(
                extend,
                weights,
                state,
                tokens_BC,
                at_BC,
                last_B,
                row_B=row_B,
                n=n + i,
                sampling=sampling,
                mesh=mesh,
            )
            return state, state[1]

        state = (caches, ids_B)
        if count == 1:
            state, new_B = one(state, 0)
            return *state, new_B[None]
        state, new_KB = jax.lax.scan(one, state, jnp.arange(count))
        return *state, new_KB

    # The caches are donated: a step writes into them in place instead of copying them.
    return jax.jit(
        step,
        donate_argnums=1,
        static_argnames="count",
        compiler_options=dict(options) or None,
    )


def _decode(
    extend: Callable[..., tuple[Any, jax.Array]],
    weights: Any,
    state: tuple[Any, jax.Array],
    tokens_BC: Any,
    positions_BC: Any,
    last_B: Any,
    *,
    row_B: Any,
    n: Any,
    sampling: SamplingParams,
    mesh: Any,
) -> tuple[Any, jax.Array]:
    """Returns the state (caches, ids_B) after one call of `extend` and the choice of each row's next id."""
    caches, ids_B = state
    if tokens_BC is None:
        tokens_BC = ids_B[:, None]
    index_B = jnp.maximum(last_B, 0)
    caches, logits_BV = extend(weights, caches, tokens_BC, positions_BC, index_B)
    column_V = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
    logits_BV = jnp.where(column_V < sampling.vocab_size, logits_BV, -jnp.inf)

    # By seed, row and number of the token, so that a row is the same in any batch and in any burst.
    def key_of(row: jax.Array) -> jax.Array:
        row_key = jax.random.fold_in(jax.random.key(sampling.seed), row)
        return jax.random.fold_in(row_key, n)

    new_B = sample_token(
        logits_BV,
        jax.vmap(key_of)(row_B),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
    )
    ids_B = jnp.where(last_B >= 0, new_B, ids_B)
    return caches, sharding.constrain(ids_B, mesh, P())


def make_cached_forward(
    model: gpt.GPT,
    mesh: Any = None,
) -> Callable[..., tuple[Any, jax.Array]]:
    """Returns extend(weights, caches, tokens_BC, positions_BC, last_B) -> (caches, logits_BV).

    Computes C more tokens of each row at their positions, and the float32 logits of the true vocabulary after the
    token at index last_B. weights: from `unstack_layers`. caches: (k_BNSH, v_BNSH) per layer. A cache slot above a
    token's position is hidden from it; a position of block_size or more is not kept. mesh: on which XLA partitions it.
    """
    config = model.config
    block = gpt.Block(config, model.compute)
    x_spec = P(sharding.BATCH_AXES, None, None)
    kv_spec = cache_spec(config.n_head, mesh)

    def extend(
        weights: Any,
        caches: Any,
        tokens_BC: Any,
        positions_BC: Any,
        last_B: Any,
    ) -> tuple[Any, jax.Array]:
        tables = {"params": weights["tables"]}
        x_BCD: Any = model.apply(tables, tokens_BC, positions_BC, method="embed")
        # Rows stay on their devices. Without a constraint XLA chooses, and may gather them.
        x_BCD = sharding.constrain(x_BCD, mesh, x_spec)
        new_caches = []
        # A Python loop over layers: a scan would copy the stacked caches in and out at each token.
        for layer, (k_BNSH, v_BNSH) in zip(weights["layers"], caches, strict=True):
            cache = Cache(k_BNSH, v_BNSH, positions_BC)
            result = block.apply({"params": layer}, x_BCD, cache=cache)
            x_BCD, cache = typing.cast(Any, result)
            x_BCD = sharding.constrain(x_BCD, mesh, x_spec)
            k_BNSH = sharding.constrain(cache.k_BNSH, mesh, kv_spec)
            v_BNSH = sharding.constrain(cache.v_BNSH, mesh, kv_spec)
            new_caches.append((k_BNSH, v_BNSH))
        # The head is nearly a third of GPT-2 small's FLOPs: it is applied to one position per row, not to all C.
        x_B1D: Any = jnp.take_along_axis(x_BCD, last_B[:, None, None], axis=1)
        x_B1D = model.apply(tables, x_B1D, method="final_norm")
        return new_caches, _logits(weights, x_B1D, config.vocab_size)

    return extend


def _logits(weights: Any, x_B1D: jax.Array, vocab_size: int) -> jax.Array:
    """Returns the float32 logits [B, V] of the true vocabulary. weights: from `unstack_layers`."""
    if "head_DV" in weights:
        logits_B1V = loss.masked_logits(x_B1D, weights["head_DV"], vocab_size)
    else:
        # Not `unembedding`: for one row XLA would copy its transpose at each token.
        table_VD = weights["tables"]["wte"]["embedding"]
        logits_B1V = jnp.einsum("BTD,VD->BTV", x_B1D, table_VD)
    return logits_B1V[:, 0, :vocab_size]


def unstack_layers(model: gpt.GPT, params: Any) -> Any:
    """Returns {"tables": everything but the layers, "layers": [one tree per layer], "head_DV": the output head}.

    Matrices are in the dtype of the products, the head also in their layout: reading them is most of a token's time.
    On a single CPU device that computes in float32 nothing is copied: the layers are views of the stacked arrays, and
    "head_DV" is absent if the token embedding is the head.
    """
    tables = {name: tree for name, tree in params.items() if name != "h"}
    if model.compute.dtype == jnp.float32 and _is_on_one_cpu(params):
        views = {"tables": tables, "layers": _layer_views(model.config.n_layer, params)}
        if "lm_head" in params:
            views["head_DV"] = params["lm_head"]["kernel"]
        return views
    split = _make_split(model.config.n_layer, model.compute.dtype)
    return {"tables": tables, **split(params)}


def _is_on_one_cpu(params: Any) -> bool:
    """Returns whether all parameters are arrays on one CPU device; False for arrays of NumPy and while tracing."""
    leaves = jax.tree.leaves(params)
    if not all(isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) for leaf in leaves):
        return False
    devices = set().union(*(leaf.devices() for leaf in leaves))
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def _layer_views(n_layer: int, params: Any) -> list[Any]:
    """Returns the tree of each layer, whose arrays share the memory of the stacked arrays [L, ...] on one CPU device.

    Copies of GPT-2 small's layers would take as long as its first token. A view keeps the stacked array's memory
    alive. If a program is given that array as a donated argument meanwhile, JAX copies it instead of overwriting it.
    """
    leaves, tree = jax.tree.flatten(jax.block_until_ready(params["h"]))
    mesh = mesh_of(params)
    placed = jax.sharding.NamedSharding(mesh, P()) if mesh else leaves[0].sharding
    # Not np.asarray: a jax.Array keeps its result, which would prevent the donation of the array forever.
    stacked = [np.from_dlpack(leaf) for leaf in leaves]
    # device_put shares the memory of an array that is aligned to 64 bytes, as most are, and copies the others.
    layers = jax.device_put([[a[i] for a in stacked] for i in range(n_layer)], placed)
    return [jax.tree.unflatten(tree, arrays) for arrays in layers]


@functools.lru_cache(maxsize=8)
def _make_split(n_layer: int, dtype: Any) -> Callable[[Any], dict[str, Any]]:
    def split(params: Any) -> dict[str, Any]:
        stacked = params["h"]
        matrices = {name: stacked[name] for name in ("attn", "mlp")}
        matrices = jax.tree.map(lambda a: a.astype(dtype), matrices)
        stacked = stacked | matrices  # LayerNorms stay in float32
        layers = [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(n_layer)]
        return {"layers": layers, "head_DV": gpt.unembedding(params).astype(dtype)}

    return jax.jit(split)


def empty_state(
    model: gpt.GPT,
    params: Any,
    size: int,
) -> tuple[Any, jax.Array]:
    """Returns (caches, ids_B) of zeros for `size` rows, each [size, N, S, H] in the compute dtype, and int32 [size].

    They have the shardings with which a step returns them: otherwise the second step would compile a second program.
    """
    c = model.config
    mesh = mesh_of(params)

    def placed(spec: P) -> Any:
        if mesh:
            return jax.sharding.NamedSharding(mesh, spec)
        return getattr(jax.tree.leaves(params)[0], "sharding", None)

    positions = min(SMALLEST_CONTEXT, c.block_size)
    shape = (size, c.n_head, positions, c.n_embd // c.n_head)
    make = _make_zeros(c.n_layer, shape, model.compute.dtype, placed(cache_spec(c.n_head, mesh)), placed(P()))
    return make()


@functools.lru_cache(maxsize=8)
def _make_zeros(n_layer: int, shape: tuple[int, ...], dtype: Any, kv: Any, ids: Any) -> Callable[[], Any]:
    # One program for all arrays: a call of jnp.zeros for each would take longer than the memory needs.
    def zeros() -> tuple[Any, jax.Array]:
        caches = [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(n_layer)]
        return caches, jnp.zeros(shape[0], jnp.int32)

    return jax.jit(zeros, out_shardings=(kv, ids))


def grow_caches(
    caches: Any,
    positions: int,
    block_size: int,
) -> Any:
    """Returns caches [B, N, S, H] with S of at least `positions`: doubled as often as needed, up to block_size."""
    assert positions <= block_size, positions
    given = caches[0][0].shape[2]
    size = given
    while size < positions:
        size = min(2 * size, block_size)
    if size == given:
        return caches
    grow = _make_grow(size, mesh_of(caches))
    return grow(caches)


@functools.lru_cache(maxsize=16)
def _make_grow(size: int, mesh: Any) -> Callable[[Any], Any]:
    def pad(cache_BNSH: Any) -> Any:
        missing = size - cache_BNSH.shape[2]
        padding = ((0, 0), (0, 0), (0, missing), (0, 0))
        wider = jnp.pad(cache_BNSH, padding)
        return sharding.constrain(wider, mesh, cache_spec(cache_BNSH.shape[1], mesh))

    return jax.jit(lambda caches: jax.tree.map(pad, caches))


def cache_spec(n_head: int, mesh: Any) -> Any:
    """Returns the PartitionSpec of keys and values BNSH: rows over the data axes, heads over `tensor` if it divides."""
    tensor = mesh.shape["tensor"] if mesh else 1
    heads = None if n_head % tensor else "tensor"
    return P(sharding.BATCH_AXES, heads, None, None)


def mesh_of(params: Any) -> Any:
    """Returns the mesh over which `params` are sharded, or None."""
    placed = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if isinstance(placed, jax.sharding.NamedSharding):
        return placed.mesh
    return None


def device_of(params: Any) -> Any:
    """Returns one of the devices on which `params` are stored, or will be."""
    placed = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if placed:
        return next(iter(placed.device_set))
    return jax.devices()[0]
