"""What a notebook does to a runtime of Colab or Kaggle, simulated: none of them has been tried yet."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FAMILY = dict.fromkeys(("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt"), "0.11.0")
FAMILY |= {"nvidia-cublas-cu12": "12.5.3"}
GPU_RUNTIME = FAMILY | {"flax": "0.11.0", "protobuf": "5.29", "numpy": "2.0.2"}


def load_hosted():
    spec = importlib.util.spec_from_file_location("hosted", ROOT / "notebooks/hosted.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install_cell(name):
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    [cell] = [cell for cell in notebook["cells"] if cell["id"] == "install"]
    return "".join(cell["source"])


def run_code(code, folder):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


hosted = load_hosted()


@pytest.mark.parametrize("oldest", ["0.10", "0.11", "0.11.0"])
def test_jax_of_the_runtime_is_kept_with_its_whole_family(oldest):
    extras, pins, reason = hosted.choose(oldest, GPU_RUNTIME, "cuda12", ["hub"])
    assert extras == ["hub"]
    assert sorted(pins) == sorted(f"{package}=={version}" for package, version in FAMILY.items())
    assert reason == "using the runtime's JAX 0.11.0"
    assert hosted.choose(oldest, GPU_RUNTIME, "cuda", [])[0] == [], "its plugin fits the driver"


@pytest.mark.parametrize("accelerator", ["cuda", "cuda12", "tpu", ""])
def test_older_or_missing_jax_is_replaced_for_the_accelerator(accelerator):
    extras, pins, reason = hosted.choose("0.10", {"jax": "0.9.4", "numpy": "2.0"}, accelerator, [])
    assert (extras, pins) == ([accelerator] if accelerator else [], [])
    assert reason.startswith("the runtime's JAX 0.9.4 is older than 0.10: installing one for ")
    assert hosted.choose("0.10", {"numpy": "2.0"}, accelerator, ["hub"])[0][0] == "hub"


@pytest.mark.parametrize("accelerator", ["cuda", "cuda12"])
def test_older_jax_is_replaced_for_the_cuda_that_it_had(accelerator):
    """With the plugin for CUDA 12 still installed, one for CUDA 13 would register a second backend named cuda."""
    assert hosted.choose("0.10", GPU_RUNTIME | {"jax": "0.9.4"}, accelerator, [])[0] == ["cuda12"]


@pytest.mark.parametrize(("accelerator", "package"), [("cuda", "jax-cuda13-plugin"), ("tpu", "libtpu")])
def test_jax_without_support_for_the_accelerator_gets_it(accelerator, package):
    plain = {"jax": "0.12.1", "jaxlib": "0.12.1"}
    extras, pins, reason = hosted.choose("0.10", plain, accelerator, [])
    assert extras == [accelerator]
    assert pins == ["jax==0.12.1", "jaxlib==0.12.1"]
    assert "adding its support" in reason
    assert hosted.choose("0.10", plain | {package: "1"}, accelerator, [])[0] == []


def test_older_protobuf_may_be_updated_and_asks_for_a_restart():
    _, pins, _ = hosted.choose("0.10", GPU_RUNTIME, "", [])
    assert not any(pin.startswith("protobuf") for pin in pins)
    after = GPU_RUNTIME | {"protobuf": "6.31"}
    assert hosted.changed_in_use(GPU_RUNTIME, after, {"google.protobuf"}) == ["protobuf 5.29, now 6.31"]
    assert hosted.changed_in_use(GPU_RUNTIME, after, {"numpy"}) == []
    after = GPU_RUNTIME | {"jax": "0.12.0"}
    assert hosted.changed_in_use(GPU_RUNTIME, after, {"jax"}) == ["jax 0.11.0, now 0.12.0"]


def test_session_that_must_be_restarted_stops_there(monkeypatch, capsys):
    """A line would scroll away in "Run all", and the next cell would mix old modules and new ones."""
    versions = iter([{"numpy": "1.26"}, {"numpy": "2.4"}] * 2)
    monkeypatch.setattr(hosted, "installed_versions", lambda: next(versions))
    monkeypatch.setattr(hosted, "find_accelerator", lambda: "")
    monkeypatch.setattr(hosted, "install", lambda *of: None)
    with pytest.raises(RuntimeError, match=r"restart the session, then run this cell again: .* numpy 1\.26, now 2\.4"):
        hosted.set_up()
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    hosted.set_up()
    assert "a batch has no restart: it had loaded numpy 1.26, now 2.4" in capsys.readouterr().out


def test_runtime_with_an_old_python_is_refused(monkeypatch):
    """Although it lacks tomllib."""
    hosted.check_python(">=3.11", (3, 11))
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setattr(sys, "version_info", (3, 10, 12, "final", 0))
    with pytest.raises(RuntimeError, match=r"Python 3\.10, and gptjax needs 3\.11: choose a newer runtime"):
        load_hosted().set_up()


@pytest.mark.parametrize(
    ("answer", "extra"),
    [
        ("550.54.15, 7.5\n", "cuda12"), ("580.65.06, 7.5\n", "cuda"), ("580.65.06, 7.0\n", "cuda12"),
        ("590.1, 9.0\n580.2, 9.0\n", "cuda"), ("No devices were found\n", ""),
    ],
)  # fmt: skip
def test_cuda_follows_the_driver_and_the_oldest_gpu(answer, extra):
    assert hosted.cuda_extra(answer) == extra


# The install cell, in a process of its own: its clone is real, its pip is not

FAKE_PIP = """
import json, os, pathlib, sys
at = sys.argv.index("--constraint")
pins = pathlib.Path(sys.argv[at + 1]).read_text().split()
with open(os.environ["PIP_CALLS"], "a") as calls:
    calls.write(json.dumps([sys.argv[1:at], pins]) + "\\n")
