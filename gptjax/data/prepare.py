"""Turns documents into token shards: `gptjax prepare --source=stdlib --tokenizer=gpt2 --out=DIR`.

The work happens in `DIR.partial`, where a journal records how far it has come. If it is killed at any moment, the same
command continues and produces identical bytes. DIR appears when all is done.
"""

import argparse
import contextlib
import hashlib
import itertools
import logging
import os
import re
import shlex
from collections.abc import Iterator
from typing import Any

from gptjax.cli import Parser, run_cli
from gptjax.config import DataConfig
from gptjax.convert.tokenizer_source import open_tokenizer
from gptjax.data import shard_writer, sources
from gptjax.data.header import LARGEST_COUNT
from gptjax.data.journal import Journal, chain, hash_text, read_journal, write_journal
from gptjax.data.meta import read_meta
from gptjax.data.partial import hold, remove
from gptjax.data.progress import Log, reporter
from gptjax.data.tokenizer import Tokenizer
from gptjax.data.tokens import verify
from gptjax.errors import ConfigError, DataError, UserError, WorkdirError
from gptjax.redaction import say
from gptjax.streams import go_on_without_output
from gptjax.workdir import is_empty, missing_parts, remove_directories

VAL_FRACTION = 0.05
SHARD_TOKENS = 100_000_000
BATCH_BYTES = 8 * 2**20  # of text held in memory at a time, give or take a document


def prepare(
    *,
    source: str,
    tokenizer: Tokenizer,
    out: str,
    text_feature: str = "text",
    val_fraction: float = VAL_FRACTION,
    shard_tokens: int = SHARD_TOKENS,
    log: Log | None = None,
) -> None:
    """Tokenizes all documents of `source` into the directory `out`; does nothing if they are there already.

    The hash of a document's text decides whether it belongs to the validation split, so equal texts are in one split.

    Args:
        source: as data.source.
        tokenizer: makes the ids.
        out: the directory to write.
        text_feature: the feature of a tfds: source that has the text.
        val_fraction: the share of the documents that is for validation.
        shard_tokens: the size of each shard except a split's last one.
        log: receives the progress, a line at a time; the logger `gptjax` if None.

    Raises:
        ConfigError: an argument is wrong, or `out` holds something else.
        DataError: a document or the directory of tfds:/DIR cannot be read, or a split would be empty.
        UnavailableError: a TFDS data set cannot be downloaded.
        WorkdirError: `out` cannot be written.
    """
    log = log or logging.getLogger("gptjax").info
    source = sources.canonical_name(source)
    out = os.path.abspath(out)
    partial = out + ".partial"
    _check_arguments(source, out, val_fraction, shard_tokens)
    if _is_done(out, source, tokenizer) and not os.path.exists(partial):
        log(f"{out}: already prepared from {source}")
        return
    settings = {
        "source": source,
        "text_feature": text_feature,
        "tokenizer_sha256": tokenizer.sha256,
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
    }
    made = missing_parts(os.path.dirname(partial))
    with _reporting_write_errors(out), hold(partial, out, log):
        if _is_done(out, source, tokenizer):
            log(f"{out}: already prepared from {source}, by another process or before a kill")
        else:
            try:
                _prepare_locked(
                    partial,
                    out,
                    settings,
                    tokenizer=tokenizer,
                    log=log,
                )
            except UserError:
                if read_journal(partial) is None:  # nothing had begun, so nothing is left behind
                    remove(partial)
                    remove_directories(made)
                raise
        remove(partial)


def _check_arguments(
    source: str,
    out: str,
    val_fraction: float,
    shard_tokens: int,
) -> None:
    if not 0 < val_fraction < 1:
        raise ConfigError(
            "must be above 0 and below 1",
            field="val_fraction",
            value=val_fraction,
        )
    if not 1 <= shard_tokens <= LARGEST_COUNT:
        raise ConfigError(
            f"must be from 1 to {LARGEST_COUNT}",
            field="shard_tokens",
            value=shard_tokens,
        )
    kind, _, path = source.partition(":")
    if kind in ("text", "lines") and os.path.commonpath([out, path]) == path:
        raise ConfigError(
            f"is inside the source {source}, and would become a part of it",
            field=out,
            remedy="choose another --out",
        )


