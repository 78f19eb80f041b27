"""The plan of a run on chips that are not here, as a command: by formulas for GPUs, by the real compiler for TPUs."""

import collections
import functools
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from gptjax.config import load
from gptjax.plan.aot import has_compiler, parse_oom, peak_bytes
from gptjax.plan.search import candidates, param_shapes
from gptjax.plan.topology import parse_topology

ROOT = pathlib.Path(__file__).parents[2]
SMALL = "--config=configs/gpt2_small.py"
KINDS = {"all-gather", "reduce-scatter", "all-reduce", "all-reduce (DCN)"}


@functools.cache
def plan(*flags):
    """Returns (exit code, stdout, stderr) of one plan."""
    command = [sys.executable, "-m", "gptjax.plan", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540, check=False)
    return done.returncode, done.stdout, done.stderr


def refused(*flags):
    """Returns (exit code, the one line on stderr)."""
    code, out, err = plan(*flags)
    assert "tokens/s" not in out, "a report in spite of the error"
    assert err.count("\n") == 1, err
    return code, err


def report_of(tmp_path, topology, *settings):
    """Returns the report of GPT-2 small on a topology; settings: of the mesh, as in "fsdp=8", or flags."""
    return report_and_text(tmp_path, topology, *settings)[0]


def report_and_text(tmp_path, topology, *settings):
    file = tmp_path / "plan.json"
    flags = [flag if flag.startswith("--") else f"--config.mesh.{flag}" for flag in settings]
    code, out, err = plan(SMALL, f"--topology={topology}", *flags, f"--json={file}")
    assert (code, err) == (0, "")
    return json.loads(file.read_text()), out


# GPUs: formulas, where there is no compiler for them

by_formulas = pytest.mark.skipif(has_compiler(parse_topology("h100:8", 1)), reason="jax[cuda] is here")


@by_formulas
def test_gpu_report_is_labelled_analytic_and_adds_up(tmp_path):
    flags = ("--slices=4", "--price_per_chip_hour=2", "--target_tokens=300e9")
    report, out = report_and_text(tmp_path, "h100:8", *flags)
    assert report["source"].startswith("analytic")
    assert report["source"] in out
    assert (report["chips"], report["mesh"]) == (32, {"data": 32, "fsdp": 1, "tensor": 1})
    assert report["tokens_per_step"] == 512 * 1024
    assert report["target_tokens"] == 300e9
    assert report["attention"] == "cudnn"
    seconds = 300e9 / report["best_case_tokens_per_second"]
    assert report["chip_hours"] == pytest.approx(32 * seconds / 3600)
    assert report["cost"] == pytest.approx(2 * report["chip_hours"])
    assert 0 < report["best_case_mfu"] <= 1
    assert report["seconds"]["step"] == max(s for name, s in report["seconds"].items() if name != "step")
    assert f"bound by {report['bound'].replace('_', ' ')}" in out
    assert "(estimate)" in out


@by_formulas
def test_typical_case_names_the_efficiencies_that_it_assumes(tmp_path):
    report = report_of(tmp_path, "h100:8", "--slices=4", "--price_per_chip_hour=2")
    assert report["typical_efficiencies"] == {
        "matrix_units": 0.6, "memory": 0.6, "links": 0.7, "network": 0.6, "exposed_communication": 0.5,
    }  # fmt: skip
    assert report["typical_mfu"] < report["best_case_mfu"]
    assert report["typical_cost"] == pytest.approx(report["cost"] * report["typical_hours"] / report["hours"])
    _, out, _ = plan(SMALL, "--topology=h100:8")
    typical = r"typical case: [\d.]+% MFU, [\d,]+ tokens/s \(estimate; assumes of the peak: matrix units 60%"
    assert re.search(typical, out)
    assert "50% of communication not hidden, assumed)" in out
    assert "pip install 'gptjax[cuda]'" in out, "how to compile instead"


