"""docs/extending.md: its four examples, applied to a copy of the package, do what the page says."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
DIFFS = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """The package with all four examples applied, and what extended.py found in it."""
    directory = tmp_path_factory.mktemp("extending")
    shutil.copytree(ROOT / "gptjax", directory / "gptjax", ignore=shutil.ignore_patterns("__pycache__"))
    for diff in DIFFS:
        subprocess.run(["git", "apply"], input=diff, cwd=directory, text=True, check=True)
    flags = "--xla_force_host_platform_device_count=4"
    environment = os.environ | {"PYTHONPATH": str(directory), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "tests" / "extended.py")]
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["file"].startswith(str(directory))
    return found


def test_an_example_changes_at_most_three_files():
    files = [set(re.findall(r"^\+\+\+ b/(\S+)", diff, re.MULTILINE)) for diff in DIFFS]
    assert [len(names) for names in files] == [3, 2, 1, 1]


def test_new_activation_is_counted_in_parameters_flops_and_memory(changed):
    L, D, F, T = 2, 32, 128, 16
    made, counted, without = changed["parameters"]
    assert made == counted == without + L * D * F
    assert changed["flops"] == 6 * L * D * F
    assert changed["memory"] == T * L * F * 4, "the gate's output, in float32"


def test_new_matrix_is_sharded_decayed_and_updated_like_others(changed):
    role = changed["role"]
    assert (role["parameter"], role["shape"]) == ("h/mlp/c_gate/kernel", [2, 32, 128])
    assert (role["weight_decay"], role["optimizer"]) == (True, "muon")
    assert role["sharding"].endswith("(None, 'fsdp', 'tensor')")
    assert changed["losses on a mesh"] == pytest.approx(changed["losses"], rel=1e-5)
    assert changed["does not divide"].startswith("mesh.fsdp=3: does not divide ")


def test_cached_sampling_of_the_new_model_is_exact(changed):
    ids, naive = changed["sampled"]
    assert ids == naive
    assert len(ids) == 12


def test_new_parameter_is_saved_but_refused_by_exports(changed):
    assert changed["kept"] == [32, 128]
    assert changed["read back"]
    assert changed["init_from"].startswith("init_from=x: it has activation=gelu_new, this run model.activation=swiglu")
    for target, message in changed["exports"].items():
        assert message.startswith(f"h/mlp/c_gate/kernel: GPT-2 has no such parameter; --to={target}: "), message


def test_new_optimizer_learns_and_new_metric_is_reported(changed):
    assert changed["losses"][-1] < changed["losses"][0] - 0.01
    assert changed["param_norm"] > 1


def test_new_source_yields_its_documents(changed):
    assert changed["documents"] == [["a.txt:1", "first"], ["a.txt:2", "second"]]
    assert changed["kinds"].endswith("text:PATH, lines:PATH, blocks:PATH, jsonl:PATH, csv:PATH, parquet:PATH")
