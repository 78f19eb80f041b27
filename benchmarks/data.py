"""How many tokens a second one core reads from shuffled windows, and how much memory that takes."""

import argparse
import os
import tempfile
import time

import numpy as np

from gptjax.data.dataset import Dataset
from gptjax.data.tokens import Split, make_header, open_shard, token_dtype

VOCAB_SIZE = 50257
CHUNK_TOKENS = 2**23


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


def measure(path: str, *, block_size: int, batch_size: int) -> None:
    """Reads one epoch and prints a line for each quarter of it."""
    shard = np.asarray(open_shard(path, VOCAB_SIZE))
    split = Split((shard,), (path,), len(shard), 0, "last", VOCAB_SIZE, "")
    dataset = Dataset(split, block_size, batch_size, seed=0)
    num_steps = max(4, dataset.num_windows // batch_size)
    print(f"{os.path.getsize(path) / 2**30:.2f} GiB, block_size {block_size}, {num_steps} batches of {batch_size}")
    first = 0
    for quarter in range(1, 5):
        last = num_steps * quarter // 4
        wall, core = time.perf_counter(), time.process_time()
        for step in range(first, last):
            dataset.read(dataset.row_ids(step))
        wall, core = time.perf_counter() - wall, time.process_time() - core
        tokens = (last - first) * batch_size * block_size / 1e6
        speed = f"{tokens / core:.1f} M tokens/s per core, {tokens / wall:.1f} M tokens/s"
        print(f"steps {first} to {last}: {speed}, {resident_mib():.0f} MiB resident")
        first = last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=10**9, help="size of the shard")
    parser.add_argument("--block_size", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=512, help="sequences")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "train.bin")
        write_shard(path, args.bytes // 2)
        measure(path, block_size=args.block_size, batch_size=args.batch_size)


if __name__ == "__main__":
    main()
