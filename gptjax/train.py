"""The training loop: the only place where time, files and devices meet."""

import contextlib
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import errors, goodput
from gptjax.checkpoint import Checkpointer, versions, without_counters
from gptjax.config import Config, flatten
from gptjax.data.dataset import Prefetcher, data_index
from gptjax.divergence import RollBackError, Spike, find_spike, history_after, remember
from gptjax.errors import ConfigError, DivergedError
from gptjax.evaluate import COMPRESSED_BYTES, compare, evaluate
from gptjax.goodput import Stopwatch, duration
from gptjax.metrics import Reporter, peak_flops
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
from gptjax.start import initial_state, new_history, restore, start_state
from gptjax.state import TrainState
from gptjax.workdir import fetch_logs, local_directory, store_logs, write_json

log = logging.getLogger("gptjax")
SLOW_STEP_SECONDS = 60.0
SAMPLE_TOKENS = 256
TOKENS_BETWEEN_LOOKS = 8  # of a sample, at whether to stop
SMALL_BATCH = 4  # sequences: what a CPU can be asked for
CPU_EFFICIENCY = 0.5  # of a large matrix product, in a train step


def train(config: Config, workdir: str, *, started: float | None = None) -> int:
    """Trains `config` in `workdir`, from its newest checkpoint if it has one, and returns the exit code.

    started: when the command was, by time.time(); None means now.

    Raises:
        UserError: with the code and the message of everything foreseeable that ends a run early.
    """
    started, local = started or time.time(), local_directory(workdir, process=jax.process_index())
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
        stack.enter_context(without_counters())
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
        history["started_at"] = goodput.first_start(history, started)
        spent = goodput.at_start(history, started=started, last_sign=last_sign(local), now=time.time())
        watch, consensus = Stopwatch(spent), Consensus(preemption, run.mesh)
        fetch_logs(workdir, local)
        write_description(run, local)
        run_on = functools.partial(
            run_until_spike,
            run,
            directory=local,
            watch=watch,
            checkpointer=checkpointer,
            consensus=consensus,
            watchdog=watchdog,
        )
        with ending_without_the_others():
            end = run_on(state, history, after="restart" if history["restarts"] else "start")
            while isinstance(end, Spike):
                state, history = roll_back(run, checkpointer, history, end, watch)
                watchdog.beat()
                end = run_on(state, history, after="rollback")
        return end


def run_until_spike(
    run: Run,
    state: TrainState,
    history: dict[str, Any],
    *,
    directory: str,
    watch: Stopwatch,
    after: str,
    **tools: Any,
) -> int | Spike:
    """Runs the loop, with its logs and batches, and returns its exit code, or the spike to be undone by a rollback.

    directory: of the logs. after: what ends here, as a kind of time: start, restart or rollback.
    """
    step, compiled = int(state.step), after == "rollback"
    batch = functools.partial(run.batch, skipped=tuple(history["skipped_ranges"]))
    with contextlib.ExitStack() as stack:
        reporter = stack.enter_context(
            contextlib.closing(make_reporter(run, directory, step, history, watch, compiled))
        )
        prefetcher = Prefetcher(batch, step, run.config.train.steps_per_dispatch)
        stack.enter_context(contextlib.closing(prefetcher))
        stack.enter_context(ending_without_the_others())
        watch.add(after)
        try:
            return run_loop(run, state, history, reporter=reporter, prefetcher=prefetcher, compiled=compiled, **tools)
        except RollBackError as error:
            return error.spike  # and with the error goes the loop's state, whose memory the restored one may need


