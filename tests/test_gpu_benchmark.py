"""benchmarks/gpu.sh brings its results home, whatever fails, from a machine with the packages of its list only."""

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers import failing

ROOT = pathlib.Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
FILES = {"results.jsonl", "tables.txt", "log.txt", "trace.tgz", "autotune.tgz"}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a benchmark by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: __import__(name)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"XLA_FLAGS": ""} | environment,
    )  # fmt: skip


def rows_in(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def names_in(archive: pathlib.Path) -> list[str]:
    with tarfile.open(archive) as file:
        return file.getnames()


# The machine's packages


def listed(*names: str) -> set[str]:
    lines = [line for name in names for line in (BENCHMARKS / name).read_text().splitlines()]
    return {re.split(r"[\[=#\s]", line)[0] for line in lines} - {""}


def absent_modules(*lists: str) -> list[str]:
    """Returns the top-level modules of this environment that a machine with the packages of `lists` lacks."""

    def plain(name: str) -> str:
        return name.lower().replace("_", "-")

    here, rest = set(), [plain(name) for name in listed(*lists)]
    while rest:
        name = rest.pop()
        if name in here:
            continue
        here.add(name)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # torch and CUDA are there, not here
            needed = [text for text in importlib.metadata.requires(name) or [] if "extra ==" not in text]
            rest += [plain(re.split(r"[^\w.-]", text)[0]) for text in needed]
    ours = {"gptjax", "tests", "pip", "setuptools", "pkg_resources", "_distutils_hack"}
    owners = importlib.metadata.packages_distributions()
    return [name for name, packages in owners.items() if name not in ours and not {*map(plain, packages)} & here]


BLOCKED = """
import runpy, sys
absent = set({absent!r})

class Machine:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {{name!r}} on that machine", name=name)

sys.meta_path.insert(0, Machine())
sys.path.insert(0, {benchmarks!r})
sys.argv = {argv!r}
{code}
"""


def on_that_machine(code: str, *arguments: str, wheels: bool) -> subprocess.CompletedProcess[str]:
    absent = absent_modules("gpu-image.txt", *(["gpu-wheels.txt"] if wheels else []))
    assert {"tensorflow_datasets", "nbclient"} <= set(absent)
    assert ("tensorboardX" in absent) is not wheels
    text = BLOCKED.format(absent=absent, benchmarks=str(BENCHMARKS), argv=["benchmark", *arguments], code=code)
    return run("-c", text)


def test_the_parts_need_nothing_but_the_listed_packages():
    """Without carried wheels: all but gptjax.main. A contestant runs, and imports what it needs as it goes."""
    done = on_that_machine(
        "import bench, ceilings, cold_shards, correct, gpu, race, real_run, sample, summary\n"
        f"runpy.run_path({str(BENCHMARKS / 'contestant.py')!r}, run_name='__main__')",
        "gptjax", "--case=mini", "--batch=2",
        wheels=False,
    )  # fmt: skip
    assert "'ModuleNotFoundError'" not in done.stdout, done.stdout
    assert (done.returncode, '"ready": true' in done.stdout) == (0, True), done.stdout + done.stderr


def test_training_command_needs_the_carried_wheels(tmp_path):
    flags = ["--config=configs/quickstart.py", f"--config.data.path={tmp_path}", f"--workdir={tmp_path / 'run'}"]
    flags += ["--config.data.tokenizer=bytes", "--config.model.vocab_size=257"]
    code = "import tensorboardX, gptjax.train; from gptjax import main; main.cli()"
    done = on_that_machine(code, *flags, wheels=True)
    assert (done.returncode, "there is no train split" in done.stderr) == (65, True), done.stderr
    done = on_that_machine(code, *flags, wheels=False)
    assert "on that machine" in done.stderr


# The parts


def scripts_and_arguments(gpu: Any) -> list[tuple[str, list[str]]]:
    parts = [*gpu.gpu_parts("OUT"), *gpu.toy_parts("OUT", "")]
    return [(pathlib.Path(c[2]).name, list(c[3:])) for part in parts for c in part.commands]


def test_toy_and_full_benchmarks_have_the_same_parts(load):
    gpu = load("gpu")
    order = [part.name for part in gpu.gpu_parts("OUT")]
    assert order == [part.name for part in gpu.toy_parts("OUT", "")]
    assert order[:5] == ["ceilings", "correct", "train-cublaslt", "train", "peer"]
    assert all("," not in name and ":" not in name for name in order), "--only and --limit cut there"
    assert sum(part.limit for part in gpu.gpu_parts("OUT")[:5]) < 540


def test_the_parts_are_commands_that_exist(load, monkeypatch):
    """Every flag of every part is parsed by the script that gets it, up to the contestants of a race."""
    gpu, parsed = load("gpu"), []

    class ParsedError(Exception):
        pass

    def parse(self, args=None, namespace=None):
        found, rest = self.parse_known_args(args, namespace)
        assert rest == [], rest
        parsed.append(found)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    commands = scripts_and_arguments(gpu)
    contestants = []
    for name, arguments in commands:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(ParsedError):
            load(name.removesuffix(".py")).main()
        contestants += getattr(parsed[-1], "contestants", [])
    assert {name for name, _ in commands} == {"ceilings.py", "correct.py", "race.py", "sample.py", "real_run.py"}
    assert len(contestants) > 15
    for text in contestants:
        with pytest.raises(ParsedError):
            load("contestant").parse(shlex.split(text.replace(gpu.BEST, "--xla=a=1")))


def test_a_directory_with_a_blank_is_one_argument(load):
    gpu = load("gpu")
    for parts in (gpu.gpu_parts("/my results"), gpu.toy_parts("/my results", "")):
        [contestant] = [word for word in parts[-1].commands[0] if "--trace" in word]
        assert load("contestant").parse(shlex.split(contestant.replace(gpu.BEST, ""))).trace == "/my results/trace"


def test_compiler_options_of_the_parts_exist(load):
    """XLA's option names are the same on every platform; it refuses one that it does not know."""
    import jax

    step = jax.jit(lambda x: x + 1).lower(1.0)
    gpu, parse = load("gpu"), load("train_step").parse_options
    step.compile(compiler_options=parse(gpu.CUBLASLT))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such"):
        step.compile(compiler_options=parse("xla_gpu_no_such=1"))
    flags = [part.xla_flags for part in gpu.gpu_parts("OUT")] + ["--xla_gpu_per_fusion_autotune_cache_dir=/tmp"]
    assert run("-c", "import jax; jax.devices()", XLA_FLAGS=" ".join(flags)).returncode == 0
    assert run("-c", "import jax; jax.devices()", XLA_FLAGS="--xla_gpu_no_such=1").returncode != 0


def test_find_best_returns_the_fastest_setting_so_far(load):
    find_best = load("gpu").find_best
    rows = [
        {"part": "train-a", "who": "gptjax --batch=32 --xla=a=1", "tokens/s": 5.0},
        {"part": "train", "who": "gptjax --batch=32", "tokens/s": 6.0},
        {"part": "train-a", "who": "gptjax --batch=64 --xla=a=1", "tokens/s": 9.0},
        {"part": "train", "who": "gptjax --batch=64", "verdict": "out of memory"},
        {"part": "peer", "who": "gptjax --batch=64 --xla=b=1", "tokens/s": 99.0},
    ]
    assert find_best(rows, "gptjax --batch=64 <best>") == "--xla=a=1"
    assert find_best(rows, "gptjax --batch=32 <best>") == ""
    assert find_best(rows, "gptjax --batch=3 <best>") == ""


# What comes back


@pytest.mark.long
def test_part_ended_by_its_limit_loses_only_its_rows(tmp_path):
    out = tmp_path / "out"
    only = "--only=ceilings,triton-loss,decode,trace"
    done = run("benchmarks/gpu.py", "--toy", f"--out={out}", only, "--limit=decode:1")
    rows = rows_in(out / "results.jsonl")
    assert done.returncode == 1
    assert {path.name for path in out.iterdir()} <= FILES
    assert [row["part"] for row in rows].count("machine") == 1
    of_decode = [row["verdict"] for row in rows if row["part"] == "decode"]
    assert (of_decode[0], of_decode[-1]) == ("ended by its limit", "left out: the part's time is over")
    assert [row["verdict"] for row in rows if row["part"] == "trace"][-1] == "measured"
    assert any(name.endswith(".xplane.pb") for name in names_in(out / "trace.tgz"))
    tables = (out / "tables.txt").read_text()
    assert all(f"\n{part}\n" in tables for part in ("decode", "trace"))
    assert done.stdout.endswith(f"{tables}\n")
    assert not [line for line in processes() if str(out) in line], "nothing goes on"


def processes() -> list[str]:
    lines = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return lines


def test_parts_skipped_by_the_deadline_are_recorded(tmp_path):
    done = run("benchmarks/gpu.py", "--toy", f"--out={tmp_path}", "--deadline=9")
    rows = rows_in(tmp_path / "results.jsonl")
    assert done.returncode == 1
    assert len(rows) == 1 + 11
    assert {row["verdict"] for row in rows[1:]} == {"left out: the deadline is near"}


def test_benchmark_without_a_gpu_runs_no_part(tmp_path):
    (tmp_path / "autotune.tgz").write_bytes(os.urandom(40))  # of a call that was killed: it costs itself only
    done = run("benchmarks/gpu.py", f"--out={tmp_path}", JAX_PLATFORMS="cpu")
    rows = rows_in(tmp_path / "results.jsonl")
    assert (done.returncode, [row["part"] for row in rows]) == (1, ["machine", "all"])
    assert rows[1]["verdict"] == "left out: JAX finds no GPU here; --toy runs on a CPU"


def test_read_rows_ignores_earlier_calls_and_lines_without_rows(load, tmp_path):
    path = tmp_path / "results.jsonl"
    wrong = ["3", "null", "[]", '"machine"', "{}", '{"who": "x"}', '{"part": 3}', '{"part": null}']
    earlier, rows = ['{"part": "machine"}', '{"part": "train", "n": 1}'], ['{"part": "machine"}', '{"part": "train"}']
    path.write_text("\n".join([*wrong, *earlier, rows[0], *wrong, rows[1], '{"par']))
    assert load("bench").read_rows(path) == [{"part": "machine"}, {"part": "train"}]


def test_temporary_files_of_parts_lie_in_the_scratch(load, tmp_path):
    """gpu.py removes it, also after parts that were killed."""
    environment = load("gpu").make_environment(tmp_path / "out", tmp_path / "scratch", toy=True)
    done = run("-c", "import tempfile; print(tempfile.mkdtemp())", **environment)
    assert pathlib.Path(done.stdout.strip()).is_relative_to(tmp_path / "scratch")


def test_largest_model_has_time_to_compile(load, monkeypatch):
    """73 s on two cores: LOG.md."""
    [part] = [part for part in load("gpu").gpu_parts("OUT") if part.name == "xl"]
    monkeypatch.setenv("GPTJAX_SECONDS", f"{part.limit:.0f}")
    args = load("race").parse(list(part.commands[0][3:]))
    assert args.ready_seconds > 1.2 * 73
    assert args.ready_seconds + 2 * args.seconds < part.limit
    assert load("race").parse(["gptjax"]).ready_seconds == 0.6 * part.limit
    assert load("race").parse(["gptjax", "--ready_seconds=5"]).ready_seconds == 5


def test_command_with_open_output_does_not_block_the_driver(load, tmp_path):
    gpu = load("gpu")
    driver = gpu.Driver(tmp_path, dict(os.environ), time.monotonic() + 100)
    code = "import subprocess; subprocess.Popen(['sleep', '50']); print('the end', flush=True)"
    start = time.monotonic()
    assert driver._run_command([sys.executable, "-c", code], start + 40, dict(os.environ)) == ""
    assert time.monotonic() - start < 20
    wrong = driver._run_command([sys.executable, "-c", "raise SystemExit('no card')"], start + 60, dict(os.environ))
    assert wrong == "failed with code 1: no card"


def test_a_part_that_does_not_exist_is_named(tmp_path):
    done = run("benchmarks/gpu.py", f"--out={tmp_path}", "--only=trains")
    assert done.returncode == 2
    assert "'trains': no such part; there are: ceilings, correct, train-cublaslt, train" in done.stderr


@pytest.mark.long
def test_failed_contestant_loses_only_its_row(tmp_path):
    """The third one's module is missing: benchmarks are run where torch is not, too."""
    results = tmp_path / "results.jsonl"
    (tmp_path / "torch.py").write_text("raise MemoryError('not enough')\n")
    done = run(
        "benchmarks/race.py", "--part=peer", "--case=mini", "--seconds=1",
        "gptjax --batch=2", "gptjax --batch=2 --loss=triton", "torch --batch=2",
        GPTJAX_RESULTS=str(results), PYTHONPATH=f"{ROOT}:{tmp_path}",
    )  # fmt: skip
    rows = {row["who"]: row for row in rows_in(results)}
    assert done.returncode == 1
    assert rows["torch --batch=2"]["verdict"] == "out of memory: MemoryError: not enough"
    assert rows["gptjax --batch=2 --loss=triton"]["verdict"].startswith("not here: ConfigError")
    best = rows["gptjax --batch=2"]
    assert (best["verdict"], best["batch"], best["tokens/s"] > 0) == ("measured", 2, True)
    assert best["tokens/s"] == pytest.approx(2 * 32 / best["ms"] * 1e3)
    assert "tokens/s" not in rows["torch --batch=2"]


def test_contestant_uses_the_first_batch_size_that_fits(load, monkeypatch):
    contestant, tried = load("contestant"), []

    def make(args, batch):
        tried.append(batch)
        if batch > 4:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")
        return lambda steps: None, {"GiB": 1}

    monkeypatch.setattr(contestant, "make_gptjax", make)
    args = contestant.parse(["gptjax", "--batch=16,8,4,2"])
    assert contestant.prepare(args)[1:] == (4, {"GiB": 1, contestant.ROW: contestant.STEPS_IN_A_ROW})
    assert tried == [16, 8, 4]
    with pytest.raises(RuntimeError, match="RESOURCE"):
        contestant.prepare(contestant.parse(["gptjax", "--batch=16,8"]))


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (
            type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 6.58 GiB."),
            True,
        ),  # torch's
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Failed to allocate request for 6GiB"), True),
        (MemoryError(), True),
        (RuntimeError("INTERNAL: a wrong product"), False),
    ],
)
def test_out_of_memory_errors_are_recognized(load, error, is_one):
    assert load("contestant").is_out_of_memory(error) is is_one


