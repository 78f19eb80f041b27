"""Documents to token shards: `python -m gptjax.data.prepare --source=stdlib --tokenizer=gpt2 --out=DIR`.

The work happens in `DIR.partial`, where a journal says how far it has come; killed at any moment, the same command
continues and ends in the same bytes. DIR appears when all is done.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

import numpy as np

from gptjax import runtime
from gptjax.config import DataConfig
from gptjax.data import sources, tokens
from gptjax.data.tokenizer import Tokenizer, load_tokenizer
from gptjax.errors import ConfigError, DataError, UserError, WorkdirError

VAL_FRACTION = 0.05
SHARD_TOKENS = 100_000_000
BATCH_BYTES = 8 * 2**20  # of text held in memory at a time, give or take a document
REPORT_SECONDS = 10.0
SHARD_NAMES = {"train": "train_{:06d}.bin", "validation": "val_{:06d}.bin"}
TOKENIZER_FILE = "tokenizer.json"
LOCK_FILE = "lock"

Log = Callable[[str], None]


@dataclasses.dataclass
class Counts:
    """What one split has received so far."""

    tokens: int = 0
    bytes: int = 0
    documents: int = 0


@dataclasses.dataclass
class Journal:
    """How far a preparation has come: everything up to here is on disk."""

    settings: dict[str, Any]  # a journal with other settings is of another preparation
    documents: int = 0  # taken from the source
    digest: str = ""  # of those, chained, so that a changed source is noticed
    splits: dict[str, Counts] = dataclasses.field(default_factory=lambda: {split: Counts() for split in SHARD_NAMES})


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

    A document belongs to the validation split if the hash of its text says so, thus equal texts are in the same split.

    Args:
        val_fraction: of the documents.
        shard_tokens: the size of every shard of a split but the last.
        log: takes a line at a time; the logger `gptjax` if None.

    Raises:
        ConfigError: an argument is wrong, or `out` holds something else.
        DataError: a document cannot be read, or a split would be empty.
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
    with _locked(partial, out, log):
        if _is_done(out, source, tokenizer):
            log(f"{out}: already prepared from {source}, by another process or before a kill")
        else:
            try:
                _prepare_locked(partial, out, settings, tokenizer=tokenizer, log=log)
            except UserError:
                if _read_journal(partial) is None:  # nothing had begun, so nothing is left behind
                    _remove(partial)
                raise
        _remove(partial)


def _check_arguments(source: str, out: str, val_fraction: float, shard_tokens: int) -> None:
    if not 0 < val_fraction < 1:
        raise ConfigError(f"val_fraction={val_fraction}: must be above 0 and below 1")
    if not 1 <= shard_tokens <= tokens.LARGEST_COUNT:
        raise ConfigError(f"shard_tokens={shard_tokens}: must be from 1 to {tokens.LARGEST_COUNT}")
    kind, _, path = source.partition(":")
    if kind in ("text", "lines") and os.path.commonpath([out, path]) == path:
        raise ConfigError(f"{out}: lies in the source {source}, of which it would become a part: choose another --out")


def _is_done(out: str, source: str, tokenizer: Tokenizer) -> bool:
    """Returns whether `out` holds this data; False if nothing is there.

    Raises:
        ConfigError: `out` holds something else.
    """
    if not os.path.lexists(out) or (os.path.isdir(out) and not os.listdir(out)):
        return False
    if not os.path.isdir(out) or (meta := tokens.read_meta(out)) is None:
        raise ConfigError(f"{out}: exists and was not written by prepare: choose another --out, or remove it")
    if (meta.source, meta.tokenizer_sha256) != (source, tokenizer.sha256):
        found = f"source {meta.source} and tokenizer {meta.tokenizer}"
        raise ConfigError(f"{out}: already prepared from {found}: choose another --out, or remove it")
    return True


@contextlib.contextmanager
def _locked(partial: str, out: str, log: Log) -> Iterator[None]:
    """Waits until no other process prepares `out`; the kernel frees the lock of a dead one."""
    path = os.path.join(partial, LOCK_FILE)
    descriptor = None
    while descriptor is None:
        os.makedirs(partial, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the folder's owner has just finished
            descriptor = _try_lock(path, out, log)
    try:
        yield
    finally:
        os.close(descriptor)


def _remove(partial: str) -> None:
    """Removes the folder, its lock last."""
    for name in os.listdir(partial):
        path = os.path.join(partial, name)
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif name != LOCK_FILE:
            os.remove(path)
    os.remove(os.path.join(partial, LOCK_FILE))
    # Another process may have made a new lock in it by now, and will remove both.
    with contextlib.suppress(OSError):
        os.rmdir(partial)


def _try_lock(path: str, out: str, log: Log) -> int | None:
    """Returns the locked file, None if it was removed while we waited: whoever held it has finished."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log(f"{out}: another process is preparing it: waiting")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
        return descriptor
    os.close(descriptor)
    return None


