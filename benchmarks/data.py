"""How fast data come: tokens per second and core read from cached and from cold shards, and text tokenised.

    python benchmarks/data.py [--bytes=1000000000] [--cold_bytes=2000000000] [--text_mb=20] [--out=DIR]

Reading, cached: shuffled windows of one shard of random ids, one epoch in four parts, with the resident memory after
each: it must not grow.
Reading, cold: 300 shards of 200 MB. The page cache is dropped before each batch of 480 windows. The
shards are links to ten files, so that 2 GB of disk are enough. /proc/self/io counts the bytes that come from disk.
Opening: 10,000 small shards, with and without meta.json.
Tokenising: `prepare` of a folder of this Python's own library to the end: hashes, splits, shards and
their checksums, in one process and in one per CPU; relative to tiktoken's `encode_ordinary_batch` of the same documents
in one thread.
"""

import argparse
import itertools
import os
import pathlib
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import bench
import numpy as np
from cold_shards import bytes_from_disk, drop_cache, link_shards, write_shard

from gptjax.data.dataset import Dataset
from gptjax.data.meta import Meta, ShardMeta, SplitMeta, write_meta
from gptjax.data.prepare import prepare
from gptjax.data.tokenizer import load_tokenizer
from gptjax.data.tokens import hash_file, open_split
from gptjax.data.workers import usable_cpus

BATCH_DOCUMENTS = 256
REPEATS = 5
COLD_FILES, COLD_SHARDS, COLD_BATCH, COLD_BATCHES = 10, 300, 480, 30
MANY_SHARDS, SMALL_SHARD_TOKENS = 10_000, 2_000


def resident_mib() -> float:
    """Returns the resident memory of this process, mapped files included."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Returns (seconds, seconds of processors, those of processes that it started too) of a call."""

    def core() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)

    wall, before = time.perf_counter(), core()
    call()
    return time.perf_counter() - wall, core() - before


