"""The state that a run goes on from: its newest intact checkpoint's, or the initial one."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.checkpoint import Checkpointer, Record, compare_configs
from gptjax.config import GPTConfig
from gptjax.convert import formats
from gptjax.errors import ConfigError
from gptjax.run import Run
from gptjax.sharding import path_name
from gptjax.state import TrainState

log = logging.getLogger("gptjax")


def new_history() -> dict[str, Any]:
    """Returns the history of a run that has done nothing yet."""
    return {
        "restarts": 0,
        "skipped_steps": 0,
        "nonfinite_in_a_row": 0,
        "validated": -1,  # the step of the last evaluation
        "recent": {},  # losses and gradient norms: see divergence.py
        "rollbacks": 0,
        "skipped_ranges": [],  # of the data: see data_index
        "seconds": {},  # by kind: see goodput.py
    }


def start_state(run: Run, checkpointer: Checkpointer) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state and the history to go on from: the newest intact checkpoint's, or fresh ones."""
    restored = restore(run, checkpointer)
    if restored is not None:
        state, history = restored
        log.info("resumed from step %d of %s", int(state.step), checkpointer.directory)
        return state, history | {"restarts": history["restarts"] + 1}
    if run.config.checkpoint.resume == "require":
        raise ConfigError(f"checkpoint.resume='require': {checkpointer.directory} has no checkpoint")
    return initial_state(run), new_history()


def restore(run: Run, checkpointer: Checkpointer) -> tuple[TrainState, dict[str, Any]] | None:
    """Returns state and history of the newest intact checkpoint, checked to be of this run; None where there are none.

    Raises:
        UserError: none is intact, or they are of another run.
    """
    restored = checkpointer.restore_latest(run.abstract_state, check=lambda record: check_record(run, record))
    return restored and (restored[0], new_history() | restored[1].history)


def check_record(run: Run, record: Record) -> None:
    """Raises ConfigError unless `run` can go on from the checkpoint; notes what has changed."""
    compare_configs(record.config, run.config)
    compare_data(record.data, run.data_identity, allowed=run.config.data.allow_changed)


def initial_state(run: Run) -> TrainState:
    """Returns the state of step 0: of the config's seed, or with the parameters that init_from names."""
    state = run.init()
    return TrainState(state.step, initial_params(run), state.opt_state) if run.config.init_from else state


def initial_params(run: Run) -> Any:
    """Returns the parameters that init_from names, placed for this run, one read at a time.

    Raises:
        ConfigError: they are of another model.
    """
    text, model = run.config.init_from, run.config.model
    place = formats.parse_place("init_from", text if ":" in text else f"gptjax:{text}", formats.READABLE)
    weights = formats.open_weights(place, dropout=model.dropout)
    compare_models(weights.config, model, text)
    if weights.tokenizer is not None and weights.tokenizer.sha256 != run.tokenizer.sha256:
        log.warning("init_from=%s: made with tokenizer %s, not with this run's", text, weights.tokenizer.name)
    log.info("parameters from %s", weights.origin)
    for note in weights.notes:
        log.info("  %s", note)
    abstract = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(run.abstract_state.params)}

    def put(path: str, leaf: np.ndarray) -> jax.Array:
        leaf = leaf[: model.block_size] if path == "wpe/embedding" else leaf
        shape, sharding = abstract[path].shape, abstract[path].sharding
        placed = jax.make_array_from_callback(shape, sharding, lambda index: leaf[index])
        return jax.jit(jnp.copy, out_shardings=sharding)(placed)  # NumPy's memory could not be donated to a step

    return formats.load_params(weights, put)


def compare_models(found: GPTConfig, wanted: GPTConfig, source: str) -> None:
    """Raises ConfigError unless the parameters of `found` are those of `wanted`, but for positions left out."""
    names = ("n_layer", "n_head", "n_embd", "vocab_size", "bias", "tie_embeddings")
    changed = [n for n in names if getattr(found, n) != getattr(wanted, n)]
    if found.block_size < wanted.block_size:
        changed.append("block_size")
    if changed:
        lines = [f"it has {n}={getattr(found, n)}, this run model.{n}={getattr(wanted, n)}" for n in changed]
        remedy = " ".join(f"--config.model.{n}={getattr(found, n)}" for n in changed)
        raise ConfigError("\n".join(f"init_from={source}: {line}" for line in [*lines, f"to train it: {remedy}"]))
    if found.block_size > wanted.block_size:
        log.info("init_from=%s: positions from %d on are left out", source, wanted.block_size)


def compare_data(old: dict[str, Any], new: dict[str, Any], *, allowed: bool) -> None:
    """Raises ConfigError when the checkpoint was trained on other data, or in another order, unless `allowed`."""
    changed = [f"{name} was {old.get(name)!r}, now {value!r}" for name, value in new.items() if old.get(name) != value]
    if changed and not allowed:
        lines = [f"the data changed since the checkpoint: {line}" for line in changed]
        raise ConfigError("\n".join([*lines, "to go on all the same: --config.data.allow_changed=True"]))
    for line in changed:
        log.info("note: the data changed since the checkpoint: %s", line)
