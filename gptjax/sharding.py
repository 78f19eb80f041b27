"""The device mesh, and the sharding of parameters, optimizer state and batches over it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import KeyPath

from gptjax.config import GPTConfig, MeshConfig
from gptjax.errors import ConfigError
from gptjax.params import PARAMS, PyTree, check_paths, find, leaf_shape, rows

# Outermost to innermost: neighbours along `tensor`, which sends the most, are physically closest.
AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
# Of tokens [A, B, T+1]. T+1 is not sharded, because `tensor` does not divide it. Under tensor parallelism the model
# slices its local sequence itself.
BATCH_SPEC = P(None, BATCH_AXES, None)
# "fsdp" in a spec: each layer is all-gathered over this axis before use. "tensor" in a spec: each device computes with
# its own shard.
PARAM_SPECS = {param.path: param.spec for param in PARAMS}


def make_mesh(
    config: MeshConfig,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Returns the mesh (data, fsdp, tensor) over `devices`, all of them unless given.

    With several slices only `data` spans the DCN.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices, or `data` is no multiple of the slices.
    """
    if devices is None:
        devices = jax.devices()
    # slice_index differs only between TPU slices; other devices may not have it.
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    sizes = mesh_sizes(config, len(devices), slices)
    # mesh_utils orders the devices so that neighbours along an axis are neighbours in the torus. A plain reshape of
    # jax.devices() would send over several hops. A mesh axis may split a torus axis: 64 on an 8 x 16 x 16 torus.
    split = {"allow_split_physical_axes": True}
    if slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, **split)
    else:
        # Slices are the outer part of `data`, so that an all-reduce over `data` can sum within a slice first.
        within_slice = (sizes[0] // slices, *sizes[1:])
        across_slices = (slices, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(
            within_slice,
            across_slices,
            devices,
            **split,
        )
    # Auto: outside of shard_map XLA propagates shardings.
    types = (AxisType.Auto,) * len(AXES)
    return Mesh(grid, AXES, axis_types=types)


def mesh_sizes(
    config: MeshConfig,
    count: int,
    slices: int = 1,
) -> tuple[int, int, int]:
    """Returns (data, fsdp, tensor) of a mesh over `count` devices in `slices` slices.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices, or `data` is no multiple of the slices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    # At most one size is -1 (checked in config.py). It takes all remaining devices.
    given = math.prod(s for s in sizes if s != -1)
    exact = -1 in sizes or given == count
    if count % given or not exact:
        nearest = _nearest_mesh(sizes, count)
        raise ConfigError(
            f"data x fsdp x tensor does not fit {count} devices",
            field="mesh",
            value=_by_x(sizes),
            remedy=f"nearest valid: {_by_x(nearest)}",
        )
    rest = count // given  # the size of the axis that is -1
    data, fsdp, tensor = (rest if size == -1 else size for size in sizes)
    # `fsdp` and `tensor` send in each layer and stay on ICI; `data` sends once per step.
    if data % slices:
        raise ConfigError(
            f"must be a multiple of the {slices} slices, since only `data` may span slices",
            field="mesh.data",
            value=data,
        )
    return data, fsdp, tensor


def _by_x(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes))


def _nearest_mesh(sizes: list[int], count: int) -> list[int]:
    """Returns the mesh of `count` devices that is nearest to `sizes`, by the sum of log ratios."""

    def distance(mesh: list[int]) -> float:
        # The logarithm counts a halving like a doubling. A size of -1 has no preference.
        pairs = zip(mesh, sizes, strict=True)
        return sum(abs(math.log(m / s)) for m, s in pairs if s != -1)

    # All meshes of `count` devices; a few hundred at most.
    divisors = [d for d in range(1, count + 1) if count % d == 0]
    meshes = [
        [count // (fsdp * tensor), fsdp, tensor]
        for fsdp in divisors
        for tensor in divisors
        if count % (fsdp * tensor) == 0
    ]
    return min(meshes, key=distance)  # of equal distances the first: smaller fsdp, then smaller tensor


def path_name(path: KeyPath) -> str:
    """Returns a tree path as 'h/attn/c_attn/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def nest(leaves: Iterable[tuple[str, PyTree]]) -> PyTree:
    """Returns the tree of (path, leaf) pairs: ("h/ln_1/bias", x) becomes {"h": {"ln_1": {"bias": x}}}."""
    tree: PyTree = {}
    for path, leaf in leaves:
        # Plain dicts, sorted by JAX when it flattens them: the order of `leaves` does not matter.
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def param_spec(path: str) -> P:
    """Returns the PartitionSpec of the parameter at `path`.

    Raises:
        ConfigError: params.py does not describe it.
    """
    # `find` fails with a message; PARAM_SPECS would raise a KeyError.
    return PARAM_SPECS[find(path).path]


def param_specs(params: PyTree) -> PyTree:
    """Returns the PartitionSpec of each leaf of a parameter tree.

    Raises:
        ConfigError: params.py does not describe a leaf.
    """
    return jax.tree.map_with_path(lambda path, _: param_spec(path_name(path)), params)


def abstract_params(config: GPTConfig) -> PyTree:
    """Returns the parameter tree of `config` as float32 jax.ShapeDtypeStruct."""
    # The table gives the shapes. Tracing the model would take seconds, and planning and conversion need no more.
    leaves = []
    for param in rows(config):
        shape = leaf_shape(param, config)
        leaf = jax.ShapeDtypeStruct(shape, np.float32)
        leaves.append((param.path, leaf))
    return nest(leaves)


def check_params(params: PyTree, config: GPTConfig) -> None:
    """Checks a (possibly abstract) parameter tree against the table in params.py.

    Raises:
        ConfigError: a leaf is unknown, missing or of the wrong shape; the message names it.
    """
    # The modules and the table are written separately. A parameter without a row would have no defined sharding, weight
    # decay or conversion.
    shapes = _shapes_by_path(params)
    check_paths(shapes, config)
    for param in rows(config):
        shape = shapes[param.path]
        expected = leaf_shape(param, config)
        if shape != expected:
            raise ConfigError(
                f"has shape {shape}, in gptjax.params.PARAMS {expected}",
                field=param.path,
            )


def _shapes_by_path(params: PyTree) -> dict[str, tuple[int, ...]]:
    # Abstract leaves have shapes, too.
    leaves = jax.tree.leaves_with_path(params)
    return {path_name(path): leaf.shape for path, leaf in leaves}


def param_shardings(params: PyTree, mesh: Mesh) -> PyTree:
    """Returns the NamedSharding of each leaf of a (possibly abstract) parameter tree.

    Raises:
        ConfigError: a mesh axis does not divide the dimension that it shards, or params.py does not describe a leaf.
    """

    def place(path: KeyPath, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = path_name(path)
        # jit refuses uneven shards, too, but its message names neither the parameter nor a size that would fit.
        _check_divides(name, leaf.shape, mesh)
        return NamedSharding(mesh, param_spec(name))

    return jax.tree.map_with_path(place, params)


def state_shardings(
    state: PyTree,
    params: PyTree,
    mesh: Mesh,
) -> PyTree:
    """Returns the NamedSharding of each leaf of `state`, such as an optimizer state, from the specs of `params`.

    A leaf whose path ends in a parameter's path is placed like it. One that lacks some of its dimensions (adafactor's
    factored moments) takes the spec of those that it keeps; scalars and all other leaves are replicated.

    Raises:
        ConfigError: params.py does not describe a leaf of `params`.
    """
    shapes = _shapes_by_path(params)
    # Longest first: otherwise a path that is the end of a longer path would match the longer one's leaves.
    paths = sorted(shapes, key=len, reverse=True)

    def place(path: KeyPath, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = path_name(path)
        # By path, not by shape: wpe and a kernel may have one shape. The slashes keep "a/x" from ending "ba/x".
        owner = next((p for p in paths if f"/{name}".endswith(f"/{p}")), None)
        if owner is None:
            return NamedSharding(mesh, P())
        # Square kernels are ambiguous by shape: Adafactor's v_col keeps the last dim, v_row the first.
        # Moments have all dims of their parameter, and keep its spec.
        spec = _kept_spec(
            leaf.shape,
            shapes[owner],
            param_spec(owner),
            from_end="v_col" in name,
        )
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(place, state)


def constrain(
    x: jax.Array,
    mesh: Mesh | None,
    spec: P,
) -> jax.Array:
    """Returns `x`, of any shape, with its sharding fixed, in a program that XLA partitions over `mesh`.

    A mesh of None means one device.
    """
    if mesh is None:
        return x
    # Not for use under shard_map, where an array is a shard already.
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def data_parallel_size(mesh: Mesh) -> int:
    """Returns the number of shards of the batch."""
    # Devices along `tensor` share their sequences.
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def _kept_spec(
    shape: tuple[int, ...],
    full: tuple[int, ...],
    spec: P,
    *,
    from_end: bool = False,
) -> P:
    """Returns the entries of `spec` for the dims of `full` that `shape` keeps, or P() if it has other dims."""
    # A spec may be shorter than the array: the dims that it does not name are not sharded.
    missing = len(full) - len(spec)
    axes = list(spec) + [None] * missing
    if from_end:
        reversed_spec = P(*reversed(axes))
        reversed_kept = _kept_spec(shape[::-1], full[::-1], reversed_spec)
        return P(*reversed(reversed_kept))
    # Greedy: each size takes the first dim of `full` that has it and comes after the dim taken before.
    kept = []
    position = 0
    for size in shape:
        while position < len(full) and full[position] != size:
            position += 1
        if position == len(full):
            return P()  # a placeholder, such as adafactor's [1] for moments that it does not factor
        kept.append(axes[position])
        position += 1
    return P(*kept)


def divides(
    shapes: Mapping[str, tuple[int, ...]],
    mesh_shape: Mapping[str, int],
) -> bool:
    """Returns whether each axis of the mesh divides the dimensions that it shards, for parameter shapes by path."""
    return not any(_undivided(path, shape, mesh_shape) for path, shape in shapes.items())


def _undivided(
    path: str,
    shape: tuple[int, ...],
    mesh_shape: Mapping[str, int],
) -> list[tuple[int, str]]:
    """Returns (size, axis) of each dimension that its axis of the mesh does not divide."""
    found = []
    # strict=False: a spec may be shorter than the shape.
    for size, axis in zip(shape, param_spec(path), strict=False):
        if axis is not None and size % mesh_shape[axis]:
            found.append((size, axis))
    return found


def _check_divides(
    path: str,
    shape: tuple[int, ...],
    mesh: Mesh,
) -> None:
    for size, axis in _undivided(path, shape, mesh.shape):
        given = mesh.shape[axis]
        # The axis size must divide the dimension and the number of devices.
        fits = [n for n in range(1, mesh.size + 1) if size % n == 0 and mesh.size % n == 0]
        by_distance = sorted(fits, key=lambda n, given=given: abs(n - given))
        nearest = sorted(by_distance[:2])
        raise ConfigError(
            f"does not divide {path} of shape {_by_x(shape)}",
            field=f"mesh.{axis}",
            value=given,
            remedy=f"nearest valid: {', '.join(map(str, nearest))}",
        )


def bytes_per_device(tree: PyTree) -> int:
    """Returns the bytes that an abstract, sharded tree takes on each device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        # All shards of an array have one shape. A replicated array counts in full on each device.
        shard_shape = leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shard_shape) * np.dtype(leaf.dtype).itemsize
    return total
