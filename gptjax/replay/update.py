"""One step of a run again, to look at: `python -m gptjax.replay --workdir=DIR --step=N`.

Restores the newest checkpoint before the step, or the initial state, takes the run's own train step from there, and
shows the rows and documents of update N, the loss of each token, and the gradient's norm by layer and parameter: on
the screen, and in one HTML file. The work directory is only read, so that a run may train in it meanwhile.
--config.section.field=VALUE changes a setting, as mesh.fsdp where this machine has other devices.
"""

from __future__ import annotations  # jax.Array in a signature would import JAX

import argparse
import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from etils import epath, epy

from gptjax import runtime
from gptjax.config import Config, MeshConfig, flatten, from_dict, unknown_field
from gptjax.errors import CheckpointError, ConfigError, WorkdirError
from gptjax.workdir import local_directory

with epy.lazy_imports():  # imported at their first use, so that a wrong flag exits before JAX loads
    import jax
    import jax.numpy as jnp
    import numpy as np

    from gptjax import checkpoint, page, sharding, start, step
    from gptjax import run as runs
    from gptjax.data import dataset

if TYPE_CHECKING:
    from gptjax.checkpoint import Checkpointer, Record
    from gptjax.page import Replayed, Row
    from gptjax.run import Run
    from gptjax.state import TrainState

log = logging.getLogger("gptjax")
PROGRESS_SECONDS = 5.0
FULL_ROWS = 64  # whose text the HTML file has, unless told otherwise
COMPARED = ("loss", "grad_norm", "update_norm", "lr")

Ranges = list[dict[str, Any]]


