"""From scores to accuracy, perplexity and their standard errors."""

import math
from collections.abc import Sequence
from typing import Any

from gptjax.tasks.item import Item, Score

LARGEST_EXPONENT = 700.0  # math.exp overflows at 710


def summarize(items: Sequence[Item], scores: Sequence[Score], *, has_lengths: bool = True) -> dict[str, Any]:
    """Returns the metrics of a task: acc, acc_stderr, count, cut, and what the form of its questions allows.

    acc_norm and acc_bytes compare log-likelihoods per character and per byte of the choices; acc_norm is that of
    lm-eval. perplexity is of whole continuations, as LAMBADA has it.

    items: questions. scores: of all their pairs, in order.
    """
    right: dict[str, list[float]] = {"acc": []}
    logprobs = []
    at = 0
    for item in items:
        own = scores[at : at + len(item.contexts)]
        at += len(own)
        if not item.has_choices:
            right["acc"].append(float(own[0].is_greedy))
            logprobs.append(own[0].logprob)
            continue
        right["acc"].append(_is_best([score.logprob for score in own], item.label))
        if has_lengths:
            for name, lengths in (("acc_norm", item.lengths), ("acc_bytes", item.text_bytes)):
                normalised = [score.logprob / length for score, length in zip(own, lengths, strict=True)]
                right.setdefault(name, []).append(_is_best(normalised, item.label))
    result: dict[str, Any] = {}
    for name, values in right.items():
        result[name] = math.fsum(values) / len(values)
        result[f"{name}_stderr"] = standard_error(values)
    if logprobs:
        mean = math.fsum(logprobs) / len(logprobs)
        result["perplexity"] = math.exp(min(-mean, LARGEST_EXPONENT))
        # Of an exponential, by the first term of its series.
        result["perplexity_stderr"] = result["perplexity"] * standard_error(logprobs)
    return result | {"count": len(items), "cut": sum(score.is_cut for score in scores)}


def _is_best(values: Sequence[float], label: int) -> float:
    return float(max(range(len(values)), key=values.__getitem__) == label)  # the first of equal ones


def standard_error(values: Sequence[float]) -> float:
    """Returns the standard error of a mean, from the sample's standard deviation; 0 for one value."""
    count = len(values)
    if count < 2:
        return 0.0
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return math.sqrt(variance / count)


def describe(name: str, result: dict[str, Any]) -> str:
    """Returns the result of a task as one line."""
    parts = []
    for metric in ("acc", "acc_norm", "acc_bytes", "perplexity"):
        if metric in result:
            digits = 2 if metric == "perplexity" else 4
            parts.append(f"{metric} {result[metric]:.{digits}f} ± {result[f'{metric}_stderr']:.{digits}f}")
    cut = f", {result['cut']} contexts cut" if result["cut"] else ""
    return f"{name}: {', '.join(parts)} ({result['count']:,} questions{cut})"
