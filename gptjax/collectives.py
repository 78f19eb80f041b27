"""The step cut by hand: what each device computes on its own parts, and what it sends to the others.

Each shard of the batch computes on its own sequences, gathers weights where it needs them, and sums gradients when, and
in the dtype, that it is told. `tensor` cuts heads, MLP width and vocabulary, and between the products the positions of
each sequence: what enters a product is gathered, what leaves it is summed and cut again. Source: Korthikanti et al.
2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.2. Outside of a step cut so, all of
this does nothing.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32
from jax.sharding import PartitionSpec as P

from gptjax.sharding import AXES, BATCH_AXES, TABLES, param_spec, path_name

LANES = 128  # of a TPU's tile


def on_each_shard(function: Callable[..., Any], *, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Returns `function` run by each device on its own parts; just `function` where there is one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def param_specs(params: Any) -> Any:
    """Returns the PartitionSpec of each parameter, outside of a mesh that of none."""
    if jax.sharding.get_abstract_mesh().empty:
        return P()
    return jax.tree.map_with_path(lambda path, _: param_spec(path_name(path)), params)


def _cut(axes: Iterable[str] = AXES) -> tuple[str, ...]:
    """Returns along which of `axes` the code that runs here is one shard of several; () outside of a step."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in axes if axis in mesh.manual_axes and mesh.shape[axis] > 1)


def shard_index() -> jax.typing.ArrayLike:
    """Returns which shard of the batch this is, in the order of its sequences; 0 where it is not cut by hand."""
    return jax.lax.axis_index(_cut(BATCH_AXES)) if _cut(BATCH_AXES) else 0


def tensor_index() -> jax.typing.ArrayLike:
    """Returns which part of heads, MLP width, vocabulary and positions this is; 0 where they are not cut by hand."""
    return jax.lax.axis_index("tensor") if _cut(["tensor"]) else 0


def tensor_parts() -> int:
    """Returns in how many parts heads, MLP width, vocabulary and positions are cut by hand here."""
    return jax.sharding.get_abstract_mesh().shape["tensor"] if _cut(["tensor"]) else 1


def own_positions(x: jax.Array) -> jax.Array:
    """Returns this device's part of the positions, dim 1, of `x`."""
    size = x.shape[1] // tensor_parts()
    return jax.lax.dynamic_slice_in_dim(x, tensor_index() * size, size, axis=1) if tensor_parts() > 1 else x


def gather_positions(x: jax.Array) -> jax.Array:
    """Returns `x` with all positions, dim 1, of which each device has a part; backward, their sum is cut."""
    return jax.lax.all_gather(x, "tensor", axis=1, tiled=True) if tensor_parts() > 1 else x


def sum_positions(x: jax.Array) -> jax.Array:
    """Returns this device's part of the positions, dim 1, of the sum of `x` over `tensor`; backward, it is gathered."""
    return jax.lax.psum_scatter(x, "tensor", scatter_dimension=1, tiled=True) if tensor_parts() > 1 else x


def summed_product(*operands: Any, **how: Any) -> jax.Array:
    """Returns jax.lax.dot_general of a kernel cut by rows, summed; nn.Dense adds its bias to it after that."""
    return sum_positions(jax.lax.dot_general(*operands, **how))


def sum_of_logs(log_BT: jax.Array) -> jax.Array:
    """Returns log(sum over `tensor` of exp(log_BT)) of this device's positions."""
    if tensor_parts() == 1:
        return log_BT
    top_BT = jax.lax.pmax(jax.lax.stop_gradient(log_BT), "tensor")
    return own_positions(top_BT) + jnp.log(sum_positions(jnp.exp(log_BT - top_BT)))


def gathers() -> bool:
    """Returns whether weights are cut here and must be gathered."""
    return bool(_cut(["fsdp"]))


