"""Reads the parameters of a checkpoint without its run: the whole tree, or one array at a time."""

import dataclasses
import glob
import logging
import os
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from gptjax.checkpoint import Checkpointer
from gptjax.config import Config, from_dict
from gptjax.data.prepare import default_path
from gptjax.errors import CheckpointError, ConfigError
from gptjax.fingerprint import fingerprint_array
from gptjax.identity import read_identity
from gptjax.mix import parse_mix
from gptjax.orbax_context import CHUNK_BYTES
from gptjax.record import FAILURES, CorruptCheckpointError, Record, judge
from gptjax.sharding import abstract_params, make_mesh, nest, param_shardings
from gptjax.state import AVERAGE
from gptjax.workdir import is_bucket

log = logging.getLogger("gptjax")
MOST_RUNS = 8  # that an error lists
ADAMW_PARTS = 3  # optax.adamw is a chain of three; the state of the first has the moments, the others have no arrays


def has_average(record: Record) -> bool:
    """Returns whether a checkpoint has an average of its parameters."""
    return any(name.startswith(f"{AVERAGE}/") for name in record.fingerprints)


def describe_weights(workdir: str, step: int, *, raw: bool) -> str:
    """Returns which weights `load_params` takes, for a message; "" where there is no choice."""
    if not has_average(Checkpointer(workdir).read_record(step)):
        return ""
    return ", raw weights" if raw else ", averaged weights"


def load_params(workdir: str, *, step: int | None = None, raw: bool = False) -> tuple[Config, Any, int]:
    """Returns (config, params, step) of the newest intact checkpoint, or of `step`.

    The parameters are their average, where the checkpoint has one and `raw` is False.

    The parameters are float32 jax.Arrays with the shapes of `params.PARAMS`, on the first device of this process.

    Raises:
        CheckpointError: no checkpoint is usable, or it belongs to another run.
        UnreadableError: one cannot be read at the moment.
        UserError: the work directory is in a bucket that cannot be reached.
    """
    checkpointer = Checkpointer(workdir)
    steps = checkpointer.steps()
    if not steps and not is_bucket(workdir) and (not os.path.isdir(workdir) or _runs_in(workdir)):
        raise _no_such_run(workdir)
    if not steps or (step is not None and step not in steps):
        available = ", ".join(map(str, steps)) or "none"
        wanted = "" if step is None else f" of step {step}"
        raise CheckpointError(
            f"no checkpoint{wanted}",
            field="--workdir",
            value=workdir,
            remedy=f"available: {available}",
        )
    refused = []
    identity = read_identity(workdir)
    for candidate in reversed(steps) if step is None else [step]:
        try:
            record = checkpointer.read_record(candidate)
            if step is None and not identity.owns(record):
                raise CheckpointError(
                    identity.explain(record),
                    field=f"{checkpointer.directory}/{candidate}",
                    remedy=f"to use it anyway: --step={candidate}",
                )
            config = from_dict(record.config)
            tree = AVERAGE if has_average(record) and not raw else "params"
            params = checkpointer.load(candidate, {tree: _abstract_params(config)}, record)[tree]
        except CorruptCheckpointError as damage:
            refused.append(f"step {candidate}: {damage}")
            log.warning("checkpoint %s/%d refused: %s", checkpointer.directory, candidate, damage)
            continue
        return config, params, candidate
    raise CheckpointError(f"no usable checkpoint: {'; '.join(refused)}", field="--workdir", value=workdir)


def at_its_data(config: Config, record: Record, *, flag: str) -> Config:
    """Returns `config` with data.path set to the data of the run that saved `record`. It prepares none.

    It looks in the directory that the run read, then in the one that `config` names, relative to the current directory.

    flag: names another directory of data, for the remedy.

    Raises:
        ConfigError: they are at neither place, or `record` names none.
    """
    if not record.data:
        raise ConfigError("the checkpoint does not say on which data it was trained", remedy=f"name them: {flag}=DIR")
    for mix in (str(record.data.get("mix", "")), config.data.mix):
        if mix and all(os.path.isdir(os.path.expanduser(part.directory)) for part in parse_mix(mix)):
            return dataclasses.replace(config, data=dataclasses.replace(config.data, path="", mix=mix))
    if config.data.mix:
        raise ConfigError(
            "the run's data are not there",
            field="data.mix",
            value=config.data.mix,
            remedy=f"name other data: {flag}=DIR",
        )
    recorded = str(record.data.get("directory", ""))
    named = config.data.path or default_path(config.data.source, config.data.tokenizer)
    for directory in (recorded, named):
        if directory and os.path.isdir(directory):
            return dataclasses.replace(config, data=dataclasses.replace(config.data, path=directory))
    raise ConfigError(
        "the run's data are not there",
        field="data.path",
        value=recorded or named,
        remedy=f"name their directory: {flag}=DIR",
    )


