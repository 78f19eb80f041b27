"""What the tests share that kill real processes and damage real files."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from gptjax import train as train_module
from gptjax.config import Config
from gptjax.setup import Run
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
def long_twin(lab: runs.Lab) -> pathlib.Path:
    """The work directory of a finished run of 48 steps that nothing has disturbed."""
    return runs.make_twin(lab, "long-twin", "train.num_steps=48", "checkpoint.save_every=24")


@pytest.fixture(scope="session")
def tiny_run(lab: runs.Lab) -> Run:
    """The run of the tiny config on one device of this process, compiled at most once."""
    return runs.make_run_on(lab.config())


@pytest.fixture
def train_here(lab: runs.Lab, tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """train_here(workdir, train={...}, ...) trains in this process with what tiny_run has compiled.

    Only settings that are not compiled in may differ from the tiny config. parts: replaces fields of the Run.
    """

    def train(workdir: pathlib.Path, *, parts: dict | None = None, **sections: dict) -> int:
        def make_run(config: Config) -> Run:
            return dataclasses.replace(tiny_run, config=config, **(parts or {}))

        monkeypatch.setattr(train_module, "make_run", make_run)
        return train_module.train(lab.config(**sections), str(workdir))

    return train
