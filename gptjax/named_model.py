"""The model that --workdir or --model names, for commands that ask it something."""

import argparse
import dataclasses
from typing import Any

import jax

from gptjax.config import Config, DataConfig
from gptjax.convert import formats, native
from gptjax.convert.tokenizer_source import open_run_tokenizer, open_tokenizer
from gptjax.data.tokenizer import Tokenizer
from gptjax.stored import StoredParams, at_its_data, describe_weights, load_params
from gptjax.workdir import local_directory

ROWS = 8  # sequences per device and batch, for weights that come without a run's config


def load_model(args: argparse.Namespace, *, needs_data: bool = True) -> tuple[Config, Any, Tokenizer | None, str]:
    """Returns (config, params, tokenizer, a name for the result) of --workdir or --model.

    needs_data: whether config must name data that are here.

    Raises:
        UserError: the model or its tokenizer is missing or damaged.
    """
    if args.workdir:
        config, params, step = load_params(args.workdir, step=args.step, raw=args.raw)
        if needs_data:
            config = _with_data(config, args.workdir, step, data=args.data)
        if args.tokenizer:
            tokenizer = open_tokenizer(args.tokenizer)
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=args.tokenizer))
        else:
            tokenizer = open_run_tokenizer(config.data.tokenizer, local_directory(args.workdir))
        return config, params, tokenizer, f"step {step}{describe_weights(args.workdir, step, raw=args.raw)}"
    weights = formats.open_model(args.model, tokenizer=args.tokenizer, activation=args.activation)
    data = DataConfig(path=args.data, global_batch_size=ROWS * jax.device_count())
    # init_from lets the model's vocabulary be larger than the tokenizer's.
    config = Config(model=weights.config, data=data, init_from=weights.origin)
    if needs_data and not args.data:  # the origin of a model of gptjax is gptjax:WORKDIR@STEP
        workdir, steps, _ = native.locate(weights.origin.removeprefix("gptjax:"))
        config = _with_data(config, workdir, steps[-1], data="")
    params = formats.load_params(weights, lambda _, leaf: leaf)
    return config, params, weights.tokenizer, weights.origin


def _with_data(config: Config, workdir: str, step: int, *, data: str) -> Config:
    """Returns `config` with data.path at `data`, or without it at the data of the run in `workdir`.

    Raises:
        UserError: the checkpoint of `step` names no data, or they are not there.
    """
    if data:
        return dataclasses.replace(config, data=dataclasses.replace(config.data, path=data, mix=""))
    return at_its_data(config, StoredParams(workdir, step).record, flag="--data")
