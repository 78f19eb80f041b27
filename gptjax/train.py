"""Trains a run: starts or resumes it, runs the loop, and rolls back after spikes."""

import contextlib
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Iterator

import jax

from gptjax import errors, goodput, peers
from gptjax.bucket_logs import fetch_logs
from gptjax.checkpoint import Checkpointer
from gptjax.chips import peak_flops
from gptjax.config import Config, flatten
from gptjax.convert.tokenizer_source import saved_tokenizer
from gptjax.data.dataset import Prefetcher, batch_index
from gptjax.dispatch import Tokens
from gptjax.distributed import StopVote, barrier, check_agreement, gather_json
from gptjax.divergence import RollBackError, Spike, history_after, replay_command
from gptjax.errors import ConfigError, DivergedError, first_line
from gptjax.exhaustion import bytes_asked_for
from gptjax.goodput import Stopwatch
from gptjax.history import History
from gptjax.identity import Identity, read_identity
from gptjax.logs import rows_after
from gptjax.loop import Loop, Tools, evaluation_due, write_report
from gptjax.metrics import Reporter
from gptjax.orbax_context import suppress_tensorstore_metrics
from gptjax.redaction import print_error
from gptjax.resume import check_start, initial_state, restore, start_state
from gptjax.setup import Run, make_run, out_of_memory_error, train_step_hash, write_description
from gptjax.signals import Interrupt, Preemption, Watchdog, fault_point
from gptjax.state import TrainState
from gptjax.tasks.store import identify
from gptjax.versions import source_hash, versions
from gptjax.workdir import check_bucket, is_new, local_directory, lock_workdir

log = logging.getLogger("gptjax")


def train(config: Config, workdir: str, *, started: float | None = None, owns_process: bool = True) -> int:
    """Trains the run of `config`, from the newest checkpoint in `workdir` if there is one, and returns the exit code.

    started: time.perf_counter() at the start of the command; None means now.
    owns_process: whether the process exists for this run, so that a signal or a hang may end it.

    Raises:
        UserError: for every expected failure; it carries the exit code.
    """
    started = time.perf_counter() if started is None else started
    # For a run in a bucket, logs and the lock are local. Only the checkpoints are written to the bucket directly.
    local = local_directory(workdir, process=jax.process_index())
    check_bucket(workdir)
    # Checked before the lock, because lock_workdir creates the directory.
    if config.checkpoint.resume == "never" and not (is_new(local) and is_new(workdir)):
        raise ConfigError(
            f"--workdir={workdir} is not empty",
            field="checkpoint.resume",
            value="never",
            remedy="choose another",
        )
    # The stack closes in reverse order: the last save finishes before the signal handlers and the lock are released.
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(lock_workdir(local))
        preemption = stack.enter_context(Preemption() if owns_process else Interrupt())
        with exit_on_peer_failure():
            check_same_start(config, workdir)
            run = make_run(config, tokenizer=saved_tokenizer(config.data.tokenizer, local), has_tasks=True)
            stack.enter_context(naming_what_needs_memory(run))
            check_same_run(run)
        # Orbax reads tensorstore's metrics at each save, and each read leaks memory in tensorstore.
        stack.enter_context(suppress_tensorstore_metrics())
        checkpointer = Checkpointer(workdir, keep=config.checkpoint.keep)
        stack.enter_context(contextlib.closing(checkpointer))
        limit = config.train.watchdog_timeout_seconds if owns_process else 0.0
        watchdog = stack.enter_context(Watchdog(limit))
        with exit_on_peer_failure():
            state, history, identity = restore_together(run, checkpointer, workdir)
        watchdog.beat()
        # Until here a signal ends the process at once. From here on it asks for a save.
        preemption.can_save = True
        step = int(state.step)
        # A run is finished only after its last evaluation, which a preemption may have interrupted.
        if step >= config.train.num_steps and not evaluation_due(config, step, history):
            log.info("%s: finished at step %d of %d; nothing to do", workdir, step, config.train.num_steps)
            return errors.OK
        identity = identity.complete(history.run_id, checkpointer.steps())
        # The id of a new run is random, so all processes take the id of process 0.
        with exit_on_peer_failure():
            run_id = gather_json(identity.run_id)[0]
        identity = dataclasses.replace(identity, run_id=run_id)
        history = dataclasses.replace(history, run_id=run_id)
        history, watch = start_accounting(history, workdir, step=step, started=started)
        tools = Tools(
            checkpointer=checkpointer,
            stop_vote=StopVote(preemption, run.mesh),
            watchdog=watchdog,
            watch=watch,
            lock=lock,
            directory=local,
            identity=identity,
        )
        # Like goodput at the end: where a run was restarted or has several processes, people look closer.
        has_roles = history.restarts > 0 or jax.process_count() > 1
        write_description(run, local, identity, has_roles=has_roles)
        try:
            with exit_on_peer_failure():
                return run_with_rollbacks(run, state, history, tools=tools)
        except DivergedError:
            # The run ends here, and its curves show how it came to that.
            if report := write_report(tools):
                log.info("open in a browser: %s", os.path.join(tools.directory, report))
            raise


