"""How fast data come: tokens a second read from a shard, and text tokenised beside tiktoken alone, by core.

    python benchmarks/data.py [--bytes=1000000000] [--block_size=1024] [--text_mb=20] [--out=DIR]

Reading: shuffled windows of a shard of random ids, one epoch in four parts, with the resident memory after each: it
must not grow. Tokenising: `prepare` of a folder of this Python's own library to the end: hashes, splits, shards and
their checksums; beside tiktoken's `encode_ordinary_batch` of the same documents in one thread.
"""

import argparse
import itertools
import os
import pathlib
import resource
import sysconfig
import tempfile
import time
from collections.abc import Callable
from typing import Any

import bench
import numpy as np

from gptjax.data.dataset import Dataset
from gptjax.data.prepare import prepare
from gptjax.data.tokenizer import load_tokenizer
from gptjax.data.tokens import Split, make_header, open_shard, token_dtype

VOCAB_SIZE = 50257
CHUNK_TOKENS = 2**23
BATCH_DOCUMENTS = 256


def write_shard(path: str, count: int) -> None:
    """Writes a shard of `count` random ids."""
    dtype = token_dtype(VOCAB_SIZE)
    random = np.random.default_rng(0)
    with open(path, "wb") as file:
        file.write(make_header(count, dtype))
        for start in range(0, count, CHUNK_TOKENS):
            file.write(random.integers(0, VOCAB_SIZE, min(CHUNK_TOKENS, count - start), dtype).tobytes())


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


def read(path: str, *, block_size: int, batch_size: int) -> list[dict[str, Any]]:
    """Reads one epoch, and returns a row for each quarter of it."""
    shard = np.asarray(open_shard(path, VOCAB_SIZE))
    split = Split((shard,), (path,), len(shard), 0, "last", VOCAB_SIZE, "")
    dataset = Dataset(split, block_size, batch_size, seed=0)
    num_steps = max(4, dataset.num_windows // batch_size)
    ends, rows = [num_steps * quarter // 4 for quarter in range(5)], []
    for first, last in itertools.pairwise(ends):
        wall, core = timed(lambda a=first, b=last: [dataset.read(dataset.row_ids(step)) for step in range(a, b)])
        amount = (last - first) * batch_size * block_size / 1e6
        rows.append(row(f"read, batches {first} to {last}", amount, "M tokens", wall, core))
    return rows


def row(what: str, amount: float, unit: str, wall: float, core: float) -> dict[str, Any]:
    resident = resident_mib()
    return {
        "what": what, "amount": amount, "unit": unit, "a second": amount / wall, "a second and core": amount / core,
        "resident MiB": resident,
    }  # fmt: skip


def copy_library(folder: pathlib.Path, most: float) -> list[str]:
    """Copies files of this Python's library, up to so many bytes, and returns their texts."""
    texts, size = [], 0
    for number, path in enumerate(sorted(pathlib.Path(sysconfig.get_path("stdlib")).rglob("*.py"))):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if not text or size >= most:
            continue
        (folder / f"{number:06d}.txt").write_text(text, encoding="utf-8")
        texts.append(text)
        size += len(text.encode())
    return texts


def tokenise(directory: pathlib.Path, most: float) -> list[dict[str, Any]]:
    folder = directory / "text"
    folder.mkdir()
    texts, tokenizer = copy_library(folder, most), load_tokenizer("gpt2")
    amount = sum(len(text.encode()) for text in texts) / 1e6

    def alone() -> None:
        for start in range(0, len(texts), BATCH_DOCUMENTS):
            batch = tokenizer.encoding.encode_ordinary_batch(texts[start : start + BATCH_DOCUMENTS], num_threads=1)
            for ids in batch:
                np.asarray(ids, np.uint16)

    def whole() -> None:
        prepare(source=f"text:{folder}", tokenizer=tokenizer, out=str(directory / "out"), log=lambda line: None)

    alone()
    return [
        row("tiktoken alone, one thread", amount, "MB of text", *timed(alone)),
        row("prepare, to the last checksum", amount, "MB of text", *timed(whole)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=10**9, help="size of the shard")
    parser.add_argument("--block_size", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=512, help="sequences")
    parser.add_argument("--text_mb", type=float, default=20, help="text to tokenise")
    parser.add_argument("--out", default="", help="directory of the JSON file; default benchmarks/results")
    args = parser.parse_args()
    machine = bench.machine()
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "train.bin")
        write_shard(path, args.bytes // 2)
        rows = read(path, block_size=args.block_size, batch_size=args.batch_size)
        os.remove(path)
        rows += tokenise(pathlib.Path(directory), 1e6 * args.text_mb)
    print(bench.table(rows))
    print(bench.write("data", rows, machine, args.out))


if __name__ == "__main__":
    main()
