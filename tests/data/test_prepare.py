"""Prepare ends in the same bytes however often it is killed, and never mixes up its splits."""

import dataclasses
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptjax.config import DataConfig
from gptjax.data import preparation, progress, tokens
from gptjax.data.meta import read_meta
from gptjax.data.prepare import default_path, ensure_prepared
from gptjax.data.tokenizer import load_tokenizer
from gptjax.data.tokens import open_split
from gptjax.errors import ConfigError, DataError, WorkdirError
from tests.data.corpus import BYTES, documents_of, interrupted
from tests.data.corpus import prepared as prepare_quietly
from tests.helpers import raises

ROOT = Path(__file__).parents[2]
SHARD_TOKENS = 3000

# Runs prepare in children that kill themselves at the n-th time something reaches the disk, until one is left alive.
KILLER = """
import os, signal, sys
from gptjax.data import preparation, prepare

def die_at(count):
    calls = iter(range(10**9))
    def wrap(function):
        def wrapped(*args, **kwargs):
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return wrapped
    for name in ("fsync", "replace", "rename", "truncate", "remove", "makedirs"):
        setattr(os, name, wrap(getattr(os, name)))

preparation.BATCH_BYTES = 4000
every, runs, status = int(sys.argv[1]), 0, 1
while status:
    runs += 1
    child = os.fork()
    if child == 0:
        die_at(every if every else 2 * runs)
        prepare.main(sys.argv[2:])
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
print("runs", runs)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty documents, of which some are equal and one is empty."""
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    words = ["the", "of", "and", "shard", "token", "window", "café", "<|endoftext|>", "\n"]
    for index in range(60):
        text = " ".join(random.choice(words, random.integers(20, 120)))
        (folder / f"{index:03d}.txt").write_text("twice" if index in (7, 50) else text * (index != 9))
    return folder


def prepare_corpus(corpus, out, **options):
    settings = {"source": f"text:{corpus}", "val_fraction": 0.2, "shard_tokens": SHARD_TOKENS} | options
    return prepare_quietly(settings.pop("source"), out, **settings)


def command(corpus: Path, out: Path) -> list[str]:
    flags = [f"--source=text:{corpus}", "--tokenizer=bytes", f"--out={out}"]
    return [*flags, "--val_fraction=0.2", f"--shard_tokens={SHARD_TOKENS}"]


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare_corpus(corpus, out)
    return out


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_document_is_in_one_split(corpus, prepared):
    texts = [text for path in sorted(corpus.iterdir()) if (text := path.read_text())]
    train, validation = documents_of(prepared, "train"), documents_of(prepared, "validation")
    assert sorted(train + validation) == sorted(texts)
    assert not set(train) & set(validation)
    assert 5 <= len(validation) <= 20
    assert (train + validation).count("twice") == 2
    assert train == [text for text in texts if text in set(train)]  # in the order of the source


def test_meta_counts_documents_bytes_and_tokens(prepared):
    meta = read_meta(str(prepared))
    for split in ("train", "validation"):
        documents, part = documents_of(prepared, split), meta.splits[split]
        assert part.documents == len(documents)
        assert part.bytes == sum(len(text.encode()) for text in documents)
        assert part.tokens == part.bytes + part.documents == sum(shard.tokens for shard in part.shards)
        assert [shard.tokens for shard in part.shards[:-1]] == [SHARD_TOKENS] * (len(part.shards) - 1)
    assert len(meta.splits["train"].shards) > 3
    assert (meta.eot_position, meta.eot_id, meta.tokenizer) == ("last", 256, "bytes")
    assert load_tokenizer(str(prepared / "tokenizer.json")).sha256 == BYTES.sha256
    tokens.verify(str(prepared))


