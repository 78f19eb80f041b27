"""The training loop: the only place where time, files and devices meet."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import errors
from gptjax.checkpoint import Checkpointer, Record, compare_configs, versions
from gptjax.config import Config, GPTConfig, flatten
from gptjax.convert import formats
from gptjax.data.dataset import Prefetcher
from gptjax.errors import ConfigError, DivergedError
from gptjax.evaluate import COMPRESSED_BYTES, compare, evaluate
from gptjax.metrics import Reporter, duration, peak_flops
from gptjax.optim import role_table
from gptjax.run import Run, describe_run, make_run
from gptjax.runtime import (
    Consensus,
    Preemption,
    Watchdog,
    check_agreement,
    complain,
    fault_point,
    lock_workdir,
    meet,
)
from gptjax.sample import generate
from gptjax.sharding import path_name
from gptjax.state import TrainState
from gptjax.workdir import fetch_logs, local_directory, store_logs, write_json

log = logging.getLogger("gptjax")
SLOW_STEP_SECONDS = 60.0
SAMPLE_TOKENS = 256
TOKENS_BETWEEN_LOOKS = 8  # of a sample, at whether to stop
SMALL_BATCH = 4  # sequences: what a CPU can be asked for
CPU_EFFICIENCY = 0.5  # of a large matrix product, in a train step


def train(config: Config, workdir: str) -> int:
    """Trains `config` in `workdir`, from its newest checkpoint if it has one, and returns the exit code.

    Raises:
        UserError: with the code and the message of everything foreseeable that ends a run early.
    """
    local = local_directory(workdir, process=jax.process_index())
    if config.checkpoint.resume == "never" and os.path.isdir(local) and set(os.listdir(local)) - {".lock"}:
        raise ConfigError(f"checkpoint.resume='never': --workdir={workdir} is not empty; choose another")
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock_workdir(local))
        preemption = stack.enter_context(Preemption())
        with ending_without_the_others():
            check_agreement("config", flatten(config) | {"workdir": workdir} | versions())
            run = make_run(config)
            meet("data", config.train.barrier_seconds)
            check_agreement("data", run.data_identity)
        stack.enter_context(jax.set_mesh(run.mesh))
        checkpointer = stack.enter_context(contextlib.closing(Checkpointer(workdir, keep=config.checkpoint.keep)))
        watchdog = stack.enter_context(Watchdog(config.train.watchdog_seconds))
        with ending_without_the_others():
            if jax.process_index() == 0:
                log.info("%s", checkpointer.check_room(run.abstract_state))
            meet("restore", config.train.barrier_seconds)
            state, history = start_state(run, checkpointer)
            meet("first step", config.train.barrier_seconds)
        watchdog.beat()
        preemption.has_begun = True
        step = int(state.step)
        if step >= config.train.num_steps and not evaluation_is_missing(config, step, history):
            log.info("%s: finished at step %d of %d; nothing to do", workdir, step, config.train.num_steps)
            return errors.OK
        fetch_logs(workdir, local)
        write_description(run, local)
        reporter = stack.enter_context(contextlib.closing(make_reporter(run, local, step, history["seconds"])))
        prefetcher = Prefetcher(run.batch, step, config.train.steps_per_dispatch)
        stack.enter_context(contextlib.closing(prefetcher))
        with ending_without_the_others():
            return run_loop(
                run,
                state,
                history,
                checkpointer=checkpointer,
                reporter=reporter,
                prefetcher=prefetcher,
                consensus=Consensus(preemption, run.mesh),
                watchdog=watchdog,
            )


@contextlib.contextmanager
def ending_without_the_others() -> Iterator[None]:
    """Ends this process at once, with code 69, when a collective fails: all that it could close waits for others."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):  # too large is told as what it is
            raise
        message = f"another process is gone: {str(error).splitlines()[0]}; start the same command again on all"
        complain(f"error: {message}")
        os._exit(errors.UNAVAILABLE)


def make_reporter(run: Run, workdir: str, step: int, seconds: dict[str, float]) -> Reporter:
    return Reporter(
        workdir,
        run.config,
        resumed_from=step,
        seconds=seconds,
        tokens_per_step=run.tokens_per_step,
        flops_per_step=run.flops_per_step,
        peak_flops=sum(peak_flops(device) for device in run.mesh.devices.flat),
    )


def start_state(run: Run, checkpointer: Checkpointer) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state and the history to go on from: the newest intact checkpoint's, or fresh ones."""
    config = run.config

    def check(record: Record) -> None:
        compare_configs(record.config, config)
        compare_data(record.data, run.data_identity, allowed=config.data.allow_changed)

    restored = checkpointer.restore_latest(run.abstract_state, check=check)
    if restored is not None:
        state, record = restored
        log.info("resumed from step %d of %s", record.step, checkpointer.directory)
        return state, {"validated": -1} | record.history | {"restarts": record.history.get("restarts", 0) + 1}
    if config.checkpoint.resume == "require":
        raise ConfigError(f"checkpoint.resume='require': {checkpointer.directory} has no checkpoint")
    state = run.init()
    if config.init_from:
        state = TrainState(state.step, initial_params(run), state.opt_state)
    return state, {"restarts": 0, "skipped_steps": 0, "nonfinite_in_a_row": 0, "validated": -1, "seconds": {}}


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