def _no_such_run(workdir: str) -> CheckpointError:
    """Returns the error for a work directory that is missing, or is a directory of runs; it lists the runs there."""
    if os.path.isdir(workdir):
        problem, places = "is a directory of runs", [workdir]
    else:
        problem, places = "no such directory", [os.path.dirname(workdir) or ".", "runs"]
    found = [run for place in places for run in _runs_in(place)]
    remedy = f"runs: {', '.join(dict.fromkeys(found))}" if found else "there are no runs here"
    return CheckpointError(problem, field="--workdir", value=workdir, remedy=remedy)


def _runs_in(directory: str) -> list[str]:
    """Returns the paths of the newest work directories in a directory, at most MOST_RUNS."""
    found = glob.glob(f"{glob.escape(directory)}/*/checkpoints")
    runs = [os.path.normpath(os.path.dirname(path)) for path in found]
    return sorted(runs, key=os.path.getmtime, reverse=True)[:MOST_RUNS]


class StoredParams:
    """The parameters of one checkpoint, read and verified one at a time, as NumPy arrays."""

    def __init__(self, directory: str, step: int) -> None:
        """Reads the record of the checkpoint of `step` in the work directory `directory`.

        Raises:
            CorruptCheckpointError: the record is missing, cannot be parsed, or has a wrong checksum.
            UnreadableError: it cannot be read at the moment.
            UserError: its config is not valid here, or the work directory is in a bucket that cannot be reached.
        """
        self._checkpointer = Checkpointer(directory)
        self.step = step
        self.record = self._checkpointer.read_record(step)
        self.config = from_dict(self.record.config)

    def read(self, path: str, shape: tuple[int, ...], *, tree: str = "params", dtype: type = np.float32) -> np.ndarray:
        """Returns the parameter at `path`, of `shape`, after checking its fingerprint; or a leaf of another tree.

        tree: "params", "opt_state" or AVERAGE.
        dtype: of the leaf.

        Raises:
            CorruptCheckpointError: it is missing, cannot be parsed, has another shape or differs from the saved one.
            UnreadableError: it cannot be read at the moment.
        """
        context: Any = ocp.Context()
        context.pytree.loading.partial_load = True  # without it Orbax requires every parameter in `wanted`
        context.memory.read_concurrent_bytes = 2 * CHUNK_BYTES
        try:
            wanted: Any = {tree: _only(path, np.empty(shape, dtype))}
        except (ValueError, MemoryError) as error:
            raise CorruptCheckpointError(f"{path} needs more memory than is available") from error
        directory = self._checkpointer.directory / str(self.step)
        try:
            with context:
                loaded = ocp.load_checkpointables(directory, wanted)
        except FAILURES as error:
            raise judge(directory, f"{path} is unreadable", error) from error
        [leaf] = jax.tree.leaves(loaded)
        if leaf.shape != shape:
            raise CorruptCheckpointError(f"{path} has shape {list(leaf.shape)}, and the config asks for {list(shape)}")
        if fingerprint_array(leaf) != self.record.fingerprints.get(f"{tree}/{path}"):
            raise CorruptCheckpointError(f"{path}: the fingerprint does not match")
        return leaf


def _only(path: str, leaf: np.ndarray) -> Any:
    """Returns a tree with one leaf, at "h/ln_1/bias", or at "0/mu/h/ln_1/bias" in the tuple that is AdamW's state."""
    first, _, rest = path.partition("/")
    if not first.isdigit():
        return nest([(path, leaf)])
    parts: list[Any] = [None] * ADAMW_PARTS
    parts[int(first)] = nest([(rest, leaf)])
    return tuple(parts)


def _abstract_params(config: Config) -> Any:
    one_device = dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1)
    mesh = make_mesh(one_device, jax.local_devices()[:1])
    shapes = abstract_params(config.model)
    shardings = param_shardings(shapes, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
