"""Turns documents into token shards: `gptjax prepare --source=stdlib --tokenizer=gpt2 --out=DIR`.

The work happens in `DIR.partial`, where a journal records how far it has come. If it is killed at any moment, the same
command continues and produces identical bytes. DIR appears when all is done.

Several machines can share the work: each runs the command with another --part=k/n, and then one runs it with --join.
"""

import argparse
import functools
import hashlib
import logging
import numbers
import os
import re
import shlex
from collections.abc import Callable
from typing import Any

from gptjax.cli import Parser, run_cli
from gptjax.config import DataConfig
from gptjax.convert.tokenizer_source import open_tokenizer
from gptjax.data import parts, preparation, sources, workers
from gptjax.data.assign import WINDOW_TOKENS
from gptjax.data.header import LARGEST_COUNT
from gptjax.data.journal import read_journal
from gptjax.data.meta import read_meta
from gptjax.data.own_tokenizer import is_own, open_data_tokenizer
from gptjax.data.partial import hold, remove, reporting_write_errors
from gptjax.data.progress import Log
from gptjax.data.readers import Reading
from gptjax.data.remote_files import is_remote, require_local
from gptjax.data.staleness import changed_since, files_now
from gptjax.data.text_files import PIPE
from gptjax.data.tfds_source import is_tfds_directory
from gptjax.data.tokenizer import Tokenizer
from gptjax.data.tokens import verify
from gptjax.errors import ConfigError, UserError
from gptjax.redaction import say
from gptjax.streams import go_on_without_output
from gptjax.workdir import is_empty, missing_parts, remove_directories

VAL_FRACTION = DataConfig().val_fraction
SHARD_TOKENS = 100_000_000
JOIN = "join"


def prepare(
    *,
    source: str,
    tokenizer: Tokenizer | str,
    out: str,
    text_feature: str = "text",
    val_fraction: float = VAL_FRACTION,
    shard_tokens: int = SHARD_TOKENS,
    encoding: str = "",
    skip_bad: bool = False,
    window: int = WINDOW_TOKENS,
    processes: int = 0,
    part: str = "",
    log: Log | None = None,
) -> None:
    """Tokenizes all documents of `source` into the directory `out`; does nothing if they are there already.

    The hash of a document's text decides whether it belongs to the validation split, so equal texts are in one split.
    Where that leaves a split without a window, it gets the documents nearest to the boundary. A single document is
    divided by position: its last part is for validation.

    Args:
        source: as data.source.
        tokenizer: makes the ids; a name is as data.tokenizer.
        out: the directory to write.
        text_feature: the feature, field or column that has the text, of a tfds:, jsonl:, csv: or parquet: source.
        val_fraction: the share of the documents that is for validation.
        shard_tokens: the size of each shard except a split's last one.
        encoding: of text files; "" means UTF-8.
        skip_bad: leave rows without a text out, and count them.
        window: tokens that each split gets at least, as far as there are enough.
        processes: that tokenize; 0 means one per CPU. The bytes do not depend on it.
        part: "k/n" writes the k-th of n parts to `out`.parts, and "join" makes `out` of them.
        log: receives the progress, a line at a time; the logger `gptjax` if None.

    Raises:
        ConfigError: an argument is wrong, or `out` holds something else.
        DataError: a file is no text or cannot be read, or there is too little text for two splits.
        UnavailableError: a TFDS data set cannot be downloaded.
        WorkdirError: `out` cannot be written.
    """
    log = log or logging.getLogger("gptjax").info
    source = sources.canonical_name(source)
    out = _absolute(out)
    _check_arguments(source, out, val_fraction, shard_tokens)
    if isinstance(tokenizer, str):
        reading = Reading(text_feature=text_feature, encoding=encoding, skip_bad=skip_bad)
        tokenizer = open_data_tokenizer(tokenizer, out, source=source, share=val_fraction, reading=reading, log=log)
    settings: dict[str, Any] = {
        "source": source,
        "text_feature": text_feature,
        "tokenizer_sha256": tokenizer.sha256,
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
        "encoding": encoding,
        "skip_bad": skip_bad,
        "window": window,
    }
    target, partial, write = _choose_work(part, out, settings, processes)
    if _is_done(out, settings, tokenizer) and not os.path.exists(partial):
        log(f"{out}: already prepared from {source}")
        return
    made = missing_parts(os.path.dirname(partial))
    with reporting_write_errors(target), hold(partial, target, log):
        if _is_done(out, settings, tokenizer):
            log(f"{out}: already prepared from {source}, by another process or before a kill")
        elif target != out and os.path.exists(target):
            parts.check_part(target, settings | files_now(source))
            log(f"{target}: already prepared")
        else:
            try:
                now = files_now(source) if part == JOIN else {}
                write(partial, target, settings | now, tokenizer=tokenizer, log=log)
            except UserError:
                if read_journal(partial) is None:  # nothing had begun, so nothing is left behind
                    remove(partial)
                    remove_directories(made)
                raise
        if os.path.exists(partial):
            remove(partial)


