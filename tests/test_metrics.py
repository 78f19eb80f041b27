import math

from gptjax import metrics

ROW = {
    "step": 20, "loss": 9.0, "loss_mean": 2.5, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 2000.0,
    "mfu": 0.421,
}  # fmt: skip


def test_step_line_states_speed_and_remaining_time():
    line = metrics.step_line(ROW | {"step_seconds": 0.5, "data_wait": 0.01}, 100)
    assert line.startswith("step 20/100  loss 2.5000  lr 1.00e-03  grad 0.50  2,000 tokens/s  mfu 42.1%  500ms/step")
    assert line.endswith("wait 1.0%  eta 40s")


def test_step_line_has_eighty_columns_where_a_bar_is_below():
    row = ROW | {"step": 600_000, "loss_mean": 9.98761, "tokens_per_second": 5_234_567.8, "step_seconds": 0.123}
    line = metrics.step_line(row | {"data_wait": 0.01}, 0)
    assert line == "step 600000  loss 9.9876  lr 1.00e-03  grad 0.50  5,234,568 tokens/s  mfu 42.1%"
    assert len(line) <= 80


def test_the_first_line_of_a_process_claims_no_speed():
    nan = dict.fromkeys(("tokens_per_second", "mfu", "step_seconds", "data_wait"), math.nan)
    assert metrics.step_line(ROW | nan, 100) == "step 20/100  loss 2.5000  lr 1.00e-03  grad 0.50"