def run_loop(
    run: Run,
    state: TrainState,
    history: dict[str, Any],
    *,
    checkpointer: Checkpointer,
    reporter: Reporter,
    prefetcher: Prefetcher,
    consensus: Consensus,
    watchdog: Watchdog,
) -> int:
    """Takes `state` to the last step, or to the next one once preempted, and returns the exit code.

    The host runs one dispatch ahead: the metrics of one are read while the next one computes.
    """
    config, watch, step = run.config, reporter.watch, int(state.step)
    pending: tuple[int, Any, Any] | None = None
    first, num_steps = True, config.train.num_steps
    saved = step if step else None

    def settle() -> None:
        nonlocal pending
        if pending is not None:
            (end, metrics, answer), pending = pending, None
            settle_dispatch(run, reporter, history, end, metrics, last_saved=saved)
            consensus.hear(answer)
            watchdog.beat()

    def make_should_stop() -> Callable[[], bool]:
        answer = None

        def should_stop() -> bool:
            nonlocal answer
            stop, answer = consensus.hear(answer), consensus.ask()
            watchdog.beat()
            return stop

        return should_stop

    def evaluate_now() -> dict[str, float]:
        settle()
        result = validate(run, state.params, reporter, step, make_should_stop())
        if result:
            history["validated"] = step
        return result

    if evaluation_is_missing(config, step, history):
        evaluate_now()
    while step < num_steps and not consensus.stopping:
        tokens = prefetcher.get(step)
        watch.add("data_wait")
        traced = step == config.train.profile_step
        with profiled(traced, reporter.directory):
            state, metrics = run.train_step(state, tokens)
            answer = consensus.ask()
            if first or traced:
                jax.block_until_ready(metrics)
        if first:
            watch.add("compile")
        settle()
        step += config.train.steps_per_dispatch
        pending, first = (step, metrics, answer), False
        fault_point("step")
        result = evaluate_now() if evaluation_is_missing(config, step, history) else {}
        if is_due(step, config.train.sample_every):
            settle()
            write_samples(run, state.params, reporter, step, make_should_stop())
        if step == num_steps or consensus.stopping or is_due(step, config.checkpoint.save_every):
            settle()
            save(run, checkpointer, state, step, history, reporter, result)
            saved = step
    if consensus.stopping and saved != step:  # before the first dispatch, or between two
        settle()
        save(run, checkpointer, state, step, history, reporter, {})
    checkpointer.wait()
    watch.add("checkpoint")
    if step < num_steps or evaluation_is_missing(config, step, history):
        log.warning("preempted at step %d, checkpoint written: start the same command again", step)
        return errors.PREEMPTED
    if not config.train.eval_batches and run.validation_data.split.bytes <= COMPRESSED_BYTES:
        log.info("%s", compare(run.validation_data.split, run.tokenizer))
    log.info("done: %d steps in %s", step, describe_seconds(watch.spent))
    return errors.OK


def evaluation_is_missing(config: Config, step: int, history: dict[str, Any]) -> bool:
    """Returns whether the evaluation of `step` is due and not done: also after a preemption has cut it short."""
    due = step == config.train.num_steps or (is_due(step, config.train.eval_every) and step < config.train.num_steps)
    return step > 0 and due and history["validated"] != step


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def settle_dispatch(
    run: Run, reporter: Reporter, history: dict[str, Any], end: int, metrics: Any, *, last_saved: int | None
) -> None:
    """Reads the metrics of the dispatch that ended at step `end`, applies the policy on non-finite ones, reports.

    Raises:
        DivergedError: train.nan_policy is `stop`, or too many steps in a row were not finite.
    """
    count = run.config.train.steps_per_dispatch
    host = {name: np.reshape(np.asarray(value), (count,)) for name, value in metrics.items()}
    reporter.watch.add("step")
    for index in range(count):
        step = end - count + index + 1
        row = {name: float(values[index]) for name, values in host.items()}
        if row.pop("finite"):
            history["nonfinite_in_a_row"] = 0
        else:
            note_nonfinite(run, history, step, row, last_saved=last_saved)
        reporter.report_step(step, row, skipped=history["skipped_steps"])


def note_nonfinite(
    run: Run, history: dict[str, Any], step: int, row: dict[str, float], *, last_saved: int | None
) -> None:
    """Counts a step that kept its parameters because it was not finite; raises DivergedError where policy says so."""
    train = run.config.train
    history["skipped_steps"] += 1
    history["nonfinite_in_a_row"] += 1
    what = f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}"
    if train.nan_policy == "skip" and history["nonfinite_in_a_row"] < train.nan_limit:
        log.warning("%s: update skipped (%d so far)", what, history["skipped_steps"])
        return
    windows = run.train_data.row_ids(step - 1)[:8].tolist()
    reason = f"{train.nan_limit} in a row" if train.nan_policy == "skip" else "train.nan_policy='stop'"
    stands = f"the last good checkpoint is of step {last_saved}, and the same command goes on from there"
    if last_saved is None:
        stands = "there is no checkpoint yet"
    raise DivergedError(
        f"{what}: {reason}; its batch starts with windows {windows} of the training data\n"
        f"{stands}: "
        "add --config.train.nan_policy=skip to leave such updates out, or lower optim.peak_lr"
    )


