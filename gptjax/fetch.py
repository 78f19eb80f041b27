"""Brings ready token shards from the Hub: `gptjax fetch hf:kjj0/fineweb10B-gpt2 --out=data/fineweb --tokens=1e9`.

Shards have llm.c's format or NumPy's, and the ids of one tokenizer. Those for validation come first, then as many for
training as --tokens needs. The work happens in DIR.partial; if it is killed at any moment, the same command continues.
With more --tokens later, it adds shards. Train on them by --config.data.path=DIR.
"""

import argparse
import dataclasses
import math
import os
from collections.abc import Sequence

import numpy as np
from etils import epath

from gptjax.cli import Parser, run_cli
from gptjax.convert import hub
from gptjax.convert.hub_listing import File, Kind
from gptjax.convert.tokenizer_source import open_tokenizer
from gptjax.data.file_sources import describe_files
from gptjax.data.foreign import SPLITS, SUFFIXES, split_of
from gptjax.data.header import HEADER_BYTES, LARGEST_COUNT
from gptjax.data.hub_shards import (
    SHARDS,
    STATE_FILE,
    Counted,
    State,
    choose_shards,
    examine,
    read_state,
    take_until,
    write_state,
)
from gptjax.data.hub_source import FORM, Place, parse_place
from gptjax.data.meta import Meta, ShardMeta, SplitMeta, read_meta, write_meta
from gptjax.data.partial import hold, remove, reporting_write_errors
from gptjax.data.progress import Log
from gptjax.data.remote_files import require_local
from gptjax.data.shards import Shard
from gptjax.data.tokenizer import Tokenizer
from gptjax.data.tokens import open_shard
from gptjax.disk_space import measure_free_space
from gptjax.errors import ConfigError, UserError, WorkdirError, one_line
from gptjax.exhaustion import show_bytes
from gptjax.redaction import say
from gptjax.streams import go_on_without_output
from gptjax.workdir import (
    TOKENIZER_FILE,
    is_empty,
    missing_parts,
    remove_directories,
    sync_path,
)

TRAIN_SHARDS = "train_shards"  # in the options of meta.json: how many the repository has
ID_BYTES = 2  # of a shard, until one of them is here


def fetch(
    source: str,
    out: str,
    *,
    tokenizer: Tokenizer,
    tokens: float = math.inf,
    log: Log = say,
) -> None:
    """Brings shards into the directory `out`; does nothing if enough of them are there already.

    Args:
        source: hf:OWNER/NAME[/FOLDER][@REVISION].
        out: the directory to write.
        tokenizer: made the ids.
        tokens: to train on, at least, as far as the repository has them.
        log: receives the progress, a line at a time.

    Raises:
        ConfigError: an argument is wrong, or `out` holds something else.
        DataError: the repository has no such shards or may not be read, or a shard is damaged or of another tokenizer.
        UnavailableError: the Hub cannot be reached, or huggingface_hub is missing.
        WorkdirError: `out` cannot be written, or there is too little space.
    """
    place = parse_place(source, field="source")
    if not tokens >= 1:
        raise ConfigError("must be at least 1", field="--tokens", value=tokens)
    require_local(out, field="--out")
    out = os.path.abspath(out)
    partial = f"{out}.partial"
    if _is_complete(out, place, tokenizer, tokens=tokens) and not os.path.exists(partial):
        log(f"{out}: already complete")
        return
    made = missing_parts(os.path.dirname(partial))
    with reporting_write_errors(out), hold(partial, out, log):
        if _is_complete(out, place, tokenizer, tokens=tokens):
            log(f"{out}: already complete, by another process or before a kill")
        else:
            state = read_state(partial, out, source=str(place), log=log)
            try:
                _fetch(partial, out, place, state=state, tokenizer=tokenizer, tokens=tokens, log=log)
            except UserError:
                if not os.path.exists(os.path.join(partial, STATE_FILE)):  # nothing had begun: nothing is left behind
                    remove(partial)
                    remove_directories(made)
                raise
        remove(partial)


def _is_complete(out: str, place: Place, tokenizer: Tokenizer, *, tokens: float) -> bool:
    """Returns whether `out` has these tokens, or all that the repository has.

    Raises:
        ConfigError: `out` holds something else.
    """
    meta = _read_fetched(out, place, tokenizer)
    if meta is None:
        return False
    train = meta.splits["train"]
    return train.tokens >= tokens or len(train.shards) == meta.options.get(TRAIN_SHARDS)


