"""Step to batch: which windows of the shards an update reads, as a pure function of seed and step."""

import bisect
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import jax
import numpy as np
from grain.experimental import index_shuffle

from gptjax.data.tokens import Split, check_ids, release
from gptjax.errors import DataError

if TYPE_CHECKING:
    from gptjax.data.tokenizer import Tokenizer

T = TypeVar("T")

SHUFFLE_ROUNDS = 4
# Validation has an order of its own, whatever the seed: a random one, so that its first rows are a fair sample.
VALIDATION_SEED = 20190214
TEXT_TOKENS = 2**20  # decoded at a time
NO_WINDOW = -1  # in the rows beyond the end of the validation split, whose tokens are all -1


def data_index(step: int, skipped: Sequence[Mapping[str, Any]] = ()) -> int:
    """Returns which batch of the data the update from `step` on takes: number `step`, or later where some are skipped.

    skipped: {"step": c, "batches": k} each: from step c on, the data are k batches further on.
    """
    return step + sum(part["batches"] for part in skipped if part["step"] <= step)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Windows of block_size + 1 tokens: window i of a shard is its tokens [i * block_size, (i + 1) * block_size]."""

    split: Split
    block_size: int
    global_batch_size: int  # sequences
    seed: int

    def __post_init__(self) -> None:
        if self.num_windows < 1:
            longest = max(map(len, self.split.shards))
            raise DataError(
                f"{self.split.paths[0]}: the longest shard has {longest} tokens, too few for model.block_size="
                f"{self.block_size}, which takes {self.block_size + 1}; nearest valid: {max(1, longest - 1)}"
            )

    @property
    def num_windows(self) -> int:
        return self._ends[-1]

    @property
    def num_validation_batches(self) -> int:
        """The last may be filled up with rows of -1."""
        return -(-self.num_windows // self.global_batch_size)

    @functools.cached_property
    def _ends(self) -> list[int]:
        """The number of windows up to and with each shard."""
        counts = (max(0, (len(shard) - 1) // self.block_size) for shard in self.split.shards)
        return list(itertools.accumulate(counts))

    def row_ids(self, step: int) -> np.ndarray:
        """Returns the windows of the batch of `step`, in order: int64 [global_batch_size]."""
        return self._shuffle(self._samples(step))

    def read(self, window_ids: np.ndarray) -> np.ndarray:
        """Returns the tokens of the windows, -1 for a window -1: int32 [len(window_ids), block_size + 1].

        Raises:
            DataError: an id is not in the vocabulary; names the shard, the token's number and the id.
        """
        rows = np.full((len(window_ids), self.block_size + 1), -1, np.int32)
        found = {row: self.find(window) for row, window in enumerate(window_ids.tolist()) if window != NO_WINDOW}
        for row, (shard, start) in found.items():
            rows[row] = self.split.shards[shard][start : start + self.block_size + 1]
        # Seen as unsigned, where an id of 2**31 and more has not become negative.
        if found and rows[list(found)].view(np.uint32).max() >= self.split.vocab_size:
            self._raise_bad_id(list(found.values()))
        for shard in {shard for shard, _ in found.values()}:
            release(self.split.shards[shard])
        return rows

    def find(self, window: int) -> tuple[int, int]:
        """Returns the shard, and the token in it, at which the window starts."""
        shard = bisect.bisect_right(self._ends, window)
        before = self._ends[shard - 1] if shard else 0
        return shard, (window - before) * self.block_size

    def batch(self, step: int, *, sharding: jax.sharding.Sharding, num_micro_steps: int) -> jax.Array:
        """Returns the batch of `step`, of which this process reads the rows of its own devices only.

        Returns:
            int32 [A, B, T+1] with A = num_micro_steps and A * B = global_batch_size: row r is at [r // B, r % B].
        """
        return self._place(self._samples(step), self._shuffle, sharding, num_micro_steps)

    def validation_batch(self, index: int, *, sharding: jax.sharding.Sharding, num_micro_steps: int) -> jax.Array:
        """Returns batch `index` of a fixed order that holds each window once; rows beyond its end are -1.

        Returns:
            int32 [A, B, T+1], as `batch`.
        """
        return self._place(self._samples(index), self._shuffle_validation, sharding, num_micro_steps)

    def _samples(self, step: int) -> np.ndarray:
        return np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size, dtype=np.int64)

    def _shuffle(self, samples: np.ndarray) -> np.ndarray:
        """Returns each sample's window: sample n is of epoch n // num_windows, which has its own permutation."""
        epochs, positions = np.divmod(samples, self.num_windows)
        seeds = {epoch: _epoch_seed(self.seed, epoch) for epoch in np.unique(epochs).tolist()}
        pairs = zip(epochs.tolist(), positions.tolist(), strict=True)
        return self._permute((position, seeds[epoch]) for epoch, position in pairs)

    def _shuffle_validation(self, samples: np.ndarray) -> np.ndarray:
        windows = self._permute((min(sample, self.num_windows - 1), VALIDATION_SEED) for sample in samples.tolist())
        return np.where(samples < self.num_windows, windows, NO_WINDOW)

    def _permute(self, pairs: Iterator[tuple[int, int]]) -> np.ndarray:
        # Constant memory for any number of windows. Grain tries numbers below 2**16 until one is in range, which takes
        # 6 microseconds a window from some 10,000 windows on, but milliseconds where there are ten.
        last = self.num_windows - 1
        shuffled = (index_shuffle(index, max_index=last, seed=seed, rounds=SHUFFLE_ROUNDS) for index, seed in pairs)
        return np.fromiter(shuffled, np.int64)

    def _raise_bad_id(self, places: list[tuple[int, int]]) -> None:
        for shard, start in places:
            tokens = self.split.shards[shard][start : start + self.block_size + 1]
            check_ids(self.split.paths[shard], tokens, self.split.vocab_size, start=start)

    def _place(
        self,
        samples: np.ndarray,
        order: Callable[[np.ndarray], np.ndarray],
        sharding: jax.sharding.Sharding,
        num_micro_steps: int,
    ) -> jax.Array:
        samples_AB = samples.reshape(num_micro_steps, -1)
        shape = (*samples_AB.shape, self.block_size + 1)
        cache: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}  # devices that replicate rows share one reading

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            key = tuple(part.indices(size) for part, size in zip(index[:2], shape, strict=False))
            if key not in cache:
                own_AB = samples_AB[index[:2]]
                cache[key] = self.read(order(own_AB.ravel())).reshape(*own_AB.shape, -1)
            return cache[key][..., index[2]]

        return jax.make_array_from_callback(shape, sharding, read, dtype=np.int32)