def test_the_split_does_not_depend_on_the_other_documents(corpus, prepared, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(corpus.iterdir())[20:45]:
        (few / f"other_{path.name}").write_text(path.read_text())
    prepare_corpus(few, tmp_path / "out")
    assert set(documents_of(tmp_path / "out", "train")) <= set(documents_of(prepared, "train"))
    assert set(documents_of(tmp_path / "out", "validation")) <= set(documents_of(prepared, "validation"))


@pytest.mark.parametrize("batch_bytes", [1, 5000])
def test_batches_do_not_change_the_result(corpus, prepared, tmp_path, monkeypatch, batch_bytes):
    monkeypatch.setattr(preparation, "BATCH_BYTES", batch_bytes)
    prepare_corpus(corpus, tmp_path / "out")
    assert read_all(tmp_path / "out") == read_all(prepared)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.faults
@pytest.mark.parametrize("every", [0, 60, 90])  # the last phase makes 28 calls, each counted twice
def test_k1_prepare_killed_at_every_write_ends_byte_equal(corpus, prepared, tmp_path, every):
    """every=0: killed at the 2nd, then at the 4th, ... write; else each run gets so far, or to its end."""
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", KILLER, str(every), *command(corpus, out)]
    run = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split("runs ")[-1]) > 1
    assert re.search(r"continuing after \d+ documents", run.stdout)
    assert "starting over" not in run.stdout
    assert read_all(out) == read_all(prepared)
    assert os.listdir(tmp_path) == ["out"]


def interrupt(corpus, out, monkeypatch):
    """Leaves a preparation as a kill after some groups of documents would."""
    with interrupted(monkeypatch, groups=3, batch_bytes=4000):
        prepare_corpus(corpus, out)


@pytest.mark.faults
def test_k1_bytes_written_after_the_journal_are_removed(corpus, prepared, tmp_path, monkeypatch):
    interrupt(corpus, tmp_path / "out", monkeypatch)
    shards = tmp_path / "out.partial" / "shards"
    with open(max(shards.glob("train*")), "ab") as file:
        file.write(b"torn write" * 500)
    (shards / "train_000099.bin").write_bytes(b"later shard")
    lines = prepare_corpus(corpus, tmp_path / "out")
    assert lines[0].startswith("continuing after")
    assert read_all(tmp_path / "out") == read_all(prepared)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["lock", "shards/train_000000.bin", "shards/train_000001.bin"])
def test_l2_a_link_in_an_unfinished_preparation_is_not_written_through(name, corpus, tmp_path, monkeypatch):
    interrupt(corpus, tmp_path / "out", monkeypatch)
    outside, path = tmp_path / "outside", tmp_path / "out.partial" / name
    content = path.read_bytes() if path.exists() else b""
    outside.write_bytes(content + b"do not touch")
    path.unlink(missing_ok=True)
    path.symlink_to(outside)
    with raises(WorkdirError, f"{tmp_path}/out", match="symbolic link"):
        prepare_corpus(corpus, tmp_path / "out")
    assert outside.read_bytes() == content + b"do not touch"


@pytest.mark.faults
def test_x1_shard_shorter_than_the_journal_is_refused(corpus, tmp_path, monkeypatch):
    interrupt(corpus, tmp_path / "out", monkeypatch)
    path = f"{tmp_path}/out.partial/shards/train_000000.bin"
    os.truncate(path, 1500)
    with raises(DataError, path, remedy=f"remove {tmp_path}/out.partial"):
        prepare_corpus(corpus, tmp_path / "out")


@pytest.mark.faults
@pytest.mark.parametrize("change", ["text", "name", "fewer", "journal"])
def test_o2_changed_source_restarts_the_preparation(corpus, tmp_path, monkeypatch, change):
    copy = shutil.copytree(corpus, tmp_path / "corpus")
    interrupt(copy, tmp_path / "out", monkeypatch)
    if change == "text":
        (copy / "001.txt").write_text("changed")
    if change == "name":
        (copy / "001.txt").rename(copy / "001b.txt")
    if change == "fewer":
        for path in sorted(copy.iterdir())[5:]:
            path.unlink()
        (copy / "zz.txt").write_text("x" * 10 + "\n")
    if change == "journal":
        (tmp_path / "out.partial" / "journal.json").write_text("{")
    lines = prepare_corpus(copy, tmp_path / "out")
    assert [line for line in lines if "starting over" in line] or change == "journal"
    prepare_corpus(copy, tmp_path / "reference")
    assert read_all(tmp_path / "out") == read_all(tmp_path / "reference")


