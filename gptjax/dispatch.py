"""Several steps in one dispatch: how many, where a dispatch ends, and the batches that it takes."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.chips import peak_flops
from gptjax.config import Config
from gptjax.sharding import BATCH_SPEC
from gptjax.sizes import train_flops_per_token

DISPATCH_SECONDS = 0.25  # a dispatch of several steps takes about that long: signals and log lines wait for its end
# A step that takes longer has a dispatch of its own. On CPUs a dispatch takes cores from the step. An accelerator
# computes while the host prepares the next dispatch, and waits for it only where steps are very short.
LONG_STEP_SECONDS = 0.05
LONG_ACCELERATOR_STEP_SECONDS = 0.01
SHORT_STEP_SECONDS = 0.005  # no step is expected to take less, however few FLOPs it has
# FLOP/s of the train step in one process on CPUs: two cores of an AMD EPYC reach that with configs/quickstart.py. A
# constant, because all processes must choose alike, and a measured speed would differ between them.
CPU_FLOPS_PER_SECOND = 1.5e11
PEAK_SHARE = 0.3  # fraction of the matmul peak that an accelerator reaches


class Batches(NamedTuple):
    """The batches of a dispatch in a run whose dispatches may make up to K steps."""

    tokens_KABT: jax.Array  # int32 [K, A, B, T+1]; from index `num_steps` on they are padding
    num_steps: jax.Array  # int32 [], the steps to make: from 1 to K


Tokens = jax.Array | Batches  # of one dispatch: int32 [A, B, T+1] where K is 1, otherwise Batches


def last_batch(tokens: Tokens) -> jax.Array:
    """Returns the batch of the last step of a dispatch: int32 [A, B, T+1]."""
    if not isinstance(tokens, Batches):
        return tokens
    return jax.lax.dynamic_index_in_dim(tokens.tokens_KABT, tokens.num_steps - 1, keepdims=False)


def abstract_tokens(config: Config, mesh: Mesh, *, num_microbatches: int, steps_per_dispatch: int) -> Any:
    """Returns the Tokens of the train step as shapes with shardings, for compiling ahead of time."""
    sequences = config.data.global_batch_size // num_microbatches
    shape: tuple[int, ...] = (num_microbatches, sequences, config.model.block_size + 1)
    if steps_per_dispatch > 1:
        shape = (steps_per_dispatch, *shape)
    sharding = tokens_sharding(mesh, steps_per_dispatch)
    tokens: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    num_steps: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    return Batches(tokens, num_steps) if steps_per_dispatch > 1 else tokens


def tokens_sharding(mesh: Mesh, steps_per_dispatch: int) -> NamedSharding:
    """Returns the sharding of the tokens of a dispatch, [A, B, T+1] or [K, A, B, T+1]: over B alone."""
    unsharded = () if steps_per_dispatch == 1 else (None,)
    return NamedSharding(mesh, P(*unsharded, *BATCH_SPEC))


def choose_steps_per_dispatch(config: Config, mesh: Mesh) -> int:
    """Returns K, the most steps of a dispatch: train.steps_per_dispatch, or a number chosen by the time of a step.

    The time is estimated from the config and the kind of the devices, so all processes choose the same number, and so
    does a resumed run. Where the peak of a chip is not known, K is 1.
    """
    if config.train.steps_per_dispatch:
        return config.train.steps_per_dispatch
    seconds = _estimated_step_seconds(config, mesh)
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    longest_step = LONG_STEP_SECONDS if is_cpu else LONG_ACCELERATOR_STEP_SECONDS
    if math.isnan(seconds) or seconds > longest_step:
        return 1
    period = min(_periods(config))
    dispatches = math.ceil(period / int(DISPATCH_SECONDS / seconds))
    return math.ceil(period / dispatches)  # so that the dispatches of a period have about the same length


def _estimated_step_seconds(config: Config, mesh: Mesh) -> float:
    """Returns about the seconds of one step on the devices of a mesh; nan if their peak is not known."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        # Devices of one process share its cores.
        processes = {one.process_index for one in mesh.devices.flat}
        speed = len(processes) * CPU_FLOPS_PER_SECOND
    else:
        speed = mesh.size * PEAK_SHARE * peak_flops(device)
    tokens = config.data.global_batch_size * config.model.block_size
    return max(tokens * train_flops_per_token(config.model) / speed, SHORT_STEP_SECONDS)


def _periods(config: Config) -> list[int]:
    """Returns the periods in steps at whose multiples the host must see the state or the time."""
    train = config.train
    periods = (
        train.log_every,  # the time of a row is that of whole dispatches
        train.eval_every,
        train.sample_every,
        train.stats_every,
        config.checkpoint.save_every,
    )
    return [period for period in periods if period]


def dispatch_end(config: Config, step: int, *, at_most: int, start: int | None = None) -> int:
    """Returns the step after the dispatch that begins at `step`: at most `at_most` steps later.

    It ends where something is due, so that all that a run does falls on the same steps as with one step per dispatch,
    whatever step the run was resumed from.

    start: the first step of this process. Its dispatch is of that step alone, because no row times the dispatch that
        compiles. None: of no process.
    """
    if step == start:
        return step + 1
    train = config.train
    # A profile is of one step.
    edges = [step + at_most, train.num_steps, train.profile_step, train.profile_step + 1]
    edges += [(step // period + 1) * period for period in _periods(config)]
    return min(edge for edge in edges if edge > step)
