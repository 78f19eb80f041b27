"""Asks a model the questions of tasks: in training, and at the command line."""

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from gptjax.errors import DataError
from gptjax.tasks.results import summarize
from gptjax.tasks.score import Pair, Scorer, encode_pair
from gptjax.tasks.store import Task
from gptjax.workdir import TASKS_FILE, replace_file

if TYPE_CHECKING:
    from gptjax.data.tokenizer import Tokenizer


class Asked(NamedTuple):
    """A task, and the ids of all its pairs."""

    task: Task
    pairs: list[Pair]


def encode_task(task: Task, tokenizer: "Tokenizer") -> Asked:
    """Returns a task with the ids of its pairs.

    Raises:
        DataError: a text cannot be tokenized, or a continuation has no token.
    """
    pairs = []
    for number, item in enumerate(task.items, 1):
        for context, continuation in zip(item.contexts, item.continuations, strict=True):
            pair = encode_pair(context, continuation, tokenizer, only_last_token=task.only_last_token)
            if not pair.continuation:
                raise DataError("its continuation has no token of its own", field=f"{task.name}, question {number}")
            pairs.append(pair)
    return Asked(task, pairs)


def ask(
    scorer: Scorer,
    params: Any,
    tasks: Sequence[Asked],
    *,
    should_stop: Callable[[], bool] = lambda: False,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, Any]]:
    """Returns the metrics of each task by its name; {} if `should_stop` interrupted it.

    on_batch: called before each batch with the number of pairs before it, and of all.
    """
    total = sum(len(asked.pairs) for asked in tasks)
    done = 0
    results = {}
    for asked in tasks:
        scores = scorer.score(
            params,
            asked.pairs,
            should_stop=should_stop,
            on_batch=lambda count, _, before=done: on_batch(before + count, total),
        )
        if not scores:
            return {}
        done += len(asked.pairs)
        task = asked.task
        result = summarize(task.items, scores, has_lengths=task.has_lengths)
        results[task.name] = {"protocol": task.protocol, **result, "sha256": task.sha256}
    return results


def as_metrics(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Returns results by the names of their metrics, such as tasks/hellaswag/acc."""
    return {
        f"tasks/{name}/{metric}": value
        for name, result in results.items()
        for metric, value in result.items()
        if metric not in ("protocol", "sha256", "count", "cut")
    }


def write_results(directory: str, model: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Writes results/tasks.json in a directory, and returns its path. Other tasks of the same model stay in it.

    model: a name of the model, such as "step 5000".

    Raises:
        OSError: it cannot be written.
    """
    path = os.path.join(directory, TASKS_FILE)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    merged = dict(results)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or of somebody else
        with open(path, encoding="utf-8") as file:
            earlier = json.load(file)
        if earlier["model"] == model:
            merged = {**earlier["tasks"], **results}
    content = json.dumps({"model": model, "tasks": merged}, indent=2) + "\n"
    replace_file(path, content.encode())
    return path
