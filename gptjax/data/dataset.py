"""Step to batch: the windows of the shards that an update reads, as a pure function of seed and step."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, TypeVar

import jax
import numpy as np

from gptjax.data.shuffle import shuffle
from gptjax.data.tokens import Split, check_ids
from gptjax.documents import EndOfText
from gptjax.errors import DataError
from gptjax.history import SkippedRange

if TYPE_CHECKING:
    from gptjax.data.tokenizer import Tokenizer

T = TypeVar("T")
Bounds = tuple[int, int, int]  # slice.indices of one dim

# Validation has its own order, whatever the seed: a random one, so that its first rows are a fair sample.
VALIDATION_SEED = 20190214
TEXT_TOKENS = 2**20  # decoded at a time
NO_WINDOW = -1  # in the rows beyond the end of the validation split, whose tokens are all -1


def batch_index(
    step: int,
    skipped: Sequence[SkippedRange] = (),
) -> int:
    """Returns the index of the batch that the update at `step` consumes: `step`, or a later one after rollbacks."""
    earlier = [part.batches for part in skipped if part.step <= step]
    return step + sum(earlier)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Windows of block_size + 1 tokens: window i of a shard is its tokens [i * block_size, (i + 1) * block_size].

    Raises:
        DataError: every shard is shorter than one window.
    """

    split: Split
    block_size: int
    global_batch_size: int  # sequences
    seed: int

    def __post_init__(self) -> None:
        if self.num_windows < 1:
            longest = max(map(len, self.split.shards))
            needed = f"model.block_size={self.block_size}, which takes {self.block_size + 1}"
            raise DataError(
                f"the longest shard has {longest} tokens, too few for {needed}",
                field=self.split.paths[0],
                remedy=f"nearest valid: {max(1, longest - 1)}",
            )

    @property
    def eot(self) -> EndOfText:
        """End-of-text in the shards."""
        return self.split.eot

    @property
    def tokens(self) -> int:
        """The tokens of all shards."""
        return self.split.tokens

    @property
    def fingerprint(self) -> str:
        """A sha256 that differs for other data."""
        return self.split.fingerprint

    def sources(self) -> Iterator[tuple[str, float, "Dataset"]]:
        """Yields ("", 1.0, this dataset): the name, the share and the dataset of each source, as Mixture does."""
        yield "", 1.0, self

    def epochs(self, samples: int) -> dict[str, float]:
        """Returns {}: metrics of epochs are those of a mixture's sources."""
        return {}

    @property
    def num_windows(self) -> int:
        """The number of windows in all shards, which is one epoch."""
        return int(self._ends[-1])

    @property
    def num_validation_batches(self) -> int:
        """The batches that hold each window once; the last may be filled up with rows of -1."""
        return -(-self.num_windows // self.global_batch_size)

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """The number of windows up to and with each shard: int64 [shards]."""
        counts = []
        for shard in self.split.shards:
            windows = (len(shard) - 1) // self.block_size  # -1 // block_size, for an empty one, is negative
            counts.append(max(0, windows))
        return np.cumsum(counts, dtype=np.int64)

    def window_ids(self, step: int) -> np.ndarray:
        """Returns the windows of the batch of `step`, in order: int64 [global_batch_size]."""
        return self.windows_of(example_indices(step, self.global_batch_size))

    def read(self, window_ids: np.ndarray) -> np.ndarray:
        """Returns the tokens of the windows, -1 for a window -1: int32 [len(window_ids), block_size + 1].

        Args:
            window_ids: int64 [any number]; NO_WINDOW for a row without a window.

        Raises:
            DataError: a shard cannot be read, or was changed; or an id is not in the vocabulary: the message has the
                shard, the token's number and the id.
        """
        is_window = window_ids != NO_WINDOW
        shards, starts = self._locate(window_ids[is_window])
        length = self.block_size + 1
        ids = self.split.reader.read(shards, starts, length)
        if ids.size and ids.max() >= self.split.vocab_size:
            self._raise_bad_id(shards, starts, ids)
        if len(ids) == len(window_ids):
            return ids.view(np.int32)  # not a copy: every id is below the vocabulary size, so the bits are the same
        shape = (len(window_ids), length)
        rows = np.full(shape, -1, np.int32)
        rows[is_window] = ids
        return rows

    def shard_of(self, window: int) -> tuple[str, int]:
        """Returns the file of the shard, and the token in it, at which the window starts."""
        number, start = self.locate(window)
        return os.path.basename(self.split.paths[number]), start

    def locate(self, window: int) -> tuple[int, int]:
        """Returns the number of the shard, and the token in it, at which the window starts."""
        shards, starts = self._locate(np.array([window]))
        return int(shards[0]), int(starts[0])

    def _locate(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the shard of each window and the token in it at which it starts: both int64 [windows]."""
        shards = np.searchsorted(self._ends, windows, side="right")
        first_windows = np.concatenate([[0], self._ends])
        starts = (windows - first_windows[shards]) * self.block_size
        return shards, starts

    def batch(
        self,
        step: int | Sequence[int],
        *,
        sharding: jax.sharding.Sharding,
        num_microbatches: int,
    ) -> jax.Array:
        """Returns the batch of `step`. This process reads only the rows of its own devices.

        Returns:
            int32 [A, B, T+1] with A = num_microbatches and A * B = global_batch_size: row r is at [r // B, r % B].
            For K steps int32 [K, A, B, T+1].

        Raises:
            DataError: as `read`.
        """
        return self._place(step, self.windows_of, sharding, num_microbatches)

    def validation_batch(
        self,
        index: int,
        *,
        sharding: jax.sharding.Sharding,
        num_microbatches: int,
    ) -> jax.Array:
        """Returns batch `index` of a fixed order that holds each window once; rows beyond its end are -1.

        Returns:
            int32 [A, B, T+1], as `batch`.

        Raises:
            DataError: as `read`.
        """
        return self._place(index, self._shuffle_validation, sharding, num_microbatches)

    def windows_of(self, samples: np.ndarray) -> np.ndarray:
        """Returns each sample's window: int64 [n], of int64 [n].

        Sample n belongs to epoch n // num_windows, and each epoch has its own permutation.
        """
        epochs, positions = np.divmod(samples, self.num_windows)
        windows = np.empty_like(samples)
        for epoch in np.unique(epochs).tolist():
            in_epoch = epochs == epoch
            windows[in_epoch] = shuffle(
                positions[in_epoch],
                self.num_windows,
                _epoch_seed(self.seed, epoch),
            )
        return windows

    def _shuffle_validation(self, samples: np.ndarray) -> np.ndarray:
        """Returns each sample's window, NO_WINDOW beyond the first epoch: int64 [n], of int64 [n]."""
        positions = np.minimum(samples, self.num_windows - 1)
        windows = shuffle(positions, self.num_windows, VALIDATION_SEED)
        is_window = samples < self.num_windows
        return np.where(is_window, windows, NO_WINDOW)

    def _raise_bad_id(
        self,
        numbers: np.ndarray,
        starts: np.ndarray,
        ids: np.ndarray,
    ) -> None:
        windows = zip(numbers.tolist(), starts.tolist(), ids, strict=True)
        for number, start, row in windows:
            shard = self.split.shards[number]
            check_ids(shard.path, row, self.split.vocab_size, start=start)

    def _place(
        self,
        index: int | Sequence[int],
        order: Callable[[np.ndarray], np.ndarray],
        sharding: jax.sharding.Sharding,
        num_microbatches: int,
    ) -> jax.Array:
        return place_batch(
            example_indices(index, self.global_batch_size),
            lambda samples: self.read(order(samples)),
            block_size=self.block_size,
            sharding=sharding,
            num_microbatches=num_microbatches,
        )


def example_indices(step: int | Sequence[int], global_batch_size: int) -> np.ndarray:
    """Returns the numbers of the step's sequences, counted since step 0: int64 [global_batch_size].

    For K steps int64 [K, global_batch_size].
    """
    first = np.asarray(step, np.int64) * global_batch_size
    return first[..., None] + np.arange(global_batch_size, dtype=np.int64)


def place_batch(
    samples: np.ndarray,
    read_samples: Callable[[np.ndarray], np.ndarray],
    *,
    block_size: int,
    sharding: jax.sharding.Sharding,
    num_microbatches: int,
) -> jax.Array:
    """Returns the tokens of samples on the devices. This process reads only the rows of its own devices.

    samples: int64 [A * B], or [K, A * B].
    read_samples: returns the tokens of some of them, int32 [n, T+1] of int64 [n].

    Returns:
        int32 [A, B, T+1] with A = num_microbatches, or [K, A, B, T+1].
    """
    samples_AB = samples.reshape(*samples.shape[:-1], num_microbatches, -1)  # or [K, A, B]
    shape = (*samples_AB.shape, block_size + 1)
    # By the bounds of A and B: devices that replicate rows share one reading of them.
    cache: dict[tuple[Bounds, ...], np.ndarray] = {}

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        """Returns the tokens that one device holds: int32, the slices `index` of (K,) A, B and T+1."""
        assert index is not None
        *rows, positions = index
        key = tuple(part.indices(size) for part, size in zip(rows, samples_AB.shape, strict=True))
        if key not in cache:
            local_AB = samples_AB[tuple(rows)]
            tokens = read_samples(local_AB.ravel())
            cache[key] = tokens.reshape(*local_AB.shape, -1)
        return cache[key][..., positions]

    return jax.make_array_from_callback(shape, sharding, read, dtype=np.int32)


def source_seed(seed: int, source: int) -> int:
    """Returns the seed of source number `source` of a mixture."""
    digest = hashlib.sha256(f"{seed}/source {source}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _epoch_seed(seed: int, epoch: int) -> int:
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


class Prefetcher(Generic[T]):
    """Calls `make(step)` in threads for the steps that come next, so that `get` finds their results.

    `get` does not wake the threads: on a busy CPU they would run at once, before the thread that needs the batch.

    Args:
        make: called from several threads at a time.
        start: the first step.
        following: returns the step that comes after a step; None: the next number.
        depth: the number of steps ahead; 0 makes each result in `get`, without threads.
    """

    def __init__(
        self,
        make: Callable[[int], T],
        start: int,
        *,
        following: Callable[[int], int] | None = None,
        depth: int = 2,
    ) -> None:
        self._make = make
        self.following = following or (lambda step: step + 1)
        self._depth = depth
        self._futures: dict[int, Future[T]] = {}
        self._pool: ThreadPoolExecutor | None = None
        if depth > 0:
            self._pool = ThreadPoolExecutor(
                max_workers=depth,
                thread_name_prefix="prefetch",
            )
        self.start(start)

    def get(self, step: int) -> T:
        """Returns make(step), or raises what it raised; any step may be asked for."""
        future = self._futures.pop(step, None)
        if future is None:
            return self._make(step)
        return future.result()

    def close(self) -> None:
        """Waits for the calls that have begun; after this, `get` calls `make` itself."""
        pool = self._pool
        self._pool = None  # before start, which then cancels everything that has not begun
        self.start(0)
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def start(self, first: int) -> None:
        """Lets the threads make `depth` steps from `first` on, and no others."""
        wanted: list[int] = []
        step = first
        while self._pool and len(wanted) < self._depth:
            wanted.append(step)
            step = self.following(step)
        for step in set(self._futures).difference(wanted):
            future = self._futures.pop(step)
            future.cancel()
        for step in wanted:
            if self._pool and step not in self._futures:
                future = self._pool.submit(self._make, step)
                self._futures[step] = future


def document_text(
    split: Split,
    tokenizer: "Tokenizer",
    max_bytes: int,
) -> bytes:
    """Returns the first `max_bytes` bytes of the text of a split, without its end-of-text tokens.

    Raises:
        DataError: a shard cannot be read.
    """
    text = bytearray()
    for shard in split.shards:
        for start in range(0, len(shard), TEXT_TOKENS):
            if len(text) >= max_bytes:
                break
            ids = shard.read(start, start + TEXT_TOKENS)
            is_text = ids != tokenizer.eot_id
            text += tokenizer.decode_bytes(ids[is_text])
    return bytes(text[:max_bytes])