def check_same_start(config: Config, workdir: str) -> None:
    """Checks that all processes run the same command and code, and that the config can start.

    Processes that differ would compute garbage, or wait for each other in different collectives.

    Raises:
        UserError: the processes disagree, or the config cannot start in `workdir`.
    """
    check_agreement("config", flatten(config) | {"workdir": workdir} | versions())
    check_agreement("source", {"sha256 of gptjax's files": source_hash()})
    # Called before make_run, because make_run may prepare data for hours.
    check_start(config, Checkpointer(workdir))


def check_same_run(run: Run) -> None:
    """Checks that all processes have built the same run from the same data.

    Raises:
        UserError: the processes disagree, or one of them is missing.
    """
    # Each host may have prepared its own copy of the data, and one of them may take longer.
    barrier("data", run.config.train.barrier_timeout_seconds)
    check_agreement("data", run.data_identity | {"micro-batches": run.num_microbatches})
    check_agreement("tasks", identify(asked.task for asked in run.tasks))
    if jax.process_count() > 1:
        # An environment variable, such as XLA_FLAGS, can change the program without changing the source.
        check_agreement("program", {"sha256 of the train step": train_step_hash(run)})


def restore_together(run: Run, checkpointer: Checkpointer, workdir: str) -> tuple[TrainState, History, Identity]:
    """Returns the state and history to resume from, equal on all processes, and the identity of the work directory.

    Raises:
        UserError: the processes see different checkpoints, or as in `start_state`.
    """
    seconds = run.config.train.barrier_timeout_seconds
    # Checked before the first step: a first save that finds no space would lose all steps before it.
    if jax.process_index() == 0:
        log.info("%s", checkpointer.check_disk_space(run.abstract_state))
    barrier("restore", seconds)
    fault_point("restore")
    identity = read_identity(workdir)
    # Without this check, each process would restore the newest checkpoint that it sees.
    check_agreement("checkpoints", {"steps": checkpointer.steps()} | identity.to_json())
    state, history = start_state(run, checkpointer, identity)
    # A process that found a checkpoint damaged has fallen back to an older one.
    check_agreement("restore", {"step": int(state.step)})
    # The first step is a collective, which has no timeout. A barrier has one, and names the missing processes.
    barrier("first step", seconds)
    return state, history, identity


def start_accounting(history: History, workdir: str, *, step: int, started: float) -> tuple[History, Stopwatch]:
    """Returns the history with the time of the first start, and a stopwatch with the seconds spent so far.

    started: time.perf_counter() at the start of the command.
    """
    local = local_directory(workdir, process=jax.process_index())
    seconds = time.perf_counter() - started
    started_at = time.time() - seconds  # perf_counter has an arbitrary origin
    first_start = goodput.first_start(history, started_at)
    history = dataclasses.replace(history, started_at=first_start)
    # Only process 0 writes logs. On a new host it has no local copy of the logs in the bucket yet.
    if jax.process_index() == 0:
        fetch_logs(workdir, local)
    # Read before the reporter removes these rows.
    lost = goodput.seconds_after(rows_after(local, step), step)
    spent = goodput.spent_at_start(history, started=started_at, seconds=seconds, lost=lost)
    return history, Stopwatch(spent)


def run_with_rollbacks(run: Run, state: TrainState, history: History, *, tools: Tools) -> int:
    """Runs the loop to its end, rolling back after each spike, and returns the exit code.

    Raises:
        UserError: the run cannot continue.
    """
    start = "restart" if history.restarts else "start"
    end = run_until_spike(run, state, history, tools=tools, after=start)
    while isinstance(end, Spike):
        # `state` was donated to the first step and must not be used: roll_back restores another one.
        state, history = roll_back(run, history, end, tools=tools)
        tools.watchdog.beat()
        end = run_until_spike(run, state, history, tools=tools, after="rollback")
    return end