def _prepare_locked(partial: str, out: str, settings: dict[str, Any], *, tokenizer: Tokenizer, log: Log) -> None:
    name = settings["source"]
    source = sources.open_source(name, text_feature=settings["text_feature"], work_dir=os.path.join(partial, "source"))
    if source.total_documents == 1:
        _raise_empty("validation", 1, name)
    shards = os.path.join(partial, "shards")
    journal, documents = _resume(partial, settings, source, log)
    _truncate_shards(shards, journal, tokenizer)
    with _reporter(source, log) as report:
        for batch in _batches(documents):
            _write_batch(shards, batch, journal, tokenizer)
            _write_journal(partial, journal)
            report(journal)
    for split, counts in journal.splits.items():
        if not counts.documents:
            _raise_empty(split, journal.documents, name)
    _finish(shards, out, journal, tokenizer)
    train, validation = (journal.splits[split] for split in ("train", "validation"))
    log(f"{out}: {train.tokens:,} tokens to train on, {validation.tokens:,} to validate, {tokenizer.name} ids")


def _resume(
    partial: str, settings: dict[str, Any], source: sources.Source, log: Log
) -> tuple[Journal, Iterator[sources.Document]]:
    """Returns the journal to continue, and the documents that it has not counted yet."""
    journal = _read_journal(partial)
    if journal is None:
        return Journal(settings), _nonempty(source)
    if journal.settings != settings:
        log("the unfinished preparation had other settings: starting over")
        return Journal(settings), _nonempty(source)
    documents, digest = _nonempty(source), ""
    for name, text in itertools.islice(documents, journal.documents):
        digest = _chain(digest, name, _hash(text))
    if digest != journal.digest:
        log("the source has changed since the preparation was interrupted: starting over")
        return Journal(settings), _nonempty(source)
    log(f"continuing after {journal.documents:,} documents")
    return journal, documents


def _nonempty(source: sources.Source) -> Iterator[sources.Document]:
    return (document for document in source.documents() if document[1])


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _chain(digest: str, name: str, text_hash: bytes) -> str:
    """Returns the hash of all documents so far: unlike a running sha256, it can be written down and continued."""
    return hashlib.sha256(digest.encode() + os.fsencode(name) + b"\0" + text_hash).hexdigest()


def _choose_split(text_hash: bytes, val_fraction: float) -> str:
    share = int.from_bytes(text_hash[:6], "big") / 2**48  # uniform in [0, 1)
    return "validation" if share < val_fraction else "train"


def _batches(documents: Iterator[sources.Document]) -> Iterator[list[sources.Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_batch(shards: str, batch: list[sources.Document], journal: Journal, tokenizer: Tokenizer) -> None:
    """Appends the documents to their splits' shards and counts them; on return they are on disk."""
    dtype = tokens.token_dtype(tokenizer.vocab_size)
    appended: dict[str, list[np.ndarray]] = {split: [] for split in SHARD_NAMES}
    for (name, text), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch]), strict=True):
        text_hash = _hash(text)
        split = _choose_split(text_hash, journal.settings["val_fraction"])
        appended[split].append(np.array([*ids, tokenizer.eot_id], dtype))
        journal.splits[split].bytes += len(text.encode())
        journal.splits[split].documents += 1
        journal.documents += 1
        journal.digest = _chain(journal.digest, name, text_hash)
    for split, arrays in appended.items():
        if arrays:
            ids = np.concatenate(arrays)
            _append(shards, split, ids, start=journal.splits[split].tokens, size=journal.settings["shard_tokens"])
            journal.splits[split].tokens += len(ids)


def _append(shards: str, split: str, ids: np.ndarray, *, start: int, size: int) -> None:
    """Writes `ids` behind the first `start` tokens of the split, whose shards hold `size` tokens each."""
    while len(ids):
        index, used = divmod(start, size)
        taken, ids = np.split(ids, [size - used])
        with _synced(_shard_path(shards, split, index), "ab") as file:
            if used == 0:
                file.write(bytes(tokens.HEADER_BYTES))  # the header's place; it counts what is not known yet
            file.write(taken.tobytes())
        start += len(taken)