def _absolute(out: str) -> str:
    """Returns the absolute path of a local directory.

    Raises:
        ConfigError: it is in a bucket.
    """
    require_local(out, field="out")
    return os.path.abspath(out)


def _choose_work(part: str, out: str, settings: dict[str, Any], processes: int) -> tuple[str, str, Callable[..., None]]:
    """Returns the directory to write, the one for unfinished work, and the function that writes; adds to `settings`.

    Raises:
        ConfigError: `part` is none.
    """
    if processes < 0:
        raise ConfigError("must be 0, for one per CPU, or above", field="processes", value=processes)
    processes = processes or workers.usable_cpus()
    if part == JOIN:
        return out, f"{out}.join.partial", parts.join_parts
    if part:
        settings["part"] = list(parts.parse_part(part))
        target = parts.path_of(out, *settings["part"])
        return target, f"{target}.partial", functools.partial(parts.write_part, processes=processes)
    return out, f"{out}.partial", functools.partial(preparation.write_data, processes=processes)


def _check_arguments(
    source: str,
    out: str,
    val_fraction: float,
    shard_tokens: int,
) -> None:
    if not isinstance(val_fraction, numbers.Real) or not 0 < val_fraction < 1:
        raise ConfigError(
            "must be above 0 and below 1",
            field="val_fraction",
            value=val_fraction,
        )
    if not isinstance(shard_tokens, numbers.Integral) or not 1 <= shard_tokens <= LARGEST_COUNT:
        raise ConfigError(
            f"must be from 1 to {LARGEST_COUNT}",
            field="shard_tokens",
            value=shard_tokens,
        )
    path = source.partition(":")[2]
    if sources.is_files(source) and path != PIPE and os.path.commonpath([out, path]) == path:
        raise ConfigError(
            f"is inside the source {source}, and would become a part of it",
            field=out,
            remedy="choose another --out",
        )


