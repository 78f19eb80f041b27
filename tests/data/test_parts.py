"""Several processes or machines write the bytes that one process writes."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.data import parts, preparation, workers
from gptjax.data.characters import FORMAT
from gptjax.data.prepare import main
from gptjax.data.source import Document, Place
from gptjax.data.tokenizer import load_tokenizer
from gptjax.errors import ConfigError, DataError, UnavailableError
from tests.data import corpus
from tests.data.corpus import BYTES, TEXTS, WRITERS, as_text, as_tfds, compress, read_shards
from tests.data.test_prepare import KILLER
from tests.helpers import failing, raises

prepared = functools.partial(corpus.prepared, shard_tokens=2000, window=50)


def prepare_parts(path, out, count, **options):
    for part in range(1, count + 1):
        prepared(path, out, part=f"{part}/{count}", **options)


@pytest.fixture
def folder(tmp_path):
    as_text(tmp_path / "text", TEXTS)
    return f"text:{tmp_path}/text"


# Processes


@pytest.fixture
def many_tasks(monkeypatch):
    """Lets a small corpus be many tasks of worker processes."""
    monkeypatch.setattr(workers, "ALONE_CHARACTERS", 100)
    monkeypatch.setattr(preparation, "TASK_BYTES", 500)


def test_processes_do_not_change_the_bytes(folder, tmp_path, many_tasks, monkeypatch):
    prepared(folder, tmp_path / "one", processes=1)
    monkeypatch.setattr(preparation, "BATCH_BYTES", 3000)
    prepared(folder, tmp_path / "three", processes=3)
    assert read_shards(tmp_path / "three") == read_shards(tmp_path / "one")


def test_processes_tokenize_at_the_same_time(many_tasks):
    """One of two processes is stopped. The other one tokenizes all that is left."""
    batches = [[Document(str(number), f"text {number}", Place())] for number in range(30)]
    with workers._Pool(BYTES, 2) as pool:
        first, second = pool._processes
        os.kill(first.pid, signal.SIGSTOP)  # whatever it holds, the other one must finish the rest
        futures = [pool.submit(batch) for batch in batches]
        done = [future for future in futures if _finishes(future)]
        os.kill(first.pid, signal.SIGCONT)
        assert len(done) >= len(batches) - 1
        assert all(future.result(timeout=60).ids.size for future in futures)
    assert second.poll() is not None


def _finishes(future):
    try:
        return bool(future.result(timeout=5))
    except TimeoutError:
        return False


def test_dead_process_ends_the_command_and_a_rerun_completes_it(folder, tmp_path, many_tasks, monkeypatch):
    prepared(folder, tmp_path / "expected", processes=1)
    monkeypatch.setattr(preparation, "BATCH_BYTES", 1000)
    submit = workers._Pool.submit
    count = iter(range(100))

    def kill_later(pool, batch):
        if next(count) == 8:
            for process in pool._processes:
                process.kill()
        return submit(pool, batch)

    with monkeypatch.context() as patch:
        patch.setattr(workers._Pool, "submit", kill_later)
        with raises(UnavailableError, "--processes", value=2, remedy="smaller number", match="status -9"):
            prepared(folder, tmp_path / "out", processes=2)
    lines = prepared(folder, tmp_path / "out", processes=2)
    assert lines[0].startswith("continuing after")
    assert read_shards(tmp_path / "out") == read_shards(tmp_path / "expected")


def test_error_of_a_process_names_the_document(folder, tmp_path, many_tasks):
    path = tmp_path / "characters.json"
    characters = sorted(set("".join(TEXTS)) - {"é"})
    shutil.copytree(tmp_path / "text", tmp_path / "plain")
    for file in (tmp_path / "plain").iterdir():
        file.write_text(file.read_text().replace("é", "" if file.name != "040" else "é"))
    path.write_text(json.dumps({"format": FORMAT, "name": "c", "characters": "".join(characters)}))
    with raises(DataError, "040", match=r"no id for the character '\\xe9'"):
        prepared(f"text:{tmp_path}/plain", tmp_path / "out", tokenizer=load_tokenizer(str(path)), processes=2)


def test_processes_end_with_their_parent():
    code = (
        "import os; from gptjax.data import workers; from gptjax.data.tokenizer import load_tokenizer\n"
        "pool = workers._Pool(load_tokenizer('bytes'), 2)\n"
        "print(*[process.pid for process in pool._processes], flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    for pid in map(int, done.stdout.split()):  # their pipes hold the output open, so run() has waited for them
        assert not Path(f"/proc/{pid}/cmdline").exists() or b"workers" not in Path(f"/proc/{pid}/cmdline").read_bytes()


# Parts


@pytest.mark.parametrize("kind", ["text", "lines", "jsonl", "csv", "parquet", "jsonl.gz", "tfds"])
@pytest.mark.parametrize("count", [1, 3])
def test_joined_parts_have_the_bytes_of_one_process(tmp_path, folder, kind, count):
    kind, _, suffix = kind.partition(".")
    if kind == "tfds":
        path = as_tfds(tmp_path / "data", TEXTS)
    else:
        WRITERS[kind](tmp_path / "data", TEXTS)
        path = compress(tmp_path / "data", f".{suffix}") if suffix else tmp_path / "data"
    prepared(folder, tmp_path / "text_files")
    prepared(f"{kind}:{path}", tmp_path / "one")
    prepare_parts(f"{kind}:{path}", tmp_path / "out", count)
    prepared(f"{kind}:{path}", tmp_path / "out", part="join")
    one, out = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "out"))
    assert one == out
    assert read_shards(tmp_path / "one") == read_shards(tmp_path / "text_files")
    assert not list(tmp_path.rglob("*.partial"))


def test_bad_rows_of_parts_are_counted_together(tmp_path):
    texts = [None if number % 5 == 0 else text for number, text in enumerate(TEXTS)]
    WRITERS["jsonl"](tmp_path / "data", texts)
    prepare_parts(f"jsonl:{tmp_path}/data", tmp_path / "out", 3, skip_bad=True)
    lines = prepared(f"jsonl:{tmp_path}/data", tmp_path / "out", part="join", skip_bad=True)
    assert f"left out {texts.count(None)} bad rows" in lines


def test_part_that_is_complete_is_not_written_again(folder, tmp_path):
    prepare_parts(folder, tmp_path / "out", 2)
    assert prepared(folder, tmp_path / "out", part="2/2") == [f"{tmp_path}/out.parts/2-of-2: already prepared"]


def test_part_that_was_killed_at_its_end_is_not_tokenized_again(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(parts, "sync_path", failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prepared(folder, tmp_path / "out", part="1/2")
    monkeypatch.setattr(workers, "encode_documents", failing(AssertionError("tokenized again")))
    assert prepared(folder, tmp_path / "out", part="1/2")[0].startswith("continuing after")


def test_missing_part_is_named(folder, tmp_path):
    with raises(ConfigError, f"{tmp_path}/out.parts", remedy="--part=1/N"):
        prepared(folder, tmp_path / "out", part="join")
    prepared(folder, tmp_path / "out", part="1/3")
    with raises(ConfigError, f"{tmp_path}/out.parts", remedy="--part=2/3", match="missing of 3: 2, 3"):
        prepared(folder, tmp_path / "out", part="join")
    prepared(folder, tmp_path / "out", part="1/2")
    with raises(ConfigError, f"{tmp_path}/out.parts", match="N-of-2, N-of-3"):
        prepared(folder, tmp_path / "out", part="join")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["val_fraction", "files", "tokenizer"])
def test_part_of_another_preparation_is_named(folder, tmp_path, change):
    prepared(folder, tmp_path / "out", part="1/2")
    options = {"val_fraction": 0.2} if change == "val_fraction" else {}
    options |= {"tokenizer": load_tokenizer("gpt2")} if change == "tokenizer" else {}
    if change == "files":
        (tmp_path / "text" / "more").write_text("more")
    prepared(folder, tmp_path / "out", part="2/2", **options)
    foreign = "1-of-2" if change == "files" else "2-of-2"  # the first was prepared before the files changed
    with raises(ConfigError, f"{tmp_path}/out.parts/{foreign}", remedy="prepare it again", match=change):
        prepared(folder, tmp_path / "out", part="join")
    if change != "files":
        with raises(ConfigError, f"{tmp_path}/out.parts/2-of-2", remedy="prepare it again", match=change):
            prepared(folder, tmp_path / "out", part="2/2")


def test_join_with_other_flags_names_the_flag(folder, tmp_path):
    prepare_parts(folder, tmp_path / "out", 2)
    with raises(ConfigError, f"{tmp_path}/out.parts/1-of-2", match="shard_tokens is 2000 there, and 100 here"):
        prepared(folder, tmp_path / "out", part="join", shard_tokens=100)


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:-9] + bytes(9)])
@pytest.mark.parametrize("name", ["journal.json", "shards/train_000000.bin"])
def test_damaged_part_is_named(folder, tmp_path, name, damage):
    prepare_parts(folder, tmp_path / "out", 2)
    path = tmp_path / "out.parts" / "2-of-2" / name
    path.write_bytes(damage(path.read_bytes()))
    with raises(DataError, str(path if "shards" in name else path.parent), match="damaged"):
        prepared(folder, tmp_path / "out", part="join")


def test_source_that_cannot_be_divided_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one document " * 100)
    (tmp_path / "lines").write_text("a\nb\n")
    lines = f"lines:{tmp_path}/lines"
    prepare_parts(lines, tmp_path / "out", 2)
    for source, part, problem in (
        (f"text:{tmp_path}/a.txt", "1/2", "is one document"),
        ("lines:-", "1/2", "pipe"),
        (lines, "join", "too little text"),
    ):
        out = tmp_path / ("out" if part == "join" else "other")
        with raises(ConfigError, "data.source", value=source, remedy="without --part", match=problem):
            prepared(source, out, part=part)


def test_part_of_files_that_have_changed_since_is_refused(folder, tmp_path):
    prepare_parts(folder, tmp_path / "out", 2)
    (tmp_path / "text" / "more").write_text("more")
    for part in ("1/2", "join"):
        with raises(ConfigError, f"{tmp_path}/out.parts/1-of-2", match="its source had other files"):
            prepared(folder, tmp_path / "out", part=part)


def test_parts_of_two_versions_of_a_data_set_are_not_joined(tmp_path):
    source = f"tfds:{as_tfds(tmp_path / 'data', TEXTS)}"
    prepare_parts(source, tmp_path / "out", 2)
    path = tmp_path / "out.parts" / "2-of-2" / "journal.json"
    path.write_text(path.read_text().replace('"stamp": "corpus/1.0.0', '"stamp": "corpus/1.0.1'))
    with raises(ConfigError, f"{tmp_path}/out.parts/2-of-2", match="stamp is corpus/1.0.1"):
        prepared(source, tmp_path / "out", part="join")


def test_parts_of_a_file_that_is_no_text_are_refused(tmp_path):
    (tmp_path / "lines").write_bytes(b"plain\n" * 5000 + "caf\u00e9\n".encode("latin-1") * 500)
    lines = f"lines:{tmp_path}/lines"
    prepared(lines, tmp_path / "out", part="1/2")
    with raises(DataError, f"{tmp_path}/lines", remedy="latin-1", match="are invalid"):
        prepared(lines, tmp_path / "out", part="2/2")


@pytest.mark.parametrize("value", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2"])
def test_part_that_is_none_is_refused(folder, tmp_path, value):
    with raises(ConfigError, "--part", value=value, remedy=""):
        prepared(folder, tmp_path / "out", part=value)
    assert sorted(os.listdir(tmp_path)) == ["text"]


@pytest.mark.faults
@pytest.mark.parametrize("flag", ["--part=1/2", "--join"])
def test_k1_part_or_join_killed_at_every_write_ends_byte_equal(folder, tmp_path, flag):
    flags = [f"--source={folder}", "--tokenizer=bytes", "--val_fraction=0.2", "--shard_tokens=3000"]
    main([*flags, f"--out={tmp_path}/one"])
    out = tmp_path / "out"
    for part in ("1/2", "2/2"):
        if flag != f"--part={part}":
            main([*flags, f"--out={out}", f"--part={part}"])
    arguments = [sys.executable, "-c", KILLER, "0", *flags, f"--out={out}", flag]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split("runs ")[-1]) > 1
    if flag != "--join":
        main([*flags, f"--out={out}", "--join"])
    assert read_shards(out) == read_shards(tmp_path / "one")
    assert sorted(os.listdir(tmp_path)) == ["one", "out", "out.parts", "text"]