def test_changed_settings_restart_the_preparation(corpus, prepared, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupt(corpus, out, monkeypatch)
    lines = prepare_corpus(corpus, out, val_fraction=0.4)
    assert "other settings, or its files have changed: starting over" in lines[0]
    assert read_all(out) != read_all(prepared)


def test_existing_output_is_kept_or_refused(corpus, prepared, tmp_path):
    before = read_all(prepared)
    for tokenizer in (BYTES, dataclasses.replace(BYTES, name="copy")):
        lines = prepare_corpus(corpus, prepared, tokenizer=tokenizer)
        assert "already prepared" in lines[0]
    with raises(ConfigError, str(prepared), match=f"shard_tokens={SHARD_TOKENS}, and shard_tokens is 50"):
        prepare_corpus(corpus, prepared, shard_tokens=50)
    with raises(ConfigError, str(prepared), remedy="choose another --out", match=f"source text:{corpus}"):
        prepare_corpus(corpus, prepared, source=f"lines:{corpus}")
    with raises(ConfigError, str(prepared), match="tokenizer bytes"):
        prepare_corpus(corpus, prepared, tokenizer=load_tokenizer("gpt2"))
    assert read_all(prepared) == before
    (tmp_path / "mine.txt").write_text("precious")
    for path in (tmp_path, tmp_path / "mine.txt"):
        with raises(ConfigError, str(path), remedy="choose another --out"):
            prepare_corpus(corpus, path)
    (tmp_path / "empty").mkdir()
    prepare_corpus(corpus, tmp_path / "empty")
    assert read_all(tmp_path / "empty") == before


@pytest.mark.faults
def test_l1_waiting_preparations_continue_after_the_holder_dies(corpus, prepared, tmp_path):
    """One prepares, the other waits and finds it done; the lock of a killed process is free."""
    out = tmp_path / "out"
    slow = (
        "import sys, time; from gptjax.data import preparation as p; p.BATCH_BYTES = 4000; write = p.write_journal;"
        "p.write_journal = lambda *a: (write(*a), print('batch', flush=True), time.sleep(float(sys.argv.pop(1))));"
        "sys.argv[1:1] = [sys.argv[1]] * 99; from gptjax.data import prepare;"
        "prepare.main([a for a in sys.argv if a.startswith('--')])"
    )

    def start(seconds):
        arguments = [sys.executable, "-c", slow, str(seconds), *command(corpus, out)]
        return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    with start(60) as dead:
        assert dead.stdout.readline() == "batch\n"
        with start(0) as waiting, start(0) as third:
            for process in (waiting, third):
                assert "another process is preparing it: waiting" in process.stdout.readline()
            dead.kill()
            said = waiting.communicate(timeout=120)[0] + third.communicate(timeout=30)[0]
    assert (waiting.returncode, third.returncode) == (0, 0)
    assert said.count("continuing after") == 1
    assert said.count("by another process or") == 1
    assert read_all(out) == read_all(prepared)
    assert os.listdir(tmp_path) == ["out"]


def test_missing_source_leaves_nothing_and_loses_no_progress(corpus, tmp_path, monkeypatch):
    with raises(ConfigError, "data.source", value=f"text:{tmp_path}/none"):
        prepare_corpus(tmp_path / "none", tmp_path / "out")
    assert not os.listdir(tmp_path)
    moved = tmp_path / "corpus"
    moved.symlink_to(corpus)
    interrupt(moved, tmp_path / "out", monkeypatch)
    moved.unlink()
    with raises(ConfigError, "data.source", value=f"text:{moved}"):
        prepare_corpus(moved, tmp_path / "out")
    moved.symlink_to(corpus)
    lines = prepare_corpus(moved, tmp_path / "out")  # what was done is not lost
    assert lines[0].startswith("continuing after")


def test_output_directory_inside_the_source_is_refused(corpus):
    with raises(ConfigError, f"{corpus}/data", remedy="choose another --out", match="inside"):
        prepare_corpus(corpus, corpus / "data")
    assert not (corpus / "data.partial").exists()


def test_bad_arguments_are_refused(corpus, tmp_path):
    for name, value in (("val_fraction", 0.0), ("val_fraction", 1.0), ("val_fraction", np.nan), ("shard_tokens", 0)):
        with raises(ConfigError, name, value=value):
            prepare_corpus(corpus, tmp_path / "out", **{name: value})
    assert not os.listdir(tmp_path)


def test_default_path_is_unique_per_source_and_tokenizer():
    assert default_path("stdlib", "gpt2") == "data/stdlib-gpt2"
    assert default_path("tfds:wiki40b/en", "bytes") == "data/tfds-wiki40b-en-bytes"
    directories = [default_path(f"tfds:{path}/1.0.0", "bytes") for path in ("/a/b-c", "/a-b/c", "~/c")]
    assert len(set(directories)) == 3
    assert all(re.fullmatch(r"data/tfds-1\.0\.0-[0-9a-f]{8}-bytes", path) for path in directories)
    assert re.fullmatch(r"data/text-b-[0-9a-f]{8}-gpt2", default_path("text:/a/b", "gpt2"))
    paths = [
        default_path(f"{kind}:/{folder}/b c", t) for kind in ("text", "lines") for folder in "xy" for t in ("t", "u")
    ]
    assert len(set(paths)) == 8
    assert all(re.fullmatch(r"data/[\w.-]+", path) for path in paths)
    assert default_path("text:/a/b/", "gpt2") == default_path("text:/a/b", "gpt2")


def test_ensure_prepared_prepares_once(corpus, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    config = DataConfig(source=f"text:{corpus}", tokenizer="bytes")
    with caplog.at_level(logging.INFO, "gptjax"):
        path = ensure_prepared(config)
    assert path == default_path(config.source, "bytes")
    assert f"preparing it now (same as: python -m gptjax.data.prepare --source=text:{corpus}" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "gptjax"):
        assert ensure_prepared(config) == path
    assert not caplog.text
    assert open_split(path, "train", tokenizer=BYTES).tokens > 0


def test_ensure_prepared_uses_existing_data(prepared):
    assert ensure_prepared(DataConfig(source="tfds:lm1b", path=str(prepared))) == str(prepared)


def test_ensure_prepared_downloads_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--source=tfds:lm1b --tokenizer=gpt2 '--text_feature=a b' --out=data/tfds-lm1b-gpt2"
    with raises(ConfigError, "data/tfds-lm1b-gpt2", remedy=f"run: python -m gptjax.data.prepare {flags}"):
        ensure_prepared(DataConfig(source="tfds:lm1b", text_feature="a b"), load_tokenizer("bytes"))
    assert not os.listdir(tmp_path)


def test_ensure_prepared_never_fills_a_path_that_was_given(corpus, tmp_path):
    path = tmp_path / "typo"
    with raises(ConfigError, "data.path", value=str(path), remedy=f"--out={path}"):
        ensure_prepared(DataConfig(source=f"text:{corpus}", path=str(path)), load_tokenizer("bytes"))
    assert not path.exists()


def run_cli(*flags: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "gptjax.data.prepare", *flags]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_command_line_prepares_and_verifies(corpus, prepared, tmp_path):
    run = run_cli(*command(corpus, tmp_path / "out"))
    assert (run.returncode, run.stderr) == (0, "")
    assert re.search(r"out: [\d,]+ tokens to train on, [\d,]+ to validate, bytes ids", run.stdout)
    assert read_all(tmp_path / "out") == read_all(prepared)
    path = tmp_path / "out" / "train_000001.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    run = run_cli("--verify", f"--out={tmp_path}/out")
    assert (run.returncode, run.stdout) == (65, "")
    assert re.fullmatch(r".*train_000001\.bin: .*\n", run.stderr)


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--source=bogus"], 2), (["--source=text:/no/such/place"], 2), (["--tokenizer=bogus"], 2),
        (["--val_fraction=2"], 2), (["--no_such_flag"], 2), (["--source=stdlib", "--out=/dev/null/data"], 73),
        (["--verify", "--out=/no/such/place"], 65),
    ],
)  # fmt: skip
def test_mistakes_exit_with_a_code_and_no_traceback(flags, code):
    run = run_cli(*flags)
    assert run.returncode == code
    assert run.stderr
    assert "Traceback" not in run.stderr


def test_stdlib_is_prepared_with_the_bytes_tokenizer(tmp_path):
    lines = prepare_quietly("stdlib", tmp_path / "out")
    meta = read_meta(str(tmp_path / "out"))
    train, validation = meta.splits["train"], meta.splits["validation"]
    assert train.bytes > 8e6
    assert 0.01 < validation.bytes / train.bytes < 0.15
    assert len(lines) == 1
    assert os.listdir(tmp_path) == ["out"]


def test_progress_line_states_the_remaining_time(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "BATCH_BYTES", 4000)
    monkeypatch.setattr(progress, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    lines = prepare_corpus(corpus, tmp_path / "out")
    assert re.fullmatch(r"\d+ documents, [\d,]+ tokens, ETA \d+ s", lines[1])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    prepare_corpus(corpus, tmp_path / "again")
    assert read_all(tmp_path / "out") == read_all(tmp_path / "again")
