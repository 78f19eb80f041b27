"""What the tests share that kill real processes and damage real files."""

import pathlib
from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests import runs


@pytest.fixture(scope="session", autouse=True)
def _shared_compile_cache(lab: runs.Lab) -> Iterator[None]:
    """What one test or worker has compiled, the others read: half of what these tests do is to compile the same."""
    before, least = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(lab.root / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def long_reference(lab: runs.Lab) -> pathlib.Path:
    """The work directory of a finished run of 48 steps that nothing has disturbed."""
    return runs.make_reference(lab, "long-reference", "train.num_steps=48", "checkpoint.save_every=24")
