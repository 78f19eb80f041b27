"""Where every array lies: the device mesh, and the whole placement of parameters on one screen."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.config import MeshConfig
from gptjax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
TABLES = ("wte/embedding", "wpe/embedding", "lm_head/kernel")
LANES = 128  # of a TPU's tile
BATCH_SPEC = P(None, BATCH_AXES, None)  # tokens [A, B, T+1]

# Parameter path -> placement. `fsdp` cuts the model width, `tensor` the heads, the MLP width and the vocabulary.
# Leading None of everything under h/: the layers. An unmatched path is an error.
PARAM_SPECS = (
    (r"wte/embedding", P("tensor", "fsdp")),  # [V, D]
    (r"wpe/embedding", P(None, "fsdp")),  # [T, D]
    (r"h/attn/c_attn/kernel", P(None, "fsdp", None, "tensor")),  # [L, D, 3, D]
    (r"h/attn/c_attn/bias", P(None, None, "tensor")),  # [L, 3, D]
    (r"h/attn/c_proj/kernel", P(None, "tensor", "fsdp")),  # [L, D, D]
    (r"h/mlp/c_fc/kernel", P(None, "fsdp", "tensor")),  # [L, D, F]
    (r"h/mlp/c_fc/bias", P(None, "tensor")),  # [L, F]
    (r"h/mlp/c_proj/kernel", P(None, "tensor", "fsdp")),  # [L, F, D]
    (r"h/(attn|mlp)/c_proj/bias", P(None, None)),  # [L, D]
    (r"h/ln_[12]/(scale|bias)", P(None, None)),  # [L, D]
    (r"ln_f/(scale|bias)", P(None)),  # [D]
    (r"lm_head/kernel", P("fsdp", "tensor")),  # [D, V]
)


def make_mesh(config: MeshConfig, devices: Any = None) -> Mesh:
    """Returns the mesh (data, fsdp, tensor) over `devices`, all of them unless given.

    Of several slices, which only the data center's network connects, `data` alone goes across.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices, or `data` does not to that of the slices.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    sizes, types = mesh_sizes(config, len(devices), slices), (AxisType.Auto,) * len(AXES)
    within, across = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
    # An axis may be a part of a dimension of the torus: 64 of 8 x 16 x 16.
    split = {"allow_split_physical_axes": True}
    if slices == 1:
        return Mesh(mesh_utils.create_device_mesh(sizes, devices, **split), AXES, axis_types=types)
    return Mesh(mesh_utils.create_hybrid_device_mesh(within, across, devices, **split), AXES, axis_types=types)