def test_oversized_trace_is_packed_in_part(load, tmp_path, monkeypatch):
    gpu, source, archive = load("gpu"), tmp_path / "trace", tmp_path / "trace.tgz"
    assert gpu.pack(source, archive) == "trace.tgz: there is nothing to pack"
    (source / "plugins").mkdir(parents=True)
    (source / "plugins" / "a.xplane.pb").write_bytes(os.urandom(1000))
    (source / "plugins" / "a.trace.json.gz").write_bytes(os.urandom(50_000))
    assert gpu.pack(source, archive, ".xplane.pb") == ""
    assert "./plugins/a.trace.json.gz" in names_in(archive)
    monkeypatch.setattr(gpu, "LARGEST_FILE", 10_000)
    assert gpu.pack(source, archive, ".xplane.pb") == ""
    assert names_in(archive) == ["a.xplane.pb"]
    assert gpu.pack(source, archive) == "trace.tgz: larger than 0 MB, left out"
    assert not archive.exists()


def test_packed_autotuning_is_reused_by_the_next_run(load, tmp_path):
    gpu, environments, directories = load("gpu"), [], []
    for name in ("out", "first", "second"):
        (tmp_path / name).mkdir()
    for name in ("first", "second"):
        environments.append(gpu.make_environment(tmp_path / "out", tmp_path / name, toy=True))
        found = re.search(r"--xla_gpu_per_fusion_autotune_cache_dir=(\S+)", environments[-1]["XLA_FLAGS"])
        directories.append(pathlib.Path(found[1]))
    (directories[0] / "a.textproto").write_text("a product")
    assert gpu.pack(directories[0], tmp_path / "out" / "autotune.tgz") == ""
    assert gpu.load_autotune(tmp_path / "out", tmp_path / "second") == []
    assert (directories[1] / "a.textproto").read_text() == "a product"
    assert str(directories[1]).startswith(environments[1]["JAX_COMPILATION_CACHE_DIR"]), "where JAX looks by itself"


