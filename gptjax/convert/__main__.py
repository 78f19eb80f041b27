"""Converts GPT-2 weights between formats: `gptjax convert --from=hf:gpt2 --to=gptjax:runs/gpt2`.

Formats: hf:DIR, hf:OWNER/NAME[@REVISION], gptjax:WORKDIR[@STEP], nanogpt:ckpt.pt, llmc:model.bin, and, read only,
msgpack:DIR with the old flax_model.msgpack.
The result is read back and compared before it gets its name, so an output that exists is complete and correct.
"""

from __future__ import annotations  # np.ndarray in a signature would import NumPy

import argparse
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

from etils import epy

from gptjax.cli import Parser, run_cli
from gptjax.convert.model_ref import WRITABLE, ModelRef, parse_model_ref
from gptjax.convert.staging import refuse_existing, staged
from gptjax.errors import ConfigError, DataError
from gptjax.model_flags import ACTIVATIONS
from gptjax.redaction import say
from gptjax.workdir import METRICS_FILE, is_bucket

with epy.lazy_imports():  # so that a wrong flag exits before anything large loads
    import numpy as np

    from gptjax import params
    from gptjax.convert import formats, hub, torch_file
    from gptjax.convert import weights as w

log = logging.getLogger("gptjax")
REPORT_SECONDS = 5.0


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line, after the checks that need no file.

    Raises:
        ConfigError: a flag is unknown, missing or wrong.
    """
    parser = Parser(__doc__)
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="FORMAT:PATH",
        help="The model to convert.",
    )
    parser.add_argument(
        "--to",
        dest="target",
        default="",
        metavar="FORMAT:PATH",
        help="Where to write the result. By default nothing is written, which needs --dry_run.",
    )
    parser.add_argument(
        "--dtype",
        default="",
        choices=["", "float32", "bfloat16"],
        metavar="{float32,bfloat16}",
        help="The dtype of exported weights. By default it is the source's.",
    )
    parser.add_argument(
        "--dropout",
        type=float,
        default=None,
        help="The dropout rate of the result. By default it is the source's.",
    )
    parser.add_argument(
        "--tokenizer",
        default="",
        metavar="NAME",
        help="The tokenizer: gpt2, bytes, a file, a directory or hf:OWNER/NAME. By default it is the source's.",
    )
    parser.add_argument(
        "--activation",
        default="",
        choices=["", *ACTIVATIONS],
        metavar=f"{{{','.join(ACTIVATIONS)}}}",
        help="The activation of a source that does not store one: gelu_new for a ckpt.pt of nanoGPT from before May "
        "2023. By default it is the one that the format's own program computes today.",
    )
    raw_help = "Take the parameters of a run themselves. By default it is their average, where the run keeps one."
    parser.add_argument("--raw", action="store_true", help=raw_help)
    parser.add_argument(
        "--strict",
        action="store_true",
        help="Refuse a target whose program computes another activation than the model's. By default it is a warning.",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="Print the map of tensors and the differences, and write nothing.",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="Replace an existing output. By default it is refused.",
    )
    parser.add_argument(
        "--allow_nonfinite",
        action="store_true",
        help="Convert weights that are NaN or infinite, too. By default they are refused.",
    )
    parser.add_argument(
        "--push",
        default="",
        metavar="OWNER/NAME",
        help="Upload the result of --to=hf:DIR to this repository of the Hub. By default nothing is uploaded.",
    )
    args = parser.parse_strictly(arguments)
    _check_flags(args)
    return args


def _check_flags(args: argparse.Namespace) -> None:
    if not args.target and not args.dry_run:
        raise ConfigError("missing", field="--to", remedy="give FORMAT:PATH of the result, or --dry_run")
    if args.dropout is not None and not 0 <= args.dropout < 1:
        raise ConfigError(
            "must be from 0 to below 1",
            field="--dropout",
            value=args.dropout,
        )
    if args.push and not args.target.startswith("hf:"):
        raise ConfigError("only the result of --to=hf:DIR can be uploaded", field="--push")
    if args.dtype and args.target.startswith("gptjax:"):
        raise ConfigError(
            "parameters of gptjax are float32",
            field="--dtype",
            value=args.dtype,
            remedy="choose it at the export",
        )


def main(arguments: list[str]) -> None:
    """Converts weights, or only describes them.

    Raises:
        UserError: the weights cannot be read, do not fit the target's format, or cannot be written.
    """
    args = parse_flags(arguments)
    source = parse_model_ref("--from", args.source, formats.READABLE)
    target = None
    if args.target:
        target = parse_model_ref("--to", args.target, WRITABLE)
    if target and not args.dry_run:
        check_target(source, target, force=args.force)
    if args.raw:
        if source.format != "gptjax":
            raise ConfigError("is for runs of gptjax", field="--raw", remedy="leave the flag out")
        source = source._replace(path=f"{source.path}@raw")
    weights = formats.open_weights(
        source,
        tokenizer=args.tokenizer,
        dropout=args.dropout,
        activation=args.activation,
    )
    if target:
        weights = formats.adapt(weights, target.format)
    target_format = target.format if target else "gptjax"
    dtype = formats.export_dtype(weights, target_format, args.dtype)
    differences = formats.differences(weights, target_format, dtype) if target else []
    describe(weights, differences)
    refuse_other_function(weights, target_format, strict=args.strict)
    if args.dry_run or target is None:
        table = formats.map_table(weights, target_format, dtype)
        say("\n".join(table))
        return
    if target.format == "nanogpt":  # before minutes of work, and about a file that the user has named
        torch_file.import_torch(target.path)
    convert(
        weights,
        target,
        dtype=dtype,
        force=args.force,
        allow_nonfinite=args.allow_nonfinite,
    )
    if args.push:
        log.info("uploaded to %s", hub.upload(target.path, args.push))


def describe(weights: w.Weights, differences: list[str]) -> None:
    """Logs the model's sizes, its notes and the differences of the result."""
    c = weights.config
    log.info(
        "%s: %s parameters, %d layers, %d heads, width %d, %d positions, %d ids, %s, %s",
        weights.origin,
        f"{params.count_params(c):,}",
        c.n_layer,
        c.n_head,
        c.n_embd,
        c.block_size,
        c.vocab_size,
        "tied" if c.tie_embeddings else "untied",
        weights.dtype,
    )
    for note in (*weights.notes, *differences):
        log.info("  %s", note)