def parse_flags(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Returns the command line, and what it changes in the config."""
    parser = runtime.Parser(__doc__)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the work directory of a run")
    parser.add_argument("--step", required=True, type=int, metavar="N", help="the update that makes step N")
    parser.add_argument("--out", default="", metavar="FILE", help="the HTML file: replay-N.html in the work directory")
    parser.add_argument("--rows", type=int, default=FULL_ROWS, help="so many rows have their text in it; 0 means all")
    parser.add_argument(
        "--rollbacks", type=int, default=-1, help="the run as it was after so many rollbacks; by default as it is now"
    )
    args, rest = parser.parse_known_args(arguments)
    if args.step < 1:
        raise ConfigError(f"--step={args.step}: the first update makes step 1")
    if args.rows < 0:
        raise ConfigError(f"--rows={args.rows}: must be at least 0")
    overrides = runtime.parse_overrides(parser, rest)
    for name in overrides:
        if name not in flatten(Config()):
            raise ConfigError(unknown_field(name))
    return args, overrides


def main(arguments: list[str]) -> None:
    args, overrides = parse_flags(arguments)
    runtime.start_jax()
    records = read_records(checkpoint.Checkpointer(args.workdir))
    skipped = skipped_ranges(records, args.rollbacks)
    config = find_config(args.workdir, args.step, records, overrides)
    config = fit(config, history_of(records, args.step), overrides)
    if args.step > config.train.num_steps:
        raise ConfigError(f"--step={args.step}: the run has train.num_steps={config.train.num_steps}")
    run = runs.make_run(config)
    with jax.set_mesh(run.mesh):
        replayed = replay(run, args.workdir, args.step, records, skipped)
    for line in page.text_lines(replayed):
        print(line)
    name = args.out or os.path.join(local_directory(args.workdir), f"replay-{args.step}.html")
    write(name, "".join(page.render(replayed, full_rows=args.rows)))
    print(f"\n{name}")


def read_records(checkpointer: Checkpointer) -> dict[int, Record]:
    """Returns the records of all checkpoints that can be read, the newest first."""
    records = {}
    for number in reversed(checkpointer.steps()):
        try:
            records[number] = checkpointer.read_record(number)
        except checkpoint.Damaged as damage:
            log.warning("checkpoint of step %d left out: %s", number, damage)
    return records


def skipped_ranges(records: Mapping[int, Record], rollbacks: int) -> Ranges:
    """Returns which data the run skips, as its newest checkpoint knows it, or as it was after so many rollbacks."""
    newest = next(iter(records.values()), None)
    ranges: Ranges = newest.history.get("skipped_ranges", []) if newest else []
    if rollbacks > len(ranges):
        raise ConfigError(f"--rollbacks={rollbacks}: the newest checkpoint knows of {len(ranges)}")
    return [part for part in ranges if rollbacks < 0 or part["rollback"] <= rollbacks]


def history_of(records: Mapping[int, Record], number: int) -> Mapping[str, Any]:
    """Returns what is known of the process that made step `number`: the history in the first checkpoint from there on.

    Where there is none, that in the newest one.
    """
    later = [record.history for at, record in records.items() if at >= number]
    return later[-1] if later else next((record.history for record in records.values()), {})


def find_config(workdir: str, number: int, records: Mapping[int, Record], overrides: Mapping[str, str]) -> Config:
    """Returns the config that made step `number`: of the first checkpoint from there on, else of the last start.

    Raises:
        CheckpointError: there is none.
    """
    later = [record.config for at, record in records.items() if at >= number]
    path = epath.Path(workdir) / "config.json"
    try:
        values = later[-1] if later else json.loads(path.read_text())
    except (OSError, ValueError) as error:
        if not records:
            raise CheckpointError(f"--workdir={workdir}: no run there: no checkpoint and no config.json") from error
        values = next(iter(records.values())).config
    values = from_dict(values).to_dict()
    for name, text in overrides.items():
        *sections, last = name.split(".")
        target = values[sections[0]] if sections else values
        target[last] = text
    return from_dict(values)


def fit(config: Config, about: Mapping[str, Any], overrides: Mapping[str, str]) -> Config:
    """Returns the config for this machine's devices, with the run's number of micro-steps if that can be.

    A micro-step's number is in its dropout key.
    """
    count, size = jax.device_count(), config.data.global_batch_size
    try:
        sharding.mesh_sizes(config.mesh, count)
    except ConfigError:
        axis = "fsdp" if config.model.n_embd % count == 0 else "data"
        log.info("note: the run's mesh does not fit the %d device(s) here: mesh.%s=%d instead", count, axis, count)
        config = dataclasses.replace(config, mesh=MeshConfig(**{"data": 1, "fsdp": 1, axis: count}))
    data, fsdp, _ = sharding.mesh_sizes(config.mesh, count)
    known = about.get("num_micro_steps", 0)
    if known and "train.micro_batch_size" not in overrides:
        share, left = divmod(size, known * data * fsdp)
        if left:
            log.info("note: the run's %d micro-steps cannot be had here: dropout, if any, is not the same", known)
        else:
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_size=share))
    return config


def replay(run: Run, workdir: str, number: int, records: Mapping[int, Record], skipped: Ranges) -> Replayed:
    """Returns the update that makes step `number`, computed again."""
    state = restore_before(run, workdir, number, records, skipped)
    origin, index = int(state.step), dataset.data_index(number - 1, skipped)
    state, at = advance(run, state, number - 1, skipped)
    metrics, losses, norms = compute(run, state, at, number - 1, skipped)
    source = f"the checkpoint of step {origin}" if origin in records else "the initial state"
    notes = [
        f"from {source} and the {number - 1 - origin} steps between",
        f"batch {index} of the data" + (f", after {len(skipped)} rollback(s)" if skipped else ""),
        compare_with_log(workdir, number, metrics, skipped),
    ]
    machine = history_of(records, number).get("machine", "devices that are not known")
    if machine != run.machine:
        notes.append(f"the run was on {machine}, this is {run.machine}: last bits may differ")
    return page.Replayed(
        title=f"step {number} of {workdir}",
        notes=notes,
        metrics=metrics,
        rows=make_rows(run, index, losses),
        norms=norms,
        words=page.Words(lambda i: run.tokenizer.decode_bytes([i]), run.tokenizer.eot_id, run.tokenizer.vocab_size),
    )


def restore_before(run: Run, workdir: str, number: int, records: Mapping[int, Record], skipped: Ranges) -> TrainState:
    """Returns the newest state before step `number` that comes from the same data."""

    def before(ranges: Ranges, at: int) -> list[tuple[int, int]]:
        return [(part["step"], part["batches"]) for part in ranges if part["step"] < at]

    checkpointer = checkpoint.Checkpointer(workdir)
    for at, record in records.items():
        if at >= number or before(record.history.get("skipped_ranges", []), at) != before(skipped, at):
            continue
        try:
            start.check_record(run, record)
            return checkpointer.restore(record, run.abstract_state)
        except checkpoint.Damaged as damage:
            log.warning("checkpoint of step %d left out: %s", at, damage)
    return start.initial_state(run)


def advance(run: Run, state: TrainState, target: int, skipped: Ranges) -> tuple[TrainState, int]:
    """Returns the state of the dispatch in which the update from step `target` on lies, and the step it starts at."""
    first = at = int(state.step)
    count, said = run.config.train.steps_per_dispatch, time.monotonic()
    while at + count <= target:
        state, metrics = run.train_step(state, run.batch(at, skipped))
        at += count
        jax.block_until_ready(metrics)
        if time.monotonic() - said > PROGRESS_SECONDS:
            log.info("replay: step %d of %d, from %d", at, target, first)
            said = time.monotonic()
    return state, at


def compute(
    run: Run, state: TrainState, at: int, target: int, skipped: Ranges
) -> tuple[dict[str, float], np.ndarray, dict[str, np.ndarray]]:
    """Returns (metrics of the update from step `target` on, loss of each token, gradient norms by parameter).

    The state is of step `at`, where the update's dispatch starts, and is used up. Metrics are of the whole dispatch, as
    the run takes it.
    """
    several, inside = run.config.train.steps_per_dispatch > 1, target - at
    batches = run.batch(at, skipped)
    metrics: Any = {}
    if inside:
        _, metrics = run.train_step(jax.tree.map(jnp.copy, state), batches)
        state, _ = run.train_step(state, batches[:inside])
    losses, norms = look(run, state, batches[inside] if several else batches)
    if not inside:
        _, metrics = run.train_step(state, batches)
    values = {name: float(np.reshape(np.asarray(metrics[name]), -1)[inside]) for name in COMPARED}
    return values, losses, norms


def look(run: Run, state: TrainState, tokens_ABT: jax.Array) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns each token's loss [rows, T], and the gradient's norm by parameter, by layer where it has layers."""
    ends = {"eot_id": run.tokenizer.eot_id, "eot_position": run.train_data.split.eot_position}
    loss_fn = step.make_loss_fn(run.model, run.config, **ends)
    gradient_fn = step.make_gradient_fn(loss_fn, config=run.config, compute=run.compute)

    def norms(*of: Any) -> dict[str, jax.Array]:
        leaves = [(sharding.path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(gradient_fn(*of)[0])]
        return {path: norm_of(path, leaf) for path, leaf in leaves}

    of = (state.params, tokens_ABT, state.step)
    losses_ABT = jax.jit(step.make_token_loss_fn(run.model, run.config, **ends))(*of)
    found = {path: np.asarray(norm) for path, norm in jax.jit(norms)(*of).items()}
    return np.asarray(losses_ABT).reshape(-1, losses_ABT.shape[-1]), found


def norm_of(path: str, leaf: jax.Array) -> jax.Array:
    """Returns the norm of a gradient: of each layer [L] where it has them, else [1]."""
    rows = leaf if path.startswith("h/") else leaf[None]
    return jnp.sqrt(jnp.sum(jnp.square(rows), axis=tuple(range(1, rows.ndim))))


def make_rows(run: Run, index: int, losses: np.ndarray) -> list[Row]:
    """Returns the rows of batch `index` of the data."""
    data, rows = run.train_data, []
    windows = data.row_ids(index)
    for number, (window, tokens) in enumerate(zip(windows.tolist(), data.read(windows), strict=True)):
        shard, first = data.find(window)
        documents = page.split_documents(tokens, eot_id=run.tokenizer.eot_id, eot_position=data.split.eot_position)
        file = os.path.basename(data.split.paths[shard])
        rows.append(page.Row(number, window, file, first, tokens, losses[number], documents))
    return rows


def compare_with_log(workdir: str, number: int, metrics: Mapping[str, float], skipped: Ranges) -> str:
    """Returns a line on whether the run logged the same."""
    path, found = epath.Path(workdir) / "metrics.jsonl", None
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:  # the last one, half written
            continue
        if isinstance(row, dict) and row.get("step") == number and "loss" in row:
            found = row
    if found is None:
        return "metrics.jsonl has no such step"
    if found.get("rollbacks", 0) != len(skipped):
        return f"metrics.jsonl has this step after {found.get('rollbacks', 0)} rollback(s): not compared"
    logged = {name: found[name] for name in COMPARED if name in found}
    other = [f"{name} {value}" for name, value in logged.items() if value != _as_logged(metrics[name])]
    return (
        f"DIFFERENT from metrics.jsonl, which has {', '.join(other)}"
        if other
        else "equal to metrics.jsonl, bit for bit"
    )


def _as_logged(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write(path: str, text: str) -> None:
    """Writes the file at once or not at all."""
    partial = f"{path}.{os.getpid()}.tmp"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(partial, path)
    except OSError as error:
        raise WorkdirError(f"{path}: cannot be written: {error.strerror}; choose another with --out=FILE") from error


def cli() -> None:
    runtime.run_cli(main)


if __name__ == "__main__":
    cli()
