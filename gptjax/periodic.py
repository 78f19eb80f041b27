"""Validation, tasks and samples: the training loop calls them every `eval_every` and `sample_every` steps."""

import contextlib
import logging
from collections.abc import Callable

import jax

from gptjax.config import Config
from gptjax.evaluate import count_sequences, evaluate_run
from gptjax.generate import generate
from gptjax.metrics import Reporter
from gptjax.params import PyTree
from gptjax.setup import Run
from gptjax.tasks.ask import as_metrics, ask, write_results
from gptjax.tasks.results import describe

log = logging.getLogger("gptjax")

SAMPLE_TOKENS = 256
TOKENS_BETWEEN_STOP_CHECKS = 8  # each check is a collective of all processes


def validate(
    run: Run, params: PyTree, reporter: Reporter, *, step: int, should_stop: Callable[[], bool]
) -> dict[str, float]:
    """Evaluates `params`, reports the result and returns it; {} if `should_stop` interrupted the evaluation."""
    batches = run.config.train.eval_batches

    def on_batch(done: int, total: int) -> None:
        reporter.screen.show_work("evaluating", done, total)

    result: dict[str, float] = evaluate_run(run, params, batches=batches, should_stop=should_stop, on_batch=on_batch)
    if result and run.tasks and tasks_due(run.config, step):
        answers = ask_tasks(run, params, reporter, step=step, should_stop=should_stop)
        # Without them the evaluation is not finished, and a restart repeats it.
        result = result | answers if answers else {}
    reporter.screen.show_work("")
    if result:
        reporter.report_validation(step, result, sequences=count_sequences(run.validation_data, batches))
    reporter.watch.lap("evaluation")
    return result


def tasks_due(config: Config, step: int) -> bool:
    """Returns whether the evaluation of `step` has tasks."""
    every = config.tasks.every
    is_periodic = every > 0 and step % every == 0
    return is_periodic or step == config.train.num_steps


def ask_tasks(
    run: Run, params: PyTree, reporter: Reporter, *, step: int, should_stop: Callable[[], bool]
) -> dict[str, float]:
    """Returns the metrics of the run's tasks, and writes results/tasks.json; {} if `should_stop` interrupted them."""

    def on_batch(done: int, total: int) -> None:
        reporter.screen.show_work("asking tasks", done, total)

    results = ask(run.scorer, params, run.tasks, should_stop=should_stop, on_batch=on_batch)
    for name, result in results.items():
        log.info("step %d  %s", step, describe(name, result))
    if results and jax.process_index() == 0:
        try:
            write_results(reporter.directory, f"step {step}", results)
        except OSError as error:  # metrics.jsonl has them, too
            log.warning("results/tasks.json cannot be written: %s", error)
    return as_metrics(results)


class SamplingInterruptedError(Exception):
    """Ends the generation of a sample when the run has to stop."""


def write_samples(run: Run, params: PyTree, reporter: Reporter, *, step: int, should_stop: Callable[[], bool]) -> None:
    """Writes a sample of the model to the log and to samples.txt; a shorter one if `should_stop` interrupts it."""
    reporter.screen.show_work("sampling")
    prompt = run.tokenizer.encode(run.config.train.sample_prompt)
    ids: list[int] = []

    def append(row: int, token: int) -> None:
        ids.append(token)
        if len(ids) % TOKENS_BETWEEN_STOP_CHECKS == 0 and should_stop():
            raise SamplingInterruptedError

    with contextlib.suppress(SamplingInterruptedError):
        generate(
            run.model,
            params,
            [prompt],
            max_new_tokens=SAMPLE_TOKENS,
            eot_id=run.tokenizer.eot_id,
            start_id=run.tokenizer.start_id,
            vocab_size=run.tokenizer.vocab_size,  # an imported model may have more ids than the tokenizer
            temperature=0.8,
            seed=step,  # so that a resumed run writes the same samples
            on_token=append,
        )
    reporter.screen.show_work("")
    text = run.config.train.sample_prompt + run.tokenizer.decode(ids)
    reporter.report_sample(step, text)
    reporter.watch.lap("sampling")
