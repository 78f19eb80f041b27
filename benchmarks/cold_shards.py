"""Shards of random ids on disk, and what it takes to read them as if they had never been read."""

import contextlib
import os
import pathlib
from collections.abc import Iterable

import numpy as np

from gptjax.data.header import make_header, token_dtype

VOCAB_SIZE = 50257  # GPT-2's
CHUNK_TOKENS = 2**23


def write_shard(path: str, count: int) -> None:
    """Writes a shard of `count` random ids."""
    dtype = token_dtype(VOCAB_SIZE)
    random = np.random.default_rng(0)
    with open(path, "wb") as file:
        file.write(make_header(count, dtype))
        for start in range(0, count, CHUNK_TOKENS):
            file.write(random.integers(0, VOCAB_SIZE, min(CHUNK_TOKENS, count - start), dtype).tobytes())
        os.fsync(file.fileno())  # pages that are not on disk cannot be dropped


def link_shards(files: list[pathlib.Path], directory: pathlib.Path, count: int) -> None:
    """Gives `files` `count` names in `directory`, in turn: a large data set that takes little disk."""
    for number in range(count):
        os.link(files[number % len(files)], directory / f"random_train_{number:06d}.bin")


def drop_cache(files: Iterable[pathlib.Path]) -> None:
    """Drops the pages of `files` from the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bytes_from_disk(process: int) -> int:
    """Returns how many bytes a process has read from disk so far, 0 if it has ended."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path(f"/proc/{process}/io").read_text().splitlines():
            if line.startswith("read_bytes"):
                return int(line.split()[1])
    return 0