sys.exit(os.environ.get("PIP_ANSWER"))
"""


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    """Returns a function that runs a notebook's install cell in an empty directory, as on Kaggle."""
    (tmp_path / "site/pip").mkdir(parents=True)
    (tmp_path / "site/pip/__init__.py").touch()
    (tmp_path / "site/pip/__main__.py").write_text(FAKE_PIP)
    (tmp_path / "working").mkdir()
    # A bare copy of what git tracks, under the address of the repository.
    published = tmp_path / "published"
    subprocess.run(["git", "init", "-q", "-b", "main", published], check=True)
    for name in ("pyproject.toml", "notebooks/hosted.py"):
        (published / name).parent.mkdir(exist_ok=True)
        (published / name).write_bytes((ROOT / name).read_bytes())
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "-C", published, "add", "."], check=True)
    subprocess.run(["git", "-C", published, *who, "commit", "-q", "-m", "all"], check=True)

    def run(name, *, source=published, times=1, **environment):
        program = f"for _ in range({times}):\n    exec({install_cell(name)!r}, globals())\n"
        program += "import os; print('in', os.getcwd())"
        for variable, value in {
            "KAGGLE_KERNEL_RUN_TYPE": "Interactive",
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.file://{source}.insteadOf",
            "GIT_CONFIG_VALUE_0": "https://github.com/gptjax/gptjax",
            "PYTHONPATH": str(tmp_path / "site"),
            "PIP_CALLS": str(tmp_path / "calls"),
            **environment,
        }.items():
            monkeypatch.setenv(variable, value)
        done = run_code(program, tmp_path / "working")
        calls = tmp_path / "calls"
        return done, [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    return run


@pytest.mark.parametrize(("name", "extras"), [("quickstart", ""), ("pretrained_gpt2", "[hub]")])
def test_install_cell_clones_and_installs_once_each_time(runtime, tmp_path, name, extras):
    done, calls = runtime(name, times=2)
    assert done.returncode == 0, done.stderr
    clone = tmp_path / "working/gptjax"
    assert done.stdout.splitlines()[-1] == f"in {clone}"
    assert done.stdout.startswith("using the runtime's JAX ")
    assert len(calls) == 2, "the cell can be run twice"
    for arguments, pins in calls:
        assert arguments == ["install", "--quiet", f"{clone}{extras}"]
        assert any(pin.startswith("jax==") for pin in pins)


def test_install_cell_stops_where_the_source_cannot_be_reached(runtime, tmp_path):
    done, calls = runtime("quickstart", source=tmp_path / "nothere")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()
    assert any("https://github.com/gptjax/gptjax cannot be reached; turn the internet on" in line for line in last)
    assert calls == []
    assert not (tmp_path / "working/gptjax").exists(), "a rerun starts afresh"


def test_install_cell_stops_where_pip_fails(runtime):
    done, _ = runtime("quickstart", PIP_ANSWER="ERROR: ResolutionImpossible")
    assert done.returncode == 1
    assert "RuntimeError: pip could not install gptjax. It had to keep jax" in done.stderr
    assert "ERROR: ResolutionImpossible" in done.stderr
    assert "\nin " not in done.stdout


def test_install_cell_installs_nothing_outside_hosted_runtimes(runtime, tmp_path, monkeypatch):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    (tmp_path / "notebooks").mkdir()
    done = run_code(install_cell("quickstart") + "\nprint(os.getcwd())", tmp_path / "notebooks")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}\n")
