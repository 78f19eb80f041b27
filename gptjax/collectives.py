"""Manual parallelism under shard_map: FSDP, tensor and sequence parallelism, and their collectives.

Each device computes on its own sequences. It all-gathers a layer's weights where they are used, and reduce-scatters
their gradients in `reduce_dtype`. `tensor` shards heads, MLP width and vocabulary. Between matmuls it shards positions:
an all-gather comes before a column-parallel matmul, and a reduce-scatter after a row-parallel one. Source: Korthikanti
et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.2.

Every function takes a `Parallel`. Along a mesh axis of size 1 it sends nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.tree_util import KeyPath
from jax.typing import DTypeLike

from gptjax.params import PyTree, find
from gptjax.sharding import AXES, BATCH_AXES, BATCH_SPEC, param_spec, param_specs, path_name

LANES = 128  # of a TPU's tile
ShardFn = Callable[[PyTree, jax.Array, jax.Array], PyTree]  # takes this device's shards
Groups = list[list[int]] | None  # axis_index_groups of a collective; None means all devices in one group


@dataclasses.dataclass(frozen=True)
class Parallel:
    """The parallelism of a program under shard_map. The default: one device, or a program that XLA partitions."""

    mesh: Mesh | None = None
    dtype: jnp.dtype = jnp.dtype(jnp.float32)  # of weights and activations that are sent
    reduce_dtype: jnp.dtype = jnp.dtype(jnp.float32)  # of sums of weight gradients over devices
    table_reduce_dtype: jnp.dtype = jnp.dtype(jnp.float32)  # the same for embedding tables and the head
    # Collectives over all devices of a TPU slice take two stages: in one stage, XLA sends twice the bytes.
    two_stage_collectives: bool = False

    @property
    def fsdp(self) -> int:
        """The number of devices along `fsdp`."""
        return self.size("fsdp")

    @property
    def tensor(self) -> int:
        """The number of devices along `tensor`."""
        return self.size("tensor")

    def size(self, axis: str) -> int:
        """Returns how many devices the mesh has along `axis`."""
        if self.mesh is None:
            return 1
        return self.mesh.shape[axis]

    def axes(self, names: Iterable[str] = AXES) -> tuple[str, ...]:
        """Returns the mesh axes among `names` that have more than one device."""
        # Axes of size 1 are left out everywhere, so that one device runs a program without collectives.
        return tuple(name for name in names if self.size(name) > 1)


ONE_DEVICE = Parallel()


def on_shards(
    function: ShardFn,
    parallel: Parallel,
    *,
    out_specs: Callable[[PyTree], PyTree],
) -> ShardFn:
    """Wraps function(params, tokens_ABT, replicated) in jax.shard_map; returns it unchanged for one device.

    Params are sharded by PARAM_SPECS, tokens_ABT (int32 [A, B, T+1]) over data and fsdp, and each device has all of
    `replicated`.

    out_specs: returns the specs of the result, given those of params.
    """
    # On one device nothing is wrapped, so that its program is plain JAX.
    if not parallel.axes():
        return function

    def sharded(
        params: PyTree,
        tokens_ABT: jax.Array,
        replicated: jax.Array,
    ) -> PyTree:
        specs = param_specs(params)
        # check_vma=False: JAX does not check that a result with spec P() is equal on all devices. psum_all and
        # all_reduce_gradients make it equal.
        run = jax.shard_map(
            function,
            mesh=parallel.mesh,
            in_specs=(specs, BATCH_SPEC, P()),
            out_specs=out_specs(specs),
            check_vma=False,
        )
        return run(params, tokens_ABT, replicated)

    return sharded


def data_parallel_index(parallel: Parallel) -> jax.typing.ArrayLike:
    """Returns the index of this device's shard of the batch, an int32 scalar, in the order of its sequences."""
    axes = parallel.axes(BATCH_AXES)
    if not axes:
        return 0
    return jax.lax.axis_index(axes)  # row-major, as BATCH_SPEC shards dim 1 over both axes


def tensor_parallel_index(parallel: Parallel) -> jax.typing.ArrayLike:
    """Returns the index of this device's shard of heads, MLP width, vocabulary and positions, an int32 scalar."""
    # Outside of shard_map axis_index fails, because no axis is manual there.
    if parallel.tensor == 1:
        return 0
    return jax.lax.axis_index("tensor")