def _read_fetched(out: str, place: Place, tokenizer: Tokenizer) -> Meta | None:
    """Returns the meta.json of an earlier fetch; None if `out` does not exist or is empty.

    Raises:
        ConfigError: `out` holds something else.
    """
    if not os.path.lexists(out) or is_empty(out):
        return None
    meta = read_meta(out) if os.path.isdir(out) else None
    if meta is None or meta.source != str(place) or set(meta.splits) != set(SPLITS) or "revision" not in meta.files:
        raise ConfigError(
            f"exists and was not fetched from {place}",
            field=out,
            remedy="choose another --out, or remove it",
        )
    if not tokenizer.has_hash(meta.tokenizer_sha256, meta.tokenizer):
        raise ConfigError(
            f"was fetched for the tokenizer {one_line(meta.tokenizer)}",
            field=out,
            remedy=f"give --tokenizer={one_line(meta.tokenizer)}, or choose another --out",
        )
    return meta


def _fetch(
    partial: str,
    out: str,
    place: Place,
    *,
    state: State,
    tokenizer: Tokenizer,
    tokens: float,
    log: Log,
) -> None:
    """Downloads what is missing to the directory `partial`, which this process holds, and moves it to `out`."""
    old = _read_fetched(out, place, tokenizer)
    if old is not None and not state.commit:
        state.commit = old.files["revision"]
        log(f"{out}: adding shards of the same revision, {state.commit}")
    if state.shards:
        log(f"continuing after {len(state.shards):,} shards of revision {state.commit}")
    revision = state.commit or place.revision
    folder = os.path.join(partial, SHARDS)
    kind = Kind(
        choose=lambda names: choose_shards(names, place),
        missing="no token shards",
        needed=f"{' or '.join(SUFFIXES)} files with train and val in their names",
        repo_type="dataset",
        folder=place.folder,
    )
    state.commit, files = hub.list_repository(place.repo, revision, kind=kind, folder=folder)
    os.makedirs(folder, exist_ok=True)
    write_state(partial, state)
    by_split = {split: [file for file in files if split_of(file.path) == split] for split in SPLITS}
    known = _known_shards(old)
    chosen = by_split["validation"] + take_until(by_split["train"], tokens, width=ID_BYTES, offset=HEADER_BYTES)
    wanted = _missing(chosen, known, state)
    size = sum(file.remaining for file in wanted)
    log(f"{place}: {len(wanted):,} shards of revision {state.commit}, {show_bytes(size)} to download")
    _check_space(partial, wanted)
    _download(_missing(by_split["validation"], known, state), place, partial, state=state, tokenizer=tokenizer)
    total = len(by_split["train"])
    first = _open_here(by_split["validation"][0], [folder, out])
    by_split["train"] = take_until(by_split["train"], tokens, width=first.dtype.itemsize, offset=first.offset)
    missing = _missing(by_split["train"], known, state)
    _check_space(partial, missing)
    _download(missing, place, partial, state=state, tokenizer=tokenizer)
    meta = _make_meta(
        by_split,
        str(place),
        old=old,
        state=state,
        tokenizer=tokenizer,
        folders=[folder, out],
        total=total,
    )
    _publish(folder, out, meta, tokenizer)
    train = meta.splits["train"]
    if train.tokens < tokens < math.inf:
        log(f"{place} has no more training shards")
    validation = meta.splits["validation"].tokens
    log(f"{out}: {train.tokens:,} tokens to train on, {validation:,} to validate, {tokenizer.name} ids")
    log(f"use it: gptjax train gpt2_small --config.data.path={out}")


def _make_meta(
    by_split: dict[str, list[File]],
    source: str,
    *,
    old: Meta | None,
    state: State,
    tokenizer: Tokenizer,
    folders: Sequence[str],
    total: int,
) -> Meta:
    """Returns the meta.json of verified shards.

    Args:
        by_split: the shards of each split, in order.
        source: what the user gave.
        old: of an earlier fetch, to which shards were added.
        state: what is known of the others.
        tokenizer: whose ids they have.
        folders: where they are.
        total: the number of training shards in the repository.
    """
    sizes = tuple((file.name, file.size) for split in SPLITS for file in by_split[split])
    return Meta(
        source=source,
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        eot_position=_eot_position(by_split["train"][0], folders, tokenizer),
        splits={split: _split_meta(split, by_split[split], old, state) for split in SPLITS},
        options={TRAIN_SHARDS: total},
        files=describe_files(sizes, state.commit),
    )


def _known_shards(meta: Meta | None) -> dict[str, ShardMeta]:
    if meta is None:
        return {}
    return {shard.file: shard for split in meta.splits.values() for shard in split.shards}