@by_formulas
def test_chips_without_bfloat16_are_planned_in_float32():
    code, out, _ = plan(SMALL, "--topology=v100:8")
    assert code == 0
    assert "Tesla V100 has no matrix units for bfloat16" in out
    assert "Tesla V100 needs the extra cuda12: pip install 'gptjax[cuda12]'" in out
    assert "xla attention" in out, "cuDNN's needs bfloat16"


def test_search_ranks_fitting_meshes_and_prints_the_command():
    code, out, err = plan("--config=configs/gpt2_xl.py", "--topology=h100:8", "--search")
    assert (code, err) == (0, "")
    times = [float(line.split()[5]) for line in out.splitlines() if re.match(r"\s+\d+\s+\d+\s+\d+\s+\d+ ", line)]
    assert len(times) > 5
    assert times == sorted(times)
    last = out.splitlines()[-1]
    assert last.startswith("start it with: python -m gptjax.main --config=configs/gpt2_xl.py --config.mesh.data=")
    flags = last.split("gptjax.main ")[1].split()
    found = plan(*flags, "--topology=h100:8")
    assert found[0] == 0, "the command that a search ends with is one that a plan accepts"


@by_formulas
def test_oversized_plan_reports_the_shortage_and_a_fit():
    large = ("--config=configs/gpt2_xl.py", "--topology=h100:8", "--config.mesh.data=8",
             "--config.train.micro_batch_size=64", "--config.compute.remat=none")  # fmt: skip
    code, line = refused(*large)
    assert code == 3
    match = re.search(r"needs ([\d.]+) GiB per device, ([\d.]+) available \(([\d.]+) short\)", line)
    need, have, short = map(float, match.groups())
    assert need - have == pytest.approx(short, abs=0.02)
    assert have == pytest.approx(0.92 * 80e9 / 2**30, abs=0.01)
    near = re.search(r"by the formulas this fits: (.*)", line)[1].split()
    assert "--config.mesh.data=8" in near, "the nearest keeps the mesh"
    assert plan("--config=configs/gpt2_xl.py", "--topology=h100:8", *near)[0] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v5x:4x4"], "--topology=v5x:4x4: no such chip; known: v4, v5e"),
        (["--topology=v5e:4x5"], "no such slice; nearest: v5e:4x4"),
        (["--topology=h100:8", "--config.mesh.fsdp=3"], "does not fit 8 devices; nearest valid: 2x4x1"),
        (["--topology=h100:8", "--config.data.global_batch_size=100"], "data.global_batch_size=100"),
        (["--topology=h100:8", "--config.mesh.tensor=8"],
         "mesh.tensor=8: must divide model.n_head=12 and model.block_size=1024; nearest: 2, 4"),
        (["--topology=h100:8", "--config.model.n_embd=780", "--config.mesh.data=1", "--config.mesh.fsdp=8"],
         "mesh.fsdp=8"),
        (["--topology=h100:8", "--slices=2", "--config.mesh.fsdp=16"], "must be a multiple of the 2 slices"),
        (["--topology=h100:8", "--slices=0"], "--slices=0: must be a positive number"),
        (["--topology=h100:8", "--target_tokens=nan"], "--target_tokens=nan"),
        (["--topology=h100:8", "--serach"], "--serach: no such flag; nearest: --search"),
        ([], "--topology"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_the_nearest_valid_setting(flags, message):
    code, line = refused(SMALL, *flags)
    assert code == 2
    assert message in line


def test_mistake_is_found_before_jax_is_imported():
    code = "import sys, gptjax.plan.__main__ as p\ntry: p.main(['--config=configs/gpt2_small.py'])\n"
    code += "except Exception: print('jax' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "False\n"


def test_local_topology_without_accelerators_is_refused():
    code, line = refused(SMALL, "--topology=local")
    assert code == 2
    assert re.search(r"--topology=local: this machine has \d+ x cpu, and the table of chips has no figures", line)


def test_candidates_divide_every_size_they_shard():
    config = load(str(ROOT / "configs" / "gpt2_xl.py"), {})
    topology = parse_topology("h100:8", 2)
    found = list(candidates(config, topology, param_shapes(config)))
    assert len({tuple(s.shape.mesh.values()) for s in found}) > 2
    for s in found:
        mesh = s.shape.mesh
        assert mesh["data"] * mesh["fsdp"] * mesh["tensor"] == 16
        assert mesh["tensor"] == 1, "25 heads"
        assert mesh["data"] % 2 == 0, "only data goes across nodes"
        assert s.shape.micro_batch * s.shape.num_microbatches * mesh["data"] * mesh["fsdp"] == 512


# What the TPU compiler says


def test_peak_memory_counts_temporaries():
    """JAX 0.10 tells a peak of CPU programs that is their arguments' size."""
    x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    compiled = jax.jit(lambda x: jnp.sin(x @ x) @ x).lower(x).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary >= 2**20
    assert peak_bytes(compiled) == pytest.approx(2 * 2**20 + temporary, rel=0.01)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory. Used 21.4G of 15.75G hbm. Exceeded", (21.4 * 2**30, 15.75 * 2**30)),
        ("RESOURCE_EXHAUSTED: HLO temporaries (41.71G) exceeds available HBM (15.75G)", (41.71 * 2**30, 15.75 * 2**30)),
        ("RESOURCE_EXHAUSTED: Used 900.5M of 512.0M hbm", (900.5 * 2**20, 512 * 2**20)),
        ("RESOURCE_EXHAUSTED: something else", None),
        ("INTERNAL: Used 21.4G of 15.75G hbm", None),
    ],
)  # fmt: skip
def test_overflow_is_read_from_the_compilers_message(message, expected):
    assert parse_oom(message) == expected


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the extra 'plan' is here")
def test_missing_tpu_compiler_error_states_what_to_install():
    code, line = refused(SMALL, "--topology=v5e:4x4")
    assert code == 69
    assert "pip install 'gptjax[plan]'" in line