def _is_done(out: str, settings: dict[str, Any], tokenizer: Tokenizer) -> bool:
    """Returns whether `out` holds this data; False if it does not exist or is empty.

    Raises:
        ConfigError: `out` holds something else, or was prepared from other files or with other options.
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
    if meta.source != settings["source"] or not tokenizer.has_hash(meta.tokenizer_sha256, meta.tokenizer):
        raise ConfigError(
            f"already prepared from source {meta.source} and tokenizer {meta.tokenizer}",
            field=out,
            remedy="choose another --out, or remove it",
        )
    changes = changed_since(meta, settings, may_connect=True)
    if changes:
        raise ConfigError(
            f"was prepared {changes}",
            field=out,
            remedy="remove it and prepare again, or choose another --out",
        )
    return True


def default_path(source: str, tokenizer: str) -> str:
    """Returns the directory for the data of a source and a tokenizer, as data.source and data.tokenizer name them.

    >>> default_path("tfds:wiki40b/en", "gpt2")
    'data/tfds-wiki40b-en-gpt2'
    """
    kind, _, path = source.partition(":")
    if sources.is_files(source) or is_tfds_directory(source) or is_remote(path):
        source = f"{kind}-{_shorten(os.path.expanduser(path))}"
    if tokenizer not in ("gpt2", "bytes") and not is_own(tokenizer):
        tokenizer = _shorten(tokenizer)
    return os.path.join("data", f"{_make_safe(source)}-{_make_safe(tokenizer)}")


def _shorten(path: str) -> str:
    """Returns the last part of the path, with a hash that distinguishes it from other paths with that last part."""
    path = path.rstrip("/") if is_remote(path) else os.path.abspath(path)
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()
    return f"{os.path.basename(path)}-{digest[:8]}"


def _make_safe(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name).strip("-")


def ensure_prepared(config: DataConfig, tokenizer: Tokenizer | None = None, *, window: int = WINDOW_TOKENS) -> str:
    """Returns the directory of the data that `config` names, prepared now if it is missing and needs no network.

    tokenizer: of the data; None means data.tokenizer.
    window: tokens that each split gets at least: one more than the run's block_size.

    Raises:
        ConfigError: it is missing and data.path names it, or it would have to be downloaded; the remedy is a command.
            Or it was prepared from other files or with other options than the config's.
        UserError: as `prepare`.
    """
    path = config.path or default_path(config.source, config.tokenizer)
    if os.path.isdir(path) and not is_empty(path):
        if not config.path:  # which takes a directory as it is
            _check_unchanged(path, config)
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
        tokenizer=tokenizer or config.tokenizer,
        out=path,
        text_feature=config.text_feature,
        val_fraction=config.val_fraction,
        window=window,
    )
    return path


def _check_unchanged(path: str, config: DataConfig) -> None:
    """Checks that a directory holds the source as it is now.

    Raises:
        ConfigError: the source's files or the options have changed since it was prepared.
    """
    meta = read_meta(path)
    if meta is None:
        return
    changes = changed_since(meta, {"val_fraction": config.val_fraction, "text_feature": config.text_feature})
    if changes:
        raise ConfigError(
            f"was prepared {changes}",
            field=path,
            remedy=f"remove it to prepare it again, or take it as it is with --config.data.path={path}",
        )


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
    if config.val_fraction != VAL_FRACTION:
        command.append(f"--val_fraction={config.val_fraction}")
    command.append(f"--out={path}")
    return shlex.join(command)


def _parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--source", default="stdlib", help=f"The documents: {sources.kinds()}.")
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        metavar="NAME",
        help="The tokenizer: gpt2, bytes, bpe:N to train one of N ids, a file, a directory or hf:OWNER/NAME.",
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
        help="The feature, field or column that holds the text, of a tfds:, jsonl:, csv: or parquet: source.",
    )
    parser.add_argument(
        "--val_fraction",
        type=float,
        default=VAL_FRACTION,
        help="The share of documents that is kept for validation. Take 0.0005 for a big corpus.",
    )
    parser.add_argument("--shard_tokens", type=int, default=SHARD_TOKENS, help="The number of tokens per shard.")
    parser.add_argument(
        "--encoding",
        default="",
        help="The encoding of text files, such as utf-16 or latin-1. By default it is UTF-8, and a file that is not is "
        "refused.",
    )
    parser.add_argument(
        "--skip_bad",
        action="store_true",
        help="Leave rows without a text out, and count them. By default the first one ends the command.",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=0,
        help="The number of processes that tokenize. By default it is the number of CPUs.",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--part",
        default="",
        metavar="K/N",
        help="Write only the K-th of N parts of the source, to the directory DIR.parts. By default all is written.",
    )
    group.add_argument(
        "--join",
        action="store_const",
        const=JOIN,
        dest="part",
        help="Make DIR of all parts in DIR.parts, which may come from other machines.",
    )
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
    out = args.out or default_path(args.source, args.tokenizer)
    if args.verify:
        verify(out, None if is_own(args.tokenizer) else open_tokenizer(args.tokenizer))
        say(f"{out}: every shard is as it was written")
        return
    go_on_without_output()  # the product is the directory
    prepare(
        source=args.source,
        tokenizer=args.tokenizer,
        out=out,
        text_feature=args.text_feature,
        val_fraction=args.val_fraction,
        shard_tokens=args.shard_tokens,
        encoding=args.encoding,
        skip_bad=args.skip_bad,
        processes=args.processes,
        part=args.part,
        log=say,
    )


def cli() -> None:
    """Runs the command, and exits with its code."""
    run_cli(main)


if __name__ == "__main__":
    cli()
