"""The notebooks: their committed outputs, and that each runs from top to bottom, shortened or as committed."""

import ast
import importlib.util
import os
import pathlib
import platform
import re
import subprocess
import tomllib

import nbclient
import nbformat
import pytest
import yaml

from gptjax import config
from gptjax.convert.tokenizer_files import write_tokenizer
from gptjax.data.tokenizer import load_tokenizer
from tests import runs
from tests.convert.hub_server import Hub
from tests.convert.models import write_hf

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TINY = {"model.block_size": "32", "model.n_layer": "1", "model.n_head": "1", "model.n_embd": "16"}
TINY |= {"train.num_steps": "4", "train.log_every": "2", "train.eval_every": "2", "train.sample_every": "0"}
TINY |= {"optim.name": "adamw", "checkpoint.save_every": "4", "log.tensorboard": "false"}

GPT2 = "openai-community/gpt2"
SIZES = {"vocab_size": 257, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 1}  # of the stand-in for it
AS_GPT2 = {f"model.{name}": size for name, size in SIZES.items() if name != "n_positions"}
FINETUNE = TINY | AS_GPT2 | {"model.block_size": 64, "data.tokenizer": "bytes", "optim.warmup_steps": 1}
FINETUNE |= {"optim.peak_lr": 0.01, "train.log_every": 1, "train.eval_every": 0}

FAKE_COLAB = """
import pathlib, types

def mount(path):
    (pathlib.Path(path) / "MyDrive").mkdir(parents=True)

drive = types.SimpleNamespace(mount=mount)
output = None  # JAX asks for it on Colab
"""

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters(notebook):
    """Returns the one cell whose values a test may replace."""
    [cell] = [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    return cell


def assigned(source):
    return {target.id for node in ast.parse(source).body for target in node.targets}


def assignments(**values):
    return "\n".join(f"{name} = {value!r}" for name, value in values.items())


@every_notebook
def test_notebook_is_valid_and_holds_nothing_of_a_machine(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert set(notebook.metadata) <= {"colab", "kernelspec", "language_info"}
    assert [cell.id for cell in notebook.cells if not set(cell.metadata) <= {"tags"}] == []
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
    printed = "".join(texts(cell) for cell in code_cells(notebook))
    for name in ("/tmp", "/home", "/root", "/Users", platform.node(), "Traceback"):
        assert name not in printed


def test_quickstart_has_the_outputs_of_one_whole_run():
    cells = {cell.id: cell for cell in code_cells(read(ROOT / "notebooks/quickstart.ipynb"))}
    assert [cell.execution_count for cell in cells.values()] == list(range(1, len(cells) + 1))
    assert pictures(cells["curve"]) == ["iVBORw0K"]
    assert "step 2700/2700" in texts(cells["train"])
    assert len(figures(cells)) == 14 + 1 + 3, "validations every 200 steps, the last one, and the evaluation"


def test_notebook_without_outputs_says_that_it_has_not_run():
    notebook = read(ROOT / "notebooks/pretrained_gpt2.ipynb")
    assert [cell.id for cell in code_cells(notebook) if cell.outputs or cell.execution_count is not None] == []
    assert "has not yet run" in notebook.cells[0].source


def test_address_of_the_repository_is_the_same_everywhere():
    """It stands in pyproject.toml. Whoever publishes gptjax changes it there, and this says where else."""
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    owner_and_name = repository.removeprefix("https://github.com/")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"] == repository
    for path in NOTEBOOKS:
        notebook = read(path)
        badge = f"https://colab.research.google.com/github/{owner_and_name}/blob/main/notebooks/{path.name}"
        assert f"({badge})" in notebook.cells[0].source
        [install] = [cell.source for cell in notebook.cells if cell.id == "install"]
        assert f'REPOSITORY = "{repository}"' in install
    tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    found = {}
    for name in filter(None, tracked):
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        for address in re.findall(rb"github\.com/([\w.-]+/gptjax)\b", content):
            found.setdefault(address.decode(), set()).add(name)
    assert set(found) == {owner_and_name}, found


def figures(cells):
    """Returns the losses and bits per byte that a run of the quickstart printed, in their order."""
    printed = re.findall(r"step \d+  val loss (\d+\.\d+)", texts(cells["train"]))
    printed += re.findall(r"validation loss (\d+\.\d+) after", texts(cells["curve"]))
    printed += re.findall(r"'\w+': (\d+\.\d+)", cells["evaluate"].outputs[-1].data["text/plain"])
    return [float(number) for number in printed]


@pytest.mark.notebooks
def test_figures_of_the_quickstart_are_those_of_a_run_here(tmp_path, monkeypatch, private_home):
    monkeypatch.delenv("XLA_FLAGS")  # as fast as it is for everybody
    committed = read(ROOT / "notebooks/quickstart.ipynb")
    settings = {}
    exec(parameters(committed).source, settings)
    del settings["__builtins__"]
    cells = execute("quickstart", tmp_path, timeout=1200, **settings)
    expected = figures({cell.id: cell for cell in code_cells(committed)})
    assert figures(cells) == pytest.approx(expected, rel=0.02)


@every_notebook
def test_the_settings_are_valid(path):
    scope = {}
    exec(parameters(read(path)).source, scope)
    found = config.load(scope["CONFIG"], scope["OVERRIDES"])
    assert found.data.global_batch_size % 8 == 0, "a row for each chip of a v5e-8 on Kaggle or Colab"


@pytest.fixture
def private_home(tmp_path, monkeypatch):
    """Keeps Jupyter, IPython and matplotlib, here and in the kernel, out of the user's home."""
    for name in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        folder = tmp_path / "home" / name
        folder.mkdir(parents=True)
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # one device, compiled fast
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(runs.OFFLINE), str(ROOT)]))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")


