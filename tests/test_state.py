"""The train state is the same on every mesh, and never lies whole on one device."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import GPTConfig, MeshConfig, OptimConfig
from gptjax.model import GPT
from gptjax.optim import make_optimizer
from gptjax.sharding import make_mesh
from gptjax.state import TrainState, make_init

CONFIG = GPTConfig(block_size=32, vocab_size=200, n_layer=2, n_head=2, n_embd=32, tie_embeddings=False)
MESHES = {"1": (1, 1, 1), "1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2)}


@functools.cache
def initial(mesh_name, seed=0):
    """Returns the abstract state, the state, and the compiled text of what made it."""
    sizes = MESHES[mesh_name]
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    abstract, init = make_init(GPT(CONFIG), make_optimizer(OptimConfig()), mesh=mesh, seed=seed)
    compiled = init.lower().compile(compiler_options={"xla_backend_optimization_level": 0})
    return abstract, compiled(), compiled.as_text()


@pytest.mark.parametrize("mesh_name", ["1x8x1", "2x2x2"])
def test_values_do_not_depend_on_the_mesh(mesh_name):
    _, alone, _ = initial("1")
    _, state, _ = initial(mesh_name)
    assert not state.params["wte"]["embedding"].sharding.is_fully_replicated
    for expected, actual in zip(jax.tree.leaves(alone), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_values_depend_on_the_seed():
    _, first, _ = initial("1")
    _, second, _ = initial("1", seed=1)
    for name in ("wte", "wpe"):
        assert not np.array_equal(first.params[name]["embedding"], second.params[name]["embedding"])
    kernels = [state.params["h"]["mlp"]["c_fc"]["kernel"] for state in (first, second)]
    assert not np.array_equal(*kernels)


@pytest.mark.parametrize("mesh_name", MESHES)
def test_state_matches_its_abstract_shapes_and_shardings(mesh_name):
    abstract, state, _ = initial(mesh_name)
    assert isinstance(state, TrainState)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for promised, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (leaf.shape, leaf.dtype) == (promised.shape, promised.dtype)
        assert leaf.sharding.is_equivalent_to(promised.sharding, leaf.ndim)


def test_step_and_moments_start_at_zero():
    _, state, _ = initial("1")
    assert state.step.dtype == jnp.int32
    assert state.step.shape == ()
    assert int(state.step) == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.opt_state))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}


def test_train_state_is_a_pytree_of_arrays():
    _, state, _ = initial("1")
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert {path[0].name for path, _ in jax.tree.leaves_with_path(state)} == {"step", "params", "opt_state"}
    moved = jax.tree.map(lambda leaf: leaf + 1, state)
    assert isinstance(moved, TrainState)
    assert int(moved.step) == 1


def largest_array(text):
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_no_device_ever_holds_an_unsharded_matrix():
    """No array in the program that one of eight devices runs is as large as the largest matrix."""
    _, _, alone = initial("1")
    _, _, sharded = initial("1x8x1")
    whole = 256 * 32  # the padded table, larger than any other parameter but h/mlp's
    assert largest_array(alone) >= whole
    assert largest_array(sharded) < whole / 2
