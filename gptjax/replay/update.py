"""Recomputes one update of a run with its own train step, from the newest earlier checkpoint."""

import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import resume, sharding, step
from gptjax.checkpoint import Checkpointer
from gptjax.config import Config, MeshConfig, from_dict
from gptjax.config_files import settings_in
from gptjax.data.dataset import batch_index
from gptjax.dispatch import last_batch
from gptjax.errors import CheckpointError, ConfigError, one_line
from gptjax.former_names import rename_fields
from gptjax.history import History, SkippedRange
from gptjax.identity import Identity
from gptjax.log_reader import newest_rows
from gptjax.record import CorruptCheckpointError, Record
from gptjax.replay.report import Replayed, Row, TokenText, is_layered, split_documents
from gptjax.setup import Run
from gptjax.state import TrainState
from gptjax.strict_json import InvalidTextError
from gptjax.workdir import CONFIG_FILE, read_file

log = logging.getLogger("gptjax")
PROGRESS_SECONDS = 5.0  # between two lines of progress
COMPARED = ("loss", "grad_norm", "update_norm", "lr")

Ranges = Sequence[SkippedRange]


def read_records(checkpointer: Checkpointer, identity: Identity) -> dict[int, Record]:
    """Returns the readable records of this run's checkpoints by step, the newest first."""
    records = {}
    for number in reversed(checkpointer.steps()):
        try:
            record = checkpointer.read_record(number)
            resume.read_history(record)
        except CorruptCheckpointError as damage:
            log.warning("checkpoint of step %d left out: %s", number, damage)
            continue
        if identity.owns(record):
            records[number] = record
        else:
            log.warning("%s/%d: %s: left out", checkpointer.directory, number, identity.explain(record))
    return records


def skipped_ranges(records: Mapping[int, Record], rollbacks: int) -> Ranges:
    """Returns the data that the run skips, according to its newest checkpoint.

    rollbacks: the run as it was after this many rollbacks; -1: as it is now.

    Raises:
        ConfigError: the run has had fewer rollbacks.
    """
    newest = next(iter(records.values()), None)
    ranges = resume.read_history(newest).skipped_ranges if newest else ()
    if rollbacks > len(ranges):
        raise ConfigError(
            f"the newest checkpoint knows of {len(ranges)}",
            field="--rollbacks",
            value=rollbacks,
        )
    if rollbacks < 0:
        return list(ranges)
    return [part for part in ranges if part.rollback <= rollbacks]


def history_of(records: Mapping[int, Record], number: int) -> History:
    """Returns the history of the process that made step `number`.

    It is in the first checkpoint from that step on; without one, the newest checkpoint is the best guess.
    """
    record = _first_from(records, number) or next(iter(records.values()), None)
    return resume.read_history(record) if record else History()


def _first_from(records: Mapping[int, Record], number: int) -> Record | None:
    """Returns the record of the first checkpoint from step `number` on; `records` has the newest first."""
    later = [record for at, record in records.items() if at >= number]
    return later[-1] if later else None


def find_config(
    workdir: str,
    number: int,
    *,
    records: Mapping[int, Record],
    overrides: Mapping[str, str],
) -> Config:
    """Returns the config that made step `number`, with `overrides`.

    It is in the first checkpoint from that step on; without one, config.json has it from the last start.

    Raises:
        CheckpointError: no config is found.
        ConfigError: an override is wrong.
    """
    record = _first_from(records, number)
    config = from_dict(record.config) if record else _config_of_last_start(workdir, records)
    values = config.to_dict()
    for name, text in overrides.items():
        *sections, last = name.split(".")
        target = values[sections[0]] if sections else values
        target[last] = text
    return from_dict(values)


def _config_of_last_start(workdir: str, records: Mapping[int, Record]) -> Config:
    """Returns the config in config.json, or in the newest checkpoint where that file is missing or damaged.

    Raises:
        CheckpointError: there is no checkpoint either.
    """
    problem = ""
    try:
        content = read_file(workdir, CONFIG_FILE)
        if content is not None:
            return from_dict(rename_fields(settings_in(content), warn=True))
    except (OSError, InvalidTextError, ConfigError) as error:
        problem = f"{workdir}/{CONFIG_FILE}: {one_line(error)}"
    if not records:
        missing = problem or f"no {CONFIG_FILE}"
        raise CheckpointError(
            f"no run there: no checkpoint and {missing}",
            field="--workdir",
            value=workdir,
        )
    number, record = next(iter(records.items()))
    if problem:
        log.warning("%s: using the config of the checkpoint of step %d", problem, number)
    return from_dict(record.config)


