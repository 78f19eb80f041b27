"""The work of a preparation: reads documents, assigns them to splits, and writes shards and a journal."""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from gptjax.data import shard_writer, sources
from gptjax.data.assign import Assignment, better_boundary, halves
from gptjax.data.encoding import Encoded
from gptjax.data.file_sources import describe_files
from gptjax.data.journal import Journal, read_journal, write_journal
from gptjax.data.progress import Log, reporter
from gptjax.data.readers import Reading
from gptjax.data.sections import keeps_tokens
from gptjax.data.source import Document, Place, Source
from gptjax.data.text_files import PIPE
from gptjax.data.tokenizer import Tokenizer
from gptjax.data.workers import encode_all
from gptjax.errors import DataError

TASK_BYTES = 2**20  # of text that a process encodes at a time, give or take a document
BATCH_BYTES = 8 * 2**20  # of text that is written to disk at a time


@dataclasses.dataclass(frozen=True)
class Work:
    """The source and how to read it. Only the source, its tokenizer and its part change the bytes of the shards."""

    source: Source
    reading: Reading
    tokenizer: Tokenizer
    processes: int
    log: Log
    start: Place = Place()
    stop: Place | None = None  # None: to the end

    @property
    def files(self) -> dict[str, Any]:
        """What meta.json records of the source's files."""
        return describe_files(self.source.files, self.source.revision)


def write_data(
    partial: str,
    out: str,
    settings: dict[str, Any],
    *,
    tokenizer: Tokenizer,
    processes: int,
    log: Log,
) -> None:
    """Writes the data that `settings` describe to `out`, by way of the directory `partial`, which this process holds.

    Raises:
        UserError: as `prepare`.
    """
    work = open_work(partial, settings, tokenizer=tokenizer, processes=processes, log=log)
    source = work.source
    name = source.name
    settings = settings | {"files": work.files, "stamp": source.stamp}
    assignment = first_assignment(source, settings)
    folder = os.path.join(partial, "shards")
    journal = write_documents(partial, settings | dataclasses.asdict(assignment), work, is_first=True)
    better = better_assignment(journal)
    if better is not None:
        if source.is_pipe:
            raise _too_little_error(journal, name)
        log(_describe_change(journal, better))
        journal = write_documents(partial, settings | dataclasses.asdict(better), work, is_first=False)
    if not all(counts.documents for counts in journal.splits.values()):
        raise _too_little_error(journal, name)
    shard_writer.finish(
        folder,
        out,
        journal=journal,
        tokenizer=tokenizer,
    )
    if journal.skipped:
        log(f"{name}: left out {journal.skipped:,} bad rows")
    train = journal.splits["train"].tokens
    validation = journal.splits["validation"].tokens
    log(f"{out}: {train:,} tokens to train on, {validation:,} to validate, {tokenizer.name} ids")


def open_work(
    partial: str,
    settings: dict[str, Any],
    *,
    tokenizer: Tokenizer,
    processes: int,
    log: Log,
) -> Work:
    """Returns the work of a preparation of the source that `settings` name.

    Raises:
        UserError: as `sources.open_source`.
    """
    reading = Reading(
        text_feature=settings["text_feature"],
        encoding=settings["encoding"],
        skip_bad=settings["skip_bad"],
    )
    name = settings["source"]
    source = sources.open_source(name, work_dir=os.path.join(partial, "source"), reading=reading)
    if source.left_out:
        log(f"{name}: {source.left_out}")
    if source.is_pipe:
        log(f"{name}: if it is interrupted, it starts over")
    return Work(source, reading, tokenizer, processes, log)


def first_assignment(source: Source, settings: dict[str, Any]) -> Assignment:
    """Returns how documents are assigned to splits, before their tokens are counted."""
    return Assignment(
        settings["val_fraction"],
        is_single=source.total_documents == 1,
        names=sorted(source.validation),
    )


def write_documents(
    partial: str,
    settings: dict[str, Any],
    work: Work,
    *,
    is_first: bool,
) -> Journal:
    """Writes all documents to the shards in `partial`, from where an interrupted preparation ended.

    settings: those of the preparation, and how documents are assigned to splits.
    is_first: a journal with a better assignment, from an interrupted preparation, is continued with it.
    """
    folder = os.path.join(partial, "shards")
    journal = _resume(partial, settings, work, is_first=is_first)
    shard_writer.truncate_shards(folder, journal, work.tokenizer)
    batches = _batches(_documents(journal, work))
    with reporter(work.source, work.log, parts=settings.get("part", [1, 1])[1]) as report:
        for group in _groups(encode_all(batches, work.tokenizer, processes=work.processes)):
            # The journal comes last: a kill before it repeats the group, after truncating the shards.
            shard_writer.write_batch(folder, group, journal=journal)
            write_journal(partial, journal)
            report(journal)
    journal.skipped = work.reading.skipped
    return journal


def better_assignment(journal: Journal) -> Assignment | None:
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


def _resume(partial: str, settings: dict[str, Any], work: Work, *, is_first: bool) -> Journal:
    """Returns the journal to continue: an empty one if there is none, or none of this preparation."""
    fresh = Journal(settings, place=work.start)
    # What a pipe has given to a comparison it does not give again.
    journal = None if work.source.is_pipe else read_journal(partial)
    if journal is None:
        return fresh
    chosen = {field.name for field in dataclasses.fields(Assignment)}
    if _without(journal.settings, chosen) != _without(settings, chosen):
        work.log("the unfinished preparation had other settings, or its files have changed: starting over")
        return fresh
    if not is_first and journal.settings != settings:  # the journal of the first assignment
        return fresh
    if journal.documents:
        work.log(f"continuing after {journal.documents:,} documents")
    return journal


def _without(settings: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _documents(journal: Journal, work: Work) -> Iterator[Document]:
    """Yields the documents that the journal has not counted yet."""
    if not journal.settings["is_single"]:
        yield from _nonempty(work.source.read(journal.place, work.stop), work.tokenizer)
        return
    parts = halves(
        _nonempty(work.source.read(Place(), None), work.tokenizer),
        val_fraction=journal.settings["val_fraction"],
        tokenizer=work.tokenizer,
        window=journal.settings["window"],
    )
    # Their places count the parts, since a place in the source can be in the middle of one.
    for number, part in enumerate(parts, 1):
        if number > journal.place.documents:
            yield part._replace(place=Place(documents=number))


def _nonempty(documents: Iterator[Document], tokenizer: Tokenizer) -> Iterator[Document]:
    """Yields the documents that have a text, and joins sections whose tokens would differ from those of the whole."""
    is_cut = keeps_tokens(tokenizer)
    texts: list[str] = []
    for document in documents:
        if document.whole and not is_cut:
            texts.append(document.text)
            if not document.is_end:
                continue
            document = Document(document.name, "".join(texts), document.place)
            texts.clear()
        if document.text:
            yield document


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch = []
    size = 0  # characters, as an estimate of bytes
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= min(TASK_BYTES, BATCH_BYTES):
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def _groups(encoded: Iterator[tuple[list[Document], Encoded]]) -> Iterator[list[tuple[list[Document], Encoded]]]:
    """Yields what is written to disk at a time."""
    group = []
    size = 0
    for batch, ids in encoded:
        group.append((batch, ids))
        size += int(ids.text_bytes.sum())
        if size >= BATCH_BYTES:
            yield group
            group = []
            size = 0
    if group:
        yield group


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