def check_overlap(report):
    """Checks that the rows of the schedule are all of the traffic, and that the typical case uses what they hide."""
    rows = report["overlap"]
    if report["slices"] == 1:  # a GPU's all-reduce over nodes is one row here, and two parts in the traffic
        assert sum(row["bytes"] for row in rows) == pytest.approx(report["traffic_bytes"])
    seconds, hidden = (sum(row[name] for row in rows) for name in ("seconds", "hidden_seconds"))
    assert all(0 <= row["hidden_seconds"] <= row["seconds"] for row in rows)
    assert report["typical_efficiencies"]["exposed_communication"] == pytest.approx(1 - hidden / seconds)


@pytest.mark.plan
@pytest.mark.skipif(not has_compiler(parse_topology("h100:8", 1)), reason="needs jax[cuda], several GB")
class TestCompiledForGpus:
    """With the GPU compiler (jax[cuda]), and no GPU."""

    @pytest.mark.parametrize(
        "flags",
        [("h200:8", "data=8"), ("h100:8", "data=1", "fsdp=8"), ("b200:8", "data=2", "fsdp=2", "tensor=2"),
         ("a100:8", "data=4", "fsdp=4", "--slices=2")],
        ids="-".join,
    )  # fmt: skip
    def test_gpu_step_traffic_equals_the_minimum(self, tmp_path, flags):
        report = report_of(tmp_path, *flags)
        check_overlap(report)
        assert report["source"].startswith("compiled with jaxlib")
        assert report["attention"] == "cudnn"
        least, sent = report["minimum_traffic_bytes"], report["traffic_bytes"]
        assert 0.99 * least < sent < 1.01 * least
        assert {row["kind"] for row in report["collectives"]} <= KINDS

    @pytest.mark.parametrize(
        "flags",
        [
            (SMALL, "--topology=a100:1", "--config.train.micro_batch_size=512"),
            ("--config=configs/gpt2_large.py", "--topology=h100:8", "--config.train.micro_batch_size=128",
             "--config.mesh.data=4", "--config.mesh.tensor=2"),
        ],
        ids=["one", "tensor"],
    )  # fmt: skip
    def test_gpu_plan_that_does_not_fit_names_one_that_does(self, flags):
        code, line = refused(*flags)
        assert code == 3
        assert re.search(r"needs [\d.]+ GiB per device, 68.55 available", line)
        near = re.search(r"this fits \(compiled\): (.*)", line)[1].split()
        assert plan(*flags[:2], *near)[0] == 0


