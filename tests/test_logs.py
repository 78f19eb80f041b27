"""The logs of a run."""

import errno
import json
import os
import tracemalloc
import types

import pytest

from gptjax import goodput, logs
from gptjax.config import Config, LogConfig
from gptjax.metrics import Reporter
from tests.helpers import os_error
from tests.runs import event_steps


def test_cut_to_step_removes_later_and_torn_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": null}\n[1]\n{"step": 3}\n{"step": 1, "lo')
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}]
    assert logs.cut_to_step(path, 2) == rows[::-1]
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert logs.cut_to_step(tmp_path / "none.jsonl", 2) == []


@pytest.mark.parametrize("block", [1, 7, 2**16])
def test_the_rows_after_a_step_are_read_from_the_end(tmp_path, monkeypatch, block):
    monkeypatch.setattr(logs, "BLOCK_BYTES", block)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n[1]\n{"step": 4, "a": 1}\n{"step": 5, "lo')
    rows = [{"step": 4, "a": 1}, {"step": 3}, {"step": 2}, {"step": 1}]
    assert list(logs.rows_after(str(tmp_path), 2)) == rows[:2]
    assert list(logs.rows_after(str(tmp_path), 0)) == rows
    assert list(logs.rows_after(str(tmp_path), 4)) == []
    assert list(logs.rows_after(str(tmp_path / "none"), 4)) == []
    logs.cut_to_step(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_cut_is_in_place_and_completes_the_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    inode = path.stat().st_ino
    assert logs.cut_to_step(path, 2) == [{"step": 2}, {"step": 1}]
    assert (path.read_text(), path.stat().st_ino) == ('{"step": 1}\n{"step": 2}\n', inode)
    path.write_text('{"step": 1}\n{"step": 2}')
    logs.cut_to_step(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    logs.cut_to_step(path, 0)
    assert path.read_text() == ""


@pytest.mark.parametrize("between", ['{"step": 9}', "[1]", "", "{", "\0" * 2**21])
def test_invalid_lines_between_kept_rows_are_cut(tmp_path, between):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{between}\n{{"step": 2}}\n')
    assert logs.cut_to_step(path, 2) == [{"step": 2}, {"step": 1}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}]


@pytest.mark.faults
@pytest.mark.parametrize("beyond", [0, 1, 1500])
def test_w3_a_cut_reads_only_what_it_cuts_and_one_block(tmp_path, monkeypatch, beyond):
    """And the same at any length: nothing before it is looked at, not even where it is damaged."""
    path, parsed, parse = tmp_path / "metrics.jsonl", [], logs.parse_json
    monkeypatch.setattr(logs, "parse_json", lambda line, *of, **how: parsed.append(line) or parse(line, *of, **how))
    line = '{{"step": {}, "loss": 2.5, "step_seconds": 0.5}}\n'
    before = "{damaged\n" + "".join(line.format(step) for step in range(1, 20_001))
    path.write_text(before + "".join(line.format(step) for step in range(20_001, 20_001 + beyond)))
    assert goodput.seconds_after(logs.rows_after(str(tmp_path), 20_000), 20_000) == 0.5 * beyond
    assert logs.cut_to_step(path, 20_000)[0]["step"] == 20_000
    assert path.read_text() == before
    assert len(parsed) <= 2 * beyond + 2**16 / len(line) * 1.5 + 3


@pytest.mark.faults
@pytest.mark.parametrize("block", [20, 2**16])
def test_w3_log_with_repeated_steps_is_cut_correctly(tmp_path, monkeypatch, block):
    """Steps that stand there twice, as after a cut that failed: those up to the restored one stay."""
    monkeypatch.setattr(logs, "BLOCK_BYTES", block)
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step} for step in (*range(1, 9), *range(5, 8))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    logs.cut_to_step(path, 5)
    assert [row["step"] for row in logs.parse_rows(path.read_bytes())] == [1, 2, 3, 4, 5, 5]


@pytest.mark.faults
def test_w3_sparse_log_is_not_read_into_memory(tmp_path, monkeypatch):
    """As a power failure leaves one, or an endless file."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    os.truncate(path, 2**27)
    tracemalloc.start()
    try:
        assert logs.cut_to_step(path, 2) == [{"step": 1}]
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
    assert path.read_text() == '{"step": 1}\n'
    monkeypatch.setattr(logs, "LARGEST_FILE", 2**20)
    os.truncate(path, 2**27)
    with pytest.raises(OSError, match="more than 1,048,576 bytes to be searched"):
        logs.cut_to_step(path, 2)
    assert list(logs.rows_after(str(tmp_path), 0)) == []


def start_log(directory, resumed_from, steps):
    log = logs.RunLog(str(directory), Config(log=LogConfig(tensorboard=True)), resumed_from=resumed_from)
    for step in steps:
        log.write({"step": step, "loss": 1.0})
    log.close()


@pytest.mark.faults
@pytest.mark.parametrize("clock", [1.8e9, 1.7e9])
def test_w3_tensorboard_files_are_kept_without_repeated_steps(tmp_path, monkeypatch, clock):
    """Also where the clock has been set back, or does not move; a record that a kill has torn ends its file only."""
    start_log(tmp_path, 0, range(1, 8))
    (first,) = (tmp_path / "tensorboard").iterdir()
    content = first.read_bytes()[:-9]
    first.write_bytes(content)
    monkeypatch.setattr(logs.time, "time", lambda: clock)
    start_log(tmp_path, 4, range(5, 10))
    start_log(tmp_path, 9, [10])
    assert first.read_bytes() == content
    assert first == min((tmp_path / "tensorboard").iterdir())
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3
    assert event_steps(tmp_path, "train/loss") == list(range(1, 11))
    assert [row["step"] for row in logs.parse_rows((tmp_path / "metrics.jsonl").read_bytes())] == list(range(1, 11))


@pytest.mark.faults
def test_w3_empty_tensorboard_is_filled_from_the_log(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 2.0}\n{"step": 3}\n')
    start_log(tmp_path, 2, [3])
    assert event_steps(tmp_path, "train/loss") == [1, 2, 3]


def test_long_log_keeps_steps_and_statistics_that_alternate(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "SHOWN_ROWS", 5)
    rows = [{"step": n // 2, ("loss" if n % 2 else "stats/grad_rms/h0"): 1.0} for n in range(20)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = list(logs.thinned_rows(tmp_path / "metrics.jsonl"))
    assert [sum(name in row for row in kept) for name in ("loss", "stats/grad_rms/h0")] == [2, 2]


def test_long_log_is_thinned_but_keeps_validations(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "SHOWN_ROWS", 10)
    rows = [{"step": step, "val_loss" if step == 8 else "loss": 1.0} for step in range(1, 41)]
    (tmp_path / "metrics.jsonl").write_text("{\n" + "".join(json.dumps(row) + "\n" for row in rows))
    steps = [row["step"] for row in logs.thinned_rows(tmp_path / "metrics.jsonl")]
    assert steps == [5, 8, 10, 15, 20, 25, 30, 35, 40]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("number", "until"),
    [
        *((number, "it can be written") for number in (errno.EACCES, errno.EIO)),
        *((number, "there is space") for number in (errno.EDQUOT, errno.ENOSPC)),
    ],
)
@pytest.mark.parametrize("at", ["open", "write"])
def test_d3_unwritable_log_warns_once_and_is_written_later(at, number, until, said, monkeypatch, tmp_path):
    real, fails = logs.open_file, [True]

    def opened(*arguments):
        if at == "open" and fails[0]:
            raise os_error(number)
        file = real(*arguments)

        def write(data):
            if fails[0]:
                raise os_error(number)
            return file.write(data)

        return types.SimpleNamespace(write=write, fileno=file.fileno, close=file.close)

    monkeypatch.setattr(logs, "open_file", opened)
    file = logs.GrowingFile(tmp_path / "samples.txt")
    for line in (b"one\n", b"two\n"):
        file.write(line)
        file.sync()
    assert said == [f"{tmp_path}/samples.txt: {os.strerror(number)}: buffering until {until}; training continues"]
    fails[0] = False
    file.write(b"three\n")
    file.close()
    assert (tmp_path / "samples.txt").read_bytes() == b"one\ntwo\nthree\n"
    assert len(said) == 1


@pytest.mark.faults
def test_d3_unwritten_backlog_is_bounded_and_reported_at_close(said, monkeypatch, tmp_path):
    monkeypatch.setattr(logs, "LARGEST_BACKLOG", 6)
    (tmp_path / "a").mkdir()
    file = logs.GrowingFile(tmp_path / "a")
    file.write(b"0123456789")
    file.close()
    assert said[1:] == [f"{tmp_path}/a: the last 6 bytes could not be written"]


@pytest.mark.faults
def test_d3_run_continues_if_its_logs_are_directories(said, tmp_path):
    """Directories in the place of metrics.jsonl and samples.txt, a file in that of tensorboard."""
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "samples.txt").mkdir()
    (tmp_path / "tensorboard").write_text("")
    watch = types.SimpleNamespace(spent={})
    reporter = Reporter(
        str(tmp_path), Config(), resumed_from=0, watch=watch, compiled=True, rollbacks=0,
        tokens_per_step=1, flops_per_step=1.0, peak_flops=1.0,
    )  # fmt: skip
    reporter.report_sample(1, "text")
    reporter.report_sample(2, "text")
    reporter.report_validation(2, {"val_loss": 1.0, "val_perplexity": 1.0, "val_bits_per_byte": 1.0}, sequences=8)
    reporter.sync()
    reporter.close()
    told = [line.partition(str(tmp_path) + "/")[2].split(":")[0] for line in said]
    assert [name for name in told if name] == [
        "metrics.jsonl", "metrics.jsonl", "tensorboard", "samples.txt", "samples.txt", "metrics.jsonl"
    ]  # fmt: skip


def remove(path):
    path.unlink()
    path.parent.rmdir()


def move_directory(path):
    path.parent.rename(path.parent.with_name("moved"))


def link_and_remove(path):
    os.link(path, path.with_name("snapshot"))
    path.unlink()


def replace(path):
    os.link(path, path.with_name("snapshot"))
    path.with_name("new").write_bytes(b"")
    path.with_name("new").rename(path)


@pytest.mark.faults
@pytest.mark.parametrize("change", [remove, move_directory, link_and_remove, replace])
def test_d4_removed_moved_or_replaced_log_is_recreated(change, tmp_path):
    path = tmp_path / "logs" / "a"
    file = logs.GrowingFile(path)
    file.write(b"one\n")
    file.sync()
    assert path.read_bytes() == b"one\n"
    change(path)
    file.sync()
    file.write(b"three\n")
    file.close()
    assert path.read_bytes() == b"three\n"


@pytest.mark.faults
def test_d4_unusable_descriptor_is_reopened(said, tmp_path):
    """As after ESTALE: the path is fine, and the open file is not."""
    file = logs.GrowingFile(tmp_path / "a")
    file.write(b"one\n")
    os.close(file._file.fileno())
    file.write(b"two\n")
    file.write(b"three\n")
    file.close()
    assert (tmp_path / "a").read_bytes() == b"one\ntwo\nthree\n"
    assert len(said) == 1