def _is_done(out: str, source: str, tokenizer: Tokenizer) -> bool:
    """Returns whether `out` holds this data; False if it does not exist or is empty.

    Raises:
        ConfigError: `out` holds something else.
    """
    if not os.path.lexists(out):
        return False
    meta = None
    if is_empty(out):
        return False
    if os.path.isdir(out):
        meta = read_meta(out)
    if meta is None:
        raise ConfigError(
            "exists and was not written by prepare",
            field=out,
            remedy="choose another --out, or remove it",
        )
    if meta.source != source or not tokenizer.has_hash(meta.tokenizer_sha256, meta.tokenizer):
        raise ConfigError(
            f"already prepared from source {meta.source} and tokenizer {meta.tokenizer}",
            field=out,
            remedy="choose another --out, or remove it",
        )
    return True


@contextlib.contextmanager
def _reporting_write_errors(out: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WorkdirError(f"cannot be written: {error}", field=out) from error


def _prepare_locked(
    partial: str,
    out: str,
    settings: dict[str, Any],
    *,
    tokenizer: Tokenizer,
    log: Log,
) -> None:
    name = settings["source"]
    source = sources.open_source(
        name,
        text_feature=settings["text_feature"],
        work_dir=os.path.join(partial, "source"),
    )
    if source.total_documents == 1:
        raise _empty_split_error("validation", 1, name)
    folder = os.path.join(partial, "shards")
    journal, documents = _resume(partial, settings, source, log)
    shard_writer.truncate_shards(folder, journal, tokenizer)
    with reporter(source, log) as report:
        for batch in _batches(documents):
            # The journal comes last: a kill before it repeats the batch, after truncating the shards.
            shard_writer.write_batch(
                folder,
                batch,
                journal=journal,
                tokenizer=tokenizer,
            )
            write_journal(partial, journal)
            report(journal)
    for split, counts in journal.splits.items():
        if not counts.documents:
            raise _empty_split_error(split, journal.documents, name)
    shard_writer.finish(
        folder,
        out,
        journal=journal,
        tokenizer=tokenizer,
    )
    train = journal.splits["train"].tokens
    validation = journal.splits["validation"].tokens
    log(f"{out}: {train:,} tokens to train on, {validation:,} to validate, {tokenizer.name} ids")


def _resume(
    partial: str,
    settings: dict[str, Any],
    source: sources.Source,
    log: Log,
) -> tuple[Journal, Iterator[sources.Document]]:
    """Returns the journal to continue, and the documents that it has not counted yet."""
    journal = read_journal(partial)
    if journal is None:
        return Journal(settings), _nonempty(source)
    if journal.settings != settings:
        log("the unfinished preparation had other settings: starting over")
        return Journal(settings), _nonempty(source)
    documents = _nonempty(source)
    digest = ""
    for name, text in itertools.islice(documents, journal.documents):
        digest = chain(digest, name, hash_text(text))
    if digest != journal.digest:
        log("the source has changed since the preparation was interrupted: starting over")
        return Journal(settings), _nonempty(source)
    log(f"continuing after {journal.documents:,} documents")
    return journal, documents


def _nonempty(source: sources.Source) -> Iterator[sources.Document]:
    for name, text in source.documents():
        if text:
            yield name, text


def _batches(documents: Iterator[sources.Document]) -> Iterator[list[sources.Document]]:
    batch = []
    size = 0  # characters, as an estimate of bytes
    for name, text in documents:
        batch.append((name, text))
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def _empty_split_error(split: str, documents: int, source: str) -> DataError:
    remedy = "try --val_fraction" if documents > 1 else "try more than one document"
    if source.startswith("text:"):
        path = source.removeprefix("text:")
        remedy += f", or --source=lines:{path} to make each line a document"
    return DataError(
        f"no document for the {split} split, out of {documents:,}",
        field="data.source",
        value=source,
        remedy=remedy,
    )


def default_path(source: str, tokenizer: str) -> str:
    """Returns the directory for the data of a source and a tokenizer, as data.source and data.tokenizer name them.

    >>> default_path("tfds:wiki40b/en", "gpt2")
    'data/tfds-wiki40b-en-gpt2'
    """
    kind, _, path = source.partition(":")
    if kind in ("text", "lines") or sources.is_tfds_directory(source):
        source = f"{kind}-{_shorten(os.path.expanduser(path))}"
    if tokenizer not in ("gpt2", "bytes"):
        tokenizer = _shorten(tokenizer)
    return os.path.join("data", f"{_make_safe(source)}-{_make_safe(tokenizer)}")


def _shorten(path: str) -> str:
    """Returns the last part of the path, with a hash that distinguishes it from other paths with that last part."""
    path = os.path.abspath(path)
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()
    return f"{os.path.basename(path)}-{digest[:8]}"


def _make_safe(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name).strip("-")


def ensure_prepared(config: DataConfig, tokenizer: Tokenizer | None = None) -> str:
    """Returns the directory of the data that `config` names, prepared now if it is missing and needs no network.

    tokenizer: of the data; None means data.tokenizer.

    Raises:
        ConfigError: it is missing and data.path names it, or it would have to be downloaded; the remedy is a command.
        UserError: as `prepare`.
    """
    path = config.path or default_path(config.source, config.tokenizer)
    if os.path.isdir(path) and not is_empty(path):
        return path
    command = _prepare_command(config, path)
    if sources.needs_network(config.source):
        raise ConfigError(
            "no data yet, and training downloads nothing",
            field=path,
            remedy=f"run: {command}",
        )
    # A mistyped data.path must not be filled: the run would silently train on other data.
    if config.path:
        raise ConfigError(
            "no data there",
            field="data.path",
            value=path,
            remedy=f"correct it, or run: {command}",
        )
    logging.getLogger("gptjax").info("%s: no data yet; preparing it now (same as: %s)", path, command)
    prepare(
        source=config.source,
        tokenizer=tokenizer or open_tokenizer(config.tokenizer),
        out=path,
        text_feature=config.text_feature,
    )
    return path


def _prepare_command(config: DataConfig, path: str) -> str:
    """Returns the shell command that prepares the data of `config` in the directory `path`."""
    command = [
        "python",
        "-m",
        "gptjax.data.prepare",
        f"--source={config.source}",
        f"--tokenizer={config.tokenizer}",
    ]
    if config.text_feature != "text":
        command.append(f"--text_feature={config.text_feature}")
    command.append(f"--out={path}")
    return shlex.join(command)


def _parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--source", default="stdlib", help=f"The documents: {sources.kinds()}.")
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        metavar="NAME",
        help="The tokenizer: gpt2, bytes, a file, a directory or hf:OWNER/NAME.",
    )
    parser.add_argument(
        "--out",
        default="",
        metavar="DIR",
        help="The directory to write. By default it is data/<source>-<tokenizer>.",
    )
    parser.add_argument(
        "--text_feature",
        default="text",
        metavar="NAME",
        help="The feature of a tfds: source that holds the text.",
    )
    parser.add_argument(
        "--val_fraction",
        type=float,
        default=VAL_FRACTION,
        help="The share of documents that is kept for validation. Take 0.0005 for a big corpus.",
    )
    parser.add_argument("--shard_tokens", type=int, default=SHARD_TOKENS, help="The number of tokens per shard.")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="Check every byte of --out instead of writing it.",
    )
    return parser.parse_strictly(arguments)


def main(arguments: list[str]) -> None:
    """Prepares a directory of shards, or verifies one.

    Raises:
        UserError: the source, the tokenizer or the output is wrong, or a shard is damaged.
    """
    args = _parse_arguments(arguments)
    tokenizer = open_tokenizer(args.tokenizer)
    out = args.out or default_path(args.source, args.tokenizer)
    if args.verify:
        verify(out, tokenizer)
        say(f"{out}: every shard is as it was written")
        return
    go_on_without_output()  # the product is the directory
    prepare(
        source=args.source,
        tokenizer=tokenizer,
        out=out,
        text_feature=args.text_feature,
        val_fraction=args.val_fraction,
        shard_tokens=args.shard_tokens,
        log=say,
    )


def cli() -> None:
    """Runs the command, and exits with its code."""
    run_cli(main)


if __name__ == "__main__":
    cli()
