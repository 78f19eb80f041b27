"""Where every array lies: the device mesh, and the whole placement of parameters on one screen."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.config import MeshConfig
from gptjax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
TABLES = ("wte/embedding", "wpe/embedding", "lm_head/kernel")
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
        _check_divides(path_name(path), leaf.shape, mesh)
        return NamedSharding(mesh, param_spec(path_name(path)))

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
    return not any(_undivided(path, shape, mesh_shape) for path, shape in shapes.items())


def _undivided(path: str, shape: tuple[int, ...], mesh_shape: Mapping[str, int]) -> list[tuple[int, str]]:
    """Returns (size, axis) of each dimension that its axis of the mesh does not divide."""
    pairs = zip(shape, param_spec(path), strict=False)
    return [(size, axis) for size, axis in pairs if axis is not None and size % mesh_shape[axis]]


def _check_divides(path: str, shape: tuple[int, ...], mesh: Mesh) -> None:
    for size, axis in _undivided(path, shape, mesh.shape):
        fits = [n for n in range(1, mesh.size + 1) if size % n == 0 and mesh.size % n == 0]
        near = sorted(sorted(fits, key=lambda n: abs(n - mesh.shape[axis]))[:2])
        raise ConfigError(
            f"mesh.{axis}={mesh.shape[axis]}: does not divide {path} of shape {'x'.join(map(str, shape))}; "
            f"nearest valid: {', '.join(map(str, near))}"
        )


def bytes_per_device(tree: Any) -> int:
    """Returns how many bytes of an abstract, sharded tree the fullest device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
