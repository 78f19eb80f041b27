"""The training loop: dispatches steps, reads their metrics, and evaluates, samples and saves when due."""

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax import errors, goodput
from gptjax.bucket_logs import store_logs
from gptjax.checkpoint import Checkpointer
from gptjax.config import Config
from gptjax.data.dataset import Prefetcher, batch_index
from gptjax.dispatch import Tokens
from gptjax.distributed import StopVote, barrier
from gptjax.divergence import RollBackError, Spike, divergence_error, judge
from gptjax.errors import WorkdirError
from gptjax.goodput import Stopwatch, duration
from gptjax.history import History
from gptjax.identity import Identity
from gptjax.layer_stats import UPDATE_STATS, as_row, last_update
from gptjax.metrics import Reporter, is_logged
from gptjax.orbax_context import import_orbax
from gptjax.periodic import validate, write_samples
from gptjax.setup import Run, write_files
from gptjax.signals import Watchdog, fault_point
from gptjax.state import TrainState
from gptjax.summary import summarize
from gptjax.traces import profiled
from gptjax.workdir import WorkdirLock, missing_description

log = logging.getLogger("gptjax")


@dataclasses.dataclass(frozen=True)
class Tools:
    """Process-wide objects that the loop uses."""

    checkpointer: Checkpointer
    stop_vote: StopVote
    watchdog: Watchdog
    watch: Stopwatch  # accounts for the time of this process, across rollbacks
    lock: WorkdirLock
    directory: str  # of the logs: the work directory, or its local copy if it is in a bucket
    identity: Identity

    @property
    def workdir(self) -> Any:
        """The work directory, local or in a bucket."""
        return self.checkpointer.directory.parent


class _Pending(NamedTuple):
    """A dispatch whose metrics have not been read."""

    start: int  # state.step before it
    end: int  # state.step after it
    metrics: Any  # on the devices
    answer: Any  # of StopVote.submit, on the devices
    observed: Any  # of the stats step, on the devices; None where none is due


