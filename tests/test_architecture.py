"""The shape of the code: imports go only downwards, little is loaded early, functions stay short."""

import ast
import collections
import functools
import io
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# A module imports only from lines below its own, also inside functions and for types.
LAYERS = """
    __main__  api
    main  describe
    train
    loop  result
    periodic  summary  report.__main__
    lm_eval  report.write
    tasks.harness  report.page
    report.panels  tokenizer  fetch  sample  evaluate  convert.__main__  plan.__main__  replay.__main__
    tasks.command  report.data
    named_model
    plan.search  replay.update
    resume  replay.report  plan.report
    plan.aot
    setup  convert.formats
    run_data  tasks.ask
    tasks.score
    tasks.fetch
    tasks.store  tasks.results
    tasks.protocols
    tasks.item
    convert.msgpack  convert.probe
    convert.huggingface  convert.nanogpt  convert.llmc  convert.native
    convert.nanogpt_run
    convert.card  convert.torch_file  convert.safetensors_file
    convert.weights
    convert.names  convert.beside  convert.model_ref
    metrics  stored  log_reader  report.series
    bucket_logs
    checkpoint  logs  step  generate  data.prepare  divergence
    data.parts  data.staleness
    data.own_tokenizer
    data.preparation  data.hub_shards  train_bpe
    convert.tokenizer_source
    convert.tokenizer_files
    data.progress  data.shard_writer  data.workers
    data.encoding
    state  optim  layer_stats  data.mixture  plan.estimate  decode  plan.topology
    data.dataset
    model  convert.tokenizer_json  data.tokens  data.journal  data.sources  data.partial  data.assign
    data.tfds_source  data.hub_source
    data.file_sources  data.foreign
    data.readers
    data.text_files  data.sections
    data.remote_files  dispatch
    sizes
    compute
    attention  loss  kernels.pointwise  data.tokenizer  data.shards  data.shuffle  data.meta  kv_cache
    identity  tree_checks  convert.tokenizer_regex  dropout  remat
    collectives  kernels.cross_entropy  fingerprint  record  data.patterns  data.header  data.reach  data.source
    data.characters
    sharding
    params  sampling_flags  model_flags  examples  sampling  config_flags  arguments
    config  cli  convert.hub  chips
    distributed
    signals  peers  coordinator  devices
    disk_space  retention  convert.hub_download
    orbax_context
    traces  convert.hub_listing  convert.hub_progress
    convert.files  convert.staging
    output_file
    redaction  workdir  streams
    plan.overlap
    plan.hlo_kernels  plan.traffic
    screen
    convert.transfer  plan.hlo  goodput  convert.byte_level
    config_files  mix
    config_values  log_tags
    errors  exhaustion  former_names  gpu_memory  cpu_memory  history  documents  versions  strict_json
"""
# Where a process starts, and its loop: only these use RUNTIME, the modules of processes and of their command lines.
ENTRIES = {"__main__", "api", "main", "describe", "train", "loop", "sample", "evaluate", "data.prepare", "tokenizer"}
ENTRIES |= {"fetch", "lm_eval"}
ENTRIES |= {f"{package}.__main__" for package in ("convert", "plan", "replay", "report")}
RUNTIME = {"cli", "config_flags", "distributed", "signals"}
# Whatever computes, so that it runs anywhere those libraries do.
COMPUTING = {"model", "compute", "sizes", "params", "attention", "loss", "kernels.cross_entropy", "kernels.pointwise"}
COMPUTING |= {"collectives", "dropout", "kv_cache", "examples", "sharding", "optim", "state", "step", "layer_stats"}
COMPUTING |= {"dispatch", "remat"}
NUMERICAL = {"jax", "flax", "optax", "numpy"}
# What a train step goes through, from the command line on.
SPINE = {"main", "config", "setup", "resume", "train", "step", "model", "collectives", "sharding", "loss", "attention"}
SPINE |= {"loop", "optim", "state", "dropout", "kv_cache", "examples", "dispatch", "remat"}
SPINE |= {"kernels.cross_entropy", "kernels.pointwise"}
# Data know nothing of models, and models nothing of data.
DATA_MAY_IMPORT = {"config", "documents", "errors", "cli", "history", "strict_json", "workdir", "redaction", "streams"}
DATA_MAY_IMPORT |= {"convert.tokenizer_source", "train_bpe"}  # which know tokenizers, and no model
DATA_MAY_IMPORT |= {"convert.hub", "convert.hub_listing"}  # which download any files
# Read before any mistake of the user's is found, so at their top they import the standard library only.
CHEAP = {"main", "config", "config_files", "config_values", "coordinator", "devices", "errors", "exhaustion"}
CHEAP |= {
    "former_names",
    "cpu_memory",
    "gpu_memory",
    "mix",
    "model_flags",
    "redaction",
    "streams",
    "strict_json",
    *RUNTIME,
}

HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "tensorflow_datasets", "tensorboardX"}


@functools.cache
def modules():
    """Returns {"data.tokens": its syntax tree} of gptjax."""
    package = ROOT / "gptjax"
    paths = [p for p in sorted(package.rglob("*.py")) if p.name != "__init__.py"]
    return {".".join(p.relative_to(package).with_suffix("").parts): ast.parse(p.read_text()) for p in paths}


VERSION = "gptjax.__version__"  # of the package itself, which imports nothing


def imported(tree):
    """Returns the dotted names that `tree` imports anywhere in it, as in `import NAME`, but for VERSION."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; the others are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names - {VERSION}


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


def test_layer_table_lists_every_module():
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


def test_only_entry_points_import_the_runtime_modules():
    users = {module for module, tree in modules().items() if own_imports(tree) & RUNTIME}
    assert users <= ENTRIES | RUNTIME
    below = {"config", "config_files", "config_values", "coordinator", "devices", "errors", "peers", "exhaustion"}
    below |= {"cpu_memory", "gpu_memory", "redaction", "streams"}
    assert set().union(*(own_imports(modules()[m]) for m in RUNTIME)) <= RUNTIME | below


def test_no_command_imports_the_training_loop_but_main():
    assert {module for module, tree in modules().items() if "train" in own_imports(tree)} == {"api", "main"}
    assert {module for module, tree in modules().items() if "loop" in own_imports(tree)} == {"train"}


def test_computing_modules_import_only_numerical_libraries():
    found = {module: foreign_imports(modules()[module]) - NUMERICAL for module in COMPUTING}
    assert found == {module: set() for module in COMPUTING}


def test_data_and_model_modules_do_not_import_each_other():
    data = {module for module in modules() if module.startswith("data.")}
    assert set().union(*(own_imports(modules()[m]) for m in data)) <= data | DATA_MAY_IMPORT
    assert set().union(*(own_imports(modules()[m]) for m in COMPUTING)).isdisjoint(data)


def test_early_modules_import_only_the_standard_library():
    early = {}
    for module in CHEAP:
        top = [node for node in modules()[module].body if isinstance(node, ast.Import | ast.ImportFrom)]
        early[module] = foreign_imports(ast.Module(top, []))
    assert early == {module: set() for module in CHEAP}


def run_python(*arguments, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


def loaded(importtime):
    """Returns the top-level packages in what `python -X importtime` wrote."""
    return set(re.findall(r"^import time: .*\| +(\w+)", importtime, re.MULTILINE))


def test_the_package_itself_imports_nothing():
    result = run_python("-X", "importtime", "-c", "print(); import gptjax")
    assert result.returncode == 0
    before = run_python("-X", "importtime", "-c", "print()")
    assert loaded(result.stderr) - loaded(before.stderr) == {"gptjax"}


@pytest.mark.parametrize("entry", sorted(ENTRIES - {"__main__", "api", "train", "loop"}))
def test_help_is_printed_without_importing_jax(entry):
    command = f"gptjax.{entry.removesuffix('.__main__')}"
    result = run_python("-X", "importtime", "-m", command, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith(f"usage: python -m {command} [-h]")
    assert "gptjax" in loaded(result.stderr)
    assert loaded(result.stderr).isdisjoint(HEAVY)


@pytest.mark.parametrize("mistake", ["--config=configs/none.py", "--config.model.n_head=7", "--worksdir=x"])
def test_mistake_is_reported_without_importing_jax(mistake, tmp_path):
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


def test_training_imports_neither_torch_nor_tensorflow():
    others = sorted(set(modules()) - {"tasks.harness"})  # which is of the extra lm_eval
    result = run_python("-c", WATCH, "gptjax.train", *(f"gptjax.{name}" for name in others))
    assert (result.returncode, result.stdout, result.stderr) == (0, "True\n", "")


def test_training_imports_orbax_later():
    """After the first dispatch: loop.py calls import_orbax, which a start with a warm compile cache would wait for."""
    result = run_python("-c", "import sys, gptjax.train; print('orbax.checkpoint' in sys.modules)")
    assert (result.returncode, result.stdout) == (0, "False\n")


@pytest.mark.parametrize("name", ["torch", "tensorflow.io"])
def test_import_watch_detects_an_attempt(name):
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
            bare = [x.arg for x in parameters(function)[function in methods :] if x.annotation is None]
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
    assert {name: lines for name, lines in length.items() if lines > 80} == {}


def test_files_are_short():
    package = ROOT / "gptjax"
    lines = {str(path.relative_to(package)): len(path.read_text().splitlines()) for path in package.rglob("*.py")}
    assert {name: count for name, count in lines.items() if count > 450} == {}


LAYOUT = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}


def density(source):
    """Returns (tokens of each line of code, comments of a module); docstrings and other strings of many lines are none.

    Python 3.12 splits an f-string into tokens, and 3.11 does not: it counts as one.
    """
    per_line = collections.Counter()
    comments = depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        if name == "FSTRING_END":
            depth -= 1
            continue
        inside, depth = depth > 0, depth + (name == "FSTRING_START")
        comments += token.type == tokenize.COMMENT
        is_text = token.type == tokenize.STRING and token.start[0] != token.end[0]
        if not inside and not is_text and token.type not in LAYOUT | {tokenize.COMMENT}:
            per_line[token.start[0]] += 1
    return list(per_line.values()), comments


def test_lines_are_not_dense():
    counts = [n for path in (ROOT / "gptjax").rglob("*.py") for n in density(path.read_text())[0]]
    assert len(counts) > 10_000
    assert statistics.mean(counts) <= 8.0
    assert statistics.quantiles(counts, n=10)[-1] <= 18


def test_spine_is_commented():
    """With 10 comments per 100 lines in every module."""
    sparse = {}
    for module in SPINE:
        source = (ROOT / "gptjax" / f"{module.replace('.', '/')}.py").read_text()
        share = 100 * density(source)[1] / len(source.splitlines())
        if share < 10:
            sparse[module] = share
    assert sparse == {}


def test_density_counts_tokens_and_comments():
    source = 'x = f"{a + b}"  # why\ny = """1\n2"""\n\n# because\nif x: y = (1,\n  2)\n'
    assert density(source) == ([3, 2, 8, 2], 2)


def parameters(function):
    a = function.args
    return [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]


def too_many_positional(tree):
    """Returns the public functions and methods of `tree` that take more than three positional arguments.

    __init__ and __call__ of a public class are public: "Class.__init__".
    """
    found = set()
    for owner in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))):
        name_of_owner = getattr(owner, "name", "_")
        public = set() if name_of_owner.startswith("_") else {"__init__", "__call__"}
        for function in (node for node in owner.body if isinstance(node, ast.FunctionDef)):
            names = [x.arg for x in (*function.args.posonlyargs, *function.args.args) if x.arg not in ("self", "cls")]
            if len(names) <= 3:
                continue
            if function.name in public:
                found.add(f"{name_of_owner}.{function.name}")
            elif not function.name.startswith("_"):
                found.add(function.name)
    return found


def test_public_functions_take_at_most_three_positional_arguments():
    assert {module: found for module, tree in modules().items() if (found := too_many_positional(tree))} == {}


def test_too_many_positional_arguments_are_detected():
    source = "def f(a, b, c, d): pass\nclass X:\n def g(self, a, b, c): pass\n def h(self, a, b, c, d, *, e): pass"
    assert too_many_positional(ast.parse(source)) == {"f", "h"}
    call = "class {}:\n def __init__(self, a, b, c, *, d): pass\n def __call__(self, a, b, c, d): pass"
    assert too_many_positional(ast.parse(call.format("X"))) == {"X.__call__"}
    assert too_many_positional(ast.parse(call.format("_X"))) == set()


def annotations(tree):
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            found += [x.annotation for x in parameters(node)] + [node.returns]
        elif isinstance(node, ast.AnnAssign):
            found.append(node.annotation)
    return [annotation for annotation in found if annotation is not None]


def test_few_annotations_of_core_modules_are_any():
    found = [a for module in SPINE for a in annotations(modules()[module])]
    unknown = [a for a in found if any(isinstance(n, ast.Name) and n.id == "Any" for n in ast.walk(a))]
    assert len(found) > 500
    assert len(unknown) <= 0.05 * len(found)


PICKLING = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def is_private(name):
    return any(part.startswith("_") and part != "__main__" for part in name.split("."))


def refused(tree):
    """Returns what in `tree` is refused: private parts of other packages, pickle, and imports that no drawing shows."""
    names = imported(tree)
    found = {name for name in names if PICKLING & set(name.split("."))}
    found |= {name for name in names - {"__future__.annotations"} if is_private(name)}
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


def test_no_module_uses_refused_imports_or_calls():
    """But for one private class of Orbax, without which a save is not durable."""
    allowed = {"orbax_context": {"orbax.checkpoint._src.path.atomicity"}}
    found = {module: refused(tree) for module, tree in modules().items()}
    assert found == {module: allowed.get(module, set()) for module in modules()}


@pytest.mark.parametrize(
    "source",
    ["from jax._src import core", "import jax._src.core", "jax._src.core", "def f():\n    import pickle",
     "from gptjax.setup import _private", "np.load(path, allow_pickle=True)", "torch.load(path, weights_only=False)",
     "torch.load(path)", "importlib.import_module('gptjax.train')", "__import__('gptjax.train')"],
)  # fmt: skip
def test_refused_imports_and_calls_are_detected(source):
    assert refused(ast.parse(source))
