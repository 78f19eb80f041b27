"""`gptjax evaluate --tasks`: loads a model onto all devices, asks it tasks, and prints and stores the results."""

import argparse
import contextlib
from collections.abc import Sequence
from typing import Any

import jax

from gptjax.compute import resolve_compute, resolve_parallel
from gptjax.config import Config
from gptjax.convert.tokenizer_source import open_tokenizer
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import WorkdirError
from gptjax.model import GPT
from gptjax.named_model import load_model
from gptjax.redaction import print_error, say
from gptjax.screen import Screen
from gptjax.setup import check_vocabulary
from gptjax.sharding import make_mesh, param_shardings
from gptjax.tasks.ask import ask, encode_task, write_results
from gptjax.tasks.results import describe
from gptjax.tasks.score import Scorer
from gptjax.tasks.store import Task
from gptjax.workdir import local_directory


def evaluate_tasks(args: argparse.Namespace, tasks: Sequence[Task]) -> None:
    """Prints the results of --tasks, and writes results/tasks.json in the work directory or the current one.

    tasks: those that --tasks names, the same on all hosts.

    Raises:
        UserError: a task or the model is missing or damaged.
    """
    config, params, tokenizer, name = load_model(args, needs_data=False)
    tokenizer = tokenizer or open_tokenizer(config.data.tokenizer)
    asked = [encode_task(task, tokenizer) for task in tasks]
    scorer, params = place_model(config, params, tokenizer)
    with contextlib.closing(Screen(print_error, stderr=True)) as screen:
        results = ask(
            scorer,
            params,
            asked,
            on_batch=lambda done, total: screen.show_work("asking tasks", done, total),
        )
    for task, result in results.items():
        say(f"{name}: {describe(task, result)}")
    directory = local_directory(args.workdir) if args.workdir else "."
    if jax.process_index() != 0:
        return
    try:
        say(write_results(directory, name, results))
    except OSError as error:
        raise WorkdirError(f"the results cannot be written: {error}", field=directory) from error


def place_model(config: Config, params: Any, tokenizer: Tokenizer) -> tuple[Scorer, Any]:
    """Returns a scorer for a model, and its parameters on the mesh of `config`.

    Raises:
        ConfigError: the model's vocabulary is not the tokenizer's.
    """
    check_vocabulary(config, tokenizer)
    mesh = make_mesh(config.mesh)
    compute = resolve_compute(config, mesh)
    model = GPT(config.model, compute, resolve_parallel(config, mesh))
    shardings = param_shardings(params, mesh)
    return Scorer(model, mesh), jax.tree.map(jax.device_put, params, shardings)
