"""gptjax as others get it: a wheel, a source distribution, an editable install, and a checkout on PYTHONPATH."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FORMS = ["wheel", "sdist", "editable", "checkout"]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(source, kind, target):
    """Returns the file that pip would build of the tree `source`."""
    command = [sys.executable, "-W", "ignore", "-c", BUILD, f"build_{kind}", str(target)]
    return target / subprocess.check_output(command, cwd=source, text=True, timeout=120).splitlines()[-1]


def unpacked(wheel, target):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Returns {form: a directory for site.addsitedir}."""
    root = tmp_path_factory.mktemp("install")
    tracked = ["gptjax", "configs", "pyproject.toml", "README.md", "LICENSE"]
    for name in tracked:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, root / "tree")
    with tarfile.open(build(root / "tree", "sdist", root)) as archive:
        archive.extractall(root / "unpacked", filter="data")
    [source] = (root / "unpacked").iterdir()
    return {
        "wheel": unpacked(build(root / "tree", "wheel", root), root / "wheel"),
        "sdist": unpacked(build(source, "wheel", source), root / "sdist"),
        "editable": unpacked(build(root / "tree", "editable", root), root / "editable"),
        "checkout": root / "tree",
    }


def run(place, directory, *arguments):
    """Returns the file of the package that runs, and what `gptjax ARGUMENTS` prints in `directory`."""
    code = (
        # Without the editable install of the environment, if there is one.
        "import site, sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)];"
        "[sys.modules.pop(name) for name in list(sys.modules) if name.startswith('__editable__')];"
        f"sys.path.insert(0, {str(place)!r}); site.addsitedir({str(place)!r});"
        "import gptjax; print(gptjax.__file__); sys.argv = ['gptjax', *sys.argv[1:]];"
        "from gptjax.__main__ import cli; cli()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code, *arguments]
    shown = subprocess.check_output(command, cwd=directory, env=environment, text=True, timeout=120)
    file, _, rest = shown.partition("\n")
    return file, rest


@pytest.mark.parametrize("form", FORMS)
def test_shipped_configs_work_by_name_from_any_directory(form, places, tmp_path):
    place = places[form]
    file, printed = run(place, tmp_path, "config", "gpt2_medium", "--config.train.num_steps=7")
    assert file == str((places["checkout"] if form == "editable" else place) / "gptjax" / "__init__.py")
    found = json.loads(printed)
    assert found["model"]["n_layer"] == 24
    assert found["data"]["global_batch_size"] == 512, "of gpt2_small, from which it begins"
    assert found["train"]["num_steps"] == 7
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", FORMS)
def test_report_finds_its_script_and_style(form, places, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    _, printed = run(places[form], tmp_path, "report", "run")
    assert printed == "run/report.html\n"
    assert "<svg" not in (tmp_path / "run" / "report.html").read_text(), "its script draws"


def test_wheel_has_what_the_checkout_has(places):
    """No file of the package or of configs/ is left out, and each is there once."""
    tree, wheel = places["checkout"], places["wheel"]
    expected = {
        path.relative_to(tree)
        for path in (tree / "gptjax").rglob("*")
        if path.suffix in (".py", ".typed", ".js", ".css")
    }
    expected |= {"gptjax" / path.relative_to(tree) for path in (tree / "configs").glob("*.py")}
    assert expected == {path.relative_to(wheel) for path in (wheel / "gptjax").rglob("*") if path.is_file()}
    assert expected == {path.relative_to(places["sdist"]) for path in (places["sdist"] / "gptjax").rglob("*.*")}