def read(directory: str, *, block_size: int, batch_size: int) -> list[dict[str, Any]]:
    """Reads one epoch of the train split, and returns a row for each quarter of it."""
    split = open_split(directory, "train", tokenizer=load_tokenizer("gpt2"))
    dataset = Dataset(split, block_size, batch_size, seed=0)
    num_steps = max(4, dataset.num_windows // batch_size)
    ends, rows = [num_steps * quarter // 4 for quarter in range(5)], []
    for first, last in itertools.pairwise(ends):
        wall, core = timed(lambda a=first, b=last: [dataset.read(dataset.window_ids(step)) for step in range(a, b)])
        amount = (last - first) * batch_size * block_size / 1e6
        rows.append(row(f"read, cached, batches {first} to {last}", amount, "M tokens", wall, core))
    return rows


def read_cold(directory: pathlib.Path, size: int, *, block_size: int) -> dict[str, Any]:
    """Reads batches from shards that are not cached, and returns a row of their medians."""
    files = [directory / f"{number}.ids" for number in range(COLD_FILES)]
    for file in files:
        write_shard(str(file), size // 2 // COLD_FILES)
    link_shards(files, directory, COLD_SHARDS)
    dataset = Dataset(
        open_split(str(directory), "train", tokenizer=load_tokenizer("gpt2")), block_size, COLD_BATCH, seed=0
    )
    walls, cores, sizes = [], [], []
    for step in range(COLD_BATCHES):
        drop_cache(files)
        before = bytes_from_disk(os.getpid())
        wall, core = timed(lambda step=step: dataset.read(dataset.window_ids(step)))
        sizes.append(bytes_from_disk(os.getpid()) - before)
        walls.append(wall)
        cores.append(core)
    wall, core, amount = bench.median(walls), bench.median(cores), COLD_BATCH * block_size / 1e6
    what = f"read, cold, {COLD_SHARDS} shards of {size / COLD_FILES / 1e6:,.0f} MB"
    details = {"ms": 1e3 * wall, "ms of a core": 1e3 * core, "MB from disk": bench.median(sizes) / 1e6}
    return row(what, amount, "M tokens", wall, core) | details


def open_many(directory: str) -> list[dict[str, Any]]:
    """Opens many small shards, twice each with and without meta.json, and returns rows of the second time."""
    tokenizer, first = load_tokenizer("gpt2"), os.path.join(directory, "train_000000.bin")
    names = [f"train_{number:06d}.bin" for number in range(MANY_SHARDS)]
    for name in names:
        write_shard(os.path.join(directory, name), SMALL_SHARD_TOKENS)
    known = tuple(ShardMeta(name, SMALL_SHARD_TOKENS, hash_file(first)) for name in names)
    split = SplitMeta(MANY_SHARDS * SMALL_SHARD_TOKENS, 1, 1, known)
    meta = Meta("none", "gpt2", tokenizer.sha256, tokenizer.vocab_size, tokenizer.eot_id, "last", {"train": split})
    rows = []
    for what in ("without meta.json", "with meta.json"):
        if what == "with meta.json":
            write_meta(directory, meta)
        open_split(directory, "train", tokenizer=tokenizer)
        wall, core = timed(lambda: open_split(directory, "train", tokenizer=tokenizer))
        rows.append(row(f"open, {what}", MANY_SHARDS, "shards", wall, core) | {"ms": 1e3 * wall})
    return rows


def row(what: str, amount: float, unit: str, wall: float, core: float) -> dict[str, Any]:
    resident = resident_mib()
    return {
        "what": what, "amount": amount, "unit": unit, "a second": amount / wall, "a second and core": amount / core,
        "resident MiB": resident,
    }  # fmt: skip


def tokenise(directory: pathlib.Path, most: float) -> list[dict[str, Any]]:
    folder = directory / "text"
    folder.mkdir()
    texts, tokenizer = bench.copy_library(folder, most), load_tokenizer("gpt2")
    amount = sum(len(text.encode()) for text in texts) / 1e6

    def alone() -> None:
        for start in range(0, len(texts), BATCH_DOCUMENTS):
            batch = tokenizer.encoding.encode_ordinary_batch(texts[start : start + BATCH_DOCUMENTS], num_threads=1)
            for ids in batch:
                np.asarray(ids, np.uint16)

    def whole(processes: int) -> None:
        out = directory / "out"
        shutil.rmtree(out, ignore_errors=True)
        prepare(source=f"text:{folder}", tokenizer=tokenizer, out=str(out), processes=processes, log=lambda line: None)

    alone()
    count = usable_cpus()
    calls = {"tiktoken alone, one thread": alone, "prepare, 1 process": lambda: whole(1)}
    calls[f"prepare, {count} processes"] = lambda: whole(count)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(REPEATS):  # interleaved: other programs disturb all of them alike
        for name, call in calls.items():
            measured[name].append(timed(call))
    rows = []
    for name, times in measured.items():
        wall, core = (statistics.median(values) for values in zip(*times, strict=True))
        rows.append(row(name, amount, "MB of text", wall, core))
    base = measured["tiktoken alone, one thread"]
    for name in list(calls)[1:]:
        ratio = statistics.median(a / b for (a, _), (b, _) in zip(base, measured[name], strict=True))
        of_core = statistics.median(a / b for (_, a), (_, b) in zip(base, measured[name], strict=True))
        rows.append({"what": f"{name}, relative to tiktoken", "a second": ratio, "a second and core": of_core})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=10**9, help="size of the shard")
    parser.add_argument("--cold_bytes", type=int, default=2 * 10**9, help="size of the files of the cold set, in all")
    parser.add_argument("--cold_dir", default="", help="where the cold set is written, a disk; default the system's")
    parser.add_argument("--block_size", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=512, help="sequences")
    parser.add_argument("--text_mb", type=float, default=20, help="text to tokenise")
    parser.add_argument("--out", default="", help="directory of the JSON file; default benchmarks/results")
    args = parser.parse_args()
    machine = bench.machine()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        write_shard(os.path.join(directory, "train.bin"), args.bytes // 2)
        rows += read(directory, block_size=args.block_size, batch_size=args.batch_size)
    with tempfile.TemporaryDirectory(dir=args.cold_dir or None) as directory:
        rows.append(read_cold(pathlib.Path(directory), args.cold_bytes, block_size=args.block_size))
    with tempfile.TemporaryDirectory() as directory:
        rows += open_many(directory)
    with tempfile.TemporaryDirectory() as directory:
        rows += tokenise(pathlib.Path(directory), 1e6 * args.text_mb)
    columns = {name: "" for found in rows for name in found}
    rows = [columns | found for found in rows]
    print(bench.table(rows))
    print(bench.write("data", rows, machine, args.out))


if __name__ == "__main__":
    main()
