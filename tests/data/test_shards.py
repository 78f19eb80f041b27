"""Windows are read from any number of shards with few descriptors, and a shard that changes is found and named."""

import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from gptjax.data import shards as shards_module
from gptjax.data.dataset import Dataset
from gptjax.data.header import make_header
from gptjax.data.shards import Shard, ShardReader
from gptjax.data.tokenizer import load_tokenizer
from gptjax.data.tokens import hash_file, open_shard, open_split
from gptjax.errors import DataError
from tests.helpers import failing, os_error, raises

TOKENS = 500
ROOT = Path(__file__).parents[2]


def write(path: Path, number: int, dtype: str = "<u2") -> None:
    """Writes a shard in which token t is 1000 * number + t."""
    ids = (1000 * number + np.arange(TOKENS)).astype(dtype)
    path.write_bytes(make_header(TOKENS, ids.dtype) + ids.tobytes())


@pytest.fixture(autouse=True)
def _ask_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "RECHECK_SECONDS", 0.0)


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    """Twelve shards, of which every third has ids of four bytes."""
    found = []
    for number in range(12):
        path = tmp_path / f"train_{number:02d}.bin"
        write(path, number, "<u4" if number % 3 == 0 else "<u2")
        found.append(open_shard(str(path), 2**32, edge_bytes=100))
    return found


