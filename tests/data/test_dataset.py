"""A batch depends on seed and step only, and every window is read once an epoch."""

import functools
import itertools
import pathlib
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gptjax.data import dataset as dataset_module
from gptjax.data.dataset import Dataset, Prefetcher, batch_index, document_text
from gptjax.data.header import make_header, token_dtype
from gptjax.data.tokenizer import load_tokenizer
from gptjax.data.tokens import Split, open_shard, open_split
from gptjax.documents import EndOfText
from gptjax.errors import DataError
from gptjax.history import SkippedRange
from tests.helpers import failing, raises

VOCAB_SIZE = 60_000
DIRECTORY = tempfile.TemporaryDirectory()  # of all shards here


def make_split(*lengths: int, vocab_size: int = VOCAB_SIZE, dtype: str = "<u2", bad: tuple[int, int] = (0, 0)) -> Split:
    """Shards of which token t of shard s is 1000 * s + t, so that a row says where it is from.

    bad: a token of shard 1 and the id that it gets instead, (0, 0) for none.
    """
    directory = pathlib.Path(tempfile.mkdtemp(dir=DIRECTORY.name))
    shards = []
    for number, length in enumerate(lengths):
        ids = (1000 * number + np.arange(length)).astype(dtype)
        if number == 1 and bad != (0, 0):
            ids[bad[0]] = bad[1]
        path = directory / f"shard{number}.bin"
        path.write_bytes(make_header(length, ids.dtype) + ids.tobytes())
        shards.append(open_shard(str(path), 2**32))
    return Split(tuple(shards), sum(lengths), 0, EndOfText(0, "last"), vocab_size, "")


@functools.cache
def make_dataset(*lengths: int, block_size: int = 10, batch: int = 8, seed: int = 0) -> Dataset:
    """The same dataset for the same arguments: a dataset has no state that a test could see."""
    return Dataset(make_split(*lengths), block_size, batch, seed)


def make_sharding(shape: tuple[int, int, int], spec: tuple = (None, ("data", "fsdp"), None)) -> NamedSharding:
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    return NamedSharding(mesh, PartitionSpec(*spec))


def one_device() -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec())


def test_windows_share_one_token_and_cross_no_shard():
    dataset = make_dataset(101, 5, 100, 11)
    assert dataset.num_windows == 10 + 0 + 9 + 1
    rows = dataset.read(np.arange(dataset.num_windows))
    starts = [*range(0, 100, 10), *range(2000, 2090, 10), 3000]
    assert rows.dtype == np.int32
    assert rows.tolist() == [list(range(start, start + 11)) for start in starts]


@pytest.mark.parametrize(("lengths", "batch"), [((801, 5, 900, 11), 8), ((1001,), 25), ((35,), 8), ((11,), 4)])
def test_each_window_is_read_once_an_epoch(lengths, batch):
    dataset = make_dataset(*lengths, batch=batch)
    windows = dataset.num_windows
    ids = np.concatenate([dataset.window_ids(step) for step in range(-(-5 * windows // batch))])
    epochs = ids[: 5 * windows].reshape(5, windows)
    assert all(sorted(epoch) == list(range(windows)) for epoch in epochs.tolist())
    if windows > 2:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) > 3  # shuffled anew


def test_order_of_windows_depends_on_the_seed():
    first = make_dataset(5001).window_ids(0).tolist()
    assert first == make_dataset(5001).window_ids(0).tolist()
    assert first != make_dataset(5001, seed=1).window_ids(0).tolist()


def test_order_of_windows_equals_the_golden_values():
    """A run resumed with newer libraries must go on in the same order."""
    dataset = make_dataset(1001, batch=6, seed=7)
    assert dataset.window_ids(0).tolist() == GOLDEN[0]
    assert dataset.window_ids(17).tolist() == GOLDEN[1]  # the epoch ends within it
    assert dataset.window_ids(10**12).tolist() == GOLDEN[2]


GOLDEN = [[37, 66, 51, 52, 3, 63], [27, 52, 69, 97, 87, 60], [82, 80, 2, 22, 13, 29]]


def read_by_processes(dataset: Dataset, step: int, *, processes: int, num_microbatches: int) -> np.ndarray:
    """The batch put together from what each process reads: the rows of its own device, of a mesh of `processes`."""
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:processes]), ("data",)), PartitionSpec(None, "data"))
    batch = dataset.batch(step, sharding=sharding, num_microbatches=num_microbatches)
    whole = np.zeros(batch.shape, np.int32)
    for shard in batch.addressable_shards:
        assert shard.data.shape[1] == batch.shape[1] // processes
        whole[shard.index] = shard.data
    return whole


