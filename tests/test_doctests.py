"""The examples in gptjax's docstrings print what they say."""

import doctest
import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = [path for path in sorted((ROOT / "gptjax").rglob("*.py")) if ">>> " in path.read_text()]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]


def test_docstrings_contain_examples():
    assert MODULES


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_pass(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some examples write files
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0, "none of them is in a docstring"
    assert result.failed == 0