def refuse_other_function(weights: w.Weights, target: str, *, strict: bool) -> None:
    """Logs how far the logits of `target`'s program differ because of its activation, or with `strict` refuses it.

    Raises:
        DataError: it computes another activation, and `strict` is on; or a tensor is damaged.
    """
    difference = formats.other_activation(weights, target)
    if not difference:
        return
    if strict:
        raise DataError(
            difference,
            field="--to",
            value=target,
            remedy="use hf:DIR, which stores the activation, or leave out --strict",
        )
    log.info("  %s", difference)


def convert(
    weights: w.Weights,
    target: ModelRef,
    *,
    dtype: str,
    force: bool,
    allow_nonfinite: bool,
) -> None:
    """Writes `weights` as `target`, reads the result back, compares, and only then gives it its name.

    dtype: of the tensors in the result.

    Raises:
        ConfigError: an output has appeared meanwhile, or another file is where the tokenizer's belongs, and `force`
            is off.
        DataError: a weight is not finite, the source is damaged, or the result differs when it is read back.
        WorkdirError: the target cannot be written.
    """
    start = time.perf_counter()
    total = params.count_params(weights.config)
    source_sum = w.Checksum()
    # The checksum is over float32, so only rounding makes the result's differ from the source's.
    rounds = dtype not in (weights.dtype, "float32")
    expected_sum = w.Checksum() if rounds else source_sum
    found_sum = w.Checksum()
    beside = formats.side_file(weights, target.format)
    with staged(target.path, force=force, beside=beside) as path:
        tensors = w.read_tensors(
            weights,
            checksum=source_sum,
            allow_nonfinite=allow_nonfinite,
        )
        if rounds:
            tensors = rounded(tensors, dtype, expected_sum)
        formats.write(
            target,
            path,
            weights,
            tensors=with_progress(tensors, total),
            dtype=dtype,
            allow_nonfinite=allow_nonfinite,
        )
        log.info("source %s  weights sha256 %s", weights.origin, source_sum.hexdigest())
        result = formats.open_weights(ModelRef(target.format, path))
        for _ in w.read_tensors(result, checksum=found_sum, allow_nonfinite=True):
            pass
        if found_sum.hexdigest() != expected_sum.hexdigest():
            raise DataError(
                "the weights read back differ from those written: is the disk damaged?",
                field=str(target),
            )
        if target.format in formats.WITH_MOMENTS and not formats.same_moments(weights, result):
            raise DataError("AdamW's moments read back differ from those written", field=str(target))
    log.info("result %s  weights sha256 %s", target, found_sum.hexdigest())
    log.info("read back and compared: done in %.1f s", time.perf_counter() - start)


