import io
import json
import logging
import math
import types

import pytest

from gptjax import metrics


def test_durations_are_written_as_people_do():
    written = [metrics.duration(s) for s in (0.0042, 4.2, 42, 59.6, 3700, 200_000, math.inf)]
    assert written == ["4ms", "4.2s", "42s", "1m00s", "1h01m", "2d07h", "n/a"]


def test_the_peak_of_a_known_device_is_found_and_of_another_is_nan():
    device = lambda kind: types.SimpleNamespace(device_kind=kind)  # noqa: E731
    assert metrics.peak_flops(device("NVIDIA H100 80GB HBM3")) == 989e12
    assert metrics.peak_flops(device("TPU v5 lite")) == 197e12
    assert metrics.peak_flops(device("TPU v5")) == 459e12
    assert math.isnan(metrics.peak_flops(device("cpu")))


def test_a_metrics_file_is_cut_after_the_step_and_loses_its_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": null}\n[1]\n{"step": 3}\n{"step": 1, "lo')
    rows = metrics.cut_to_step(path, 2)
    assert rows == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert metrics.cut_to_step(tmp_path / "none.jsonl", 2) == []


ROW = {"step": 20, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 2000.0, "mfu": 0.421}


def test_a_step_line_tells_speed_and_the_time_left():
    line = metrics.step_line(ROW | {"step_seconds": 0.5, "data_wait": 0.01}, 100)
    assert line.startswith("step 20/100  loss 2.5000  lr 1.00e-03  grad 0.50  2,000 tokens/s  mfu 42.1%  500ms/step")
    assert line.endswith("wait 1.0%  eta 40s")


def test_the_first_line_of_a_process_claims_no_speed():
    nan = dict.fromkeys(("tokens_per_second", "mfu", "step_seconds", "data_wait"), math.nan)
    assert metrics.step_line(ROW | nan, 100) == "step 20/100  loss 2.5000  lr 1.00e-03  grad 0.50"


def test_log_lines_go_where_stdout_goes_now(monkeypatch: pytest.MonkeyPatch):
    """Above the live line, not into it."""
    before, now = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(before)
    monkeypatch.setattr(metrics.log, "handlers", [handler])
    monkeypatch.setattr(metrics.log, "level", logging.INFO)
    monkeypatch.setattr("sys.stdout", now)
    handler.handle(logging.makeLogRecord({"msg": "first"}))
    metrics._follow_stdout()
    handler.handle(logging.makeLogRecord({"msg": "second"}))
    assert (before.getvalue(), now.getvalue()) == ("first\n", "second\n")


def test_a_stopwatch_books_the_time_between_calls(monkeypatch: pytest.MonkeyPatch):
    times = iter([10.0, 12.0, 15.0, 16.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(times))
    watch = metrics.Stopwatch({"step": 100.0})
    assert [watch.add("step"), watch.add("evaluation"), watch.add("step")] == [2.0, 3.0, 1.0]
    assert watch.spent == {"step": 103.0, "evaluation": 3.0}