@pytest.mark.faults
def test_o1_batches_do_not_depend_on_processes_or_accumulation():
    """Steps 0..500 cross 20 epochs; every layout starts anew at each step, as after a restart."""
    dataset = make_dataset(1501, 501, batch=8)
    rows = [dataset.window_ids(step) for step in range(501)]
    assert len(np.concatenate(rows)) > 20 * dataset.num_windows
    layouts = [(processes, steps) for processes in (1, 2, 4, 8) for steps in (1, 2, 4, 8) if processes * steps <= 8]
    cases = [(step, layouts[step % len(layouts)]) for step in range(501)]
    cases += [(step, layout) for layout in layouts for step in (0, 24, 25, 26, 500)]
    for step, (processes, num_microbatches) in cases:
        whole = read_by_processes(dataset, step, processes=processes, num_microbatches=num_microbatches)
        assert np.array_equal(whole.reshape(8, 11), dataset.read(rows[step]))


def test_batches_of_several_steps_are_read_at_once():
    dataset = make_dataset(1501, 501, batch=8)
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("data",)), PartitionSpec(None, None, "data"))
    batches = dataset.batch([24, 25, 24], sharding=sharding, num_microbatches=2)
    rows = [dataset.read(dataset.window_ids(step)).reshape(2, 4, 11) for step in (24, 25)]
    assert batches.shape == (3, 2, 4, 11)
    assert np.array_equal(batches, [*rows, rows[0]])
    assert not np.array_equal(*rows)