def rounded(
    tensors: Iterator[tuple[str, Any]],
    dtype: str,
    checksum: w.Checksum,
) -> Iterator[tuple[str, Any]]:
    """Yields the tensors rounded to `dtype`, and adds the rounded ones to `checksum`.

    tensors: (name, array) pairs, of any shape and float dtype.
    """
    for name, tensor in tensors:
        cast = np.asarray(tensor, w.DTYPES[dtype])
        checksum.update(name, cast)
        yield name, cast


def with_progress(tensors: Iterator[tuple[str, Any]], total: int) -> Iterator[tuple[str, Any]]:
    """Yields the tensors, and logs the progress every REPORT_SECONDS.

    tensors: (name, array) pairs, of any shape and dtype.
    total: the number of values in all of them.
    """
    done = 0
    reported = time.perf_counter()
    for name, tensor in tensors:
        yield name, tensor
        done += tensor.size
        if time.perf_counter() - reported > REPORT_SECONDS:
            reported = time.perf_counter()
            log.info("  %d%% of the parameters", 100 * done // total)


def check_target(
    source: ModelRef,
    target: ModelRef,
    *,
    force: bool,
) -> None:
    """Checks that `target` can be written without replacing something that the user did not name.

    --force may replace the source itself, but not a directory that contains more than the source, and never a run.

    Raises:
        ConfigError: the target is in a bucket or exists, has a run, or is a directory that the command needs.
    """
    path = target.path
    if is_bucket(path):
        raise _bad_target(target, "results are written to this machine's disks", "copy them from there")
    if target.format in formats.FILES and os.path.isdir(path):
        example = os.path.join(path, formats.FILES[target.format])
        raise _bad_target(target, "is a directory", f"name a file, such as {example}")
    refuse_existing(path, force=force)
    if os.path.isfile(os.path.join(path, METRICS_FILE)):
        raise _bad_target(target, "has a run, which --force does not replace", "name another, or remove it")
    if holds(path, os.getcwd()):
        raise _bad_target(target, "the command runs in that directory", "name another")
    if holds(path, source.path) and not holds(source.path, path):
        raise _bad_target(target, f"contains the source {source}, which would be overwritten", "name another")


def _bad_target(target: ModelRef, problem: str, remedy: str) -> ConfigError:
    return ConfigError(
        problem,
        field="--to",
        value=str(target),
        remedy=remedy,
    )


def holds(directory: str, path: str) -> bool:
    """Returns whether `path` is the existing `directory` or is inside it."""
    root = os.path.realpath(directory)
    inside = os.path.realpath(path)
    return os.path.isdir(root) and os.path.commonpath([root, inside]) == root


def cli() -> None:
    """Runs the command, on the CPU unless JAX_PLATFORMS is set."""
    # A conversion needs no accelerator. Not in main(), because notebooks call it along with other work.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    run_cli(main)


if __name__ == "__main__":
    cli()
