"""The shape of the code: imports go only downwards, little is loaded early, functions stay short."""

import ast
import functools
import os
import pathlib
import re
import statistics
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# A module imports only from lines below its own, also inside functions and for types.
LAYERS = """
    main
    train
    sample  evaluate  convert.__main__  plan  replay
    start  page
    report
    aot
    run  convert.formats
    convert.msgpack
    convert.huggingface  convert.nanogpt  convert.llmc  convert.native
    convert.card  convert.torch_file
    convert.weights
    convert.names  convert.tokenizer_files
    checkpoint  metrics  step  data.prepare  divergence
    state  optim  data.dataset  data.sources  estimate
    model  data.tokens
    attention  loss  pointwise  data.tokenizer
    parallel  kernels
    sharding
    config  runtime  workdir  convert.hub  chips
    costs
    convert.files  hlo  goodput
    errors
"""
# Where a process starts, and its loop: only these use the runtime.
ENTRIES = {"main", "train", "sample", "evaluate", "convert.__main__", "data.prepare", "plan", "replay"}
# Whatever computes, so that it runs anywhere those libraries do.
COMPUTING = {"model", "attention", "loss", "kernels", "pointwise", "parallel", "sharding", "optim", "state", "step"}
NUMERICAL = {"jax", "flax", "optax", "numpy"}
# Data know nothing of models, and models nothing of data.
DATA_MAY_IMPORT = {"config", "errors", "runtime"}
# Read before any mistake of the user's is found, so at their top they import the standard library only.
CHEAP = {"main", "config", "runtime", "errors"}

HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "tensorboardX"}


@functools.cache
def modules():
    """Returns {"data.tokens": its syntax tree} of gptjax."""
    package = ROOT / "gptjax"
    paths = [p for p in sorted(package.rglob("*.py")) if p.name != "__init__.py"]
    return {".".join(p.relative_to(package).with_suffix("").parts): ast.parse(p.read_text()) for p in paths}


def imported(tree):
    """Returns the dotted names that `tree` imports anywhere in it, as in `import NAME`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; the others are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(tree):
    """Returns which of modules() `tree` imports; {"config"} of `from gptjax.config import Config`."""
    found = set()
    for name in imported(tree):
        package, _, rest = name.partition(".")
        if package == "gptjax":
            module = rest if rest in modules() else rest.rpartition(".")[0]
            assert module in modules(), f"{name}: import a module, or from one"
            found.add(module)
    return found


def foreign_imports(tree):
    """Returns the top-level names of packages that are neither ours nor the standard library's."""
    return {name.split(".")[0] for name in imported(tree)} - {"gptjax", *sys.stdlib_module_names}


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def heights():
    lines = LAYERS.split("\n")
    return {module: -number for number, line in enumerate(lines) for module in line.split()}


def test_every_module_is_drawn():
    assert set(heights()) == set(modules())


def test_imports_go_only_downwards():
    height = heights()
    upwards = {
        f"{module} -> {other}"
        for module, tree in modules().items()
        for other in own_imports(tree)
        if height[other] >= height[module]
    }
    assert upwards == set()


def test_only_entries_use_the_runtime_and_it_stands_alone():
    users = {module for module, tree in modules().items() if "runtime" in own_imports(tree)}
    assert users <= ENTRIES
    assert own_imports(modules()["runtime"]) == {"errors"}


def test_no_command_imports_the_training_loop_but_main():
    assert {module for module, tree in modules().items() if "train" in own_imports(tree)} == {"main"}


def test_what_computes_needs_nothing_but_numerical_libraries():
    found = {module: foreign_imports(modules()[module]) - NUMERICAL for module in COMPUTING}
    assert found == {module: set() for module in COMPUTING}


def test_data_and_model_do_not_know_each_other():
    data = {module for module in modules() if module.startswith("data.")}
    assert set().union(*(own_imports(modules()[m]) for m in data)) <= data | DATA_MAY_IMPORT
    assert set().union(*(own_imports(modules()[m]) for m in COMPUTING)).isdisjoint(data)


def test_what_is_read_first_needs_the_standard_library_only():
    early = {}
    for module in CHEAP:
        top = [node for node in modules()[module].body if isinstance(node, ast.Import | ast.ImportFrom)]
        early[module] = foreign_imports(ast.Module(top, []))
    assert early == {module: set() for module in CHEAP}


def run_python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        check=False,
    )


def loaded(importtime):
    """Returns the top-level packages in what `python -X importtime` wrote."""
    return set(re.findall(r"^import time: .*\| +(\w+)", importtime, re.MULTILINE))


