"""Trains a tokenizer on your text: `gptjax tokenizer --source=text:FOLDER --vocab_size=4096 --out=mine.json`.

It has GPT-2's form: bytes, merges of the most frequent pairs, and end-of-text. Documents that gptjax prepare keeps for
validation are left out of the training. Train a model with it by --config.data.tokenizer=mine.json and
--config.model.vocab_size.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, cast

from gptjax.cli import Parser, run_cli
from gptjax.config import DataConfig
from gptjax.convert.tokenizer_files import write_tokenizer
from gptjax.data import sources
from gptjax.data.characters import make_characters
from gptjax.data.own_tokenizer import divide, train_tokenizer
from gptjax.data.readers import Reading
from gptjax.data.source import Source
from gptjax.data.tokenizer import Tokenizer, load_tokenizer
from gptjax.errors import ConfigError, WorkdirError
from gptjax.redaction import say
from gptjax.train_bpe import PATTERNS, library

HELD_OUT_CHARACTERS = 2**21  # of validation text, on which tokens are counted
BLOCK_SIZE = 1024  # of a model that transformers would use it with


def main(arguments: list[str]) -> None:
    """Trains a tokenizer, writes it, and prints how many bytes its tokens have beside GPT-2's.

    Raises:
        UserError: the source, a flag or the output is wrong.
    """
    args = _parse_arguments(arguments)
    reading = Reading(text_feature=args.text_feature, encoding=args.encoding, skip_bad=args.skip_bad)
    if os.path.lexists(_path_of(args.out)):
        raise ConfigError("exists", field="--out", value=args.out, remedy="choose another, or remove it")
    with tempfile.TemporaryDirectory() as work_dir:  # where TFDS stores the standard library
        source = sources.open_source(args.source, work_dir=work_dir, reading=reading)
        if args.characters:
            _write_characters(source, args)
            return
        say(f"training {args.vocab_size:,} ids on {source.name} with {library() or 'no library'}")
        tokenizer, held_out = _train(source, args)
    if tokenizer.vocab_size < args.vocab_size:
        say(f"only {tokenizer.vocab_size:,} ids: the text has no more pairs to merge")
    if library() != "rustbpe":
        say("note: rustbpe is not installed; equally frequent pairs are merged in another order than it does")
    _write(tokenizer, args.out)
    say(f"{args.out}: {tokenizer.vocab_size:,} ids{describe_length(tokenizer, held_out)}")
    say(f"use it: --config.data.tokenizer={_path_of(args.out)} --config.model.vocab_size={tokenizer.vocab_size}")


def _write_characters(source: Source, args: argparse.Namespace) -> None:
    """Writes the tokenizer of all characters of the source, those of validation text included.

    Raises:
        ConfigError: the output is of another program, which has no place for it.
    """
    if args.out.startswith("hf:"):
        raise ConfigError("transformers has no tokenizer of characters", field="--out", value=args.out)
    name = os.path.basename(args.out)
    tokenizer: Tokenizer = cast(Any, make_characters(name, (text for _, text in source.documents())))
    _write(tokenizer, args.out)
    say(f"{args.out}: {tokenizer.vocab_size:,} characters")
    say(f"use it: --config.data.tokenizer={args.out} --config.model.vocab_size={tokenizer.vocab_size}")


def _train(source: Source, args: argparse.Namespace) -> tuple[Tokenizer, list[str]]:
    """Returns the tokenizer, and validation texts of at most HELD_OUT_CHARACTERS."""
    held_out: list[str] = []

    def training_texts() -> Iterator[str]:
        kept = 0
        for text, is_validation in divide(source, args.val_fraction):
            if not is_validation:
                yield text
            elif kept < HELD_OUT_CHARACTERS:
                held_out.append(text[: HELD_OUT_CHARACTERS - kept])
                kept += len(text)

    tokenizer = train_tokenizer(
        training_texts(),
        vocab_size=args.vocab_size,
        name=os.path.basename(_path_of(args.out)),
        pattern=args.pattern,
        specials=args.special,
    )
    return tokenizer, held_out


def describe_length(tokenizer: Tokenizer, texts: Sequence[str]) -> str:
    """Returns the bytes per token on `texts` beside GPT-2's, for a message; "" without texts."""
    if not texts:
        return ""
    num_bytes = sum(len(text.encode()) for text in texts)
    lengths = []
    for one in (tokenizer, load_tokenizer("gpt2")):
        count = sum(map(len, one.encode_batch(texts)))
        lengths.append(num_bytes / max(count, 1))
    ours, theirs = lengths
    return f", {ours:.2f} bytes per token on {num_bytes:,} bytes that were held out (gpt2: {theirs:.2f})"


def _path_of(out: str) -> str:
    return out.removeprefix("hf:")


def _write(tokenizer: Tokenizer, out: str) -> None:
    """Writes gptjax's form to a file, or transformers' form to the directory of hf:DIR."""
    path = _path_of(out)
    try:
        if out.startswith("hf:"):
            os.makedirs(path)
            write_tokenizer(tokenizer, path, block_size=BLOCK_SIZE)
            return
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        tokenizer.save(path)
    except OSError as error:
        raise WorkdirError(f"cannot be written: {error.strerror}", field="--out", value=out) from error


def _parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--source", required=True, help=f"The documents: {sources.kinds()}.")
    parser.add_argument("--vocab_size", type=int, default=32_768, help="The number of ids, special tokens included.")
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="The file to write, or hf:DIR for a directory that transformers reads.",
    )
    parser.add_argument(
        "--characters",
        action="store_true",
        help="Make each character of the text an id, as nanoGPT's first example does, instead of merging bytes.",
    )
    parser.add_argument(
        "--pattern",
        default="gpt2",
        choices=list(PATTERNS),
        help="How text is cut into words before pairs are merged.",
    )
    parser.add_argument(
        "--special",
        action="append",
        default=[],
        metavar="NAME",
        help="A special token to reserve, such as <|user|>. The flag may be repeated. By default there is only "
        "end-of-text.",
    )
    parser.add_argument(
        "--text_feature",
        default="text",
        metavar="NAME",
        help="The feature, field or column that holds the text.",
    )
    parser.add_argument(
        "--val_fraction",
        type=float,
        default=DataConfig().val_fraction,
        help="The share of documents that is held out, as gptjax prepare keeps them for validation.",
    )
    parser.add_argument("--encoding", default="", help="The encoding of text files. By default it is UTF-8.")
    parser.add_argument(
        "--skip_bad",
        action="store_true",
        help="Leave rows without a text out. By default the first one ends the command.",
    )
    args = parser.parse_strictly(arguments)
    if not 0 < args.val_fraction < 1:
        raise ConfigError("must be above 0 and below 1", field="--val_fraction", value=args.val_fraction)
    if args.source.endswith(":-"):
        raise ConfigError("a pipe can be read once, and preparing reads it again", field="--source", value=args.source)
    return args


def cli() -> None:
    """Runs the command, and exits with its code."""
    run_cli(main)


if __name__ == "__main__":
    cli()