@pytest.mark.plan
class TestCompiled:
    """With the TPU compiler (libtpu), and no TPU."""

    @pytest.fixture(autouse=True)
    def _compiler(self):
        pytest.importorskip("libtpu", reason="needs the extra 'plan'")

    def test_tpu_report_has_memory_and_collectives(self, tmp_path):
        settings = ("data=1", "fsdp=16", "--config.data.global_batch_size=128")
        report, out = report_and_text(tmp_path, "v5e:4x4", *settings, "--overlap")
        hidden = sum(row["hidden_seconds"] for row in report["overlap"])
        assert hidden > 0, "XLA fuses all-gathers of layers with matmuls"
        assert f"hidden by the compiled schedule: {1e3 * hidden:.2f} of" in out
        assert "of communication not hidden, by the schedule)" in out
        assert report["source"].startswith("compiled with libtpu")
        assert report["attention"] == "splash", "the kernel compiles"
        memory = report["memory_bytes"]
        assert 0.5 * 2**30 < memory["peak"] < report["memory_available_bytes"]
        assert memory["peak"] == pytest.approx(sum(memory.values()) - memory["peak"])
        assert ": fits" in out
        kinds = {row["kind"] for row in report["collectives"] if "runs" in row}
        assert any(kind.startswith("all-gather") for kind in kinds)
        runs = max(row["runs"] for row in report["collectives"] if "runs" in row)
        assert runs >= 12, "a layer's collectives run once a layer"

    @pytest.mark.parametrize(
        "flags",
        [("data=16",), ("data=1", "fsdp=16"), ("data=4", "fsdp=4"), ("data=2", "fsdp=2", "tensor=4"),
         ("data=2", "fsdp=16", "--slices=2")],
        ids="-".join,
    )  # fmt: skip
    def test_tpu_step_traffic_is_near_the_minimum(self, tmp_path, flags):
        report = report_of(tmp_path, "v5e:4x4", *flags)
        check_overlap(report)
        least, sent = report["minimum_traffic_bytes"], report["traffic_bytes"]
        assert 0.99 * least < sent < 1.2 * least
        rows = collections.Counter()
        for row in report["collectives"]:
            rows[row["kind"]] += row.get("bytes", 0)
        assert set(rows) <= KINDS | {"collective-permute"}
        # XLA's own reduce-scatter hands its neighbour what fills its last tile.
        assert rows["collective-permute"] < 1e-3 * least
        assert ("all-reduce (DCN)" in rows) == ("--slices=2" in flags)

    def test_the_two_cores_of_a_v4_chip_are_one_device(self):
        code, out, err = plan(SMALL, "--topology=v4:2x2x1", "--config.model.activation=gelu")
        assert (code, err) == (0, "")
        assert "4 x TPU v4, mesh data=4 fsdp=1 tensor=1" in out

    @pytest.mark.parametrize(
        ("topology", "remedy"),
        [
            ("v5e:2x2", "this fits (compiled): --config.mesh.data=1 --config.mesh.fsdp=4 "),
            ("v5e:1x1", "nothing was found that fits: take more chips"),
        ],
    )
    def test_oversized_tpu_plan_is_refused_with_a_remedy(self, topology, remedy):
        code, line = refused("--config=configs/gpt2_xl.py", f"--topology={topology}")
        assert code == 3
        assert re.search(r"needs [\d.]+ GiB per device, 1[56][\d.]* available \([\d.]+ short\)", line)
        assert remedy in line