def test_batch_rows_fill_the_micro_batches_in_order():
    dataset = make_dataset(1001, batch=24)
    batch = dataset.batch(3, sharding=make_sharding((2, 4, 1)), num_microbatches=3)
    expected = dataset.read(dataset.window_ids(3))
    assert batch.shape == (3, 8, 11)
    assert batch.dtype == np.int32
    assert all(np.array_equal(batch[r // 8, r % 8], expected[r]) for r in range(24))


def test_process_reads_each_of_its_rows_once(monkeypatch):
    dataset, seen = make_dataset(1001, batch=16), []
    read = Dataset.read

    def spy(self, window_ids):
        seen.append(window_ids.tolist())
        return read(self, window_ids)

    monkeypatch.setattr(Dataset, "read", spy)
    batch = dataset.batch(0, sharding=make_sharding((2, 1, 4)), num_microbatches=2)  # 4 devices replicate each row
    assert sorted(map(len, seen)) == [8, 8]
    assert sorted(itertools.chain(*seen)) == sorted(dataset.window_ids(0).tolist())
    seen.clear()
    dataset.batch(0, sharding=make_sharding((2, 1, 4), (None, "data", None)), num_microbatches=1)
    assert seen[0] in (dataset.window_ids(0)[:8].tolist(), dataset.window_ids(0)[8:].tolist())
    assert np.array_equal(np.asarray(batch).reshape(16, 11), read(dataset, dataset.window_ids(0)))


def test_batch_may_be_sharded_over_tokens():
    dataset = Dataset(make_split(1001), 7, 4, 0)
    batch = dataset.batch(0, sharding=make_sharding((2, 1, 4), (None, "data", "tensor")), num_microbatches=1)
    assert np.array_equal(np.asarray(batch)[0], dataset.read(dataset.window_ids(0)))


def test_validation_reads_each_window_once_in_fixed_order():
    datasets = [make_dataset(1001, batch=16, seed=seed) for seed in (0, 1)]
    assert datasets[0].num_validation_batches == 7
    read = lambda d, index: d.validation_batch(index, sharding=one_device(), num_microbatches=2)  # noqa: E731
    batches = [np.concatenate([read(d, index) for index in range(7)]) for d in datasets]
    assert np.array_equal(*batches)
    rows = batches[0].reshape(-1, 11)
    assert sorted(rows[:100, 0].tolist()) == list(range(0, 1000, 10))
    assert rows[:100, 0].tolist() != list(range(0, 1000, 10))
    assert np.array_equal(rows[100:], np.full((12, 11), -1))
    beyond = datasets[0].validation_batch(7, sharding=one_device(), num_microbatches=1)
    assert np.array_equal(beyond, np.full((1, 16, 11), -1))


def test_batch_index_jumps_over_skipped_ranges():
    assert [batch_index(step) for step in range(4)] == [0, 1, 2, 3]
    skipped = [SkippedRange(2, 3), SkippedRange(2, 1), SkippedRange(5, 2)]
    assert [batch_index(step, skipped) for step in range(7)] == [0, 1, 6, 7, 8, 11, 12]


def test_find_returns_where_a_window_starts():
    dataset = make_dataset(31, 25)
    assert [dataset.locate(window) for window in range(5)] == [(0, 0), (0, 10), (0, 20), (1, 0), (1, 10)]


def test_too_few_tokens_are_named():
    for lengths, valid in (((9, 8), 8), ((8, 10), 9)):
        split = make_split(*lengths)
        with raises(DataError, split.paths[0], remedy=f"nearest valid: {valid}"):
            Dataset(split, 10, 8, 0)
    assert make_dataset(11).num_windows == 1


@pytest.mark.faults
@pytest.mark.parametrize(("dtype", "bad"), [("<u2", 65535), ("<u4", 60_000), ("<u4", 2**31 + 5)])
def test_x1_a_bad_id_is_named_when_it_is_read(dtype, bad):
    split = make_split(101, 101, dtype=dtype, bad=(57, bad))
    dataset = Dataset(split, 10, 20, 0)
    assert dataset.read(np.arange(15)).max() < VOCAB_SIZE
    with raises(DataError, split.paths[1], match=f"token 57 is id {bad}"):
        dataset.read(dataset.window_ids(0))


def write_directory(directory: Path, *texts: str) -> None:
    tokenizer = load_tokenizer("bytes")
    dtype = token_dtype(tokenizer.vocab_size)
    for index, text in enumerate(texts):
        ids = np.array([*tokenizer.encode(text), tokenizer.eot_id] * 2, dtype)
        (directory / f"train_{index}.bin").write_bytes(make_header(len(ids), dtype) + ids.tobytes())


def test_document_text_joins_documents_up_to_a_limit(tmp_path, monkeypatch):
    write_directory(tmp_path, "first é", "second")
    tokenizer = load_tokenizer("bytes")
    split = open_split(str(tmp_path), "train", tokenizer=tokenizer)
    whole = "first éfirst ésecondsecond".encode()
    for size in (2**20, 3):
        monkeypatch.setattr(dataset_module, "TEXT_TOKENS", size)
        assert document_text(split, tokenizer, 1000) == whole
        assert document_text(split, tokenizer, 10) == whole[:10]


def test_batches_that_were_read_are_freed(tmp_path):
    """Both as memory of this process and as pages of mapped files."""
    ids = np.zeros(32 * 2**20, np.uint16)
    (tmp_path / "train.bin").write_bytes(make_header(len(ids), ids.dtype) + ids.tobytes())
    split = open_split(str(tmp_path), "train", tokenizer=load_tokenizer("bytes"))
    dataset = Dataset(split, 1024, 512, 0)

    def resident():
        status = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

    dataset.read(dataset.window_ids(0))
    before = resident()
    for step in range(60):
        dataset.read(dataset.window_ids(step))
    assert resident() - before < 16 * 1024  # of 64 MiB read


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize(("stride", "depth"), [(1, 2), (4, 3)])
def test_prefetcher_makes_each_batch_ahead_and_once(stride, depth):
    made = []
    prefetcher = Prefetcher(
        lambda step: made.append(step) or step * 10, 5, following=lambda step: step + stride, depth=depth
    )
    for number, step in enumerate(range(5, 5 + 4 * stride, stride)):
        wait_for(lambda number=number: sorted(made) == [5 + n * stride for n in range(depth + number)])
        assert prefetcher.get(step) == step * 10
        prefetcher.start(step + stride)
    prefetcher.close()


def test_prefetcher_get_starts_no_further_batch():
    """On a busy CPU what was started would run in place of the thread that needs the batch."""
    made: list[int] = []
    prefetcher = Prefetcher(lambda step: made.append(step) or step, 0, depth=2)
    assert [prefetcher.get(step) for step in (0, 1)] == [0, 1]
    assert prefetcher._futures == {}
    assert prefetcher.get(2) == 2
    assert prefetcher._futures == {}
    prefetcher.close()
    assert sorted(made) == [0, 1, 2]


def test_prefetcher_makes_batches_in_other_threads():
    prefetcher = Prefetcher(lambda step: threading.get_ident(), 0)
    assert prefetcher.get(0) != threading.get_ident()
    prefetcher.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetcher_gives_any_step():
    prefetcher = Prefetcher(lambda step: step * 10, 0)
    for step in (7, 8, 3, 3, 100, 0):
        assert prefetcher.get(step) == step * 10
        prefetcher.start(step + 1)
    prefetcher.close()
    prefetcher.start(5)
    assert prefetcher.get(5) == 50
    prefetcher.close()


def test_prefetcher_reraises_errors_of_its_threads():
    prefetcher = Prefetcher(lambda step: failing(DataError("step 1"))() if step == 1 else step, 0)
    assert prefetcher.get(0) == 0
    with raises(DataError, match="step 1"):
        prefetcher.get(1)
    assert prefetcher.get(2) == 2
    prefetcher.close()
