"""The train state: arrays only, created already sharded; and how the average in it moves."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.collectives import ONE_DEVICE
from gptjax.compute import ResolvedCompute
from gptjax.model import GPT
from gptjax.params import PyTree
from gptjax.sharding import check_params, param_shardings, state_shardings

AVERAGE = "average"  # the name of its tree in a checkpoint


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The arrays that change during a run. A checkpoint stores them, next to the config and the history."""

    step: Any  # int32 scalar: number of finished updates
    params: PyTree  # float32
    opt_state: PyTree
    average: PyTree = None  # the moving average of params, float32, where optim.ema_decay is above 0

    @property
    def trees(self) -> dict[str, PyTree]:
        """The trees that a checkpoint stores, by name."""
        trees = {"params": self.params, "opt_state": self.opt_state}
        return trees if self.average is None else trees | {AVERAGE: self.average}

    @property
    def evaluated(self) -> PyTree:
        """The parameters that are evaluated, sampled from and exported: the average, if there is one."""
        return self.params if self.average is None else self.average


def move_average(state: TrainState, params: PyTree, decay: float) -> PyTree:
    """Returns the average after an update that has made `params`, by Polyak's method with a decay that grows first.

    Update n (from 0) has decay min(decay, (1 + n) / (10 + n)), as TensorFlow's ExponentialMovingAverage has it: the
    first averages would otherwise be those of the random initial values.
    """
    # A function of the step alone, like the learning rate, so that a resume needs no count.
    n = state.step.astype(jnp.float32)
    rate = 1 - jnp.minimum(decay, (1 + n) / (10 + n))
    # Elementwise, so each device moves its own shards.
    return jax.tree.map(lambda old, new: old + rate * (new - old), state.average, params)


def make_init(
    model: GPT,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    seed: int,
    has_average: bool = False,
) -> tuple[TrainState, Callable[[], TrainState]]:
    """Returns (abstract_state, init): the state as shapes with shardings, and a function that creates it sharded.

    The values depend on `seed` only, not on the mesh.

    has_average: whether the state keeps an average of the parameters.

    Raises:
        ConfigError: the model has a parameter that gptjax.params does not describe, or a mesh axis does not divide one.
    """
    # Initial values do not depend on the kernels or the parallelism. So init uses plain XLA without shard_map, and XLA
    # partitions `create` by its out_shardings.
    plain = model.clone(compute=ResolvedCompute(), parallel=ONE_DEVICE)

    @jax.jit  # traced once, for the shapes and for `init`
    def create() -> TrainState:
        key = jax.random.key(seed)
        # One token is enough: no parameter's shape depends on the input's.
        tokens_BT = jnp.zeros((1, 1), jnp.int32)
        params = plain.init(key, tokens_BT)["params"]
        step = jnp.zeros((), jnp.int32)
        # A copy, because the step donates both.
        average = jax.tree.map(jnp.copy, params) if has_average else None
        return TrainState(step, params, optimizer.init(params), average)

    # eval_shape allocates nothing: a wrong parameter or mesh axis is refused before any memory is taken.
    shapes = jax.eval_shape(create)
    check_params(shapes.params, model.config)
    shardings = TrainState(
        step=NamedSharding(mesh, P()),
        params=param_shardings(shapes.params, mesh),
        opt_state=state_shardings(shapes.opt_state, shapes.params, mesh),
        average=param_shardings(shapes.params, mesh) if has_average else None,
    )

    def with_sharding(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    abstract = jax.tree.map(with_sharding, shapes, shardings)
    # Each device computes its own shards only, so that no device ever holds an unsharded state.
    return abstract, jax.jit(create, out_shardings=shardings)