def fit(
    config: Config,
    history: History,
    overrides: Mapping[str, str],
) -> Config:
    """Returns the config for this machine's devices, with the run's number of micro-batches where that is possible.

    A micro-batch's number is in its dropout key, so another number of them draws other dropout masks.
    """
    config = _fit_mesh(config)
    num_microbatches = history.num_microbatches
    if not num_microbatches or "train.micro_batch_size" in overrides:
        return config
    data, fsdp, _ = sharding.mesh_sizes(config.mesh, jax.device_count())
    micro_batch, rest = divmod(config.data.global_batch_size, num_microbatches * data * fsdp)
    if rest:
        log.info(
            "note: the run's %d micro-batches do not fit the devices here: dropout, if any, is not the same",
            num_microbatches,
        )
        return config
    train = dataclasses.replace(config.train, micro_batch_size=micro_batch)
    return dataclasses.replace(config, train=train)


def _fit_mesh(config: Config) -> Config:
    """Returns the config with one mesh axis for all devices, where its own mesh does not fit them."""
    count = jax.device_count()
    try:
        sharding.mesh_sizes(config.mesh, count)
    except ConfigError:
        axis = "fsdp" if config.model.n_embd % count == 0 else "data"
        log.info("note: the run's mesh does not fit the %d device(s) here: mesh.%s=%d instead", count, axis, count)
        sizes = {"data": 1, "fsdp": 1}
        sizes[axis] = count
        return dataclasses.replace(config, mesh=MeshConfig(**sizes))
    return config


def replay(
    run: Run,
    workdir: str,
    number: int,
    *,
    records: Mapping[int, Record],
    skipped: Ranges,
) -> Replayed:
    """Returns the update that makes step `number`, recomputed.

    Raises:
        UserError: a checkpoint does not belong to the run's config, or its files cannot be read.
    """
    target = number - 1  # the step that the update starts from
    state = restore_before(run, workdir, number, records=records, skipped=skipped)
    origin = int(state.step)
    index = batch_index(target, skipped)
    state = advance(run, state, target, skipped=skipped)
    metrics, losses, norms = compute(run, state, target, skipped=skipped)
    source = f"the checkpoint of step {origin}" if origin in records else "the initial state"
    rollbacks = f", after {len(skipped)} rollback(s)" if skipped else ""
    notes = [
        f"replayed {target - origin} steps from {source}",
        f"batch {index} of the data{rollbacks}",
        compare_with_log(workdir, number, metrics, skipped=skipped),
    ]
    machine = history_of(records, number).machine or "unknown devices"
    if machine != run.machine:
        notes.append(f"the run was on {machine}, this is {run.machine}: last bits may differ")
    return Replayed(
        title=f"step {number} of {workdir}",
        notes=notes,
        metrics=metrics,
        rows=make_rows(run, index, losses),
        norms=norms,
        words=_token_text(run),
    )


def _token_text(run: Run) -> TokenText:
    tokenizer = run.tokenizer
    return TokenText(
        decode=lambda token: tokenizer.decode_bytes([token]),
        eot_id=tokenizer.eot_id,
        vocab_size=tokenizer.vocab_size,
    )


def restore_before(
    run: Run,
    workdir: str,
    number: int,
    *,
    records: Mapping[int, Record],
    skipped: Ranges,
) -> TrainState:
    """Returns the newest state before step `number` that was trained on the same data.

    A checkpoint from before a rollback has seen data that the run skips since, and the other way round.

    Raises:
        UserError: a checkpoint does not belong to the run's config, or its files cannot be read.
    """
    checkpointer = Checkpointer(workdir)
    for at, record in records.items():
        if at >= number:
            continue
        seen = resume.read_history(record).skipped_ranges
        if _skipped_before(seen, at) != _skipped_before(skipped, at):
            continue
        try:
            resume.check_record(run, record)
            return checkpointer.restore(record, run.abstract_state)
        except CorruptCheckpointError as damage:
            log.warning("checkpoint of step %d left out: %s", at, damage)
    return resume.initial_state(run)


def _skipped_before(ranges: Ranges, step: int) -> list[tuple[int, int]]:
    return [(part.step, part.batches) for part in ranges if part.step < step]


def advance(
    run: Run,
    state: TrainState,
    target: int,
    *,
    skipped: Ranges,
) -> TrainState:
    """Returns the state at step `target`; `state` is donated."""
    first = int(state.step)
    at = first
    last_report = time.monotonic()
    while at < target:
        end = min(run.dispatch_end(at), target)
        state, metrics = run.train_step(state, run.batch(at, skipped, end=end))
        at = end
        jax.block_until_ready(metrics)
        if time.monotonic() - last_report > PROGRESS_SECONDS:
            log.info("replay: step %d of %d, from %d", at, target, first)
            last_report = time.monotonic()
    return state


