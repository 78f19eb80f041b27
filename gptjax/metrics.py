"""Reports steps, evaluations and samples of a run: to its log files and on the screen."""

import logging
import math
import pathlib

from gptjax import goodput
from gptjax.config import Config, TrainConfig
from gptjax.goodput import Stopwatch, duration
from gptjax.log_tags import describe_sources
from gptjax.logs import GrowingFile, RunLog
from gptjax.screen import Screen
from gptjax.workdir import SAMPLES_FILE

log = logging.getLogger("gptjax")


class Reporter:
    """Reports a run's steps, evaluations and samples in its log files and on the screen; close it.

    Each report is a line. On a terminal a bar below the lines shows how far the run is.
    """

    def __init__(
        self,
        directory: str,
        config: Config,
        *,
        resumed_from: int,
        watch: Stopwatch,
        compiled: bool,
        rollbacks: int,
        tokens_per_step: int,
        flops_per_step: float,
        peak_flops: float,
    ) -> None:
        """Opens the logs, truncated to step `resumed_from`.

        compiled: whether the step is already compiled, so that the first dispatch is timed too.
        """
        self.directory = directory
        self.watch = watch
        self._train = config.train
        self._save_every = config.checkpoint.save_every
        self._log = RunLog(directory, config, resumed_from=resumed_from)
        self._rollbacks = rollbacks
        self._tokens_per_step = tokens_per_step
        self._flops_per_step = flops_per_step
        self._peak_flops = peak_flops
        self._last_accounted = resumed_from
        # The step and the seconds at which the interval of the next report begins. An interval must not contain the
        # compilation, which is booked under another kind: its steps would seem to take no time.
        self._since = resumed_from
        self._spent = dict(watch.spent)
        if not compiled:
            self._since += 1  # the first dispatch has one step
        self._samples: GrowingFile | None = None  # opened by the first sample
        self.screen = Screen(log.info, step=resumed_from, num_steps=config.train.num_steps)

    def report_step(self, step: int, row: dict[str, float], *, skipped: int) -> None:
        """Reports the metrics `row` of one step, if it is one that `is_logged`.

        skipped: the number of updates that train.nan_policy=skip has discarded so far.
        """
        if not is_logged(step, self._train):
            self.screen.advance(step)
            return
        tokens_seen = step * self._tokens_per_step
        row = {"step": step, **row, "tokens_seen": tokens_seen, **self._throughput(step)}
        self.screen.advance(step, row["step_seconds"])
        counts = {"skipped_steps": skipped, "rollbacks": self._rollbacks}
        nonzero = {name: count for name, count in counts.items() if count}
        self._log.write(row | nonzero | self._account(step))
        num_steps = 0 if self.screen.is_live else self._train.num_steps
        log.info("%s", step_line(row, num_steps))

    def _throughput(self, step: int) -> dict[str, float]:
        """Returns throughput, MFU and data wait since the previous report; nan where nothing was timed."""
        spent = dict(self.watch.spent)
        elapsed = {kind: spent.get(kind, 0.0) - self._spent.get(kind, 0.0) for kind in goodput.STEP_KINDS}
        seconds = sum(elapsed.values())
        steps = step - self._since
        self._since = step
        self._spent = spent
        is_timed = steps > 0 and seconds > 0
        rate = steps * self._tokens_per_step / seconds if is_timed else math.nan
        return {
            "tokens_per_second": rate,
            "mfu": rate * self._flops_per_step / self._tokens_per_step / self._peak_flops,
            "step_seconds": self._tokens_per_step / rate,
            "data_wait": elapsed["data_wait"] / seconds if is_timed else math.nan,
        }

    def _account(self, step: int) -> dict[str, float]:
        """Returns goodput and seconds by kind, about once per save interval and at the last step; otherwise {}."""
        is_last = step == self._train.num_steps
        if step - self._last_accounted < self._save_every and not is_last:
            return {}
        self._last_accounted = step
        return goodput.scalars(self.watch.spent)

    def report_validation(self, step: int, result: dict[str, float], *, sequences: int) -> None:
        """Reports the result of an evaluation: val_loss, val_perplexity and val_bits_per_byte, and those of sources.

        sequences: the number of sequences that were evaluated.
        """
        # The file already has the row if a preemption came right after it: the evaluation then ran twice.
        if step > self._log.last_validation:
            self._log.write({"step": step, **result})
        line = "step %d  val loss %.4f  perplexity %.2f  bits per byte %.3f  %s sequences"
        total = [result[name] for name in ("val_loss", "val_perplexity", "val_bits_per_byte")]
        log.info(line, step, *total, f"{sequences:,}")
        for of_source in describe_sources(result):
            log.info("%s", of_source)

    def report_stats(self, step: int, row: dict[str, float]) -> None:
        """Reports the statistics of the layers, in the log files only."""
        self._log.write({"step": step, **row})

    def report_sample(self, step: int, text: str) -> None:
        """Reports a sampled text: in TensorBoard, samples.txt and on the screen."""
        self._log.write_text("sample", text, step)
        if self._samples is None:
            self._samples = GrowingFile(pathlib.Path(self.directory) / SAMPLES_FILE)
        self._samples.write(f"--- step {step}\n{text}\n".encode())
        log.info("step %d  sample:\n%s", step, text)

    def sync(self) -> None:
        """Flushes the metrics to disk; files that were removed are re-created."""
        self._log.sync()
        if self._samples is not None:
            self._samples.renew()

    def close(self) -> None:
        """Removes the bar, and closes the logs."""
        self.screen.close()
        if self._samples is not None:
            self._samples.close()
        self._log.close()


def is_logged(step: int, train: TrainConfig) -> bool:
    """Returns whether a step has a row in the logs: every train.log_every steps, and the last one."""
    return step % train.log_every == 0 or step == train.num_steps


def step_line(row: dict[str, float], num_steps: int) -> str:
    """Returns a step's metrics as one line. Its loss is the mean over the updates since the last line.

    num_steps: 0 where a bar shows progress and ETA, so that the line fits into 80 columns.
    """
    parts = [
        f"step {row['step']}/{num_steps}" if num_steps else f"step {row['step']}",
        f"loss {row['loss_mean']:.4f}",
        f"lr {row['lr']:.2e}",
        f"grad {row['grad_norm']:.2f}",
    ]
    # Not timed in the first dispatch of a process, which is mostly compilation.
    if math.isfinite(row["tokens_per_second"]):
        seconds_left = (num_steps - row["step"]) * row["step_seconds"]
        parts += [
            f"{row['tokens_per_second']:,.0f} tokens/s",
            f"mfu {_percent(row['mfu'])}",
        ]
        if num_steps:
            parts += [
                f"{duration(row['step_seconds'])}/step",
                f"wait {_percent(row['data_wait'])}",
                f"eta {duration(seconds_left)}",
            ]
    return "  ".join(parts)


def _percent(share: float | None) -> str:
    if share is None or not math.isfinite(share):
        return "n/a"
    return f"{100 * share:.1f}%"
