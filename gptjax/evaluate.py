"""Validation loss, perplexity and bits per byte, in training and as `python -m gptjax.evaluate --workdir=DIR`.

Or of weights in any form that gptjax.convert reads: `--model=hf:DIR --data=SHARDS`.
"""

import argparse
import dataclasses
import gzip
import lzma
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gptjax import runtime
from gptjax.config import Config, DataConfig
from gptjax.errors import ConfigError

if TYPE_CHECKING:
    import jax

    from gptjax.data.dataset import Dataset
    from gptjax.data.tokenizer import Tokenizer
    from gptjax.data.tokens import Split

COMPRESSED_BYTES = 16 * 2**20  # at most so much text is given to gzip and xz
ROWS = 8  # sequences per device and batch, where no config says


def evaluate(
    eval_step: Callable[..., Any],
    params: Any,
    *,
    dataset: "Dataset",
    token_bytes_V: "jax.Array",
    sharding: Any,
    num_micro_steps: int,
    batches: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Returns {val_loss (nats a token), val_perplexity, val_bits_per_byte} over a fixed sample of the validation split.

    batches: how many global batches; 0 means all. Bits per byte divides by the bytes that the predicted tokens stand
    for. should_stop: asked before each batch; when it says yes the result is {}.
    """
    available = dataset.num_validation_batches
    sums, ahead = [], None
    for index in range(min(batches or available, available)):
        if should_stop():
            return {}
        tokens_ABT = dataset.validation_batch(index, sharding=sharding, num_micro_steps=num_micro_steps)
        before, ahead = ahead, eval_step(params, tokens_ABT, token_bytes_V)
        sums += [_read(before)] if before else []  # one batch ahead of the device, never hundreds
    sums += [_read(ahead)] if ahead else []
    loss, tokens, size = (math.fsum(column) for column in zip(*sums, strict=True))
    return {
        "val_loss": loss / tokens,
        "val_perplexity": math.exp(min(loss / tokens, 700.0)),
        "val_bits_per_byte": loss / math.log(2) / max(size, 1.0),
    }


def _read(sums: Any) -> tuple[float, float, float]:
    losses, size = sums
    return float(losses.loss), float(losses.tokens), float(size)


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Returns the bits per byte to which `gzip -9` and `xz -9` bring `text`: what a language model should beat."""
    sizes = {"gzip -9": len(gzip.compress(text, 9)), "xz -9": len(lzma.compress(text, preset=9))}
    return {name: 8 * size / max(len(text), 1) for name, size in sizes.items()}


def compare(split: "Split", tokenizer: "Tokenizer") -> str:
    """Returns a line on how far general compressors bring the text of `split`, or of its first part if it is long."""
    from gptjax.data.dataset import document_text

    text = document_text(split, tokenizer, COMPRESSED_BYTES)
    parts = ", ".join(f"{name} {bits:.3f}" for name, bits in compressed_bits_per_byte(text).items())
    return f"bits per byte of {len(text):,} bytes of the same text: {parts}"


def describe(result: dict[str, float]) -> str:
    return (
        f"validation loss {result['val_loss']:.4f}, perplexity {result['val_perplexity']:.2f}, "
        f"{result['val_bits_per_byte']:.3f} bits per byte"
    )


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line, checked as far as that needs no model."""
    parser = runtime.Parser(__doc__)
    parser.add_argument("--workdir", default="", metavar="DIR", help="the work directory of a run")
    parser.add_argument("--step", type=int, help="which checkpoint; by default the newest")
    parser.add_argument("--model", default="", metavar="FORMAT:PATH", help="or weights: hf:DIR, llmc:FILE, ...")
    parser.add_argument("--data", default="", metavar="DIR", help="shards to read; by default those of the run")
    parser.add_argument("--tokenizer", default="", help="gpt2, bytes or a file, instead of the one beside the model")
    parser.add_argument("--batches", type=int, default=0, help="global batches to read; 0, the default, means all")
    args = parser.parse_strictly(arguments)
    if bool(args.workdir) == bool(args.model):
        raise ConfigError("what to evaluate: give --workdir=DIR or --model=FORMAT:PATH")
    if args.model and args.step is not None:
        raise ConfigError(f"--step={args.step}: is for --workdir; here it is --model=gptjax:WORKDIR@{args.step}")
    if args.model and not args.data:
        raise ConfigError("--model needs --data=DIR, shards to read: gptjax.data.prepare makes them")
    return args


def main(arguments: list[str]) -> None:
    args = parse_flags(arguments)
    runtime.start_jax()
    import jax

    from gptjax.run import make_run

    config, params, tokenizer, name = load_model(args)
    run = make_run(config, tokenizer=tokenizer)
    params = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), params, run.abstract_state.params)
    with jax.set_mesh(run.mesh):
        result = evaluate(
            run.eval_step,
            params,
            dataset=run.validation_data,
            token_bytes_V=run.token_bytes_V,
            sharding=run.batch_sharding,
            num_micro_steps=run.num_micro_steps,
            batches=args.batches,
        )
    print(f"{name}: {describe(result)}")
    print(compare(run.validation_data.split, run.tokenizer))


def load_model(args: argparse.Namespace) -> tuple[Config, Any, "Tokenizer | None", str]:
    """Returns (config, params, tokenizer or None for the config's, a name for the result) of --workdir or --model.

    Raises:
        UserError: it is not there, or damaged.
    """
    import jax

    from gptjax.checkpoint import load_params
    from gptjax.convert import formats
    from gptjax.data.tokenizer import load_tokenizer

    if args.workdir:
        config, params, step = load_params(args.workdir, step=args.step)
        data = dataclasses.replace(config.data, path=args.data) if args.data else config.data
        config = dataclasses.replace(config, data=data)
        return config, params, load_tokenizer(args.tokenizer) if args.tokenizer else None, f"step {step}"
    weights = formats.open_model(args.model, tokenizer=args.tokenizer)
    data = DataConfig(path=args.data, global_batch_size=ROWS * jax.device_count())
    config = Config(model=weights.config, data=data, init_from=weights.origin)
    return config, formats.load_params(weights, lambda _, leaf: leaf), weights.tokenizer, weights.origin


def cli() -> None:
    runtime.run_cli(main)


if __name__ == "__main__":
    cli()
