"""The flags by which sample and evaluate choose a model: --workdir, --step, --model, --tokenizer."""

import argparse
import typing

from gptjax.config import Activation
from gptjax.errors import ConfigError


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags to a parser."""
    parser.add_argument("--workdir", default="", metavar="DIR", help="the work directory of a run")
    parser.add_argument("--step", type=int, help="the step of the checkpoint; by default the newest")
    parser.add_argument(
        "--model",
        default="",
        metavar="FORMAT:PATH",
        help="instead of --workdir, weights in another format: hf:DIR, llmc:FILE, ...",
    )
    parser.add_argument(
        "--activation",
        default="",
        choices=["", *typing.get_args(Activation)],
        help="of a --model whose file does not store it: gelu_new for nanoGPT from before May 2023",
    )
    parser.add_argument(
        "--tokenizer", default="", help="gpt2, bytes, a file, a directory or hf:OWNER/NAME, instead of the model's"
    )


def check_model_flags(args: argparse.Namespace) -> None:
    """Checks that the flags name one model.

    Raises:
        ConfigError: none or two are given, or --step without --workdir.
    """
    if args.workdir and args.model:
        raise ConfigError(
            "--workdir is given, too: each names a model",
            field="--model",
            value=args.model,
            remedy="leave one of them out",
        )
    if not args.workdir and not args.model:
        raise ConfigError("one of --workdir=DIR and --model=FORMAT:PATH is required")
    if args.activation and not args.model:
        raise ConfigError("is for --model", field="--activation", value=args.activation, remedy="leave the flag out")
    if args.model and args.step is not None:
        raise ConfigError(
            f"is for --workdir; here it is --model=gptjax:WORKDIR@{args.step}",
            field="--step",
            value=args.step,
        )
