"""The work of a preparation: reads documents, assigns them to splits, and writes shards and a journal."""

import dataclasses
import itertools
import os
from collections.abc import Iterator
from typing import Any

from gptjax.data import shard_writer, sources
from gptjax.data.assign import Assignment, better_boundary, halves
from gptjax.data.file_sources import Reading, describe_files
from gptjax.data.journal import Journal, chain, hash_text, read_journal, write_journal
from gptjax.data.progress import Log, reporter
from gptjax.data.source import Document, Source
from gptjax.data.text_files import PIPE
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import DataError

BATCH_BYTES = 8 * 2**20  # of text held in memory at a time, give or take a document


def write_data(
    partial: str,
    out: str,
    settings: dict[str, Any],
    *,
    tokenizer: Tokenizer,
    log: Log,
) -> None:
    """Writes the data that `settings` describe to `out`, by way of the directory `partial`, which this process holds.

    Raises:
        UserError: as `prepare`.
    """
    name = settings["source"]
    reading = Reading(
        text_feature=settings["text_feature"],
        encoding=settings["encoding"],
        skip_bad=settings["skip_bad"],
    )
    source = sources.open_source(name, work_dir=os.path.join(partial, "source"), reading=reading)
    if source.left_out:
        log(f"{name}: {source.left_out}")
    if source.is_pipe:
        log(f"{name}: if it is interrupted, it starts over")
    settings = settings | {"files": describe_files(source.files)}
    assignment = Assignment(
        settings["val_fraction"],
        is_single=source.total_documents == 1,
        names=sorted(source.validation),
    )
    folder = os.path.join(partial, "shards")
    journal = _write_all(partial, settings, assignment, source=source, tokenizer=tokenizer, log=log, is_first=True)
    better = _better_assignment(journal)
    if better is not None:
        if source.is_pipe:
            raise _too_little_error(journal, name)
        log(_describe_change(journal, better))
        journal = _write_all(partial, settings, better, source=source, tokenizer=tokenizer, log=log, is_first=False)
    if not all(counts.documents for counts in journal.splits.values()):
        raise _too_little_error(journal, name)
    shard_writer.finish(
        folder,
        out,
        journal=journal,
        tokenizer=tokenizer,
    )
    if reading.skipped:
        log(f"{name}: left out {reading.skipped:,} bad rows")
    train = journal.splits["train"].tokens
    validation = journal.splits["validation"].tokens
    log(f"{out}: {train:,} tokens to train on, {validation:,} to validate, {tokenizer.name} ids")


def _write_all(
    partial: str,
    settings: dict[str, Any],
    assignment: Assignment,
    *,
    source: Source,
    tokenizer: Tokenizer,
    log: Log,
    is_first: bool,
) -> Journal:
    """Writes all documents to the shards in `partial`, from where an interrupted preparation ended.

    is_first: a journal with a better assignment, from an interrupted preparation, is continued with it.
    """
    folder = os.path.join(partial, "shards")
    settings = settings | dataclasses.asdict(assignment)
    journal, documents = _resume(partial, settings, source, tokenizer=tokenizer, log=log, is_first=is_first)
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
    return journal


def _better_assignment(journal: Journal) -> Assignment | None:
    """Returns how the documents of a finished journal are better assigned; None if they are well assigned."""
    settings = journal.settings
    if settings["is_single"] or settings["names"] or settings["boundary"] != settings["val_fraction"]:
        return None  # it is the better one already
    if journal.documents == 1:
        return Assignment(settings["boundary"], is_single=True)
    boundary = better_boundary(
        {split: counts.tokens for split, counts in journal.splits.items()},
        {split: [(share, int(tokens)) for share, tokens in near] for split, near in journal.near.items()},
        boundary=settings["boundary"],
        window=settings["window"],
    )
    return None if boundary is None else Assignment(boundary)


def _describe_change(journal: Journal, better: Assignment) -> str:
    if better.is_single:
        return "one document only: its last part is for validation; starting over"
    small = min(journal.splits, key=lambda split: journal.splits[split].tokens)
    tokens = journal.splits[small].tokens
    return f"{small}: {tokens:,} tokens are too few, so it gets the documents nearest to it, too; starting over"


def _resume(
    partial: str,
    settings: dict[str, Any],
    source: Source,
    *,
    tokenizer: Tokenizer,
    log: Log,
    is_first: bool,
) -> tuple[Journal, Iterator[Document]]:
    """Returns the journal to continue, and the documents that it has not counted yet."""

    def documents_of(journal: Journal) -> Iterator[Document]:
        documents = _nonempty(source)
        if not journal.settings["is_single"]:
            return documents
        return _divide(documents, journal.settings, tokenizer)

    fresh = Journal(settings)
    # What a pipe has given to a comparison it does not give again.
    journal = None if source.is_pipe else read_journal(partial)
    if journal is None:
        return fresh, documents_of(fresh)
    chosen = {field.name for field in dataclasses.fields(Assignment)}
    if _without(journal.settings, chosen) != _without(settings, chosen):
        log("the unfinished preparation had other settings, or its files have changed: starting over")
        return fresh, documents_of(fresh)
    if not is_first and journal.settings != settings:  # the journal of the first assignment
        return fresh, documents_of(fresh)
    documents = documents_of(journal)
    digest = ""
    for name, text in itertools.islice(documents, journal.documents):
        digest = chain(digest, name, hash_text(text))
    if digest != journal.digest:
        log("the source has changed since the preparation was interrupted: starting over")
        return fresh, documents_of(fresh)
    if journal.documents:
        log(f"continuing after {journal.documents:,} documents")
    return journal, documents


def _without(settings: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _divide(documents: Iterator[Document], settings: dict[str, Any], tokenizer: Tokenizer) -> Iterator[Document]:
    """Yields both parts of the only document."""
    for document in documents:
        parts = halves(
            document,
            val_fraction=settings["val_fraction"],
            tokenizer=tokenizer,
            window=settings["window"],
        )
        for name, text in parts:
            if text:
                yield name, text


def _nonempty(source: Source) -> Iterator[Document]:
    for name, text in source.documents():
        if text:
            yield name, text


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
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


def _too_little_error(journal: Journal, source: str) -> DataError:
    """Returns the error for documents that cannot be divided into two splits."""
    documents = journal.documents - journal.settings["is_single"]
    remedy = "add text"
    if documents > 1:
        remedy = "add documents with other texts: equal texts stay in one split"
    if source.endswith(f":{PIPE}"):
        remedy = "write it to a file, which can be read twice"
        if documents > 1:
            remedy += ", or set --val_fraction"
    return DataError(
        f"too little text for a train and a validation split, documents: {documents:,}",
        field="data.source",
        value=source,
        remedy=remedy,
    )