@contextlib.contextmanager
def _synced(path: str, mode: str) -> Iterator[BinaryIO]:
    """Yields the open file; what was written to it is on disk afterwards."""
    with open(path, mode) as opened:
        file = cast(BinaryIO, opened)
        yield file
        file.flush()
        os.fsync(file.fileno())


def _shard_path(shards: str, split: str, index: int) -> str:
    return os.path.join(shards, SHARD_NAMES[split].format(index))


def _shard_lengths(journal: Journal, split: str) -> list[int]:
    """Returns the number of tokens in each shard."""
    size = journal.settings["shard_tokens"]
    full, rest = divmod(journal.splits[split].tokens, size)
    return [size] * full + [rest] * bool(rest)


def _truncate_shards(shards: str, journal: Journal, tokenizer: Tokenizer) -> None:
    """Takes away what was written after the journal was."""
    os.makedirs(shards, exist_ok=True)
    width = tokens.token_dtype(tokenizer.vocab_size).itemsize
    kept = {
        os.path.basename(_shard_path(shards, split, index)): tokens.HEADER_BYTES + length * width
        for split in SHARD_NAMES
        for index, length in enumerate(_shard_lengths(journal, split))
    }
    for name in os.listdir(shards):
        if name not in kept:
            os.remove(os.path.join(shards, name))
    for name, size in kept.items():
        path = os.path.join(shards, name)
        if not os.path.exists(path) or os.path.getsize(path) < size:
            raise DataError(f"{path}: less is left than the journal says: remove {os.path.dirname(shards)}")
        os.truncate(path, size)


def _finish(shards: str, out: str, journal: Journal, tokenizer: Tokenizer) -> None:
    """Writes headers, hashes, the tokenizer and meta.json, and gives the folder its name."""
    meta = tokens.Meta(
        source=journal.settings["source"],
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        eot_position="last",
        splits={split: _finish_split(shards, split, journal, tokenizer) for split in SHARD_NAMES},
    )
    tokenizer.save(os.path.join(shards, TOKENIZER_FILE))
    tokens.write_meta(shards, meta)
    _sync_directory(shards)
    os.rename(shards, out)
    _sync_directory(os.path.dirname(out))


def _finish_split(shards: str, split: str, journal: Journal, tokenizer: Tokenizer) -> tokens.SplitMeta:
    known = []
    for index, count in enumerate(_shard_lengths(journal, split)):
        path = _shard_path(shards, split, index)
        with _synced(path, "r+b") as file:
            file.write(tokens.make_header(count, tokens.token_dtype(tokenizer.vocab_size)))
        known.append(tokens.ShardMeta(os.path.basename(path), count, tokens.hash_file(path)))
    counts = journal.splits[split]
    return tokens.SplitMeta(counts.tokens, counts.bytes, counts.documents, tuple(known))


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_journal(partial: str, journal: Journal) -> None:
    path = os.path.join(partial, "journal.json")
    with _synced(path + ".tmp", "wb") as file:
        file.write(json.dumps(dataclasses.asdict(journal)).encode())
    os.replace(path + ".tmp", path)
    _sync_directory(partial)


def _read_journal(partial: str) -> Journal | None:
    """Returns None where there is no journal that could be continued."""
    path = os.path.join(partial, "journal.json")
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        values["splits"] = {split: Counts(**values["splits"][split]) for split in SHARD_NAMES}
        return Journal(**values)
    except (ValueError, KeyError, TypeError):  # of another version: its shards are cut to nothing
        return None


def _raise_empty(split: str, documents: int, source: str) -> None:
    remedy = "--val_fraction" if documents > 1 else "more than one document"
    if source.startswith("text:"):
        remedy += f", or --source=lines:{source.removeprefix('text:')} to take each line for a document"
    raise DataError(f"{source}: no document for the {split} split, out of {documents:,} in all: try {remedy}")


@contextlib.contextmanager
def _reporter(source: sources.Source, log: Log) -> Iterator[Callable[[Journal], None]]:
    """Yields what shows the progress: a bar on a terminal, elsewhere a line now and then."""
    if sys.stderr.isatty():
        with _terminal_reporter(source) as bar:
            yield bar
        return
    begun = last = time.monotonic()
    first: float | None = None  # the share that was done when we started

    def report(journal: Journal) -> None:
        nonlocal last, first
        now, share = time.monotonic(), _share(source, journal)
        first = share if first is None else first
        if now - last < REPORT_SECONDS:
            return
        last = now
        count = sum(counts.tokens for counts in journal.splits.values())
        eta = f", ETA {(now - begun) * (1 - share) / (share - first):.0f} s" if share > first else ""
        log(f"{journal.documents:,} documents, {count:,} tokens{eta}")

    yield report