def local_sequence(
    x: jax.Array,
    parallel: Parallel,
) -> jax.Array:
    """Returns this device's shard of the positions: of x [B, T, ...] it is [B, T / tensor, ...], in x's dtype."""
    if parallel.tensor == 1:
        return x
    size = x.shape[1] // parallel.tensor
    # The index is traced, so this is a dynamic slice; its transpose is a dynamic update of zeros, and sends nothing.
    start = tensor_parallel_index(parallel) * size
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)


# all_gather and psum_scatter are each other's transpose, so in the backward pass the two functions below change places.
# Both keep the dtype of x, so activations are sent and summed in the compute dtype.
def all_gather_sequence(
    x: jax.Array,
    parallel: Parallel,
) -> jax.Array:
    """All-gathers the positions over `tensor`: from [B, T / tensor, ...] to [B, T, ...], in x's dtype.

    Its transpose is a reduce-scatter.
    """
    if parallel.tensor == 1:
        return x
    return jax.lax.all_gather(x, "tensor", axis=1, tiled=True)


def reduce_scatter_sequence(
    x: jax.Array,
    parallel: Parallel,
) -> jax.Array:
    """Sums x [B, T, ...] over `tensor` and keeps this device's positions: [B, T / tensor, ...], in x's dtype.

    Its transpose is an all-gather.
    """
    if parallel.tensor == 1:
        return x
    return jax.lax.psum_scatter(x, "tensor", scatter_dimension=1, tiled=True)


def logsumexp_over_tensor(
    log_BT: jax.Array,
    parallel: Parallel,
) -> jax.Array:
    """Returns log(sum over `tensor` of exp(log_BT)) for this device's positions: float32 [B, T / tensor].

    log_BT: float32 [B, T], all positions, each over this device's part of the vocabulary.
    """
    if parallel.tensor == 1:
        return log_BT
    # The maximum only prevents overflow of exp. It cancels out, so no gradient is needed; JAX has none for pmax.
    constant_BT = jax.lax.stop_gradient(log_BT)
    top_BT = jax.lax.pmax(constant_BT, "tensor")
    scaled_BT = jnp.exp(log_BT - top_BT)
    sum_BT = reduce_scatter_sequence(scaled_BT, parallel)
    return local_sequence(top_BT, parallel) + jnp.log(sum_BT)


def all_gather_embeddings(params: PyTree, parallel: Parallel) -> PyTree:
    """All-gathers the embedding tables in a parameter tree over `fsdp`: sent in `dtype`, returned in float32.

    In the backward pass their gradients are reduce-scattered in `table_reduce_dtype`.
    """
    if not parallel.axes():
        return params

    def gather(
        path: KeyPath,
        leaf: jax.Array,
    ) -> jax.Array:
        name = path_name(path)
        if find(name).role != "table":
            return leaf
        # Called even if `fsdp` is 1: nothing is sent, but the table is rounded to `dtype`, as if `fsdp` were larger.
        return _all_gather(
            leaf,
            param_spec(name),
            out_dtype=jnp.float32,
            reduce_dtype=parallel.table_reduce_dtype,
            parallel=parallel,
        )

    return jax.tree.map_with_path(gather, params)


def all_gather_layer(layer: PyTree, parallel: Parallel) -> PyTree:
    """All-gathers one layer's weights over `fsdp`, in `dtype`.

    In the backward pass their gradients are reduce-scattered in `reduce_dtype`: each device gets its shard of the sum.
    """
    if parallel.fsdp == 1:
        return layer

    def gather(
        path: KeyPath,
        leaf: jax.Array,
    ) -> jax.Array:
        stacked_spec = param_spec(f"h/{path_name(path)}")
        # `path` is relative to the layer. params.py has the path in the stack, which begins with "h/".
        spec = P(*stacked_spec[1:])  # the scan has taken one layer: no leading L
        if "fsdp" not in spec:
            return leaf  # biases and LayerNorms are replicated
        return _all_gather(
            leaf,
            spec,
            out_dtype=parallel.dtype,
            reduce_dtype=parallel.reduce_dtype,
            parallel=parallel,
        )

    return jax.tree.map_with_path(gather, layer)


