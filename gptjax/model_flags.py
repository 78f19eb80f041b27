"""The flags by which sample and evaluate choose a model: --workdir, --step, --model, --tokenizer."""

import argparse
import typing

from gptjax.config import Activation
from gptjax.errors import ConfigError

ACTIVATIONS = typing.get_args(Activation)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags to a parser."""
    parser.add_argument(
        "--workdir",
        default="",
        metavar="DIR",
        help="The work directory of a run. It has no default: name it, or --model.",
    )
    parser.add_argument("--step", type=int, help="The step of the checkpoint. By default it is the newest one.")
    parser.add_argument(
        "--model",
        default="",
        metavar="FORMAT:PATH",
        help="Weights to use instead of --workdir, as FORMAT:PATH: hf:DIR, hf:OWNER/NAME, nanogpt:FILE, llmc:FILE, ... "
        "By default the model of --workdir is used.",
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="Take the parameters themselves. By default it is their average, where a run keeps one (optim.ema_decay).",
    )
    parser.add_argument(
        "--activation",
        default="",
        choices=["", *ACTIVATIONS],
        metavar=f"{{{','.join(ACTIVATIONS)}}}",
        help="The activation of a --model whose file does not store one: gelu_new for nanoGPT from before May 2023. "
        "By default it is the one that the format's own program computes today.",
    )
    parser.add_argument(
        "--tokenizer",
        default="",
        metavar="NAME",
        help="The tokenizer: gpt2, bytes, a file, a directory or hf:OWNER/NAME. By default it is the model's.",
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
    if args.raw and args.model and not args.model.startswith("gptjax:"):
        raise ConfigError("is for runs of gptjax", field="--raw", remedy="leave the flag out")
    if args.raw and args.model:
        args.model += "@raw"
    if args.activation and not args.model:
        raise ConfigError("is for --model", field="--activation", value=args.activation, remedy="leave the flag out")
    if args.model and args.step is not None:
        raise ConfigError(
            f"is for --workdir; here it is --model=gptjax:WORKDIR@{args.step}",
            field="--step",
            value=args.step,
        )