def _missing(files: Sequence[File], known: dict[str, ShardMeta], state: State) -> list[File]:
    """Returns the files that are neither in a finished directory nor verified by this fetch."""
    return [file for file in files if not {os.path.basename(file.path)} & (known.keys() | state.shards.keys())]


def _check_space(partial: str, files: Sequence[File]) -> None:
    """Raises WorkdirError unless the file system of `partial` has space for what is still to download of `files`."""
    needed = sum(file.remaining for file in files)
    free = measure_free_space(epath.Path(partial), flag="--out")
    if needed > free:
        raise WorkdirError(
            f"no disk space: {show_bytes(needed)} are still to download, and {show_bytes(free)} are free",
            field=partial,
            remedy="free some space and rerun the same command, or give fewer --tokens or another --out",
        )


def _download(
    files: Sequence[File],
    place: Place,
    partial: str,
    *,
    state: State,
    tokenizer: Tokenizer,
) -> None:
    """Downloads the shards, and counts each in the state when it is on disk and verified.

    Raises:
        DataError: one is damaged, or of another tokenizer.
    """
    lengths = tokenizer.token_bytes().astype(np.int64)
    for file in hub.download_each(files, place.repo, state.commit):
        counted = examine(file.path, tokenizer, lengths, sha256=file.etag)
        state.shards[os.path.basename(file.path)] = dataclasses.asdict(counted)
        write_state(partial, state)


def _open_here(file: File, folders: Sequence[str]) -> Shard:
    """Returns a verified shard, which is in one of the folders."""
    paths = [os.path.join(folder, os.path.basename(file.path)) for folder in folders]
    path = next((path for path in paths if os.path.exists(path)), paths[-1])
    return open_shard(path, LARGEST_COUNT)  # whatever its ids: they have been checked


def _eot_position(file: File, folders: Sequence[str], tokenizer: Tokenizer) -> str:
    """Returns where end-of-text is in a document, by the first id of the first shard."""
    first_id = _open_here(file, folders).read(0, 1)[0]
    return "first" if first_id == tokenizer.eot_id else "last"


def _split_meta(split: str, files: Sequence[File], old: Meta | None, state: State) -> SplitMeta:
    """Returns the entry of a split: what an earlier fetch has recorded, and the shards that were added."""
    known = _known_shards(old)
    names = [os.path.basename(file.path) for file in files]
    added = {name: Counted(**state.shards[name]) for name in names if name not in known}
    before = old.splits[split] if old is not None else SplitMeta(0, 0, 0, ())
    shards = [known.get(name) or ShardMeta(name, added[name].tokens, added[name].sha256) for name in names]
    return SplitMeta(
        tokens=before.tokens + sum(counted.tokens for counted in added.values()),
        bytes=before.bytes + sum(counted.bytes for counted in added.values()),
        documents=before.documents + sum(counted.documents for counted in added.values()),
        shards=tuple(shards),
    )


def _publish(folder: str, out: str, meta: Meta, tokenizer: Tokenizer) -> None:
    """Moves the shards in `folder` to `out`, which is complete at any moment: its meta.json comes last.

    Raises:
        OSError: a file cannot be moved or written.
    """
    if not os.path.isdir(out) or is_empty(out):
        tokenizer.save(os.path.join(folder, TOKENIZER_FILE))
        write_meta(folder, meta)
        sync_path(folder)
        os.rename(folder, out)
    else:
        for name in os.listdir(folder):
            os.replace(os.path.join(folder, name), os.path.join(out, name))
        sync_path(out)
        write_meta(out, meta)
    sync_path(os.path.dirname(out))


def _parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("source", metavar="hf:OWNER/NAME", help=f"The shards: {FORM}.")
    parser.add_argument("--out", required=True, metavar="DIR", help="The directory to write.")
    parser.add_argument(
        "--tokens",
        type=float,
        default=math.inf,
        help="The number of tokens to train on, such as 1e9, rounded up to a shard. By default all are brought.",
    )
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        metavar="NAME",
        help="The tokenizer that made the ids: gpt2, a file, a directory or hf:OWNER/NAME.",
    )
    return parser.parse_strictly(arguments)


def main(arguments: list[str]) -> None:
    """Brings shards into a directory.

    Raises:
        UserError: the source, a flag or the output is wrong, or a shard cannot be had.
    """
    args = _parse_arguments(arguments)
    go_on_without_output()  # the product is the directory
    fetch(args.source, args.out, tokenizer=open_tokenizer(args.tokenizer), tokens=args.tokens)


def cli() -> None:
    """Runs the command, and exits with its code."""
    run_cli(main)


if __name__ == "__main__":
    cli()
