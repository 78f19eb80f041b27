"""Metrics as series: what of a file counts, and that thinned curves keep what a reader must see."""

import io
import itertools
import json

import numpy as np
import pytest

from gptjax.report import series
from gptjax.report.series import Series, read_series, seconds_by_step, smooth, thin


def read(text):
    return {name: dict(zip(*map(np.ndarray.tolist, found), strict=True)) for name, found in read_series(text).items()}


def of(content):
    return read(io.BytesIO(content.encode() if isinstance(content, str) else content))


def noise(count, seed=0):
    values = np.random.default_rng(seed).normal(size=count)
    return Series(np.arange(3, 3 + 2 * count, 2), values)


def test_values_are_those_of_the_file_by_name():
    rows = [{"step": 1, "loss": 2.5, "mfu": None}, {"step": 1, "val_loss": 3}, {"step": 4, "loss": 2.25}]
    assert of("".join(json.dumps(row) + "\n" for row in rows)) == {"loss": {1: 2.5, 4: 2.25}, "val_loss": {1: 3.0}}


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 2, "loss": 9.0',
        "\0\0\0\0",
        '{"loss": 9.0}',
        '{"step": -2, "loss": 9.0}',
        '{"step": true, "loss": 9.0}',
        '{"step": 2.5, "loss": 9.0}',
        '{"step": 9007199254740993, "loss": 9.0}',
        '{"step": 2, "loss": NaN}',
        '{"step": 2, "loss": -Infinity}',
        '{"step": 2, "loss": "9.0"}',
        '{"step": 2, "loss": true}',
        '{"step": 2, "loss": 1e301}',
        f'{{"step": 2, "loss": 1{"0" * 400}}}',
        '{"step": 2, "loss": [[9.0]]}',
        "[" * 100_000,
        '"step"',
        "9",
        "",
    ],
)
def test_damaged_line_or_value_is_left_out(line):
    whole = '{"step": 1, "loss": 1.5}\n%s\n{"step": 3, "loss": 3.5}\n'
    assert of(whole % line) == {"loss": {1: 1.5, 3: 3.5}}


def test_torn_last_line_and_bytes_that_are_no_text_are_left_out():
    assert of('{"step": 1, "loss": 1.5}\n{"step": 2, "lo') == {"loss": {1: 1.5}}
    assert of(b'\xff\xfe\n{"step": 1, "loss": 1.5}') == {"loss": {1: 1.5}}
    assert of("") == {}


def test_last_row_of_a_repeated_step_counts():
    steps = [1, 2, 3, 2, 3, 4]
    assert of("".join(f'{{"step": {s}, "loss": {n}}}\n' for n, s in enumerate(steps))) == {
        "loss": {1: 0.0, 2: 3.0, 3: 4.0, 4: 5.0}
    }


def test_last_row_of_a_repeated_step_counts_whatever_else_it_has():
    rows = [
        {"step": 1, "loss": 1},
        {"step": 1, "loss": 2, "lr": 3},
        {"step": 2, "loss": 4, "lr": 5},
        {"step": 2, "loss": 6},
    ]
    expected = {"loss": {1: 2.0, 2: 6.0}, "lr": {1: 3.0, 2: 5.0}}
    assert of("".join(json.dumps(row) + "\n" for row in rows)) == expected


def test_rows_are_found_across_blocks_and_after_a_hole(monkeypatch):
    monkeypatch.setattr(series, "BLOCK_BYTES", 64)
    monkeypatch.setattr(series, "LONGEST_LINE", 200)
    lines = [f'{{"step": {n}, "loss": {n}.5}}\n' for n in range(1, 30)]
    lines.insert(10, "\0" * 1000 + "\n")
    assert list(of("".join(lines))["loss"]) == list(range(1, 30))


def test_names_are_bounded():
    lines = [json.dumps({"step": n, f"name{n}": 1.0, "loss": 2.0}) + "\n" for n in range(series.MOST_NAMES + 50)]
    found = of("".join(lines))
    assert len(found) == series.MOST_NAMES
    assert len(found["loss"]) == len(lines)


def test_names_of_layers_leave_room_for_the_others():
    layers = {f"stats/grad_rms/h{n}": 1.0 for n in range(series.MOST_LAYER_NAMES + 50)}
    found = of(json.dumps({"step": 5} | layers) + "\n" + '{"step": 10, "loss": 2.0}\n')
    assert found.pop("loss") == {10: 2.0}
    assert len(found) == series.MOST_LAYER_NAMES


def test_thinned_curve_has_the_extremes_of_every_column():
    whole = noise(10_000)
    thinned = thin(whole, 50)
    assert thinned.steps.size <= 4 * 50
    assert set(zip(*thinned, strict=True)) <= set(zip(*whole, strict=True)), "points of the file, none made up"
    assert (thinned.steps[0], thinned.steps[-1]) == (whole.steps[0], whole.steps[-1])
    edges = np.linspace(whole.steps[0], whole.steps[-1] + 1, 51)
    for low, high in itertools.pairwise(edges):
        columns = [(s.steps >= low) & (s.steps < high) for s in (whole, thinned)]
        expected, found = (s.values[c] for s, c in zip((whole, thinned), columns, strict=True))
        assert (found.min(), found.max()) == (expected.min(), expected.max())
        assert (found[0], found[-1]) == (expected[0], expected[-1])


def test_curve_with_few_points_is_not_thinned():
    whole = noise(200)
    assert thin(whole, 50) is whole


def test_steps_may_have_gaps_and_far_ends():
    whole = Series(np.array([0, 1, 2, 2**53 - 1] * 1), np.array([1.0, 9.0, 2.0, 3.0]))
    assert set(thin(whole, 1).values) == {1.0, 9.0, 3.0} | {2.0}
    many = Series(np.append(np.arange(1000), 2**53 - 1), np.append(np.arange(1000.0), 5))
    assert thin(many, 10).steps.tolist() == [0, 999, 2**53 - 1]


def test_smoothed_values_are_means_of_neighbours():
    whole = noise(1000)
    smoothed = smooth(whole, 1000)
    assert smoothed.values[0] == pytest.approx(whole.values[0])
    assert smoothed.values[4] == pytest.approx(whole.values[:9].mean())
    assert smoothed.values[500] == pytest.approx(whole.values[490:511].mean())
    few = smooth(whole, 7)
    assert few.steps.tolist() == [whole.steps[n] for n in (0, 166, 333, 499, 666, 832, 999)]
    assert set(few.values) <= set(smoothed.values)


def test_seconds_are_summed_over_the_steps_between_rows():
    seconds = Series(np.array([20, 30]), np.array([0.5, 2.0]))  # that of step 10 is missing
    assert seconds_by_step(seconds, 10).values.tolist() == [0.0, 10.0, 30.0]
    assert seconds_by_step(seconds, 2).steps.tolist() == [0, 30]
