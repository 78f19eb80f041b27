"""The end of a run as a person reads it: what it reached, where it is, and what to do next."""

import os
import shlex
from collections.abc import Mapping

from gptjax.evaluate import COMPRESSED_BYTES, compare, count_sequences, describe
from gptjax.goodput import duration
from gptjax.setup import Run


def summarize(
    run: Run, workdir: str, *, step: int, spent: Mapping[str, float], result: Mapping[str, float]
) -> list[str]:
    """Returns the last lines of a finished run.

    spent: seconds by kind since the first start.
    result: of the last evaluation; {} if an earlier process made it.
    """
    lines = [f"done: {step:,} steps in {duration(sum(spent.values()))}"]
    batches = run.config.train.eval_batches
    split = run.validation_data.split
    if result:
        lines.append(f"  {describe(result, count_sequences(run.validation_data, batches))}")
        # Compared only if both the model and the compressors get the whole validation text.
        if not batches and split.bytes <= COMPRESSED_BYTES:
            lines.append(f"  {compare(split, run.tokenizer)}")
    here = os.path.join(os.getcwd(), "")
    place = shlex.quote(workdir.removeprefix(here))
    prompt = shlex.quote(run.config.train.sample_prompt or "The ")
    return [
        *lines,
        f"  everything is in {place}: checkpoints/, metrics.jsonl, config.json",
        "next:",
        f"  python -m gptjax sample --workdir={place} --prompt={prompt}",
        f"  python -m gptjax evaluate --workdir={place}",
    ]
