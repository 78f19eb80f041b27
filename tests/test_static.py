"""Figures of compiled steps, benchmarks/static.py: the snapshot, and the limits that the step was tuned to."""

import importlib.metadata
import json
import pathlib
import subprocess
import sys

import pytest

from gptjax.plan.aot import has_compiler
from gptjax.plan.topology import parse_topology

ROOT = pathlib.Path(__file__).parent.parent
SNAPSHOT = json.loads((ROOT / "benchmarks" / "static_snapshot.json").read_text())["rows"]
FIGURES = ("kernels", "GB/step", "TFLOP/step", "temp GiB", "roof ms")
NO_GPU = not has_compiler(parse_topology("h200:1", 1))


@pytest.fixture
def static(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import static

    return static


def run(*flags):
    """Returns (exit code, stdout) of the command."""
    command = [sys.executable, "benchmarks/static.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
    return done.returncode, done.stdout + done.stderr


def compiled_anew(chip, tmp_path):
    """Returns (row, row of the snapshot) for each of its cases on a chip; skips where another compiler is here."""
    expected = [row for row in SNAPSHOT if row["chip"] == chip]
    for package, version in expected[0]["compiler"].items():
        if (here := importlib.metadata.version(package)) != version:
            pytest.skip(f"the snapshot is of {package} {version}, here is {here}: static.py --update --chips={chip}")
    code, out = run("--snapshot", f"--chips={chip}", f"--out={tmp_path}")
    [file] = tmp_path.glob("static-*.json")
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == len(expected)
    assert (code, "as in the snapshot" in out) == (0, True), out
    return [(row, next(e for e in expected if key(e) == key(row))) for row in rows]


def key(row):
    return row["case"], row["batch"], row["settings"]


def check(row, expected):
    for figure in FIGURES:
        assert row[figure] == pytest.approx(expected[figure], rel=0.05), figure
    assert row["[T,T] buffers"] == 0
    assert row["float32 [B,T,V] buffers"] == 0


@pytest.mark.plan
@pytest.mark.skipif(NO_GPU, reason="needs jax[cuda], several GB: the extra 'static'")
def test_h200_steps_match_the_snapshot_and_limits(tmp_path):
    for row, expected in compiled_anew("h200", tmp_path):
        check(row, expected)
        assert "attention=cudnn" in row["settings"]
        assert row["roof tokens/s"] >= (735_000 if "loss=triton" in row["settings"] else 675_000)
        assert row["temp GiB"] <= 30


@pytest.mark.plan
def test_v5e_steps_match_the_snapshot_and_limits(tmp_path):
    pytest.importorskip("libtpu", reason="needs the extra 'plan'")
    for row, expected in compiled_anew("v5e", tmp_path):
        check(row, expected)
        assert "attention=splash" in row["settings"]
        assert row["GB/step"] <= 43


def test_snapshot_has_every_case_within_its_limits(static):
    rows = {(row["chip"], row["batch"], row["settings"]): row for row in SNAPSHOT}
    cases = {(chip, batch, static.describe(settings, settings["attention"])) for chip, _, batch, settings in
             static.SNAPSHOT_CASES}  # fmt: skip
    assert set(rows) == cases
    assert rows["h200", 64, "attention=cudnn"]["roof tokens/s"] >= 675_000
    assert rows["h200", 64, "attention=cudnn"]["temp GiB"] <= 30
    assert rows["h200", 64, "attention=cudnn loss=triton"]["roof tokens/s"] >= 735_000
    assert rows["h200", 64, "attention=cudnn loss=triton"]["temp GiB"] <= 30
    assert rows["v5e", 8, "attention=splash"]["GB/step"] <= 43
    assert rows["v5e", 8, "attention=splash scan_unroll=1"]["roof tokens/s"] >= 127_000
    assert rows["v6e", 16, "attention=splash scan_unroll=1"]["roof tokens/s"] >= 345_000


def test_differences_beyond_five_percent_are_reported(static):
    near, far = dict(SNAPSHOT[0]), dict(SNAPSHOT[0])
    near["GB/step"] *= 1.04
    far["GB/step"] *= 1.06
    far["temp GiB"] *= 0.9
    assert static.differences([near], SNAPSHOT) == []
    named = [line.split(": ")[1].split(" is ")[0] for line in static.differences([far], SNAPSHOT)]
    assert named == ["GB/step", "temp GiB"]
    [line] = static.differences([near | {"compiler": {"jax": "0.1"}}], SNAPSHOT)
    assert "the snapshot is of" in line
    [line] = static.differences([near | {"batch": 7}], SNAPSHOT)
    assert "--update" in line


def test_large_buffers_are_counted(static):
    scores = "%s = bf16[8,12,1024,1024]{3,2,1,0} parameter(0)"
    logits = "%l = f32[8,1024,50304]{2,1,0} parameter(1)"
    text = "ENTRY %main (x: f32[4]) -> f32[4] {{\n  {}\n}}\n"
    for one, counts in ((scores, [1, 0]), (logits, [0, 1]), (logits.replace("f32", "bf16"), [0, 0])):
        assert list(static.large_buffers(text.format(one), 1024, 8192).values()) == counts


def test_similar_kernels_are_merged_into_one_row(static):
    kernel = static.Kernel("fusion.3", "jit(train_step)/h/mlp", "fusion", 2, 4e9, 0.0, False)
    other = static.Kernel("fusion.4", "jit(train_step)/h/mlp", "fusion", 1, 4e9, 0.0, False)
    product = static.Kernel("dot.1", "jit(train_step)/loss", "dot", 1, 1e9, 2e13, False)
    first, second = static.most_expensive([kernel, product, other], static.Speed(4e12, 1e15), 5)
    assert (first["where"], first["ms"], first["TFLOP"]) == ("loss", 20, 20)
    assert (second["where"], second["ms"], second["runs"], second["GB"]) == ("h/mlp", 3, 3, 12)
    assert len(static.most_expensive([kernel, product, other], static.Speed(4e12, 1e15), 1)) == 1


@pytest.mark.skipif(not NO_GPU, reason="jax[cuda] is here")
def test_missing_gpu_compiler_error_states_what_to_install():
    code, out = run("--chips=h200")
    assert code == 69
    assert out == "h200: skipped, no GPU compiler; pip install 'gptjax[static]' or 'jax[cuda12]'\n"


def test_unknown_chip_is_refused():
    code, out = run("--chips=h2000")
    assert code == 2
    assert "--chips=h2000: expected of h200, v5e, v5p, v6e" in out