class Loop:
    """Trains from a state to the last step, or to the next step after a request to stop.

    The host runs one dispatch ahead: it reads the metrics of one dispatch while the next one computes. So it judges a
    step one dispatch later, and evaluation, sampling and saving drain the pending dispatch first.
    """

    def __init__(
        self,
        run: Run,
        tools: Tools,
        *,
        state: TrainState,
        history: History,
        reporter: Reporter,
        prefetcher: Prefetcher,
        compiled: bool,
    ) -> None:
        """compiled: whether the train step is already compiled, so that the first dispatch is timed like the others."""
        self._run = run
        self._tools = tools
        self._reporter = reporter
        self._prefetcher = prefetcher
        self._state = state  # donated by each dispatch, so no other reference may be used
        self._history = history  # up to the last drained dispatch, while _step and _state are one ahead
        self._compiled = compiled
        self._step = int(state.step)
        # The step of the newest checkpoint; None before the first one. A preemption may have saved step 0.
        has_checkpoint = self._step > 0 or 0 in tools.checkpointer.steps()
        self._saved = self._step if has_checkpoint else None
        self._pending: _Pending | None = None
        self._result: dict[str, float] = {}  # of the last evaluation in this process

    def run_to_end(self) -> int:
        """Returns the exit code.

        Raises:
            RollBackError: a step spiked, and its update must be undone.
            DivergedError: the run must stop.
        """
        config = self._run.config
        tools = self._tools
        # True if the previous process was preempted during this evaluation; its checkpoint lacks the result.
        if self._evaluation_due():
            self._evaluate()
        while self._step < config.train.num_steps and not tools.stop_vote.stopping:
            self._dispatch()
            # Evaluates before it saves: the checkpoint needs the validation loss, by which the best one is kept.
            result = self._evaluate() if self._evaluation_due() else {}
            if is_due(self._step, config.train.sample_every):
                self._drain_pending()  # so that the log has the step before its sample
                self._sample()
            # A request to stop saves at once, whatever the period: the restart resumes from this checkpoint.
            is_last = self._step == config.train.num_steps
            if is_last or tools.stop_vote.stopping or is_due(self._step, config.checkpoint.save_every):
                self._save(result)
        # True only at step 0, if the request came before the first dispatch, or if it came after the last check in the
        # loop (in a single process).
        if tools.stop_vote.stopping and self._saved != self._step:
            self._save({})
        # The last save runs in the background. Nothing donates its state any more, so it can be retried.
        self._reporter.screen.show_work("saving")
        tools.checkpointer.wait_until_finished()
        tools.watch.lap("checkpoint")
        return self._end()

    def _dispatch(self) -> None:
        """Dispatches the next train step(s), then processes the metrics of the previous dispatch."""
        tools = self._tools
        tokens = self._prefetcher.get(self._step)
        tools.watch.lap("data_wait")
        start = self._step
        end = self._prefetcher.following(start)
        is_traced = start == self._run.config.train.profile_step
        is_first = not self._compiled
        if is_first:
            self._reporter.screen.show_work("compiling the train step")
        with profiled(is_traced, tools.directory):
            called = time.perf_counter()
            # Returns as soon as the step is compiled and enqueued. It donates the state.
            self._state, metrics = self._run.train_step(self._state, tokens)
            if is_first:
                log.info("compiled the train step in %s", duration(time.perf_counter() - called))
            # A collective, so all processes must enqueue it at the same place between steps.
            answer = tools.stop_vote.submit()
            observed = self._observe(tokens, end, is_first=is_first)
            # Without this wait, a trace would end before the step runs, and the first run would not count as `compile`.
            if is_first or is_traced:
                jax.block_until_ready(metrics)
        if is_first:
            # A save needs Orbax. Its import delays neither the first step nor, later, the save before a preemption.
            import_orbax()
            tools.watch.lap("compile")
            self._reporter.screen.show_work("")
        self._step = end
        # Lets the threads read the next batches. `get` does not: on a busy CPU they would delay the dispatch.
        self._prefetcher.start(self._step)
        # Blocks until the previous dispatch is done, while the devices continue with this one.
        self._drain_pending()
        self._pending = _Pending(start, end, metrics, answer, observed)
        self._compiled = True
        fault_point("step")

    def _observe(self, tokens: Tokens, end: int, *, is_first: bool) -> Any:
        """Returns the result of the stats step after the dispatch on `tokens`, on the devices; None if none is due."""
        stats_step = self._run.stats_step
        is_reported = is_due(end, self._run.config.train.stats_every)
        if stats_step is None or not (is_reported or is_first):
            return None
        # Enqueued before the next dispatch donates the parameters.
        observed = stats_step(self._state.params, tokens)
        if is_first:  # so that it compiles while the time counts as `compile`
            jax.block_until_ready(observed)
        return observed if is_reported else None

    def _drain_pending(self) -> None:
        """Waits for the pending dispatch, if any, and processes its metrics and stop vote."""
        pending = self._pending
        if pending is None:
            return
        # Reset first: if process_metrics raises, nothing must process the same metrics twice.
        self._pending = None
        # Here, so that the wait counts as the step's.
        jax.block_until_ready(pending.observed)
        self._history = process_metrics(
            self._run,
            self._reporter,
            self._history,
            start=pending.start,
            end=pending.end,
            metrics=pending.metrics,
            last_saved=self._saved,
            workdir=self._tools.workdir,
        )
        # Not reached if the step was rolled back.
        if pending.observed is not None:
            update = last_update(pending.metrics, pending.end - pending.start)
            row = as_row(update | pending.observed, self._run.config.model)
            self._reporter.report_stats(pending.end, row)
        self._tools.stop_vote.result(pending.answer)
        # Beats only here, because only a finished dispatch shows that the devices make progress.
        self._tools.watchdog.beat()
        self._tools.watch.lap("report")

    def _make_should_stop(self) -> Callable[[], bool]:
        """Returns a callback for evaluation and sampling that returns whether to stop."""
        stop_vote = self._tools.stop_vote
        answer = None

        # Reads the vote of its previous call, and submits one for the next call, so that it never waits for peers.
        def should_stop() -> bool:
            nonlocal answer
            stop = stop_vote.result(answer)
            answer = stop_vote.submit()
            self._tools.watchdog.beat()
            return stop

        return should_stop

    def _evaluation_due(self) -> bool:
        return evaluation_due(self._run.config, self._step, self._history)

    def _evaluate(self) -> dict[str, float]:
        """Returns the validation result of the state; {} if a request to stop interrupted it."""
        self._drain_pending()  # a diverged state must not be evaluated
        should_stop = self._make_should_stop()
        result = validate(
            self._run,
            self._state.evaluated,
            self._reporter,
            step=self._step,
            should_stop=should_stop,
        )
        fault_point("evaluation")
        # The next checkpoint has it, so a restart does not repeat the evaluation.
        if result:
            self._result = result
            self._history = dataclasses.replace(self._history, validated=self._step)
        return result

    def _sample(self) -> None:
        should_stop = self._make_should_stop()
        write_samples(
            self._run,
            self._state.evaluated,
            self._reporter,
            step=self._step,
            should_stop=should_stop,
        )

    def _save(self, result: dict[str, float]) -> None:
        """Starts to save the state in the background.

        result: of this step's evaluation, {} if there was none.
        """
        self._drain_pending()  # a diverged state must not be saved
        self._reporter.screen.show_work("saving")
        run = self._run
        tools = self._tools
        self._renew_workdir()
        # Syncs the logs first: a restart can drop rows after its checkpoint, but cannot add missing rows before it.
        self._reporter.sync()
        barrier(f"save of step {self._step}", run.config.train.barrier_timeout_seconds)
        tools.watch.lap("checkpoint")
        history = dataclasses.replace(
            self._history,
            machine=run.machine,
            num_microbatches=run.num_microbatches,
            seconds=dict(tools.watch.spent),
            saved_at=time.time(),
        )
        # The state may be donated as soon as this returns, and the next dispatch does so.
        tools.checkpointer.save(
            self._state,
            self._step,
            config=run.config,
            history=history.to_json(),
            data=run.data_identity | run.data_location,
            metrics=result or None,
        )
        # Does nothing unless the work directory is in a bucket.
        if jax.process_index() == 0:
            store_logs(tools.directory, str(tools.workdir))
        tools.watch.lap("checkpoint")
        self._reporter.screen.show_work("")
        fault_point("save")
        self._saved = self._step

    def _renew_workdir(self) -> None:
        """Re-creates the files of the work directory if somebody has removed them during the run."""
        tools = self._tools
        is_renewed = tools.lock.renew()
        # Looked for separately, because a shell's `rm -rf RUN/*` spares the lock, whose name begins with a dot.
        missing = missing_description(tools.directory)
        if not is_renewed and not missing:
            return
        removed = "the directory or its lock" if is_renewed else ", ".join(missing)
        log.warning("%s: removed during the run: %s; re-creating the files", tools.directory, removed)
        try:
            write_files(self._run, tools.directory, tools.identity)
        except WorkdirError as error:  # the checkpoint matters more, and has retries of its own
            log.warning("%s", error)

    def _end(self) -> int:
        """Logs how the run ended, and returns its exit code."""
        run = self._run
        tools = self._tools
        # An interrupted last evaluation counts as a preemption, so that a rerun of the command finishes it.
        if self._step < run.config.train.num_steps or self._evaluation_due():
            log.warning("preempted at step %d, checkpoint written: rerun the same command to resume", self._step)
            log.info("%s", goodput.describe(tools.watch.spent)[0])  # the table is for a finished run
            return errors.PREEMPTED
        # Where nothing was lost, goodput says little.
        is_worth_showing = self._history.restarts or jax.process_count() > 1
        for line in goodput.describe(tools.watch.spent):
            log.log(logging.INFO if is_worth_showing else logging.DEBUG, "%s", line)
        lines = summarize(
            run,
            str(tools.workdir),
            step=self._step,
            spent=tools.watch.spent,
            result=self._result,
            report=write_report(tools),
        )
        for line in lines:
            log.info("%s", line)
        return errors.OK