def mesh_sizes(config: MeshConfig, count: int, slices: int = 1) -> tuple[int, int, int]:
    """Returns (data, fsdp, tensor) of a mesh over `count` devices in so many slices.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices, or `data` does not to that of the slices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    given = math.prod(s for s in sizes if s != -1)
    if count % given or (-1 not in sizes and given != count):
        shape, near = "x".join(map(str, sizes)), "x".join(map(str, _nearest_mesh(sizes, count)))
        raise ConfigError(f"mesh={shape} (data x fsdp x tensor): {count} devices cannot form it; nearest valid: {near}")
    data, fsdp, tensor = (count // given if size == -1 else size for size in sizes)
    if data % slices:
        raise ConfigError(f"mesh.data={data}: must be a multiple of the {slices} slices: only `data` goes across them")
    return data, fsdp, tensor


def _nearest_mesh(sizes: list[int], count: int) -> list[int]:
    """Returns the sizes that `count` devices can form with the fewest changes, counted in factors."""
    divisors = [d for d in range(1, count + 1) if count % d == 0]
    meshes = [[count // (f * t), f, t] for f in divisors for t in divisors if count % (f * t) == 0]
    return min(meshes, key=lambda mesh: sum(abs(math.log(m / s)) for m, s in zip(mesh, sizes, strict=True) if s != -1))


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a tree path as 'h/attn/c_attn/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def nest(leaves: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the tree of (path, leaf) pairs, {"h": {"ln_1": {"bias": x}}} of ("h/ln_1/bias", x)."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves:
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def param_spec(path: str) -> P:
    """Returns the PartitionSpec of the parameter at `path`."""
    for pattern, spec in PARAM_SPECS:
        if re.fullmatch(pattern, path):
            return spec
    raise ValueError(f"{path}: no row of PARAM_SPECS places this parameter; add one")


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """Returns the NamedSharding of each leaf of a (possibly abstract) parameter tree.

    Raises:
        ConfigError: a dimension does not divide by its mesh axis.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        spec = param_spec(path_name(path))
        _check_divides(path_name(path), leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(place, params)


def state_shardings(state: Any, params: Any, mesh: Mesh) -> Any:
    """Returns the NamedSharding of each leaf of `state` (an optimizer state, say) by the rows of `params`.

    A leaf whose path ends in a parameter's path is placed like it. One that lacks some of its dimensions (adafactor's
    factored moments) takes the spec of those that it keeps; scalars and everything else are replicated.
    """
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        owner = next((p for p in sorted(shapes, key=len, reverse=True) if f"/{name}".endswith(f"/{p}")), None)
        last = "v_col" in name  # adafactor's column moments keep the last of two equal dims, its row moments the first
        spec = P() if owner is None else _kept_spec(leaf.shape, shapes[owner], param_spec(owner), from_end=last)
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(place, state)


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """Returns `x` with its placement fixed where a mesh is set (inside a step) that the compiler cuts by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty or mesh.manual_axes else jax.lax.with_sharding_constraint(x, spec)


# Where `tensor` is 1 the step is cut by hand: each shard of the batch computes on its own sequences, gathers weights
# where it needs them, and sums gradients when, and in the dtype, that it is told. With `tensor` the compiler cuts it.


def on_each_shard(function: Callable[..., Any], *, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Returns `function` run by each shard of the batch on its own parts; just `function` where nothing is cut so."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.shape["tensor"] > 1:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def param_specs(params: Any) -> Any:
    """Returns the PartitionSpec of each parameter, outside of a mesh that of none."""
    if jax.sharding.get_abstract_mesh().empty:
        return P()
    return jax.tree.map_with_path(lambda path, _: param_spec(path_name(path)), params)


def _cut() -> tuple[str, ...]:
    """Returns along which of BATCH_AXES the code that runs here is one shard of several; () outside of a step."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in BATCH_AXES if axis in mesh.manual_axes and mesh.shape[axis] > 1)


def shard_index() -> jax.typing.ArrayLike:
    """Returns which shard of the batch this is, in the order of its sequences; 0 where it is not cut by hand."""
    return jax.lax.axis_index(_cut()) if _cut() else 0


def gathers() -> bool:
    """Returns whether weights are cut here and must be gathered."""
    return "fsdp" in _cut()


def gather_tables(params: Any, *, dtype: Any, two_stages: bool) -> Any:
    """Returns parameters with the tables whole along the model width: they travel in `dtype` and stay float32.

    Backward, what lookup and head gave as a table's gradient has been summed, and is reduced in float32.
    """
    how = {"dtype": dtype, "out_dtype": jnp.float32, "reduce_dtype": jnp.float32, "two_stages": two_stages}
    gather = _gather if gathers() else _place_whole

    def whole(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = path_name(path)
        return gather(leaf, param_spec(name), **how) if name in TABLES else leaf

    mesh = jax.sharding.get_abstract_mesh()
    return params if mesh.empty or mesh.size == 1 else jax.tree.map_with_path(whole, params)


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


def _place_whole(x: jax.Array, spec: P, *, dtype: Any, out_dtype: Any, **_: Any) -> jax.Array:
    """The same as _gather, asked of the compiler by placements, of value and gradient."""

    def whole(_: None, x: jax.Array) -> jax.Array:
        return constrain(x.astype(dtype), P(*(None if axis == "fsdp" else axis for axis in spec))).astype(out_dtype)

    return jax.custom_derivatives.linear_call(whole, lambda _, g: constrain(g, spec), None, x)


def sum_gradients(grads: Any, *, reduce_dtype: Any) -> Any:
    """Returns the shards' gradients summed: what fsdp cuts over `data` alone, since gathering has summed it over fsdp.

    Of tables in float32.
    """

    def total(path: tuple[Any, ...], g: jax.Array) -> jax.Array:
        name = path_name(path)
        axes = tuple(axis for axis in _cut() if axis not in param_spec(name))
        dtype = jnp.float32 if name in TABLES else reduce_dtype
        return jax.lax.psum(g.astype(dtype), axes).astype(g.dtype) if axes else g

    return jax.tree.map_with_path(total, grads) if _cut() else grads


def sum_over_shards(tree: Any) -> Any:
    """Returns the sum of each leaf over the shards of the batch."""
    return jax.lax.psum(tree, _cut()) if _cut() else tree


def data_parallel_size(mesh: Mesh) -> int:
    """Returns into how many parts the batch is cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def _kept_spec(shape: tuple[int, ...], full: tuple[int, ...], spec: P, *, from_end: bool = False) -> P:
    """Returns the entries of `spec` for the dims of `full` that are left in `shape`, or P() if it is no part of it."""
    axes, kept = list(spec) + [None] * (len(full) - len(spec)), []
    if from_end:
        return P(*reversed(_kept_spec(shape[::-1], full[::-1], P(*axes[::-1]))))
    position = 0
    for size in shape:
        while position < len(full) and full[position] != size:
            position += 1
        if position == len(full):
            return P()
        kept.append(axes[position])
        position += 1
    return P(*kept)


def divides(shapes: Mapping[str, tuple[int, ...]], mesh_shape: Mapping[str, int]) -> bool:
    """Returns whether every dimension of the parameters, shapes by path, divides by its axis of the mesh."""
    return all(
        axis is None or size % mesh_shape[axis] == 0
        for path, shape in shapes.items()
        for size, axis in zip(shape, param_spec(path), strict=False)
    )


def _check_divides(name: str, shape: tuple[int, ...], spec: P, mesh: Mesh) -> None:
    for size, axis in zip(shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            fits = [n for n in range(1, mesh.size + 1) if size % n == 0 and mesh.size % n == 0]
            near = sorted(sorted(fits, key=lambda n: abs(n - mesh.shape[axis]))[:2])
            raise ConfigError(
                f"mesh.{axis}={mesh.shape[axis]}: does not divide {name} of shape {'x'.join(map(str, shape))}; "
                f"nearest valid: {', '.join(map(str, near))}"
            )


def bytes_per_device(tree: Any) -> int:
    """Returns how many bytes of an abstract, sharded tree the fullest device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