def run_until_spike(run: Run, state: TrainState, history: History, *, tools: Tools, after: str) -> int | Spike:
    """Opens logs and prefetch, runs the loop, and returns its exit code, or the spike that a rollback must undo.

    after: the category of time to close: start, restart or rollback.
    """
    step = int(state.step)
    compiled = after == "rollback"  # jit compiles once per process, so after a rollback the step is compiled already
    dispatch_end = functools.partial(run.dispatch_end, start=step)

    def batch(first: int) -> Tokens:
        return run.batch(first, skipped=history.skipped_ranges, end=dispatch_end(first))

    # Closed in reverse order: first the prefetch threads, then the logs.
    with contextlib.ExitStack() as stack:
        reporter = make_reporter(run, history, tools=tools, resumed_from=step, compiled=compiled)
        stack.enter_context(contextlib.closing(reporter))
        # Starts to read the first batch now, while the step compiles.
        prefetcher = Prefetcher(batch, step, following=dispatch_end)
        stack.enter_context(contextlib.closing(prefetcher))
        stack.enter_context(exit_on_peer_failure())
        # The time since the last lap was start-up or rollback. From here on the loop counts its own time.
        tools.watch.lap(after)
        loop = Loop(
            run,
            tools,
            state=state,
            history=history,
            reporter=reporter,
            prefetcher=prefetcher,
            compiled=compiled,
        )
        try:
            return loop.run_to_end()
        except RollBackError as error:
            # Returning drops the traceback, which frees the loop's state before the restore allocates a new one.
            return error.spike


def roll_back(run: Run, history: History, spike: Spike, *, tools: Tools) -> tuple[TrainState, History]:
    """Returns the last saved state, and a history that skips the data between it and the spike.

    The saved state predates the spike, because the loop reads the metrics of all earlier steps before it saves.

    Raises:
        UserError: as in `restore`.
    """
    tools.checkpointer.wait_for_pending_save()
    number = history.rollbacks + 1
    seconds = run.config.train.barrier_timeout_seconds
    barrier(f"rollback {number}", seconds)
    restored = restore(run, tools.checkpointer, tools.identity)
    # Before the first save the run starts again from step 0.
    state, past = restored or (initial_state(run), History())
    barrier(f"step after rollback {number}", seconds)
    step = int(state.step)
    tools.watch.spent = goodput.after_rollback(tools.watch.spent, past.seconds)
    history = history_after(history, past, step=step, spike=spike)
    # The update from `step` on takes the batch right after the skipped range.
    last = batch_index(step, history.skipped_ranges) - 1
    first = last - history.skipped_ranges[-1].batches + 1
    where = f"rolled back to step {step}, skipping data batches {first} to {last}"
    most = run.config.train.max_rollbacks
    log.warning("step %d: %s: %s (rollback %d of at most %d)", spike.step, spike.why, where, number, most)
    # That step exists only in the history before this rollback, so the command needs --rollbacks.
    command = replay_command(tools.workdir, spike.step)
    log.warning("inspect it with: %s --rollbacks=%d", command, number - 1)
    return state, history


@contextlib.contextmanager
def naming_what_needs_memory(run: Run) -> Iterator[None]:
    """Turns an out-of-memory error of JAX or NumPy into an OutOfMemoryError with an estimate and remedies.

    Raises:
        OutOfMemoryError: memory ran out; the message has an estimate and remedies.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        size = bytes_asked_for(error)
        if size is None:  # another error of the runtime
            raise
        raise out_of_memory_error(run, size) from error


@contextlib.contextmanager
def exit_on_peer_failure() -> Iterator[None]:
    """Exits this process with code 69 when a collective fails, without closing anything: that would wait for peers."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        # Running out of memory is this process's own error, and is reported as such.
        if jax.process_count() == 1 or bytes_asked_for(error) is not None:
            raise
        peers.settle()  # waits for the peer's own message, which says more than JAX's
        reason = first_line(error)
        print_error(f"error: lost a peer: {reason}; restart the command on every host")
        # sys.exit would wait in JAX's shutdown barrier, and for Orbax's threads.
        os._exit(errors.UNAVAILABLE)


def make_reporter(run: Run, history: History, *, tools: Tools, resumed_from: int, compiled: bool) -> Reporter:
    """Returns the reporter of a run, with its logs truncated to step `resumed_from`."""
    # nan if the peak of a device is not known, as for a CPU. MFU is then reported as n/a.
    total_peak = sum(peak_flops(device) for device in run.mesh.devices.flat)
    return Reporter(
        tools.directory,
        run.config,
        resumed_from=resumed_from,
        watch=tools.watch,
        compiled=compiled,
        rollbacks=history.rollbacks,
        tokens_per_step=run.tokens_per_step,
        flops_per_step=run.flops_per_step,
        peak_flops=total_peak,
    )
