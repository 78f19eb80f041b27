"""Measures validation loss, perplexity and bits per byte: in training, and as `gptjax evaluate --workdir=DIR`.

With `--model=hf:DIR --data=SHARDS` it evaluates weights in any format that gptjax.convert reads.
"""

import argparse
import contextlib
import dataclasses
import gzip
import lzma
import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from gptjax import distributed
from gptjax.cli import Parser, run_cli
from gptjax.convert.model_ref import READABLE, parse_model_ref
from gptjax.errors import ConfigError
from gptjax.exhaustion import show_bytes
from gptjax.log_tags import describe_sources
from gptjax.model_flags import add_model_flags, check_model_flags
from gptjax.redaction import print_error, say
from gptjax.screen import Screen

if TYPE_CHECKING:
    import jax

    from gptjax.data.dataset import Dataset
    from gptjax.data.mixture import Mixture
    from gptjax.data.tokenizer import Tokenizer
    from gptjax.data.tokens import Split
    from gptjax.setup import Run

COMPRESSED_BYTES = 16 * 2**20  # of text given to gzip and xz, at most
LARGEST_EXPONENT = 700.0  # math.exp overflows at 710


def evaluate(
    eval_step: Callable[..., Any],
    params: Any,
    *,
    dataset: "Dataset | Mixture",
    token_bytes_V: "jax.Array",
    sharding: Any,
    num_microbatches: int,
    batches: int,
    should_stop: Callable[[], bool] = lambda: False,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Returns {val_loss (nats per token), val_perplexity, val_bits_per_byte} over a fixed part of the validation split.

    For a mixture they are means that are weighted as the mixture is, and val_loss/NAME and val_bits_per_byte/NAME of
    each source follow.

    Args:
        eval_step: returns sums over a batch: losses and tokens, and bytes.
        params: the parameters, sharded as `eval_step` expects them.
        dataset: its validation batches are int32 [A, B, T+1].
        token_bytes_V: the bytes of text in each token, int32 [V], replicated.
        sharding: of a batch.
        num_microbatches: A.
        batches: the number of global batches of each source; 0 means all.
        should_stop: called before each batch; if it returns True, the result is {}.
        on_batch: called before each batch with the number of those before it, and of all.
    """
    sources = list(dataset.sources())
    counts = [_count_batches(source, batches) for _, _, source in sources]
    done = 0
    totals: list[_Sums] = []
    for (_, _, source), count in zip(sources, counts, strict=True):
        sums = []
        pending = None
        for index in range(count):
            on_batch(done, sum(counts))
            if should_stop():
                return {}
            tokens_ABT = source.validation_batch(index, sharding=sharding, num_microbatches=num_microbatches)
            # The host runs one batch ahead of the devices. Without this limit it would hold every batch on them.
            previous = pending
            pending = eval_step(params, tokens_ABT, token_bytes_V)
            if previous is not None:
                sums.append(_read(previous))
            done += 1
        if pending is not None:
            sums.append(_read(pending))
        # Summed in float64 and divided once, because batches differ in their number of predicted tokens.
        totals.append(_Sums(*map(math.fsum, zip(*sums, strict=True))))
    if len(totals) == 1:
        result = totals[0].result()
    else:
        # As many tokens as were read, but of each source its share: sequences of all have the same number of tokens.
        tokens = math.fsum(total.tokens for total in totals)
        wanted = [share * tokens / total.tokens for (_, share, _), total in zip(sources, totals, strict=True)]
        result = _Sums(
            loss=math.fsum(weight * total.loss for weight, total in zip(wanted, totals, strict=True)),
            tokens=tokens,
            bytes=math.fsum(weight * total.bytes for weight, total in zip(wanted, totals, strict=True)),
        ).result()
    for (name, _, _), total in zip(sources, totals, strict=True):
        if name:
            of_source = total.result()
            result |= {f"{key}/{name}": of_source[key] for key in ("val_loss", "val_bits_per_byte")}
    return result


class _Sums(NamedTuple):
    """Sums over the predicted tokens of a validation split."""

    loss: float  # nats
    tokens: float
    bytes: float  # of their text

    def result(self) -> dict[str, float]:
        loss = self.loss / self.tokens
        return {
            "val_loss": loss,
            "val_perplexity": math.exp(min(loss, LARGEST_EXPONENT)),
            "val_bits_per_byte": self.loss / math.log(2) / max(self.bytes, 1.0),
        }


def _count_batches(dataset: "Dataset", batches: int) -> int:
    available = dataset.num_validation_batches
    return min(batches or available, available)


def evaluate_run(
    run: "Run",
    params: Any,
    *,
    batches: int,
    should_stop: Callable[[], bool] = lambda: False,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Returns the result of `evaluate` for `params` on the validation split of a run, on its mesh."""
    return evaluate(
        run.eval_step,
        params,
        dataset=run.validation_data,
        token_bytes_V=run.token_bytes_V,
        sharding=run.batch_sharding,
        num_microbatches=run.num_microbatches,
        batches=batches,
        should_stop=should_stop,
        on_batch=on_batch,
    )


def _read(sums: Any) -> tuple[float, float, float]:
    losses, size = sums
    return float(losses.loss), float(losses.tokens), float(size)


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Returns the bits per byte of `text` compressed by `gzip -9` and `xz -9`; a language model should need fewer."""
    compressed = {
        "gzip -9": gzip.compress(text, 9),
        "xz -9": lzma.compress(text, preset=9),
    }
    length = max(len(text), 1)
    return {name: 8 * len(data) / length for name, data in compressed.items()}


def compare(split: "Split", tokenizer: "Tokenizer") -> str:
    """Returns a sentence with the bits per byte of general compressors on the text of `split`, or its first part."""
    from gptjax.data.dataset import document_text

    text = document_text(split, tokenizer, COMPRESSED_BYTES)
    bits_per_byte = compressed_bits_per_byte(text)
    gzip9, xz9 = bits_per_byte.values()
    what = "this text" if split.bytes <= COMPRESSED_BYTES else f"its first {show_bytes(COMPRESSED_BYTES)}"
    return f"gzip -9 needs {gzip9:.3f} bits per byte for {what}, xz -9 {xz9:.3f}; fewer is better"


def count_sequences(dataset: "Dataset | Mixture", batches: int) -> int:
    """Returns the number of sequences that `evaluate` reads; batches=0 means all."""
    sizes = [(source.num_windows, source.global_batch_size) for _, _, source in dataset.sources()]
    return sum(min(batches * rows or available, available) for available, rows in sizes)


def describe(result: Mapping[str, float], sequences: int) -> str:
    """Returns the result of `evaluate` and its number of sequences as one line."""
    return (
        f"validation loss {result['val_loss']:.4f}, perplexity {result['val_perplexity']:.2f}, "
        f"{result['val_bits_per_byte']:.3f} bits per byte ({sequences:,} sequences)"
    )


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line, with every check that needs no model.

    Raises:
        ConfigError: a flag is unknown, missing or contradicts another.
    """
    parser = Parser(__doc__)
    add_model_flags(parser)
    parser.add_argument(
        "--data",
        default="",
        metavar="DIR,...",
        help="The data to read: a directory, or several with commas. By default it is the run's.",
    )
    parser.add_argument(
        "--tasks",
        default="",
        metavar="NAME,...",
        help="Tasks to ask instead of reading data: hellaswag, lambada_openai, file:my.jsonl, ... "
        "By default there are none.",
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="The number of questions of each task. By default all are asked."
    )
    parser.add_argument(
        "--fetch_tasks",
        default="",
        metavar="NAME,...",
        help="Tasks whose questions to download and store in data/tasks, or NAME=PATH for the official file. "
        "By default there are none.",
    )
    parser.add_argument(
        "--batches", type=int, default=0, help="The number of global batches to read. By default all are read."
    )
    args = parser.parse_strictly(arguments)
    if args.fetch_tasks and not (args.workdir or args.model or args.tasks):
        return args
    check_model_flags(args)
    if args.limit < 0:
        raise ConfigError("must be 0, which means all, or more", field="--limit", value=args.limit)
    if args.data and not all(args.data.split(",")):
        raise ConfigError("names an empty directory", field="--data", value=args.data)
    if args.tasks and args.data:
        raise ConfigError("is for validation losses, and --tasks is given", field="--data", value=args.data)
    if args.batches < 0:
        raise ConfigError("must be 0, which means all, or more", field="--batches", value=args.batches)
    if args.model and not args.data and not args.tasks and not args.model.startswith("gptjax:"):
        parse_model_ref("--model", args.model, READABLE)
        raise ConfigError(
            "needs --data=DIR, a directory of shards",
            field="--model",
            value=args.model,
            remedy="gptjax prepare creates one",
        )
    return args


def main(arguments: list[str]) -> None:
    """Evaluates a run or converted weights, and prints the result.

    Raises:
        UserError: the weights or the data are missing, damaged, or do not fit together.
    """
    args = parse_flags(arguments)
    if args.fetch_tasks:
        from gptjax.tasks.fetch import fetch_tasks

        fetch_tasks(args.fetch_tasks, log=say)
        if not (args.workdir or args.model):
            return
    if args.tasks:
        from gptjax.tasks.command import evaluate_tasks
        from gptjax.tasks.store import identify, open_tasks, parse_names

        tasks = open_tasks(parse_names(args.tasks), limit=args.limit)  # before JAX, which takes longer
        distributed.start_jax()
        distributed.check_agreement("tasks", identify(tasks))
        evaluate_tasks(args, tasks)
        return
    distributed.start_jax()
    from gptjax.run_data import open_validation_data  # start_jax configures JAX before this imports it

    # A directory may have a comma in its name.
    directories = [args.data] if os.path.isdir(args.data) else args.data.split(",")
    args.data = directories[0]
    run, params, name = load_run(args)
    for directory in directories:
        if directory != args.data:
            data = open_validation_data(run.config, directory, tokenizer=run.tokenizer, instead_of=run.validation_data)
            run = dataclasses.replace(run, validation_data=data)
        with contextlib.closing(Screen(print_error, stderr=True)) as screen:
            result = evaluate_run(
                run,
                params,
                batches=args.batches,
                on_batch=lambda done, total, screen=screen: screen.show_work("evaluating", done, total),
            )
        sequences = count_sequences(run.validation_data, args.batches)
        place = f", {directory}" if len(directories) > 1 else ""
        say(f"{name}{place}: {describe(result, sequences)}")
        for line in describe_sources(result):
            say(line)
        sources = list(run.validation_data.sources())
        # The compressors get the whole text of one source.
        if sequences == run.validation_data.num_windows and len(sources) == 1:
            say(compare(sources[0][2].split, run.tokenizer))


def load_run(args: argparse.Namespace) -> tuple["Run", Any, str]:
    """Returns (run, params on its mesh, a name for the result) of --workdir or --model.

    Raises:
        UserError: the weights or the data are missing, damaged, or do not fit together.
    """
    import jax

    from gptjax.named_model import load_model
    from gptjax.setup import make_run

    config, params, tokenizer, name = load_model(args)
    run = make_run(config, tokenizer=tokenizer)
    # Weights of --model are NumPy arrays on the host; those of a run are on one device.
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, run.abstract_state.params)
    return run, params, name


def cli() -> None:
    """Runs the command, and exits with its code."""
    run_cli(main)


if __name__ == "__main__":
    cli()