def open_descriptors(directory: Path) -> int:
    links = [Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    return sum(link.is_symlink() and os.readlink(link).startswith(f"{directory}/") for link in links)


def expected(places: list[tuple[int, int]], length: int) -> list[list[int]]:
    return [list(range(1000 * number + start, 1000 * number + start + length)) for number, start in places]


def read(reader: ShardReader, places: Sequence[tuple[int, int]], length: int) -> np.ndarray:
    """Reads windows at (shard number, first token)."""
    numbers, starts = np.array(places, np.int64).reshape(-1, 2).T
    return reader.read(numbers, starts, length)


def random_places(count: int, length: int, seed: int = 0) -> list[tuple[int, int]]:
    random = np.random.default_rng(seed)
    numbers, starts = random.integers(12, size=count), random.integers(TOKENS - length, size=count)
    return list(zip(numbers.tolist(), starts.tolist(), strict=True))


def test_windows_are_returned_in_the_requested_order(shards):
    places = random_places(100, 7)
    rows = read(ShardReader(shards), places, 7)
    assert (rows.dtype, rows.tolist()) == (np.uint32, expected(places, 7))
    assert read(ShardReader(shards), [], 7).shape == (0, 7)


def test_few_descriptors_are_open_and_all_are_closed(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_OPEN", 5)
    reader = ShardReader(shards)
    for seed in range(20):
        places = random_places(30, 3, seed)
        assert read(reader, places, 3).tolist() == expected(places, 3)
        assert open_descriptors(tmp_path) == 5
    reader.close()
    assert open_descriptors(tmp_path) == 0
    assert read(reader, [(3, 4)], 3).tolist() == [[3004, 3005, 3006]]
    del reader
    assert open_descriptors(tmp_path) == 0


def test_a_shard_that_is_open_is_not_opened_again(shards, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_OPEN", 4)
    opened: list[str] = []
    real = shards_module.open_file
    monkeypatch.setattr(shards_module, "open_file", lambda path: opened.append(path) or real(path))
    reader, places = ShardReader(shards), [(number, 0) for number in range(8)]
    read(reader, places, 2)
    assert len(opened) == 8
    read(reader, places, 2)
    assert len(opened) == 12  # four were open, whatever the order in which they are asked for


def test_several_threads_may_read(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_OPEN", 3)
    reader, wrong = ShardReader(shards), []

    def run(seed):
        for turn in range(100):
            places = random_places(20, 9, 1000 * seed + turn)
            if read(reader, places, 9).tolist() != expected(places, 9):
                wrong.append((seed, turn))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (wrong, open_descriptors(tmp_path)) == ([], 3)


def test_windows_are_prefetched_before_the_first_is_read(shards, monkeypatch):
    """So that the disk fetches them at the same time."""
    calls: list[tuple[str, int, int]] = []
    pread, advise = os.pread, os.posix_fadvise
    monkeypatch.setattr(os, "pread", lambda fd, size, at: calls.append(("pread", at, size)) or pread(fd, size, at))

    def ask(fd, at, size, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        calls.append(("ask", at, size))
        advise(fd, at, size, advice)

    monkeypatch.setattr(os, "posix_fadvise", ask)
    places = random_places(30, 7)
    read(ShardReader(shards), places, 7)
    assert [name for name, *_ in calls] == ["ask"] * 30 + ["pread"] * 30
    assert sorted(where for _, *where in calls[:30]) == sorted(where for _, *where in calls[30:])


def test_reader_works_without_posix_fadvise(shards, monkeypatch):
    monkeypatch.setattr(shards_module, "HAS_FADVISE", False)
    monkeypatch.delattr(os, "posix_fadvise")
    places = random_places(100, 7)
    assert read(ShardReader(shards), places, 7).tolist() == expected(places, 7)


def read_bytes() -> int:
    """Returns how many bytes this process has had read from disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def drop_cache(paths: list[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_cold_batch_reads_only_the_pages_of_its_windows(tmp_path):
    """A system that reads ahead fetches 128 KiB or more for each window."""
    ids = np.random.default_rng(0).integers(256, size=8 * 2**20).astype(np.uint16)
    paths = [tmp_path / f"train_{number}.bin" for number in range(4)]
    for path in paths:
        path.write_bytes(make_header(len(ids), ids.dtype) + ids.tobytes())
    dataset = Dataset(open_split(str(tmp_path), "train", tokenizer=load_tokenizer("bytes")), 1024, 100, 0)
    drop_cache(paths)
    before = read_bytes()
    paths[0].read_bytes()
    if read_bytes() - before < 2 * len(ids):
        pytest.skip("this file system does not count what it reads, or keeps files in memory")
    for step in range(3):
        drop_cache(paths)
        before = read_bytes()
        dataset.read(dataset.window_ids(step))
        assert 0 < read_bytes() - before <= 100 * 2 * 4096 + 4 * 4096  # two pages per window, one to open a file


def replace(shard: Shard, change: int, *, at: int = -20, in_place: bool = False) -> None:
    """Puts a new file in the shard's place, or writes over it, with `change` added to one byte."""
    content = bytearray(Path(shard.path).read_bytes())
    content[at] = (content[at] + change) % 256
    if in_place:
        os.utime(shard.path, ns=(0, 0))  # clocks of file systems are coarse
        Path(shard.path).write_bytes(content)
        return
    Path(f"{shard.path}.new").write_bytes(content)
    os.replace(f"{shard.path}.new", shard.path)


def with_hash(shard: Shard, known: bool) -> Shard:
    return dataclasses.replace(shard, sha256=hash_file(shard.path)) if known else shard


@pytest.mark.faults
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_x1_identical_replacement_of_a_shard_is_accepted(shards, known, in_place):
    shards[4] = with_hash(shards[4], known)
    reader = ShardReader(shards)
    read(reader, [(4, 10)], 2)
    replace(shards[4], 0, in_place=in_place)
    for _ in range(2):
        assert read(reader, [(4, 10)], 2).tolist() == [[4010, 4011]]
        reader.close()


@pytest.mark.faults
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_x1_changed_replacement_of_a_shard_is_refused(shards, known, in_place):
    shards[4] = with_hash(shards[4], known)
    reader = ShardReader(shards)
    read(reader, [(4, 10)], 2)
    replace(shards[4], 1, in_place=in_place)
    if not in_place:
        assert read(reader, [(4, 10)], 2).tolist() == [[4010, 4011]], "of the old file, which is still open"
        reader.close()
    for _ in range(2):
        with raises(DataError, shards[4].path, remedy="put the old file back"):
            read(reader, [(4, 10)], 2)
    assert read(reader, [(5, 10)], 2).tolist() == [[5010, 5011]]


@pytest.mark.faults
def test_x1_change_in_the_middle_is_found_by_hash(shards):
    replace(shards[4], 1, at=1024 + 500)
    replace(shards[5], 1, at=1024 + 500)
    reader = ShardReader([*shards[:5], with_hash(shards[5], True), *shards[6:]])
    read(reader, [(4, 10)], 2)  # without a hash only both ends are compared: docs/reliability.md
    shards[7] = with_hash(shards[7], True)
    replace(shards[7], 1, at=1024 + 500)
    with raises(DataError, shards[7].path, remedy="put the old file back"):
        read(ShardReader(shards), [(7, 10)], 2)


def test_changed_inode_does_not_rehash_the_complete_file(shards, monkeypatch):
    """As on some network file systems, where a whole hash at each opening would take seconds."""
    known = [with_hash(shard, True) for shard in shards]
    identify, inodes = shards_module.identify, itertools.count()
    fresh = lambda path, descriptor: identify(path, descriptor)._replace(inode=next(inodes))  # noqa: E731
    monkeypatch.setattr(shards_module, "identify", fresh)
    monkeypatch.setattr(shards_module, "hash_whole", lambda *_: pytest.fail("the whole file is hashed"))
    reader, places = ShardReader(known), random_places(30, 5)
    assert read(reader, places, 5).tolist() == expected(places, 5)


@pytest.mark.faults
@pytest.mark.parametrize("call", ["fstat", "posix_fadvise", "close"])
def test_x1_failing_system_call_is_reported_or_harmless(shards, monkeypatch, call):
    reader = ShardReader(shards)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(os_error(116)))
        if call == "fstat":
            with raises(DataError, shards[4].path, match="Stale file handle"):
                read(reader, [(4, 10)], 2)
        else:
            assert read(reader, [(4, 10)], 2).tolist() == [[4010, 4011]]
            reader.close()


@pytest.mark.faults
def test_x1_open_shard_is_checked_once_a_second(shards, monkeypatch):
    now, asked = [100.0], []
    identify = shards_module.identify
    monkeypatch.setattr(shards_module, "RECHECK_SECONDS", 1.0)
    monkeypatch.setattr(shards_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(shards_module, "identify", lambda path, fd: asked.append(path[-6:-4]) or identify(path, fd))
    reader = ShardReader(shards)
    for now[0], numbers in ((100, [4]), (100.9, [4, 5]), (101, [5]), (101.5, [4, 5])):
        read(reader, [(number, 0) for number in numbers], 2)
    assert asked == ["04", "05", "05", "04"]
    reader.close()
    read(reader, [(4, 0)], 2)
    assert asked[4:] == ["04"], "what is opened is always asked"


@pytest.mark.faults
def test_x1_a_longer_shard_is_named(shards):
    with open(shards[4].path, "ab") as file:
        file.write(b"more")
    with raises(DataError, shards[4].path, remedy="put the old file back"):
        read(ShardReader(shards), [(4, 10)], 2)


@pytest.mark.faults
def test_x1_a_shard_that_vanished_is_named(shards):
    os.remove(shards[4].path)
    with raises(DataError, shards[4].path, match="No such file"):
        read(ShardReader(shards), [(2, 0), (4, 10)], 2)
    shutil.rmtree(Path(shards[0].path).parent)
    with raises(DataError, shards[5].path, match="No such file"):
        read(ShardReader(shards), [(5, 10)], 2)


@pytest.mark.faults
def test_x1_shard_truncated_while_open_is_named(shards):
    reader = ShardReader(shards)
    read(reader, [(4, 400)], 50)
    os.truncate(shards[4].path, 1024 + 2 * 420)
    with raises(DataError, shards[4].path, remedy="put the old file back"):
        read(reader, [(4, 370)], 50)
    with raises(DataError, shards[4].path, match="token 420 of 500"):
        shards[4].read(400, 450)


@pytest.mark.faults
def test_x1_read_error_names_the_shard(shards, monkeypatch):
    monkeypatch.setattr(os, "pread", failing(os_error(5)))
    for call in (lambda: read(ShardReader(shards), [(4, 0)], 50), lambda: open_shard(shards[4].path, 2**32)):
        with raises(DataError, shards[4].path, match="Input/output error"):
            call()


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "dangling link"])
def test_x1_shard_that_is_not_a_file_is_refused(shards, kind):
    """To open a pipe would wait for a writer, for ever; and a device has no size."""
    os.remove(shards[4].path)
    if kind == "pipe":
        os.mkfifo(shards[4].path)
    elif kind == "directory":
        os.mkdir(shards[4].path)
    else:
        os.symlink("/dev/zero" if kind == "device" else "nowhere", shards[4].path)
    for call in (lambda: read(ShardReader(shards), [(4, 0)], 5), lambda: open_shard(shards[4].path, 2**32)):
        with raises(DataError, shards[4].path, match=r"not a regular|cannot be read"):
            call()


@pytest.mark.faults
def test_x1_more_shards_than_descriptors_can_be_read(tmp_path):
    """In a process of its own, which may open 64 files."""
    for number in range(200):
        write(tmp_path / f"train_{number:03d}.bin", 0)
    code = f"""
import os, resource
import numpy as np
from gptjax.data import shards
from gptjax.data.tokens import open_shard
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
found = [open_shard(os.path.join({str(tmp_path)!r}, name), 2**16) for name in sorted(os.listdir({str(tmp_path)!r}))]
reader = shards.ShardReader(found)
total = reader.read(np.arange(len(found)), np.full(len(found), 5), 3).sum()
print(len(found), total, len(reader._open))
"""
    assert run_python(code) == f"200 {200 * (5 + 6 + 7)} 16\n"


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