def validate(run: Run, params: Any, reporter: Reporter, step: int, should_stop: Callable[[], bool]) -> dict[str, float]:
    """Returns the validation result of `params`, reported; {} if it was cut short."""
    result = evaluate(
        run.eval_step,
        params,
        dataset=run.validation_data,
        token_bytes_V=run.token_bytes_V,
        sharding=run.batch_sharding,
        num_micro_steps=run.num_micro_steps,
        batches=run.config.train.eval_batches,
        should_stop=should_stop,
    )
    if result:
        reporter.report_validation(step, result)
    reporter.watch.add("evaluation")
    fault_point("evaluation")
    return result


class CutShortError(Exception):
    """Ends a sample when the run is to stop."""


def write_samples(run: Run, params: Any, reporter: Reporter, step: int, should_stop: Callable[[], bool]) -> None:
    """Writes a sample of the model to the log and to samples.txt; a shorter one where it is to stop."""
    prompt = run.tokenizer.encode(run.config.train.sample_prompt)
    ids: list[int] = []

    def note(row: int, token: int) -> None:
        ids.append(token)
        if len(ids) % TOKENS_BETWEEN_LOOKS == 0 and should_stop():
            raise CutShortError

    with contextlib.suppress(CutShortError):
        generate(
            run.model,
            params,
            [prompt],
            max_new_tokens=SAMPLE_TOKENS,
            eot_id=run.tokenizer.eot_id,
            temperature=0.8,
            seed=step,
            on_token=note,
        )
    reporter.report_sample(step, run.config.train.sample_prompt + run.tokenizer.decode(ids))
    reporter.watch.add("sampling")


def save(
    run: Run,
    checkpointer: Checkpointer,
    state: TrainState,
    step: int,
    history: dict[str, Any],
    reporter: Reporter,
    result: dict[str, float],
) -> None:
    reporter.sync()
    meet(f"save of step {step}", run.config.train.barrier_seconds)
    history = history | {"seconds": dict(reporter.watch.spent)}
    checkpointer.save(state, step, config=run.config, history=history, data=run.data_identity, metrics=result or None)
    store_logs(reporter.directory, str(checkpointer.directory.parent))
    reporter.watch.add("checkpoint")
    fault_point("save")


@contextlib.contextmanager
def profiled(wanted: bool, directory: str) -> Iterator[None]:
    """Writes a profiler trace of what runs inside to `directory`/profile, for TensorBoard or Perfetto."""
    if not wanted:
        yield
        return
    with jax.profiler.trace(os.path.join(directory, "profile")):
        yield
    log.info("profile written to %s", os.path.join(directory, "profile"))


def describe_seconds(spent: dict[str, float]) -> str:
    total = sum(spent.values())
    parts = ", ".join(
        f"{kind.replace('_', ' ')} {duration(seconds)}" for kind, seconds in spent.items() if seconds > 0.05
    )
    return f"{duration(total)} ({parts})"


def write_description(run: Run, workdir: str) -> None:
    """Prints what is about to run, and writes it to the work directory: config, roles of parameters, tokenizer."""
    roles = role_table(run.abstract_state.params, run.config.optim)
    write_json(os.path.join(workdir, "config.json"), run.config.to_dict())
    write_json(os.path.join(workdir, "parameters.json"), roles)
    run.tokenizer.save(os.path.join(workdir, "tokenizer.json"))
    for line in [*describe_run(run), *describe_roles(roles)]:
        log.info("%s", line)
    if run.mesh.devices.flat[0].platform == "cpu":
        warn_if_slow(run)


def describe_roles(roles: list[dict[str, Any]]) -> list[str]:
    """Returns one line for each parameter: path, shape, optimizer, decay, sharding."""
    lines = []
    for row in roles:
        shape, decay = "x".join(map(str, row["shape"])), "decay" if row["weight_decay"] else "no decay"
        lines.append(f"  {row['parameter']:<22} {shape:<18} {row['optimizer']:<9} {decay:<8} {row['sharding']}")
    return lines


def warn_if_slow(run: Run) -> None:
    """Says how long a step will take on this CPU, from a short matrix product, when that is long."""
    x = jnp.ones((1024, 1024))
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    start = time.perf_counter()
    product(x).block_until_ready()
    flops_per_second = 2 * 1024**3 / (time.perf_counter() - start)
    seconds = run.flops_per_step / (CPU_EFFICIENCY * flops_per_second)
    if seconds > SLOW_STEP_SECONDS:
        log.warning("one step will take about %s on this CPU; configs/quickstart.py suits it", duration(seconds))
        if run.config.data.global_batch_size > SMALL_BATCH:
            log.warning("or a smaller batch: --config.data.global_batch_size=%d", SMALL_BATCH)
