"""The notebooks: committed without outputs, and the quickstart runs from top to bottom, shortened."""

import ast
import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TINY = {
    "model.block_size": "32",
    "model.n_layer": "1",
    "model.n_head": "1",
    "model.n_embd": "16",
    "optim.name": "adamw",
    "train.num_steps": "4",
    "train.log_every": "2",
    "train.eval_every": "2",
    "train.sample_every": "0",
    "checkpoint.save_every": "4",
    "log.tensorboard": "false",
}

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


def test_the_quickstart_is_there():
    assert "quickstart" in {path.stem for path in NOTEBOOKS}


@every_notebook
def test_outputs_are_stripped(path):
    notebook = read(path)
    nbformat.validate(notebook)
    kept = [cell.id for cell in code_cells(notebook) if cell.outputs or cell.execution_count is not None]
    assert kept == []
    assert set(notebook.metadata) <= {"colab", "kernelspec", "language_info"}
    assert [cell.id for cell in notebook.cells if not set(cell.metadata) <= {"tags"}] == []


@every_notebook
def test_colab_opens_this_very_notebook(path):
    badge = f"https://colab.research.google.com/github/gptjax/gptjax/blob/main/notebooks/{path.name}"
    assert f"({badge})" in read(path).cells[0].source


@pytest.fixture
def private_home(tmp_path, monkeypatch):
    """Keeps Jupyter, IPython and matplotlib, here and in the kernel, out of the user's home."""
    for name in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        folder = tmp_path / "home" / name
        folder.mkdir(parents=True)
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # one device, compiled fast
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")


@pytest.fixture
def text_folder(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02}.txt").write_text(f"This is document {number} of a very small library.\n" * 8)
    return folder


def execute(path, folder, **values):
    """Returns the notebook with the outputs of a run in `folder`; a cell that fails raises."""
    notebook = read(path)
    assert assigned(parameters(notebook).source) == set(values)
    parameters(notebook).source = assignments(**values)
    assert notebook.metadata.kernelspec.name == "python3"  # nbclient starts this very Python for it
    client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}})
    return client.execute()


def texts(cell):
    return "".join(output.get("text", "") for output in cell.outputs if output.output_type == "stream")


def test_the_quickstart_trains_plots_and_samples(tmp_path, text_folder, private_home):
    workdir, here = tmp_path / "run", tmp_path / "here"
    here.mkdir()
    notebook = execute(
        NOTEBOOKS[[path.stem for path in NOTEBOOKS].index("quickstart")],
        here,
        CONFIG=str(ROOT / "configs" / "quickstart.py"),
        OVERRIDES=TINY | {"data.source": f"text:{text_folder}"},
        WORKDIR=str(workdir),
    )
    cells = {cell.id: cell for cell in code_cells(notebook)}
    outputs = [output for cell in cells.values() for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    assert "step 4/4" in texts(cells["train"])
    assert cells["train"].outputs[-1].data["text/plain"] == "0"
    assert [o.data["image/png"][:8] for o in cells["curve"].outputs if "image/png" in o.get("data", {})] == ["iVBORw0K"]
    assert "bits a token after 4 steps" in texts(cells["curve"])
    assert "gzip -9" in texts(cells["evaluate"])
    assert texts(cells["sample"]).startswith("def main(")
    assert len(texts(cells["sample"])) > len("def main(") + 20
    assert (workdir / "metrics.jsonl").exists()
    assert [path.name for path in here.iterdir()] == ["data"]  # prepared by the run itself
