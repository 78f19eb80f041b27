"""README.md, .ci/run, the hooks and pyproject.toml say the same, and what they name exists."""

import ast
import pathlib
import re
import subprocess
import tomllib

import pytest
import yaml

from gptjax.__main__ import COMMANDS

ROOT = pathlib.Path(__file__).parent.parent
RUN = r"python3 -m venv .venv && .*gptjax\.main.*"
TEST = r"python3 -m venv .venv && .*pytest"


def read(name):
    return (ROOT / name).read_text()


def blocks(page="README.md"):
    """Returns the contents of a page's fenced blocks."""
    return re.findall(r"^```\w*\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)


def commands(pattern):
    return [line for block in blocks() for line in block.splitlines() if re.fullmatch(pattern, line)]


def ci_patterns():
    return re.findall(r"readme_command '([^']+)'", read(".ci/run"))


def test_readme_commands_consist_of_the_documented_parts():
    [run], [test] = commands(RUN), commands(TEST)
    environment = ["python3 -m venv .venv", ". .venv/bin/activate"]
    train = "python -m gptjax.main --config=configs/quickstart.py"
    assert [part.strip() for part in run.split("&&")] == [*environment, "pip install -e .", train]
    assert [part.strip() for part in test.split("&&")] == [*environment, "pip install -e '.[test]'", "pytest"]


def test_ci_finds_the_two_commands_in_the_readme():
    found = []
    for pattern in ci_patterns():
        result = subprocess.run(["grep", "-E", pattern, ROOT / "README.md"], capture_output=True, text=True, check=True)
        found += result.stdout.splitlines()
    assert found == [*commands(RUN), *commands(TEST)]


def test_ci_takes_the_commands_from_the_readme_only():
    code = [line.split(" #")[0] for line in read(".ci/run").splitlines() if not line.startswith("#")]
    names = re.findall(r"^(\w+)=\$\(readme_command ", "\n".join(code), re.MULTILINE)
    assert len(names) == 2
    for name in names:
        assert any(re.search(rf'bash -euc "\${name}"', line) for line in code), f"{name} is not run"
    rest = "\n".join(line for line in code if "$(readme_command " not in line)
    assert [text for text in (*commands(RUN), *commands(TEST), "gptjax.main", "python3 -m venv") if text in rest] == []


def test_pre_commit_make_and_ci_run_the_same_linters():
    hooks = [hook for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]]
    entries = [hook["entry"] for hook in hooks]
    [lint] = re.findall(r"^lint:.*\n\t(.*)$", read("Makefile"), re.MULTILINE)
    assert entries == re.findall(r"^(?:ruff|basedpyright)\b.*$", read(".ci/run"), re.MULTILINE)
    assert entries == lint.split(" && ")
    assert len(entries) == 3
    assert {hook["language"] for hook in hooks} == {"system"}, "another one would download"


def tree_lines():
    """Returns the lines of the tree of the repository in docs/architecture.md."""
    found = blocks("docs/architecture.md")
    [tree] = [block for block in found if re.search(r"^\W*gptjax/", block, re.MULTILINE) and "main.py" in block]
    return tree.splitlines()


def test_the_tree_names_every_module():
    named = set(re.findall(r"[\w.]+\.py\b", "\n".join(tree_lines())))
    modules = {path.name for path in (ROOT / "gptjax").rglob("*.py") if path.name != "__init__.py"}
    configs = {path.name for path in (ROOT / "configs").glob("*.py")}
    assert modules | configs <= named


def test_files_named_in_the_tree_exist():
    tree = "\n".join(tree_lines())
    files = set(re.findall(r"[\w.]+\.(?:py|ipynb|md|toml|cff)\b", tree))
    folders = set(re.findall(r"^\W*([\w.]+)/", tree, re.MULTILINE))
    tops = ("gptjax", "configs", "tests", "notebooks", "benchmarks", "docs")
    tracked = [path for top in tops for path in tree_of(top)]
    tracked += [path for path in ROOT.iterdir() if path.is_file()]
    assert len(files) > 10
    assert files <= {path.name for path in tracked}
    assert [name for name in folders if not ((ROOT / name).is_dir() or (ROOT / "gptjax" / name).is_dir())] == []


def tree_of(top):
    return [path for path in (ROOT / top).rglob("*") if "__pycache__" not in path.parts]


PAGES = ["README.md", "CONTRIBUTING.md", "DESIGN.md"]
PAGES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]


def anchors(page):
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_local_links_point_to_existing_files_and_headings(name):
    links = re.findall(r"\]\(([^)#]*)#?([^)]*)\)", read(name))
    here = (ROOT / name).parent
    local = [(here / file if file else ROOT / name, anchor) for file, anchor in links if "://" not in file]
    assert [str(file) for file, _ in local if not file.exists()] == []
    assert [anchor for file, anchor in local if anchor and anchor not in anchors(file.read_text())] == []


