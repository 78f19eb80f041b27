"""Validation and samples: the training loop calls them every `eval_every` and `sample_every` steps."""

import contextlib
from collections.abc import Callable

from gptjax.evaluate import count_sequences, evaluate_run
from gptjax.generate import generate
from gptjax.metrics import Reporter
from gptjax.params import PyTree
from gptjax.setup import Run

SAMPLE_TOKENS = 256
TOKENS_BETWEEN_STOP_CHECKS = 8  # each check is a collective of all processes


def validate(
    run: Run, params: PyTree, reporter: Reporter, *, step: int, should_stop: Callable[[], bool]
) -> dict[str, float]:
    """Evaluates `params`, reports the result and returns it; {} if `should_stop` interrupted the evaluation."""
    batches = run.config.train.eval_batches

    def on_batch(done: int, total: int) -> None:
        reporter.screen.show_work("evaluating", done, total)

    result = evaluate_run(run, params, batches=batches, should_stop=should_stop, on_batch=on_batch)
    reporter.screen.show_work("")
    if result:
        reporter.report_validation(step, result, sequences=count_sequences(run.validation_data, batches))
    reporter.watch.lap("evaluation")
    return result


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
