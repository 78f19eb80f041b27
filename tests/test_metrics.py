import io
import logging
import math

import pytest

from gptjax import metrics

ROW = {"step": 20, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 2000.0, "mfu": 0.421}


def test_step_line_states_speed_and_remaining_time():
    line = metrics.step_line(ROW | {"step_seconds": 0.5, "data_wait": 0.01}, 100)
    assert line.startswith("step 20/100  loss 2.5000  lr 1.00e-03  grad 0.50  2,000 tokens/s  mfu 42.1%  500ms/step")
    assert line.endswith("wait 1.0%  eta 40s")


def test_the_first_line_of_a_process_claims_no_speed():
    nan = dict.fromkeys(("tokens_per_second", "mfu", "step_seconds", "data_wait"), math.nan)
    assert metrics.step_line(ROW | nan, 100) == "step 20/100  loss 2.5000  lr 1.00e-03  grad 0.50"


def test_log_lines_follow_a_replaced_stdout(monkeypatch: pytest.MonkeyPatch):
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
