"""Helpers that several tests share: small models, their parameters, meshes, comparisons, snapshots of directories."""

import contextlib
import functools
import os
import pathlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import GPTConfig, MeshConfig
from gptjax.errors import UserError
from gptjax.model import GPT
from gptjax.sharding import make_mesh, path_name

TINY = {"block_size": 16, "vocab_size": 40, "n_layer": 2, "n_head": 2, "n_embd": 16}

# The programs are many and their data tiny: machine code in a hurry.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tiny(**changes: Any) -> GPTConfig:
    return GPTConfig(**(TINY | changes))


@functools.cache
def abstract_params(config: GPTConfig) -> Any:
    """Returns the parameters as shapes."""
    tokens_BT = jax.ShapeDtypeStruct((1, config.block_size), jnp.int32)
    return jax.eval_shape(GPT(config).init, jax.random.key(0), tokens_BT)["params"]


@functools.cache
def random_params(config: GPTConfig, scale: float = 0.3) -> Any:
    """Returns float32 parameters drawn with NumPy: normal, around 1 for LayerNorm's scales and 0 otherwise.

    They need no compilation, and at 0.3 they are far from initialization, so that each parameter changes the result.
    """
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> jax.Array:
        return jnp.asarray((path[-1].key == "scale") + scale * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree.map_with_path(draw, abstract_params(config))


def by_path(tree: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def shapes_of(params: Any) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in by_path(params).items()}


def assert_near(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Compares two trees leaf by leaf; `tolerance` is relative to the largest entry of a leaf."""
    for (path, a), e in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        error = np.max(np.abs(np.asarray(a, np.float64) - np.asarray(e, np.float64)))
        assert error <= tolerance * np.max(np.abs(e)), f"{path_name(path)}: {error}"


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])


def snapshot(root: pathlib.Path) -> dict[str, Any]:
    """Returns everything under `root`, with the numbers that change when a file's content does."""
    now: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        now[str(path)] = "directory" if path.is_dir() else (status.st_mtime_ns, status.st_size, status.st_ino)
    return now


def sweep(*values: Any) -> Any:
    """Returns the parameters of a case that runs only by `pytest -m sweep`."""
    return pytest.param(*values, marks=pytest.mark.sweep)


def failing(error: BaseException) -> Callable[..., Any]:
    """Returns a function that raises `error`, whatever it is called with."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@contextlib.contextmanager
def raises(
    kind: type[UserError], field: str = "", *, value: object = None, remedy: str | None = None, match: str = ""
) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Asserts that the block raises `kind` about `field`, with `value`; `remedy`, if given, is a part of the remedy."""
    with pytest.raises(kind, match=match or None) as caught:  # pytest warns about an empty pattern
        yield caught
    error = caught.value
    assert (error.field, error.value) == (field, value), str(error)
    assert error.exit_code == kind.exit_code
    assert remedy is None or (remedy in error.remedy if remedy else not error.remedy), error.remedy


def fake_reporter(**methods: Any) -> Any:
    """Returns what periodic.py needs of a Reporter, with these methods."""
    watch, screen = types.SimpleNamespace(lap=lambda kind: None), types.SimpleNamespace(show_work=lambda *of: None)
    return types.SimpleNamespace(watch=watch, screen=screen, **methods)
