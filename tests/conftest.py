"""Strict JAX, eight CPU devices, and no network but loopback, for every test."""

import dataclasses
import logging
import os
import pathlib
import runpy
import sys
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")

import jax
import pytest
from hypothesis import settings

from gptjax import cli
from gptjax import train as train_module
from gptjax.config import Config
from gptjax.data.tokenizer import Tokenizer, load_tokenizer
from gptjax.setup import Run
from tests import fuzzing, runs

runpy.run_path(str(runs.OFFLINE / "sitecustomize.py"))  # for this process; runs.py sees to those that tests start
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "standard")
# The same examples in every run, so that a failure is the change's own; `make soak` draws new ones.
settings.register_profile("gptjax", derandomize=not fuzzing.TIMES, database=None, deadline=None)
settings.load_profile("gptjax")


@pytest.hookimpl(trylast=True)  # pytest's own comes first, to be asked for everything else
def pytest_configure() -> None:
    """Leaves out what gptjax.cli does, too."""
    ask = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not str(unraisable.exc_value).startswith(cli.IGNORED_UNRAISABLE):
            ask(unraisable)

    sys.unraisablehook = hook


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out sweeps and notebooks unless -m names them, and has each worker begin with some of the longest tests.

    A long test that came last would have all other workers wait. Of n workers of pytest-xdist, each begins with its own
    nth of what was collected.
    """
    for marker in ("sweep", "notebooks"):
        if marker not in config.option.markexpr:
            left_out = [item for item in items if item.get_closest_marker(marker)]
            items[:] = [item for item in items if item not in left_out]
            config.hook.pytest_deselected(items=left_out)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    longest = [item for item in items if item.get_closest_marker("long")]
    others = [item for item in items if item not in longest]
    parts = [others[len(others) * n // workers : len(others) * (n + 1) // workers] for n in range(workers)]
    items[:] = [item for n, part in enumerate(parts) for item in (*longest[n::workers], *part)]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """One more than there are cores: many tests wait for processes that they have started."""
    return None if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else (os.cpu_count() or 1) + 1


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> runs.Lab:
    """Data, config file and compile cache for real runs; shared by the workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return runs.make_lab((base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "lab")


@pytest.fixture(scope="session")
def gpt2() -> Tokenizer:
    return load_tokenizer("gpt2")


@pytest.fixture(scope="session")
def reference(lab: runs.Lab) -> pathlib.Path:
    """The work directory of a finished run that nothing has disturbed."""
    return runs.make_reference(lab)


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
        def make_run(config: Config, **_: object) -> Run:
            return dataclasses.replace(tiny_run, config=config, **(parts or {}))

        monkeypatch.setattr(train_module, "make_run", make_run)
        return train_module.train(lab.config(**sections), str(workdir))

    return train


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What gptjax logs while the test runs, line by line."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("gptjax")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture(scope="module")
def quick_compiler() -> Iterator[None]:
    """Has XLA optimise nothing, which takes half the time: for modules whose programs hardly run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
