"""Step to batch for a mixture of datasets: each sample comes from one of them, in the proportions of the weights.

Which dataset gives sample n, and which of its own samples that is, is integer arithmetic on n alone. So the batch is a
pure function of seed and step here, too, for any number of hosts, and through resumes and rollbacks.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from gptjax.data.dataset import Dataset, example_indices, place_batch
from gptjax.documents import EndOfText


def counts_before(samples: np.ndarray, weights: tuple[int, ...]) -> np.ndarray:
    """Returns how many of the samples before each of `samples` come from each dataset: int64 [n, datasets].

    The proportions hold for every prefix: a count differs from its share by less than the number of datasets. This is
    the arithmetic of Grain's `MapDataset.mix`: the first dataset takes its share of n, rounded up, the second takes its
    share of the rest, and so on.

    samples: int64 [n], each at least 0; times the sum of the weights it must fit 63 bits.
    """
    counts = np.empty((*samples.shape, len(weights)), np.int64)
    rest = samples
    remaining = sum(weights)
    for number, weight in enumerate(weights):
        following = rest * (remaining - weight) // remaining
        counts[..., number] = rest - following
        rest = following
        remaining -= weight
    return counts


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Datasets that are mixed by weight; it has the methods of Dataset.

    The number of a window is its number in its own dataset, after all windows of the datasets before that.
    """

    names: tuple[str, ...]
    weights: tuple[int, ...]
    datasets: tuple[Dataset, ...]

    @property
    def eot(self) -> EndOfText:
        """End-of-text, the same in all datasets."""
        return self.datasets[0].eot

    @property
    def tokens(self) -> int:
        """The tokens of all datasets."""
        return sum(dataset.tokens for dataset in self.datasets)

    @property
    def num_windows(self) -> int:
        """The windows of all datasets."""
        return int(self._ends[-1])

    @functools.cached_property
    def fingerprint(self) -> str:
        """A sha256 that differs for other data or other weights; that of the dataset if there is only one."""
        if len(self.datasets) == 1:
            return self.datasets[0].fingerprint
        mixed = [[dataset.fingerprint, weight] for dataset, weight in zip(self.datasets, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(mixed).encode()).hexdigest()

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """The number of windows up to and with each dataset: int64 [datasets]."""
        return np.cumsum([dataset.num_windows for dataset in self.datasets], dtype=np.int64)

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], self._ends[:-1]])

    def sources(self) -> Iterator[tuple[str, float, Dataset]]:
        """Yields the name, the share and the dataset of each source."""
        for name, weight, dataset in zip(self.names, self.weights, self.datasets, strict=True):
            yield name, weight / sum(self.weights), dataset

    def epochs(self, samples: int) -> dict[str, float]:
        """Returns the epochs of each source after the first `samples` samples, by the names of their metrics."""
        [counts] = counts_before(np.array([samples]), self.weights)
        return {f"epochs/{name}": counts[i] / self.datasets[i].num_windows for i, name in enumerate(self.names)}

    def window_ids(self, step: int) -> np.ndarray:
        """Returns the windows of the batch of `step`, in order: int64 [global_batch_size]."""
        return self._windows(example_indices(step, self.datasets[0].global_batch_size))

    def _windows(self, samples: np.ndarray) -> np.ndarray:
        """Returns each sample's window: int64 [n], of int64 [n]."""
        before = counts_before(samples, self.weights)
        is_next = counts_before(samples + 1, self.weights) > before  # of exactly one dataset
        windows = np.empty_like(samples)
        for number, dataset in enumerate(self.datasets):
            chosen = is_next[:, number]
            windows[chosen] = dataset.windows_of(before[chosen, number]) + self._starts[number]
        return windows

    def read(self, window_ids: np.ndarray) -> np.ndarray:
        """Returns the tokens of the windows: int32 [len(window_ids), block_size + 1].

        window_ids: int64 [any number].

        Raises:
            DataError: as `Dataset.read`.
        """
        rows = np.empty((len(window_ids), self.datasets[0].block_size + 1), np.int32)
        numbers = np.searchsorted(self._ends, window_ids, side="right")
        for number, dataset in enumerate(self.datasets):
            chosen = numbers == number
            if chosen.any():
                rows[chosen] = dataset.read(window_ids[chosen] - self._starts[number])
        return rows

    def shard_of(self, window: int) -> tuple[str, int]:
        """Returns the shard as source/file, and the token in it, at which the window starts."""
        number = int(np.searchsorted(self._ends, window, side="right"))
        file, start = self.datasets[number].shard_of(window - int(self._starts[number]))
        return f"{self.names[number]}/{file}", start

    def batch(
        self,
        step: int | Sequence[int],
        *,
        sharding: jax.sharding.Sharding,
        num_microbatches: int,
    ) -> jax.Array:
        """Returns the batch of `step`: int32 [A, B, T+1], or [K, A, B, T+1] of K steps, as `Dataset.batch`.

        Raises:
            DataError: as `Dataset.read`.
        """
        first = self.datasets[0]
        return place_batch(
            example_indices(step, first.global_batch_size),
            lambda samples: self.read(self._windows(samples)),
            block_size=first.block_size,
            sharding=sharding,
            num_microbatches=num_microbatches,
        )