def packed(*names: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 50_000
            archive.addfile(member, io.BytesIO(os.urandom(member.size)))
    return file.getvalue()


# Each has a file that could be unpacked, or none at all.
DAMAGES = {
    "random": lambda: os.urandom(40),
    "empty": bytes,
    "truncated": lambda: packed("a.textproto", "b.textproto")[:-30_000],
    "outside": lambda: packed("a.textproto", "../../outside.textproto"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_autotuning_costs_only_itself(load, tmp_path, monkeypatch, damage):
    gpu, out, scratch = load("gpu"), tmp_path / "out", tmp_path / "a" / "b" / "scratch"
    carry, source = tmp_path / "carry", tmp_path / "source"
    for path in (carry, out, source, scratch):
        path.mkdir(parents=True)
    monkeypatch.setattr(gpu, "CARRY", carry)
    (carry / "autotune.tgz").write_bytes(DAMAGES[damage]())
    (source / "whole.textproto").write_text("a product")
    assert gpu.pack(source, out / "autotune.tgz") == ""
    [line] = gpu.load_autotune(out, scratch)
    assert line.startswith(f"{carry / 'autotune.tgz'}: left out: FAILED: ")
    found = [path.name for path in tmp_path.rglob("*.textproto") if path.parent != source]
    assert found == ["whole.textproto"]
    assert [path.name for path in scratch.iterdir()] == ["compiled"]


def test_archive_is_whole_or_absent(load, tmp_path, monkeypatch):
    gpu, source, archive = load("gpu"), tmp_path / "source", tmp_path / "autotune.tgz"
    source.mkdir()
    (source / "a.textproto").write_text("a product")
    archive.write_bytes(b"of an earlier call")
    replace = os.replace

    def look(partial, final):
        assert archive.read_bytes() == b"of an earlier call"
        assert "./a.textproto" in names_in(partial)
        replace(partial, final)

    monkeypatch.setattr(gpu.os, "replace", look)
    assert gpu.pack(source, archive) == ""
    assert "./a.textproto" in names_in(archive)
    monkeypatch.setattr(gpu.tarfile, "open", failing(OSError("No space left on device")))
    assert gpu.pack(source, archive) == "autotune.tgz: left out: FAILED: OSError: No space left on device"
    assert {path.name for path in tmp_path.iterdir()} == {"source", "autotune.tgz"}


def test_damaged_wheel_costs_only_itself(load, tmp_path, monkeypatch):
    gpu, wheels = load("gpu"), tmp_path / "wheels"
    monkeypatch.setattr(gpu, "CARRY", tmp_path)
    assert gpu.unpack_wheels(tmp_path / "site") == ["unpacked: no wheel"]
    wheels.mkdir()
    (wheels / "a-1-py3-none-any.whl").write_bytes(os.urandom(40))
    with zipfile.ZipFile(wheels / "b-1-py3-none-any.whl", "w") as archive:
        archive.writestr("no_such_module.py", "")
    torn, unpacked = gpu.unpack_wheels(tmp_path / "site")
    assert torn.startswith("a-1-py3-none-any.whl: left out: FAILED: BadZipFile")
    assert unpacked == "unpacked: b"
    assert (tmp_path / "site" / "no_such_module.py").exists()


def test_make_environment_keeps_the_settings_of_the_user(load, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/their/own")
    monkeypatch.setenv("XLA_FLAGS", "--xla_their_own=1")
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    environment = load("gpu").make_environment(tmp_path, tmp_path / "scratch", toy=False)
    assert environment["PYTHONPATH"].split(":")[:3] == [str(ROOT), str(BENCHMARKS), "/their/own"]
    assert environment["XLA_FLAGS"].startswith("--xla_their_own=1 ")
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")  # JAX refuses to start with both
    environment = load("gpu").make_environment(tmp_path, tmp_path / "other", toy=False)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in environment


def summary_of(rows: list[dict[str, Any]], directory: pathlib.Path) -> str:
    path = directory / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run("benchmarks/summary.py", str(path)).stdout


def test_tables_show_the_last_row_beside_target_and_roof(tmp_path):
    train = {"part": "train", "who": "gptjax --batch=64", "batch": 64}
    rows = [
        {"part": "machine", "card": "NVIDIA H100 80GB HBM3", "jax": "0.11.2"},
        train | {"tokens/s": 300_000.0},
        train | {"tokens/s": 550_000.0},
        {"part": "peer", "who": "torch --batch=32", "batch": 32, "tokens/s": 400_000.0},
        {"part": "decode", "who": "gptjax", "batch": 256, "tokens/s": 60_000.0},
    ]
    shown = summary_of(rows, tmp_path)
    assert "card NVIDIA H100 80GB HBM3, jax 0.11.2" in shown
    assert re.search(r"gptjax --batch=64 +64 +550,000 +500000 +1\.1 +643000", shown)
    assert "300,000" not in shown
    assert re.search(r"torch --batch=32 +32 +400,000$", shown, re.MULTILINE)
    assert re.search(r"gptjax +256 +60,000 +120000 +0\.5", shown)


def table_of(rows: list[dict[str, Any]], directory: pathlib.Path) -> list[dict[str, str]]:
    """Returns the cells of the table that summary.py prints of `rows` of one part on an H200."""
    shown = summary_of([{"part": "machine", "card": "NVIDIA H200"}, *rows], directory)
    head, *body = shown.split("\n\n")[1].splitlines()[1:]
    ends = [match.end() for match in re.finditer(r"\S(?:\S| (?! ))*", head)]
    cuts = list(zip([0, *ends], ends, strict=False))
    return [{head[a:b].strip(): line[a:b].strip() for a, b in cuts if line[a:b].strip()} for line in body]


def test_best_torch_has_the_ratio_target(tmp_path):
    ours = {"part": "peer", "who": "gptjax --batch=32", "batch": 32, "tokens/s": 6e5, "verdict": "measured"}
    eager = ours | {"who": "torch --batch=32", "tokens/s": 4e5, "gptjax is x faster": 1.5}
    compiled = eager | {"who": "torch --batch=32 --compile", "tokens/s": 5e5, "gptjax is x faster": 1.2}
    failed = ours | {"who": "torch --batch=64", "verdict": "out of memory"}
    failed.pop("tokens/s")
    shown = table_of([ours, eager, compiled, failed], tmp_path)
    best = [row for row in shown if "peer" in row]
    assert [row["who"] for row in best] == ["torch --batch=32 --compile"]
    assert (best[0]["peer"], best[0]["least ratio"], best[0]["of least ratio"]) == ("best torch", "1.15", "1.04")
    assert [row["who"] for row in shown if "of least ratio" in row] == ["torch --batch=32 --compile"]
    assert [row.get("target") for row in shown] == ["560000", None, None, None]


@pytest.mark.parametrize(
    ("card", "batch", "loss", "roof"),
    [
        ("NVIDIA H200", 64, "", "713000"), ("NVIDIA H200", 32, "", "699000"), ("NVIDIA H200", 16, "", None),
        ("NVIDIA H200", 64, " --loss=triton", "737000"), ("NVIDIA B200", 64, "", None),
        ("NVIDIA H100 80GB HBM3", 64, "", "643000"), ("NVIDIA H100 80GB HBM3", 32, "", None),
        ("NVIDIA H100 80GB HBM3", 64, " --loss=triton", None),
    ],
)  # fmt: skip
def test_roof_is_that_of_the_same_program(load, card, batch, loss, roof):
    row = {"who": f"gptjax --batch={batch}{loss}", "batch": batch, "tokens/s": 1.0, "verdict": "measured"}
    shown = load("summary").with_goals("train", row, card)
    assert (str(shown.get("static roof") or "") or None) == roof


def test_failed_row_has_no_target(tmp_path):
    row = {"part": "decode", "who": "gptjax", "batch": 1, "tokens/s": 5e3}
    shown = table_of([row, row | {"command": "x", "verdict": "failed"}], tmp_path)
    assert [cells.get("target") for cells in shown] == ["2500", None]


# Whether it computes the right thing


def test_step_products_account_for_all_matrix_flops(load):
    """By their own count of FLOPs: three times the forward pass, without attention's own products."""
    train_step, found = load("train_step"), load("ceilings").step_products("small", 2)
    config = train_step.make_config("small", 2, {"steps_per_dispatch": 1})
    tokens, attention = 2 * 1024, 12 * 12 * 768 * 1024
    work = sum(2 * runs * m * k * n for _, runs, (m, k, n) in found)
    assert (len(found), len({name for name, *_ in found})) == (15, 15)
    whole = tokens * (train_step.train_flops_per_token(config.model) - attention)
    assert work == pytest.approx(whole, rel=0.01)  # positions and the vocabulary's padding


@pytest.mark.long
def test_updates_agree_with_the_stored_losses(load):
    """Those of a GPU are held against the same file."""
    correct = load("correct")
    stored = json.loads(correct.LOSSES.read_text())["losses"]
    losses = correct.train("tiny", correct.PLAIN)[-1]
    assert losses == pytest.approx(stored, rel=1e-5)
    assert losses[-1] < losses[0] / 3, "there is something to learn"


class Path:
    """A lowered program of correct.py that fails at `stage`, or computes one gradient."""

    def __init__(self, name: str, stage: str) -> None:
        self.name, self.stage = name, stage

    def fail(self, stage: str) -> None:
        import jax

        if stage == self.stage:
            raise jax.errors.JaxRuntimeError(f"INTERNAL: no kernel\n  for {self.name}")

    def as_text(self) -> str:
        return self.name

    def compile(self) -> Callable[[Any], Any]:
        self.fail("compiling")
        return self.run

    def run(self, params: Any) -> Any:
        import numpy as np

        self.fail("running")
        return np.float32(1), {"w": np.ones(3, np.float32)}


@pytest.fixture
def correct(load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Any:
    """correct.py with four paths, of programs that compute at once."""
    module = load("correct")
    paths = {name: ({"attention": name.split()[0]}, {}, 1e-4) for name in ("triton ", "cudnn ", "xla 1", "xla 2")}
    monkeypatch.setattr(module, "PATHS", paths)
    monkeypatch.setattr(module, "make_config", lambda case, compute, sections: compute["attention"])
    for name in ("make_model", "make_params", "make_tokens"):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setenv("GPTJAX_RESULTS", str(tmp_path / "results.jsonl"))
    return module


@pytest.mark.parametrize("stage", ["lowering", "compiling", "running"])
def test_failing_path_loses_only_its_own_row(correct, monkeypatch, stage):
    number = iter(range(100))

    def lower(config, params, tokens):
        path = Path(f"{config} {next(number)}", stage if config == "triton" else "")
        path.fail("lowering")
        return path

    monkeypatch.setattr(correct, "lower_gradients", lower)
    verdicts = {row["path"]: row["verdict"] for row in correct.Gradients("mini", 3).check(list(correct.PATHS))}
    failed = verdicts.pop("triton ")
    assert re.fullmatch(r"FAILED: JaxRuntimeError: INTERNAL: no kernel for triton \d", failed)
    assert verdicts == {"cudnn ": "right", "xla 1": "right", "xla 2": "right"}


def test_every_check_is_recorded_though_one_raises(correct, load, monkeypatch, tmp_path):
    """And the kernels of other compilers come last. Without a GPU every check here fails, but none costs another."""
    for name in ("train", "generate", "lower_gradients"):
        monkeypatch.setattr(correct, name, failing(RuntimeError("no kernel\nat all")))
    monkeypatch.setattr(correct.bench, "machine", dict)
    monkeypatch.setattr(sys, "argv", ["correct.py"])
    with pytest.raises(SystemExit) as ended:
        correct.main()
    rows = rows_in(tmp_path / "results.jsonl")
    assert [row["path"] for row in rows] == [
        "20 updates, float32", "a save, restored and verified", "sampling, greedy", "xla 1", "xla 2",
        "20 updates, as a run computes here", "triton ", "cudnn ", "20 updates, loss by triton",
    ]  # fmt: skip
    assert rows.pop(1)["verdict"] == "left out: there is no state to save"
    assert [row["verdict"] for row in rows if not row["verdict"].startswith("FAILED: ")] == []
    assert ended.value.code == 1
    assert "FAILED" in load("gpu").BAD_VERDICTS, "and gpu.sh fails, too"


def test_a_setting_that_gptjax_refuses_is_not_a_failure(load):
    from gptjax.errors import ConfigError

    failure = load("bench").failure
    error = ConfigError("needs a GPU", field="compute.loss", value="triton", remedy="leave it out")
    assert failure(error) == "not here: needs a GPU"
    assert failure(ConfigError("needs a GPU")) == "not here: needs a GPU"
    assert failure(MemoryError("x" * 999)) == f"FAILED: MemoryError: {'x' * 200}"


def test_failing_ceiling_loses_only_its_own_row(load, monkeypatch):
    ceilings = load("ceilings")

    def time_product(name, *_):
        if name == "head, forward":
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return 1e-3

    monkeypatch.setattr(ceilings, "time_product", time_product)
    monkeypatch.setattr(ceilings, "make_product", failing(RuntimeError("no product")))
    *rows, whole = ceilings.products("mini", 2, seconds=1, dtype="float32")
    failed = {row["what"]: row["verdict"] for row in rows if "rate" not in row}
    assert failed == {"head, forward": "FAILED: RuntimeError: RESOURCE_EXHAUSTED: out of memory"}
    assert (len(rows), whole["verdict"]) == (15, "left out: 1 of them failed")
    assert ceilings.measure("product float32", 64, 0.01)["verdict"] == "FAILED: RuntimeError: no product"
    assert ceilings.measure("copy", 64, 0.01)["rate"] > 0


@pytest.mark.parametrize("name", ["sample", "train_step"])
def test_failing_combination_loses_only_its_own_row(load, monkeypatch, capsys, name):
    benchmark = load(name)

    def measure(*arguments):
        if 7 in arguments:
            raise RuntimeError("out of memory")
        return [{"case": "toy", "tokens/s": 1.0}]

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark.bench, "write", lambda name, rows, *_: f"{len(rows)} rows")
    monkeypatch.setattr(benchmark.bench, "machine", dict)
    monkeypatch.setattr(sys, "argv", [name, "--batch=5,7,8"])
    with pytest.raises(SystemExit) if name == "sample" else contextlib.nullcontext():
        benchmark.main()
    shown = capsys.readouterr().out
    assert "FAILED: RuntimeError: out of memory" in shown
    assert ("6 rows" if name == "sample" else "2 rows") in shown


def test_gradient_check_rejects_comparison_with_itself(load, monkeypatch):
    correct = load("correct")
    paths = {"loop": ({"scan_unroll": 1}, {}, 1e-4), "too strict a limit": ({"scan_unroll": 0}, {}, 1e-12)}
    monkeypatch.setattr(correct, "PATHS", paths)
    verdicts = [row["verdict"] for row in correct.Gradients("mini", seed=3).check(list(paths))]
    assert verdicts == ["WRONG: the same program as the reference", "WRONG"]


def test_save_check_detects_a_damaged_restore(load, monkeypatch):
    import jax

    correct = load("correct")
    monkeypatch.setattr(correct, "STEPS", 1)
    config, state, abstract, _ = correct.train("mini", correct.PLAIN)
    assert correct.check_save((config, state, abstract))["verdict"] == "right"
    restore = correct.Checkpointer.restore_latest

    def damaged(self, abstract):
        restored, record = restore(self, abstract)
        return jax.tree.map(lambda leaf: leaf + 1 if leaf.shape == () else leaf, restored), record

    monkeypatch.setattr(correct.Checkpointer, "restore_latest", damaged)
    assert correct.check_save((config, state, abstract))["verdict"] == "WRONG: arrays differ"


NEAR, FAR = [2.0, 1.0005], [2.0, 1.002]


@pytest.mark.parametrize(
    ("resumed", "on_cpu", "verdict"),
    [
        ([2.0, 1.0], True, "right: equal to the bit"),
        ([2.0, 1.0], False, "right: equal to the bit"),
        (NEAR, True, "WRONG: the losses differ by up to 0.0005 relative"),
        (NEAR, False, "not bit-equal: up to 0.0005 relative"),
        (FAR, True, "WRONG: the losses differ by up to 0.002 relative"),
        (FAR, False, "WRONG: the losses differ by up to 0.002 relative"),
        ([2.0, float("nan")], False, "WRONG: the losses differ by up to nan relative"),
        ([2.0], False, "WRONG: steps are missing"),
    ],
)
def test_a_gpu_may_resume_with_nearly_equal_losses(load, resumed, on_cpu, verdict):
    judge = load("real_run").judge
    assert judge([[2.0, 1.0], resumed], 2, on_cpu=on_cpu, interrupted=True) == verdict
    if len(resumed) == 2:
        wrong = judge([[2.0, 1.0], resumed], 2, on_cpu=on_cpu, interrupted=False)
        assert wrong == "WRONG: it was not killed, or did not resume"


def test_device_of_a_run_is_read_from_its_log(load):
    is_on_cpu = load("real_run").is_on_cpu
    assert 'f"devices: {run.machine}, mesh {mesh}' in (ROOT / "gptjax" / "setup.py").read_text()
    line = "gptjax 1 with jax\ndevices: 1 x {}, mesh data=1 fsdp=1 tensor=1, 1 process\n"
    assert is_on_cpu(line.format("cpu"))
    assert not is_on_cpu(line.format("NVIDIA H100 80GB HBM3"))
    assert is_on_cpu("nothing was logged"), "then the bits must agree"