@contextlib.contextmanager
def _terminal_reporter(source: sources.Source) -> Iterator[Callable[[Journal], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # here: only where it is shown

    columns = (TextColumn("{task.fields[done]}"), BarColumn(), TextColumn("ETA"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=1.0 if source.total_bytes or source.total_documents else None, done="")

        def report(journal: Journal) -> None:
            count = sum(counts.tokens for counts in journal.splits.values())
            done = f"{journal.documents:,} documents, {count:,} tokens"
            progress.update(task, completed=_share(source, journal), done=done)

        yield report


def _share(source: sources.Source, journal: Journal) -> float:
    """Returns the part of the source that is done, 0 if its size is not known."""
    done_bytes = sum(counts.bytes for counts in journal.splits.values())
    if source.total_bytes:
        return min(1.0, done_bytes / source.total_bytes)
    return min(1.0, journal.documents / source.total_documents) if source.total_documents else 0.0


def default_path(source: str, tokenizer: str) -> str:
    """Returns the directory for the data of `source`, as `data.tokenizer` names its ids.

    >>> default_path("tfds:wiki40b/en", "gpt2")
    'data/tfds-wiki40b-en-gpt2'
    """
    kind, _, path = source.partition(":")
    if kind in ("text", "lines"):
        source = f"{kind}-{_shorten(path)}"
    if tokenizer not in ("gpt2", "bytes"):
        tokenizer = _shorten(tokenizer)
    return os.path.join("data", f"{_make_safe(source)}-{_make_safe(tokenizer)}")


def _shorten(path: str) -> str:
    """Returns the last part of the path, and what tells it from others with the same last part."""
    path = os.path.abspath(path)
    return f"{os.path.basename(path)}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"


def _make_safe(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name).strip("-")


def ensure_prepared(config: DataConfig) -> str:
    """Returns the directory of the data that `config` names, prepared now if it is missing and needs no network.

    Raises:
        ConfigError: it is missing, and would have to be downloaded, or data.path names it; the message has the command.
    """
    path = config.path or default_path(config.source, config.tokenizer)
    if os.path.isdir(path) and os.listdir(path):
        return path
    command = ["python", "-m", "gptjax.data.prepare", f"--source={config.source}", f"--tokenizer={config.tokenizer}"]
    command += [f"--text_feature={config.text_feature}"] * (config.text_feature != "text") + [f"--out={path}"]
    if sources.needs_network(config.source):
        raise ConfigError(f"{path}: no data yet, and training downloads nothing; run: {shlex.join(command)}")
    if config.path:  # perhaps mistyped: training on other data in silence would be the worst answer
        raise ConfigError(f"data.path={path!r}: no data there; correct it, or run: {shlex.join(command)}")
    logging.getLogger("gptjax").info("%s: no data yet; preparing it, once, as does: %s", path, shlex.join(command))
    prepare(
        source=config.source, tokenizer=load_tokenizer(config.tokenizer), out=path, text_feature=config.text_feature
    )
    return path


def _parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = runtime.Parser(__doc__)
    parser.add_argument("--source", default="stdlib", help=sources.KINDS)
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, bytes, or a saved tokenizer file")
    parser.add_argument("--out", default="", help="the directory to write; by default data/<source>-<tokenizer>")
    parser.add_argument("--text_feature", default="text", help="of a tfds: source")
    parser.add_argument(
        "--val_fraction", type=float, default=VAL_FRACTION, help="of documents; 0.0005 for a big corpus"
    )
    parser.add_argument("--shard_tokens", type=int, default=SHARD_TOKENS, help="tokens per shard")
    parser.add_argument("--verify", action="store_true", help="check every byte of --out instead of writing it")
    return parser.parse_strictly(arguments)


def main(arguments: list[str]) -> None:
    args = _parse_arguments(arguments)
    tokenizer = load_tokenizer(args.tokenizer)
    out = args.out or default_path(args.source, args.tokenizer)
    if args.verify:
        tokens.verify(out, tokenizer)
        print(f"{out}: every shard is as it was written")
        return
    try:
        prepare(
            source=args.source,
            tokenizer=tokenizer,
            out=out,
            text_feature=args.text_feature,
            val_fraction=args.val_fraction,
            shard_tokens=args.shard_tokens,
            log=lambda line: print(line, flush=True),
        )
    except OSError as error:
        raise WorkdirError(f"--out={out}: cannot be written: {error}") from error


def cli() -> None:
    runtime.run_cli(main)


if __name__ == "__main__":
    cli()