def roll_back(
    run: Run, checkpointer: Checkpointer, history: dict[str, Any], spike: Spike, watch: Stopwatch
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the last good state and the history to go on with, in which the data from there to the spike are skipped.

    There is no checkpoint after it: a save comes after the metrics of all steps before it were read.
    """
    checkpointer.finish_save()
    number, seconds = history["rollbacks"] + 1, run.config.train.barrier_seconds
    meet(f"rollback {number}", seconds)
    state, past = restore(run, checkpointer) or (initial_state(run), new_history())
    meet(f"step after rollback {number}", seconds)
    step = int(state.step)
    watch.spent = goodput.after_rollback(watch.spent, past["seconds"])
    history = history_after(history, past, step, spike)
    ranges, most = history["skipped_ranges"], run.config.train.max_rollbacks
    last = data_index(step, ranges) - 1
    first = last - ranges[-1]["batches"] + 1
    where = f"back to step {step}, without batches {first} to {last} of the data"
    log.warning("step %d: %s: %s (rollback %d of at most %d)", spike.step, spike.why, where, number, most)
    command = replay_command(checkpointer.directory.parent, spike.step)
    log.warning("to look at that step: %s --rollbacks=%d", command, number - 1)
    return state, history


def replay_command(workdir: Any, step: int) -> str:
    return f"python -m gptjax.replay --workdir={workdir} --step={step}"


def last_sign(directory: str) -> float:
    """Returns when the process before was last seen to work, by its metrics; 0 where there are none."""
    path = os.path.join(directory, "metrics.jsonl")
    return os.path.getmtime(path) if os.path.exists(path) else 0.0


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


def make_reporter(
    run: Run, directory: str, step: int, history: dict[str, Any], watch: Stopwatch, compiled: bool
) -> Reporter:
    return Reporter(
        directory,
        run.config,
        resumed_from=step,
        watch=watch,
        compiled=compiled,
        started_at=history["started_at"],
        rollbacks=history["rollbacks"],
        tokens_per_step=run.tokens_per_step,
        flops_per_step=run.flops_per_step,
        peak_flops=sum(peak_flops(device) for device in run.mesh.devices.flat),
    )


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
    compiled: bool,
) -> int:
    """Takes `state` to the last step, or to the next one once preempted, and returns the exit code.

    The host runs one dispatch ahead: the metrics of one are read while the next one computes.

    compiled: whether the first dispatch will be one like the others.

    Raises:
        RollBackError: a step spiked, and is to be undone.
    """
    config, watch, step = run.config, reporter.watch, int(state.step)
    pending: tuple[int, Any, Any] | None = None
    first, num_steps, workdir = not compiled, config.train.num_steps, checkpointer.directory.parent
    saved = step if step else None

    def settle() -> None:
        nonlocal pending
        if pending is not None:
            (end, metrics, answer), pending = pending, None
            settle_dispatch(run, reporter, history, end, metrics, last_saved=saved, workdir=workdir)
            consensus.hear(answer)
            watchdog.beat()
            watch.add("report")

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
            called = time.perf_counter()
            state, metrics = run.train_step(state, tokens)
            if first:
                log.info("first step dispatched, compiled in %s", duration(time.perf_counter() - called))
            answer = consensus.ask()
            if first or traced:
                jax.block_until_ready(metrics)
        if first:
            watch.add("compile")
        step += config.train.steps_per_dispatch
        prefetcher.start(step)
        settle()
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
        log.info("%s", goodput.describe(watch.spent, time.time() - history["started_at"])[0])
        return errors.PREEMPTED
    if not config.train.eval_batches and run.validation_data.split.bytes <= COMPRESSED_BYTES:
        log.info("%s", compare(run.validation_data.split, run.tokenizer))
    log.info("done: %d steps", step)
    for line in goodput.describe(watch.spent, time.time() - history["started_at"]):
        log.info("%s", line)
    return errors.OK


def evaluation_is_missing(config: Config, step: int, history: dict[str, Any]) -> bool:
    """Returns whether the evaluation of `step` is due and not done: also after a preemption has cut it short."""
    due = step == config.train.num_steps or (is_due(step, config.train.eval_every) and step < config.train.num_steps)
    return step > 0 and due and history["validated"] != step


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def settle_dispatch(
    run: Run,
    reporter: Reporter,
    history: dict[str, Any],
    end: int,
    metrics: Any,
    *,
    last_saved: int | None,
    workdir: Any,
) -> None:
    """Reads the metrics of the dispatch that ended at step `end`, applies the policy on divergence, reports.

    Raises:
        RollBackError: a step spiked, and train.nan_policy is `rollback`.
        DivergedError: train.nan_policy is `stop`, or too many steps in a row were not finite, or spiked.
    """
    train = run.config.train
    count = train.steps_per_dispatch
    host = {name: np.reshape(np.asarray(value), (count,)) for name, value in metrics.items()}
    reporter.watch.add("step")
    for index in range(count):
        step = end - count + index + 1
        row = {name: float(values[index]) for name, values in host.items()}
        finite = bool(row.pop("finite"))
        if train.nan_policy == "rollback":
            why = find_spike(history["recent"], row, finite=finite)
            if why:
                undo(run, history, Spike(step, why), last_saved=last_saved, workdir=workdir)
        elif not finite:
            note_nonfinite(run, history, step, row, last_saved=last_saved, workdir=workdir)
        if finite:
            history["nonfinite_in_a_row"] = 0
            remember(history["recent"], row)
        reporter.report_step(step, row, skipped=history["skipped_steps"])


def undo(run: Run, history: dict[str, Any], spike: Spike, *, last_saved: int | None, workdir: Any) -> NoReturn:
    """Ends the loop for a rollback, or the run where there have been enough."""
    train = run.config.train
    if history["rollbacks"] < train.max_rollbacks:
        raise RollBackError(spike)
    what = f"step {spike.step}: {spike.why}: train.max_rollbacks={train.max_rollbacks}, and there have been so many"
    remedy = "lower optim.peak_lr, or raise train.max_rollbacks"
    raise diverged(run, history, spike.step, what, remedy, last_saved=last_saved, workdir=workdir)


def note_nonfinite(
    run: Run, history: dict[str, Any], step: int, row: dict[str, float], *, last_saved: int | None, workdir: Any
) -> None:
    """Counts a step that kept its parameters because it was not finite; raises DivergedError where policy says so."""
    train = run.config.train
    history["skipped_steps"] += 1
    history["nonfinite_in_a_row"] += 1
    what = f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}"
    if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
        what += f", update norm {row['update_norm']}"
    if train.nan_policy == "skip" and history["nonfinite_in_a_row"] < train.nan_limit:
        log.warning("%s: update skipped (%d so far)", what, history["skipped_steps"])
        return
    reason = f"{train.nan_limit} in a row" if train.nan_policy == "skip" else "train.nan_policy='stop'"
    remedy = "add --config.train.nan_policy=skip to leave such updates out, or lower optim.peak_lr"
    raise diverged(run, history, step, f"{what}: {reason}", remedy, last_saved=last_saved, workdir=workdir)


def diverged(
    run: Run, history: dict[str, Any], step: int, what: str, remedy: str, *, last_saved: int | None, workdir: Any
) -> DivergedError:
    """Returns the error that ends a run at `step`: what it met, where, from where it goes on, and how to look at it."""
    windows = run.train_data.row_ids(data_index(step - 1, history.get("skipped_ranges", ())))[:8].tolist()
    stands = f"the last good checkpoint is of step {last_saved}, and the same command goes on from there"
    if last_saved is None:
        stands = "there is no checkpoint yet"
    return DivergedError(
        f"{what}; its batch starts with windows {windows} of the training data\n"
        f"{stands}: {remedy}\n"
        f"to look at that step: {replay_command(workdir, step)}"
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
    reporter.watch.add("checkpoint")
    how = {"machine": run.machine, "num_micro_steps": run.num_micro_steps}  # what bits depend on beside the config
    history = history | how | {"seconds": dict(reporter.watch.spent), "saved_at": time.time()}
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
