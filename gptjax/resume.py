"""Restores the newest intact checkpoint of a run, or initialises its state."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.checkpoint import Checkpointer
from gptjax.config import Config, GPTConfig, flatten, from_dict
from gptjax.convert.model_ref import find_model
from gptjax.data.tokens import has_former_fingerprint
from gptjax.errors import ConfigError, one_line
from gptjax.history import History
from gptjax.identity import Identity
from gptjax.params import PyTree
from gptjax.record import CorruptCheckpointError, Record
from gptjax.setup import Run
from gptjax.sharding import path_name
from gptjax.state import TrainState

log = logging.getLogger("gptjax")


def start_state(run: Run, checkpointer: Checkpointer, identity: Identity) -> tuple[TrainState, History]:
    """Returns the state and the history to start from: of the newest intact checkpoint, or initial ones.

    Raises:
        UserError: as in `restore`, or there is no checkpoint and checkpoint.resume is `require`.
    """
    restored = restore(run, checkpointer, identity)
    if restored is not None:
        state, history = restored
        log.info("resumed from step %d of %s", int(state.step), checkpointer.directory)
        # Counted here and not in `restore`, because a rollback restores without a restart.
        history = dataclasses.replace(history, restarts=history.restarts + 1)
        return state, history
    # check_start has seen a checkpoint, but all may have been removed since then.
    if run.config.checkpoint.resume == "require":
        raise _no_checkpoint(checkpointer)
    return initial_state(run), History()


def restore(run: Run, checkpointer: Checkpointer, identity: Identity) -> tuple[TrainState, History] | None:
    """Returns state and history of the newest intact checkpoint of this run; None if there is no checkpoint.

    The arrays have the shardings of `run.abstract_state`, whatever the mesh on which they were saved.

    Raises:
        UserError: no checkpoint is intact, or it belongs to another run, model or data.
    """

    # Called before any array is read, so that a checkpoint of another run or model is refused at once.
    def check(record: Record) -> None:
        check_owner(record, identity, checkpointer.directory, allowed=run.config.checkpoint.allow_foreign)
        check_record(run, record)

    restored = checkpointer.restore_latest(run.abstract_state, check=check)
    if restored is None:
        return None
    state, record = restored
    return state, read_history(record)


def check_owner(record: Record, identity: Identity, directory: object, *, allowed: bool) -> None:
    """Checks that a checkpoint belongs to this run.

    Raises:
        ConfigError: it belongs to another run, and `allowed` is False.
    """
    # A copy of a work directory keeps its id, so a copied run may resume.
    if identity.owns(record):
        return
    checkpoint = f"{directory}/{record.step}"
    foreign = ConfigError(identity.explain(record), field=checkpoint)
    if not allowed:
        # Another run's arrays may fit in every shape. Only the id shows that they are not this run's.
        remedy = f"to resume from it anyway: --config.checkpoint.allow_foreign=True; or remove it: {checkpoint}"
        raise ConfigError.of([foreign, ConfigError(remedy=remedy)])
    log.info("note: %s", foreign)


def read_history(record: Record) -> History:
    """Returns the history in a checkpoint's record.

    Raises:
        CorruptCheckpointError: it is not a valid history.
    """
    try:
        return History.from_json(record.history)
    except ValueError as error:
        # The checkpointer catches this error and falls back to an older checkpoint.
        raise CorruptCheckpointError(f"record unreadable ({one_line(error)})") from error


def check_record(run: Run, record: Record) -> None:
    """Checks that `run` can resume from a checkpoint, and logs the changes since then.

    Raises:
        ConfigError: the model, the optimizer or the data has changed.
        CorruptCheckpointError: its history cannot be read.
    """
    read_history(record)  # parsed only for its errors: a damaged one must lead to a fallback, not to a traceback
    # Compared before the data: if the model changed, the data usually differ too, and that message would mislead.
    compare_configs(record.config, run.config)
    if not record.data and "imported" in record.history:
        log.info("note: the checkpoint was converted, and does not say on which data it was trained")
        return
    old = record.data
    new = run.data_identity
    changed = [name for name in new if old.get(name) != new[name]]
    # An earlier version computed fingerprints in another way. The old way is tried only if nothing but the fingerprint
    # differs, because it reads from all shards.
    former = old.get("fingerprint", "")
    sources = [dataset for _, _, dataset in run.train_data.sources()]
    if changed == ["fingerprint"] and len(sources) == 1 and has_former_fingerprint(sources[0].split, former):
        old = new
    compare_data(old, new | run.data_location, allowed=run.config.data.allow_changed)


def initial_state(run: Run) -> TrainState:
    """Returns the state of step 0, with random parameters from train.seed or with the parameters of init_from.

    Raises:
        UserError: init_from names no weights, or weights of another model.
    """
    state = run.init()
    if not run.config.init_from:
        return state
    # The optimizer state starts from zeros for any parameters, so it is kept. The random parameters stay on the devices
    # until the imported ones are loaded.
    params = initial_params(run)
    # An average starts at the imported parameters.
    average = None if state.average is None else jax.tree.map(jnp.copy, params)
    return TrainState(state.step, params, state.opt_state, average)


def check_start(config: Config, checkpointer: Checkpointer) -> None:
    """Checks what can fail before data are prepared, which may take hours.

    Raises:
        ConfigError: there is no checkpoint to resume from, or init_from is malformed.
    """
    # This only lists the steps. The restore checks whether one of them is intact.
    if config.checkpoint.resume == "require" and not checkpointer.steps():
        raise _no_checkpoint(checkpointer)
    # Checked even if the run will resume and not read the weights, because the config is wrong all the same.
    if config.init_from:
        find_model("init_from", config.init_from)


def _no_checkpoint(checkpointer: Checkpointer) -> ConfigError:
    return ConfigError(
        f"{checkpointer.directory} has no checkpoint",
        field="checkpoint.resume",
        value="require",
        remedy="check --workdir, or start a run with --config.checkpoint.resume=auto",
    )


def initial_params(run: Run) -> PyTree:
    """Returns the parameters of init_from, with the shapes, dtypes and shardings of run.abstract_state.params.

    Raises:
        UserError: the weights are missing, damaged, or of another model.
    """
    from gptjax.convert import formats  # it imports Orbax; see orbax_context

    text = run.config.init_from
    model = run.config.model
    # This reads headers only; load_params reads the leaves. `dropout` is passed because most formats do not store it.
    weights = formats.open_weights(find_model("init_from", text), dropout=model.dropout)
    compare_models(weights.config, model, text)
    tokenizer = weights.tokenizer
    # Not an error: two files may describe the same vocabulary.
    if tokenizer is not None and not tokenizer.has_hash(run.tokenizer.sha256, run.tokenizer.name):
        log.warning("init_from=%s: made with tokenizer %s, not with this run's", text, tokenizer.name)
    log.info("parameters from %s", weights.origin)
    for note in weights.notes:
        log.info("  %s", note)
    if weights.adamw:
        log.info("  AdamW's moments are left out: the run begins at step 0")
    # By path, because the formats deliver the leaves in an order of their own.
    abstract = {}
    for path, leaf in jax.tree.leaves_with_path(run.abstract_state.params):
        abstract[path_name(path)] = leaf

    # One leaf at a time, so that the host never holds more than one of them in memory.
    def put(path: str, leaf: np.ndarray) -> jax.Array:
        if path == "wpe/embedding":
            leaf = leaf[: model.block_size]  # a run may be shorter than the model that it starts from
        like = abstract[path]
        # Each process copies its own shards only. device_put would compare the whole array across processes.
        placed = jax.make_array_from_callback(like.shape, like.sharding, lambda index: leaf[index])
        # On a CPU `placed` may alias NumPy's memory, which cannot be donated to the train step.
        return jax.jit(jnp.copy, out_shardings=like.sharding)(placed)

    return formats.load_params(weights, put)


def compare_configs(old: Mapping[str, Any], new: Config) -> None:
    """Checks that a run of config `old` can resume with `new`, and logs the changed fields.

    Raises:
        ConfigError: the model or the optimizer has changed.
    """
    # The config of an older version may have old field names, which from_dict translates. Fields that it lacks get
    # their defaults.
    before = flatten(from_dict(old))
    after = flatten(new)
    changed = [name for name in after if before[name] != after[name]]
    errors = []
    for name in changed:
        # The model and the optimizer must stay the same. Every other field may change.
        is_average = name == "optim.ema_decay" and not (before[name] and after[name])  # one begins, or ends
        # The state of Muon holds its coefficients.
        is_fixed = name in ("optim.name", "optim.muon_coefficients")
        if name.startswith("model.") or is_fixed or is_average:
            error = ConfigError(
                f"the checkpoint has {before[name]!r}, the config {after[name]!r}",
                field=name,
                remedy="choose another --workdir",
            )
            errors.append(error)
    if errors:
        raise ConfigError.of(errors)
    for name in changed:
        log.info("note: %s changed from %r to %r since the checkpoint", name, before[name], after[name])


def compare_models(found: GPTConfig, wanted: GPTConfig, source: str) -> None:
    """Checks that a run with model `wanted` can start from stored weights of model `found`.

    Dropout may differ, because it has no parameters. The run may have fewer positions.

    Raises:
        ConfigError: another field differs, or the stored model has fewer positions.
    """
    stored = dataclasses.asdict(found)
    ours = dataclasses.asdict(wanted)
    fixed = ours.keys() - {"block_size", "dropout"}
    changed = sorted(name for name in fixed if stored[name] != ours[name])
    # More positions would need embeddings that do not exist; fewer are a prefix of the table.
    if found.block_size < wanted.block_size:
        changed.append("block_size")
    if changed:
        errors = []
        flags = []
        for name in changed:
            problem = f"it has {name}={stored[name]}, this run model.{name}={ours[name]}"
            errors.append(ConfigError(problem, field="init_from", value=source))
            flags.append(f"--config.model.{name}={stored[name]}")
        errors.append(ConfigError(remedy=f"to train it: {' '.join(flags)}"))
        if "activation" in changed and source.startswith("nanogpt:"):
            errors.append(ConfigError(remedy="if nanoGPT is from before May 2023: convert with --activation=gelu_new"))
        raise ConfigError.of(errors)
    if found.block_size > wanted.block_size:
        log.info("init_from=%s: positions from %d on are left out", source, wanted.block_size)


LOCATION = ("directory", "tokens", "mix")  # names of Run.data_location


def compare_data(old: Mapping[str, object], new: Mapping[str, object], *, allowed: bool) -> None:
    """Checks that a run trains on the data of its checkpoint in the same order, and logs the differences.

    old, new: the data's identity, and where they are, which may change.

    Raises:
        ConfigError: the data or their order differ, and `allowed` is False.
    """
    lines = []
    for name in (name for name in new if name not in LOCATION):
        former = old.get(name)  # None in a checkpoint of a version that did not record it
        if former == new[name]:
            continue
        # A fingerprint tells a reader nothing, so the directories and their sizes are named with it.
        if name == "fingerprint":
            change = f"it was trained on {_describe_data(old)}, this is {_describe_data(new)}"
        else:
            change = f"{name} was {former!r}, now {new[name]!r}"
        lines.append(f"the data changed since the checkpoint: {change}")
    if lines and not allowed:
        # Resuming on other data is legitimate, for example to fine-tune, but then the run is not reproducible from
        # its config: hence the flag.
        remedy = ConfigError(remedy="to resume anyway: --config.data.allow_changed=True")
        raise ConfigError.of([*map(ConfigError, lines), remedy])
    for line in lines:
        log.info("note: %s", line)


def _describe_data(data: Mapping[str, object]) -> str:
    """Returns the directory and number of tokens of data, and the start of their fingerprint."""
    fingerprint = f"fingerprint {str(data.get('fingerprint', ''))[:8]}"
    tokens = data.get("tokens")
    if not isinstance(tokens, int):  # in a checkpoint of an earlier version, or of somebody else
        return f"data with {fingerprint}"
    return f"{data.get('directory')} ({tokens:,} tokens, {fingerprint})"