def gather_tables(params: Any, *, dtype: Any, two_stages: bool) -> Any:
    """Returns parameters with the tables whole along the model width: they travel in `dtype` and stay float32.

    Backward, what lookup and head gave as a table's gradient has been summed, and is reduced in float32.
    """
    how = {"dtype": dtype, "out_dtype": jnp.float32, "reduce_dtype": jnp.float32, "two_stages": two_stages}

    def whole(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = path_name(path)
        return _gather(leaf, param_spec(name), **how) if name in TABLES else leaf

    return jax.tree.map_with_path(whole, params) if _cut() else params


def gather_layer(layer: Any, *, dtype: Any, reduce_dtype: Any, two_stages: bool) -> Any:
    """Returns one layer's parameters with the weights whole along the model width, in `dtype`.

    Backward, their gradients are summed over the shards in `reduce_dtype`, and each shard keeps its part.
    """
    how = {"dtype": dtype, "out_dtype": dtype, "reduce_dtype": reduce_dtype, "two_stages": two_stages}

    def whole(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        spec = P(*param_spec(f"h/{path_name(path)}")[1:])  # a layer has no leading L
        return _gather(leaf, spec, **how) if "fsdp" in spec else leaf

    return jax.tree.map_with_path(whole, layer)


def _gather(x: jax.Array, spec: P, *, dtype: Any, out_dtype: Any, reduce_dtype: Any, two_stages: bool) -> jax.Array:
    if not gathers():
        rounded = lambda _, x: x.astype(dtype).astype(out_dtype)  # noqa: E731
        return jax.custom_derivatives.linear_call(rounded, lambda _, g: g, None, x)
    dim, count = spec.index("fsdp"), jax.sharding.get_abstract_mesh().shape["fsdp"]
    leading = (x.shape[dim], *x.shape[:dim], *x.shape[dim + 1 :])
    # What travels is cut along a dim that no tile of memory spans: else XLA makes sums of twice the bytes of it.
    tiles, stages = (-1, math.gcd(x.size, LANES)), _stages(count) if two_stages else [None]

    def whole(_: None, x: jax.Array) -> jax.Array:
        parts = jnp.moveaxis(x.astype(dtype), dim, 0).reshape(1, *tiles)
        for groups in reversed(stages):
            parts = jax.lax.all_gather(parts, "fsdp", tiled=True, axis_index_groups=groups)
        return jnp.moveaxis(parts.reshape(-1, *leading[1:]), 0, dim).astype(out_dtype)

    def scatter(_: None, g: jax.Array) -> jax.Array:
        parts = jnp.moveaxis(g.astype(reduce_dtype), dim, 0).reshape(count, *tiles)
        for groups in stages:
            parts = jax.lax.psum_scatter(parts, "fsdp", tiled=True, axis_index_groups=groups)
        return jnp.moveaxis(parts.reshape(leading), 0, dim).astype(x.dtype)

    return jax.custom_derivatives.linear_call(whole, scatter, None, x)


def _stages(count: int) -> list[list[list[int]] | None]:
    """Returns the groups in which so many devices scatter a sum in two stages: across a grid's rows, then along.

    To gather, the other way round.
    """
    rows = next((n for n in (4, 2, 3, 5, 7) if count % n == 0 and count > n), 1)
    grid = np.arange(count).reshape(rows, -1)
    return [grid.T.tolist(), grid.tolist()] if rows > 1 else [None]


def sum_gradients(grads: Any, *, reduce_dtype: Any) -> Any:
    """Returns the devices' gradients summed over the axes that do not cut them: gathering has summed them over fsdp.

    Of tables in float32.
    """

    def total(path: tuple[Any, ...], g: jax.Array) -> jax.Array:
        name = path_name(path)
        axes = tuple(axis for axis in _cut() if axis not in param_spec(name))
        dtype = jnp.float32 if name in TABLES else reduce_dtype
        return jax.lax.psum(g.astype(dtype), axes).astype(g.dtype) if axes else g

    return jax.tree.map_with_path(total, grads) if _cut() else grads


def sum_over_shards(tree: Any) -> Any:
    """Returns the sum of each leaf over all devices."""
    return jax.lax.psum(tree, _cut()) if _cut() else tree


def keep_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Returns bool `shape`, each False with probability `rate`, for dropout, the same however the step is cut.

    Each entry is a hash of the key, its sequence, dim 0, and its place in that, of which `tensor` cuts dim 1: positions
    or heads. `key` is a threefry key.
    """
    entries = (shape[0], shape[1], math.prod(shape[2:]))
    row, index, place = (jax.lax.broadcasted_iota(jnp.uint32, entries, dim) for dim in range(3))
    row += jnp.uint32(shard_index() * shape[0])
    index += jnp.uint32(tensor_index() * shape[1])
    high, low = threefry_2x32(jax.random.key_data(key), jnp.stack([row, index * entries[2] + place]))
    return ((high ^ low) < np.uint32((1 - rate) * 2**32)).reshape(shape)