@pytest.fixture
def text_folder(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02}.txt").write_text(f"This is document {number} of a very small library.\n" * 8)
    return folder


def execute(name, folder, *, without="", timeout=120, **values):
    """Returns the code cells by id, with the outputs of a run in `folder`; a cell that fails raises.

    without: a tag of cells to leave out. timeout: seconds per cell.
    """
    notebook = read(ROOT / "notebooks" / f"{name}.ipynb")
    notebook.cells = [cell for cell in notebook.cells if without not in cell.metadata.get("tags", [])]
    assert assigned(parameters(notebook).source) == set(values)
    parameters(notebook).source = assignments(**values)
    assert notebook.metadata.kernelspec.name == "python3"  # nbclient starts this very Python for it
    client = nbclient.NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(folder)}})
    cells = {cell.id: cell for cell in code_cells(client.execute())}
    assert [o for cell in cells.values() for o in cell.outputs if o.output_type == "error"] == []
    return cells


def texts(cell):
    return "".join(output.get("text", "") for output in cell.outputs if output.output_type == "stream")


def pictures(cell):
    """Returns how each PNG among the outputs starts."""
    return [output.data["image/png"][:8] for output in cell.outputs if "image/png" in output.get("data", {})]


def test_the_quickstart_trains_plots_and_samples(tmp_path, text_folder, private_home, monkeypatch):
    # In a Google Drive that is a folder here.
    workdir, here = tmp_path / "drive/MyDrive/gptjax/run", tmp_path / "here"
    here.mkdir()
    (tmp_path / "modules/google").mkdir(parents=True)
    (tmp_path / "modules/google/colab.py").write_text(FAKE_COLAB)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.environ["PYTHONPATH"], str(tmp_path / "modules")]))
    settings = {"CONFIG": "quickstart", "OVERRIDES": TINY | {"data.source": f"text:{text_folder}"}}
    cells = execute("quickstart", here, WORKDIR="run", DRIVE=str(tmp_path / "drive"), **settings)
    assert "step 4/4" in texts(cells["train"])
    assert cells["train"].outputs[-1].data["text/plain"] == "0"
    assert pictures(cells["curve"]) == ["iVBORw0K"]
    assert "after 4 steps" in texts(cells["curve"])
    assert "gzip -9" in texts(cells["train"])
    assert "'val_bits_per_byte': " in cells["evaluate"].outputs[-1].data["text/plain"]
    assert texts(cells["sample"]).startswith("def main(")
    assert len(texts(cells["sample"])) > len("def main(") + 20
    assert (workdir / "metrics.jsonl").exists()
    assert [path.name for path in here.iterdir()] == ["data"]  # prepared by the run itself


@pytest.fixture
def hub(tmp_path, monkeypatch, private_home):
    """A Hub on this machine, from which the kernel gets a tiny random GPT-2 by the name of the real one."""
    folder = tmp_path / "published"
    write_hf(folder, config=SIZES | {"bos_token_id": 256, "eos_token_id": 256})
    write_tokenizer(load_tokenizer("bytes"), str(folder), block_size=SIZES["n_positions"])
    with Hub() as server:
        server.add(GPT2, {file.name: file.read_bytes() for file in folder.iterdir()})
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET"):
            monkeypatch.setenv(name, "1")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


def val_loss(cell):
    return float(re.search(r"'val_loss': (\d+\.\d+)", cell.outputs[-1].data["text/plain"])[1])


def finetune(tmp_path, text_folder, *, without=""):
    (tmp_path / "here").mkdir()
    settings = {"MODEL": f"hf:{GPT2}", "CONFIG": "finetune_gpt2", "OVERRIDES": FINETUNE, "TEXT": f"text:{text_folder}"}
    settings |= {"WORKDIR": str(tmp_path / "run"), "EXPORT": str(tmp_path / "export"), "PROMPT": "This is", "DRIVE": ""}
    return execute("pretrained_gpt2", tmp_path / "here", without=without, **settings)


def test_the_pretrained_gpt2_is_finetuned_and_exported(tmp_path, text_folder, hub):
    cells = finetune(tmp_path, text_folder, without="torch")
    commit = hub.refs[GPT2, "main"]
    assert f"hf:{GPT2}@{commit}" in texts(cells["look"])
    assert "n_embd=16" in cells["look"].outputs[-1].data["text/plain"]
    assert len(hub.fetched("model.safetensors")) == 1  # and from the cache from then on
    assert f"parameters from hf:{GPT2}@{commit}" in texts(cells["train"])
    assert cells["train"].outputs[-1].data["text/plain"] == "0"
    assert pictures(cells["curve"]) == ["iVBORw0K"]
    before, after = (texts(cells[name]) for name in ("sample-before", "sample-after"))
    assert "This is" in before  # after a line on the download
    assert after.startswith("This is")
    assert after not in before
    assert val_loss(cells["evaluate-after"]) < val_loss(cells["evaluate-before"]) - 0.01
    exported = ast.literal_eval(cells["export"].outputs[-1].data["text/plain"])
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(exported)
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["data"]


@pytest.mark.torch
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs torch and transformers")
def test_transformers_generates_the_same_text_from_the_export(tmp_path, text_folder, hub):
    cells = finetune(tmp_path, text_folder)
    theirs = texts(cells["transformers"])
    assert theirs.startswith("This is")
    assert len(theirs) > len("This is") + 20
    assert theirs in texts(cells["compare"])
    assert texts(cells["compare"]).endswith("the same text: True\n")