def test_the_package_itself_imports_nothing():
    result = run_python("-X", "importtime", "-c", "print(); import gptjax")
    assert result.returncode == 0
    before = run_python("-X", "importtime", "-c", "print()")
    assert loaded(result.stderr) - loaded(before.stderr) == {"gptjax"}


@pytest.mark.parametrize("entry", sorted(ENTRIES - {"train"}))
def test_help_comes_before_jax(entry):
    result = run_python("-X", "importtime", "-m", f"gptjax.{entry}", "--help")
    assert (result.returncode, result.stdout[:6]) == (0, "usage:")
    assert "gptjax" in loaded(result.stderr)
    assert loaded(result.stderr).isdisjoint(HEAVY)


@pytest.mark.parametrize("mistake", ["--config=configs/none.py", "--config.model.n_head=7", "--worksdir=x"])
def test_a_mistake_is_told_before_jax(mistake, tmp_path):
    arguments = ["--config=configs/gpt2_small.py", f"--workdir={tmp_path}", mistake]
    result = run_python("-X", "importtime", "-m", "gptjax.main", *arguments)
    assert result.returncode == 2
    assert mistake.removeprefix("--config.").split("=")[0] in result.stderr.splitlines()[-1]
    assert loaded(result.stderr).isdisjoint(HEAVY)


# Any attempt counts, so that this does not depend on what is installed.
WATCH = """
import importlib, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "tensorflow"):
            sys.exit(f"{name} is wanted")

sys.meta_path.insert(0, Watch())
for name in sys.argv[1:]:
    importlib.import_module(name)
print("jax" in sys.modules)
"""


def test_training_wants_neither_torch_nor_tensorflow():
    result = run_python("-c", WATCH, "gptjax.train", *(f"gptjax.{name}" for name in sorted(modules())))
    assert (result.returncode, result.stdout, result.stderr) == (0, "True\n", "")


@pytest.mark.parametrize("name", ["torch", "tensorflow.io"])
def test_the_watch_sees_an_attempt(name):
    result = run_python("-c", WATCH, name)
    assert (result.returncode, "is wanted" in result.stderr) == (1, True)


def test_a_module_states_its_responsibility_in_one_sentence():
    wrong = {}
    for module, tree in modules().items():
        first = (ast.get_docstring(tree) or "").split("\n\n")[0]
        if len(first.split()) < 4 or re.search(r"[.!?]\s+[A-Z]", first):
            wrong[module] = first
    assert wrong == {}


def test_every_argument_and_result_is_typed():
    untyped = []
    for module, tree in modules().items():
        methods = {f for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for f in node.body}
        for function in functions(tree):
            a = function.args
            named = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            bare = [x.arg for x in named[function in methods :] if x.annotation is None]
            untyped += [f"{module}.{function.name}: {name}" for name in bare]
            untyped += [f"{module}.{function.name}: result"] if function.returns is None else []
    assert untyped == []


def test_functions_are_short():
    length = {
        f"{module}.{function.name}:{function.lineno}": function.end_lineno - function.lineno + 1
        for module, tree in modules().items()
        for function in functions(tree)
    }
    assert len(length) > 100
    assert statistics.median(length.values()) <= 12
    assert statistics.quantiles(length.values(), n=10)[-1] <= 40
    assert {name: lines for name, lines in length.items() if lines > 100} == {}


PICKLING = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def refused(tree):
    """Returns what in `tree` is refused: private parts of other packages, pickle, and imports that no drawing shows."""
    names = imported(tree)
    found = {name for name in names if PICKLING & set(name.split("."))}
    found |= {name for name in names - {"__future__.annotations"} if any(p.startswith("_") for p in name.split("."))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("_src", "import_module"):
            found.add(ast.unparse(node))
        if isinstance(node, ast.Name) and node.id == "__import__":
            found.add(node.id)
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            wanted = node.arg == "weights_only"
            if not (isinstance(node.value, ast.Constant) and node.value.value is wanted):
                found.add(ast.unparse(node))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            found |= set() if any(k.arg == "weights_only" for k in node.keywords) else {"torch.load"}
    return found


def test_nothing_refused_is_used():
    assert {module: refused(tree) for module, tree in modules().items()} == {module: set() for module in modules()}


@pytest.mark.parametrize(
    "source",
    [
        "from jax._src import core",
        "import jax._src.core",
        "jax._src.core",
        "def f():\n    import pickle",
        "from gptjax.run import _private",
        "np.load(path, allow_pickle=True)",
        "torch.load(path, weights_only=False)",
        "torch.load(path)",
        "importlib.import_module('gptjax.train')",
        "__import__('gptjax.train')",
    ],
)
def test_what_is_refused_is_seen(source):
    assert refused(ast.parse(source))