def _epoch_seed(seed: int, epoch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:4], "little")


class Prefetcher(Generic[T]):
    """Calls `make(step)` in threads for the steps that come next, so that `get` finds them made.

    `get` does not wake the threads: on a busy CPU they would run at once, in place of what was about to use the batch.
    """

    def __init__(self, make: Callable[[int], T], start: int, step: int = 1, depth: int = 2) -> None:
        self._make = make
        self._step = step
        self._depth = depth
        self._futures: dict[int, Future[T]] = {}
        self._pool: ThreadPoolExecutor | None = None
        if depth > 0:
            self._pool = ThreadPoolExecutor(max_workers=depth, thread_name_prefix="prefetch")
        self.start(start)

    def get(self, step: int) -> T:
        """Returns make(step), or raises what it raised; any step may be asked for."""
        future = self._futures.pop(step, None)
        return self._make(step) if future is None else future.result()

    def close(self) -> None:
        """Waits for the calls that have begun; after this, `get` makes what it returns."""
        pool, self._pool = self._pool, None
        self.start(0)
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def start(self, first: int) -> None:
        """Lets the threads make `depth` steps from `first` on, and no others."""
        wanted = [first + i * self._step for i in range(self._depth)] if self._pool else []
        for step in set(self._futures) - set(wanted):
            self._futures.pop(step).cancel()
        for step in wanted:
            if self._pool and step not in self._futures:
                self._futures[step] = self._pool.submit(self._make, step)


def document_text(split: Split, tokenizer: "Tokenizer", max_bytes: int) -> bytes:
    """Returns the first `max_bytes` bytes of the text of a split, without its end-of-text tokens."""
    text = bytearray()
    for shard in split.shards:
        for start in range(0, len(shard), TEXT_TOKENS):
            if len(text) >= max_bytes:
                break
            ids = shard[start : start + TEXT_TOKENS]
            text += tokenizer.decode_bytes(ids[ids != tokenizer.eot_id])
    return bytes(text[:max_bytes])
