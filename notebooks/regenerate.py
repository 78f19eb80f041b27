"""Executes notebooks from top to bottom and stores their outputs: `python notebooks/regenerate.py [NAME ...]`.

They run in an empty directory, with the settings as committed. Outputs are stored without its path.
"""

import pathlib
import platform
import sys
import tempfile

import nbclient
import nbformat

HERE = pathlib.Path(__file__).resolve().parent
NAMES = ("quickstart",)  # pretrained_gpt2 downloads 0.5 GB, so it is executed only by its name
CELL_SECONDS = 3600


def main(names: list[str]) -> None:
    """Executes the notebooks and writes them back. A cell that fails raises, and the notebook stays as it was."""
    for name in names or NAMES:
        path = HERE / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as directory:
            execute(notebook, directory)
            clean(notebook, [f"{directory}/", directory, platform.node()])
        nbformat.write(notebook, path)
        print(f"{path}: executed")


def execute(notebook: nbformat.NotebookNode, directory: str) -> None:
    """Runs all cells of a notebook in `directory`, and keeps their outputs in it."""
    notebook.metadata.pop("widgets", None)
    nbclient.NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        resources={"metadata": {"path": directory}},
        record_timing=False,
    ).execute()


def clean(notebook: nbformat.NotebookNode, names: list[str]) -> None:
    """Removes the names of this machine from the outputs, and joins the pieces of a stream."""
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        joined: list[nbformat.NotebookNode] = []
        for output in cell.outputs:
            is_more = joined and output.get("name") and joined[-1].get("name") == output["name"]
            if is_more:
                joined[-1]["text"] += output["text"]
            else:
                joined.append(output)
        cell.outputs = joined
        for output in cell.outputs:
            holders = [output, output.get("data", {})]
            for holder in holders:
                for key in ("text", "text/plain"):
                    if key in holder:
                        holder[key] = without(holder[key], names)


def without(text: str, names: list[str]) -> str:
    """Returns `text` without any of `names`."""
    for name in filter(None, names):
        text = text.replace(name, "")
    return text


if __name__ == "__main__":
    main(sys.argv[1:])