def write_report(tools: Tools) -> str:
    """Writes the report of a run that has ended, and returns the name of its file; "" if there is none.

    Only process 0 writes it. A failure is a warning.
    """
    if jax.process_index() != 0:
        return ""
    # Imported only here, so that training neither loads the report's code nor waits for it.
    from gptjax.report.write import report_end

    return report_end(tools.directory, str(tools.workdir), spent=tools.watch.spent)


def evaluation_due(config: Config, step: int, history: History) -> bool:
    """Returns whether the evaluation of `step` is due but not finished, for example interrupted by a preemption."""
    last = config.train.num_steps
    # step > last only if num_steps was lowered after the checkpoint; then nothing is left to do.
    is_periodic = is_due(step, config.train.eval_every) and step < last
    return step > 0 and (step == last or is_periodic) and history.validated != step


def is_due(step: int, every: int) -> bool:
    """Returns whether an action with the period `every` is due at `step`; a period of 0 means never."""
    return every > 0 and step % every == 0


def process_metrics(
    run: Run,
    reporter: Reporter,
    history: History,
    *,
    start: int,
    end: int,
    metrics: Any,
    last_saved: int | None,
    workdir: Any,
) -> History:
    """Waits for the metrics of the dispatch from step `start` to `end`, applies train.nan_policy, and reports them.

    metrics: float32 [] by name, or [K] for up to K steps per dispatch. UPDATE_STATS in it is ignored.

    Returns:
        The history after that step.

    Raises:
        RollBackError: a step spiked, and train.nan_policy is `rollback`.
        DivergedError: a step was not finite under policy `stop`, or no further skip or rollback is allowed.
    """
    # np.asarray blocks until the dispatch is done, so this lap is the time that the devices took.
    scalars = {name: value for name, value in metrics.items() if name != UPDATE_STATS}
    host = {name: np.atleast_1d(np.asarray(value)) for name, value in scalars.items()}
    reporter.watch.lap("step")
    for index in range(end - start):
        step = start + index + 1
        row = {name: float(values[index]) for name, values in host.items()}
        verdict = judge(history, row, run.config.train, finite=bool(row.pop("finite")))
        # All steps of the dispatch have run. After a spike, the metrics of the later ones are discarded here.
        if verdict.action == "roll back":
            raise RollBackError(Spike(step, verdict.why))
        if verdict.action == "stop":
            # The update that makes `step` starts from step - 1, which determines its batch.
            batch = batch_index(step - 1, history.skipped_ranges)
            raise divergence_error(
                verdict,
                step=step,
                windows=run.train_data.window_ids(batch),
                last_saved=last_saved,
                workdir=workdir,
            )
        history = verdict.history
        if verdict.action == "skip":
            log.warning("step %d: %s: update skipped (%d so far)", step, verdict.why, history.skipped_steps)
        else:
            history = history.with_loss(row["loss"])
        row = {"loss": row.pop("loss"), "loss_mean": history.loss_mean, **row}
        if is_logged(step, run.config.train):
            samples = (batch_index(step - 1, history.skipped_ranges) + 1) * run.config.data.global_batch_size
            row |= run.train_data.epochs(samples)
        reporter.report_step(step, row, skipped=history.skipped_steps)
        if is_logged(step, run.config.train):
            history = history.without_losses()
    return history