def test_readme_is_short_and_leads_to_every_page():
    """Within two clicks: a page is in the README, or in a page that is."""
    text = read("README.md")
    assert len(text.split()) <= 900
    linked = set(re.findall(r"\]\((docs/\w+\.md)", text))
    second = {f"docs/{name}" for page in linked for name in re.findall(r"\]\((\w+\.md)", read(page))}
    assert {page for page in PAGES if page.startswith("docs/")} <= linked | second


@pytest.mark.parametrize("name", PAGES)
def test_commands_of_a_page_exist(name):
    text = "\n".join([*blocks(name), *re.findall(r"`([^`\n]*)`", read(name))])
    assert set(re.findall(r"^gptjax ([a-z]\w*)", text, re.MULTILINE)) <= set(COMMANDS)
    shipped = {path.stem for path in (ROOT / "configs").glob("*.py")}
    named = set(re.findall(r"gptjax (?:train|plan|config) ([a-z]\w*)(?!\S)", text))
    assert named <= shipped


def test_modules_and_configs_in_the_readme_exist():
    text = "\n".join(blocks())
    modules = set(re.findall(r"python -m (gptjax[\w.]*)", text))
    assert "gptjax.main" in modules
    paths = {module: ROOT / module.replace(".", "/") for module in modules}
    missing = [m for m, p in paths.items() if not (p.with_suffix(".py").exists() or (p / "__main__.py").exists())]
    assert missing == []
    assert [c for c in set(re.findall(r"configs/\w+\.py", text)) if not (ROOT / c).exists()] == []


def project():
    return tomllib.loads(read("pyproject.toml"))["project"]


@pytest.mark.parametrize("name", project()["scripts"])
def test_scripts_exist(name):
    module, function = project()["scripts"][name].split(":")
    tree = ast.parse(read(f"{module.replace('.', '/')}.py"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_version_is_defined_only_in_the_package():
    nodes = [node for node in ast.parse(read("gptjax/__init__.py")).body if isinstance(node, ast.Assign)]
    [node] = [node for node in nodes if ast.unparse(node.targets[0]) == "__version__"]
    setting = tomllib.loads(read("pyproject.toml"))["tool"]["setuptools"]["dynamic"]["version"]
    assert (project()["dynamic"], setting) == (["version"], {"attr": "gptjax.__version__"})
    assert "version" not in project()
    # Only a copy can stand in this format.
    assert yaml.safe_load(read("CITATION.cff"))["version"] == ast.literal_eval(node.value)


def distribution(requirement):
    """Returns the normalised name in a requirement such as 'Torch[x]>=2; marker'."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement).group()).lower()


def test_core_installs_neither_torch_nor_tensorflow():
    core = {distribution(requirement) for requirement in project()["dependencies"]}
    assert {"jax", "flax", "optax"} <= core
    assert core.isdisjoint({"torch", "tensorflow", "tensorflow-cpu", "tf-nightly", "tensorflow-text", "transformers"})


def test_extras_have_names_that_every_pip_finds():
    """A wheel's metadata has normalised names, and pip before 23.3 compares the name that it is given unchanged."""
    declared = set(project()["optional-dependencies"])
    assert declared == {distribution(extra) for extra in declared}
    files = subprocess.check_output(
        ["git", "ls-files", "*.py", "*.md", "*.sh", "*.toml", "*.ipynb", ".ci"], cwd=ROOT, text=True
    )
    text = "\n".join(read(name) for name in files.split() if name != "LOG.md")
    named = re.findall(r"""(?:gptjax|install [^\n]*?\.|['" ]\.)\[([\w,-]+)\]""", text)
    named += re.findall(r"""\binstall\(["'](\w[\w-]*)["']""", text)
    assert {"test", "torch", "hub", "lm-eval"} <= (used := {extra for names in named for extra in names.split(",")})
    assert used <= declared


@pytest.mark.parametrize("name", ["docs/results.md", "benchmarks/README.md"])
def test_cold_shards_are_described_as_links(name):
    """benchmarks/data.py gives ten files 300 names: a claim of 60 GB would be one about a disk that nobody filled."""
    about = [line for line in read(name).splitlines() if "300" in line and "shards of 200 MB" in line]
    assert any("ten files, 2 GB on disk" in line for line in about)
    assert "60 GB" not in read(name)


def test_the_matrix_names_tests_that_exist():
    named = set(re.findall(r"`(test_\w+)`", read("docs/matrix.md")))
    files = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    defined = {name for text in files for name in re.findall(r"def (test_\w+)", text)}
    assert len(named) > 15
    assert named <= defined
