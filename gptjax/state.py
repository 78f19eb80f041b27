"""The train state: arrays only, created already sharded."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.model import GPT
from gptjax.sharding import data_parallel_size, param_shardings, state_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run is besides its config. `step` counts finished updates."""

    step: Any
    params: Any
    opt_state: Any


def make_init(
    model: GPT, optimizer: optax.GradientTransformation, *, mesh: Mesh, seed: int
) -> tuple[TrainState, Callable[[], TrainState]]:
    """Returns (abstract_state, init): the state as shapes with shardings, and a function that makes it so placed.

    The values depend on `seed` only, not on the mesh.
    """

    @jax.jit  # traced once, for the shapes and for `init`: both under the mesh
    def create() -> TrainState:
        inputs_BT = jnp.zeros((data_parallel_size(mesh), model.config.block_size), jnp.int32)  # a kernel would cut them
        params = model.init(jax.random.key(seed), inputs_BT)["params"]
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(create)
    shardings = TrainState(
        step=NamedSharding(mesh, P()),
        params=param_shardings(shapes.params, mesh),
        opt_state=state_shardings(shapes.opt_state, shapes.params, mesh),
    )
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return abstract, jax.jit(create, out_shardings=shardings)