def _all_gather(
    x: jax.Array,
    spec: P,
    *,
    out_dtype: DTypeLike,
    reduce_dtype: DTypeLike,
    parallel: Parallel,
) -> jax.Array:
    dtype = parallel.dtype
    count = parallel.fsdp
    if count == 1:
        # Only tables come here. They are rounded as if they had been sent, so that meshes with and without `fsdp`
        # compute the same. Their gradient is not rounded.
        return jax.custom_derivatives.linear_call(
            lambda _, x: x.astype(dtype).astype(out_dtype),
            lambda _, g: g,
            None,
            x,
        )
    dim = spec.index("fsdp")
    other_dims = (*x.shape[:dim], *x.shape[dim + 1 :])
    shard_shape = (x.shape[dim], *other_dims)  # the sharded dim moved to the front
    # Sent as [devices, rows, 128]: if a shard ended within a TPU tile, XLA would use an all-reduce of twice the bytes.
    tiles = (-1, math.gcd(x.size, LANES))
    stages: list[Groups] = [None]
    if parallel.two_stage_collectives:
        stages = _stages(count)

    # The casts come before the collectives: the links carry `dtype` and `reduce_dtype`.
    def gather(
        _: None,
        x: jax.Array,
    ) -> jax.Array:
        leading = jnp.moveaxis(x.astype(dtype), dim, 0)
        parts = leading.reshape(1, *tiles)
        for groups in reversed(stages):
            parts = jax.lax.all_gather(parts, "fsdp", tiled=True, axis_index_groups=groups)
        gathered = parts.reshape(-1, *other_dims)
        return jnp.moveaxis(gathered, 0, dim).astype(out_dtype)

    def scatter(
        _: None,
        g: jax.Array,
    ) -> jax.Array:
        leading = jnp.moveaxis(g.astype(reduce_dtype), dim, 0)
        parts = leading.reshape(count, *tiles)
        for groups in stages:
            parts = jax.lax.psum_scatter(parts, "fsdp", tiled=True, axis_index_groups=groups)
        shard = parts.reshape(shard_shape)
        return jnp.moveaxis(shard, 0, dim).astype(x.dtype)

    # A linear_call, not plain astype and all_gather: their transposes would sum the gradient in `dtype`. It also marks
    # the weights for the policies in remat.py.
    return jax.custom_derivatives.linear_call(gather, scatter, None, x)


def _stages(count: int) -> list[Groups]:
    """Returns the device groups of a two-stage reduce-scatter over a grid: first down the columns, then along the rows.

    An all-gather takes them in reverse.
    """
    factors = (4, 2, 3, 5, 7)  # four rows first, the side of most TPU slices
    rows = next((n for n in factors if count % n == 0 and count > n), 1)
    if rows == 1:
        return [None]  # one device, or no factor above divides their number
    # Device i is at (i // columns, i % columns). After the first stage a device has 1 / rows of the sum over its
    # column, and after the second 1 / columns of that. So device i ends with shard i, as in one stage.
    grid = np.arange(count).reshape(rows, -1)
    across = grid.T.tolist()
    along = grid.tolist()
    return [across, along]


def all_reduce_gradients(grads: PyTree, parallel: Parallel) -> PyTree:
    """All-reduces each gradient over the axes that do not shard it, in the reduce dtype of weights or that of tables.

    The transpose of the all-gather has already summed over `fsdp`. The result has the shapes and dtypes of `grads`.
    """
    if not parallel.axes():
        return grads

    def reduce(
        path: KeyPath,
        g: jax.Array,
    ) -> jax.Array:
        name = path_name(path)
        spec = param_spec(name)
        # A replicated vector is also summed over `tensor`: each device has the gradient of its own positions only.
        axes = tuple(axis for axis in parallel.axes() if axis not in spec)
        if not axes:
            return g
        # The gradient of a table sums over tokens of very different frequency, so by default it stays in float32. Only
        # the sum over devices takes this dtype; the sum within one is in float32, as in `embed`.
        is_table = find(name).role == "table"
        dtype = parallel.table_reduce_dtype if is_table else parallel.reduce_dtype
        return jax.lax.psum(g.astype(dtype), axes).astype(g.dtype)

    return jax.tree.map_with_path(reduce, grads)


def psum_all(tree: PyTree, parallel: Parallel) -> PyTree:
    """Returns the sum of each leaf over all devices, in its shape and dtype, the same on each of them."""
    # No summand is replicated: each device has counted only its own tokens, also along `tensor`.
    axes = parallel.axes()
    if not axes:
        return tree
    return jax.lax.psum(tree, axes)
