"""The end of a run as a person reads it: what it reached, where it is, and what to do next."""

import os
import shlex
import textwrap
from collections.abc import Mapping

from gptjax.evaluate import COMPRESSED_BYTES, compare, count_sequences, describe
from gptjax.goodput import duration
from gptjax.setup import Run

COLUMNS = 80


def summarize(
    run: Run,
    workdir: str,
    *,
    step: int,
    spent: Mapping[str, float],
    result: Mapping[str, float],
    report: str = "",
) -> list[str]:
    """Returns the last lines of a finished run.

    spent: seconds by kind since the first start.
    result: of the last evaluation; {} if an earlier process made it.
    report: the name of the report's file in the work directory; "" if there is none.
    """
    reached = []
    batches = run.config.train.eval_batches
    sources = list(run.validation_data.sources())
    if result:
        reached.append(describe(result, count_sequences(run.validation_data, batches)))
        split = sources[0][2].split
        if len(sources) == 1 and split.bytes:  # known if gptjax prepared the data
            size = split.bytes / split.tokens
            reached.append(
                f"loss and perplexity are per token ({size:.2f} bytes on average); "
                "compare bits per byte across tokenizers"
            )
        # Compared only if both the model and the compressors get the whole validation text.
        if not batches and len(sources) == 1 and split.bytes <= COMPRESSED_BYTES:
            reached.append(compare(split, run.tokenizer))
    here = os.path.join(os.getcwd(), "")
    relative = workdir.removeprefix(here)
    place = shlex.quote(relative)
    prompt = shlex.quote(run.config.train.sample_prompt or "The ")
    reached.append(f"everything is in {place}: checkpoints/, metrics.jsonl, config.json")
    lines = [
        f"done: {step:,} steps in {duration(sum(spent.values()))}",
        *(line for sentence in reached for line in _wrap(sentence)),
        "next:",
        f"  python -m gptjax sample --workdir={place} --prompt={prompt}",
        f"  python -m gptjax evaluate --workdir={place}",
    ]
    if report:
        lines.append(f"  open in a browser: {shlex.quote(f'{relative}/{report}')}")
    return lines


def _wrap(sentence: str) -> list[str]:
    """Returns a sentence as indented lines that fit a terminal; a path is not broken."""
    return textwrap.wrap(
        sentence,
        width=COLUMNS,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