def compute(
    run: Run,
    state: TrainState,
    target: int,
    *,
    skipped: Ranges,
) -> tuple[dict[str, float], np.ndarray, dict[str, np.ndarray]]:
    """Returns (metrics, token losses, gradient norms) of the update from step `target`.

    state: at step `target`; it is donated.
    Losses are float [sequences, T]; norms are as in `look`.
    """
    tokens = run.batch(target, skipped)
    losses, norms = look(run, state, last_batch(tokens))
    _, metrics = run.train_step(state, tokens)
    # Each is [], or [K] where a dispatch may have several steps.
    values = {name: float(np.atleast_1d(np.asarray(metrics[name]))[0]) for name in COMPARED}
    return values, losses, norms


def look(
    run: Run,
    state: TrainState,
    tokens_ABT: jax.Array,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns each token's loss, float [A * B, T], and the norms of the update's gradient by parameter.

    tokens_ABT: int [A, B, T+1]. Norms are float [L] for parameters that are stacked over layers, otherwise [1].
    """
    eot = run.train_data.eot
    token_loss_fn = step.make_token_loss_fn(run.model, run.config, eot=eot)
    loss_fn = step.make_loss_fn(run.model, run.config, eot=eot)
    gradient_fn = step.make_gradient_fn(
        loss_fn,
        config=run.config,
        parallel=run.model.parallel,
    )

    def norms_fn(
        params: Any,
        tokens_ABT: jax.Array,
        number: jax.Array,
    ) -> dict[str, jax.Array]:
        gradient, _ = gradient_fn(params, tokens_ABT, number)
        norms = {}
        for path, leaf in jax.tree.leaves_with_path(gradient):
            name = sharding.path_name(path)
            norms[name] = norm_of(name, leaf)
        return norms

    losses_ABT = jax.jit(token_loss_fn)(state.params, tokens_ABT, state.step)
    norms = jax.jit(norms_fn)(state.params, tokens_ABT, state.step)
    sequence_length = losses_ABT.shape[-1]
    losses = np.asarray(losses_ABT).reshape(-1, sequence_length)
    return losses, {name: np.asarray(norm) for name, norm in norms.items()}


def norm_of(path: str, leaf: jax.Array) -> jax.Array:
    """Returns the norm of a gradient: float [L], one per layer, for leaves [L, ...] of the layers, otherwise [1]."""
    rows = leaf if is_layered(path) else leaf[None]
    inner = tuple(range(1, rows.ndim))
    return jnp.sqrt(jnp.sum(jnp.square(rows), axis=inner))


def make_rows(
    run: Run,
    index: int,
    losses: np.ndarray,
) -> list[Row]:
    """Returns the rows of batch `index` of the data; losses: float [rows, T]."""
    data = run.train_data
    windows = data.window_ids(index)
    tokens = data.read(windows)
    rows = []
    for number, window in enumerate(windows.tolist()):
        shard, start = data.shard_of(window)
        rows.append(
            Row(
                number=number,
                window=window,
                shard=shard,
                start=start,
                tokens=tokens[number],
                losses=losses[number],
                documents=split_documents(tokens[number], data.eot),
            )
        )
    return rows


def compare_with_log(
    workdir: str,
    number: int,
    metrics: Mapping[str, float],
    *,
    skipped: Ranges,
) -> str:
    """Returns a line that reports whether the run logged the same metrics."""
    try:
        row = _last_train_row(workdir, number)
    except OSError as error:
        return f"metrics.jsonl: {error.strerror or one_line(error)}: not compared"
    if not row:
        return "metrics.jsonl has no such step"
    rollbacks = row.get("rollbacks", 0)
    if rollbacks != len(skipped):
        return f"metrics.jsonl has this step after {one_line(rollbacks)} rollback(s): not compared"
    different = []
    for name in COMPARED:
        if name in row and row[name] != _as_logged(metrics[name]):
            different.append(f"{name} {one_line(row[name])}")
    if different:
        return f"DIFFERENT from metrics.jsonl, which has {', '.join(different)}"
    return "equal to metrics.jsonl, bit for bit"


def _last_train_row(workdir: str, number: int) -> dict[str, Any]:
    """Returns the last training row of a step, {} without one: after a rollback or resume the log has several.

    Raises:
        OSError: the log cannot be read.
    """
    for row in newest_rows(workdir, having=str(number).encode()):
        if row["step"] == number and "loss" in row:
            return row
    return {}


def _as_logged(value: float) -> float | None:
    """Returns a metric as a row has it: null where it is not finite."""
    return value if math.isfinite(value) else None
