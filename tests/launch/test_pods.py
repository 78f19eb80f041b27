"""docs/pods.md quotes what gptjax and launch/ really say, and names only what exists."""

import ast
import fcntl
import os
import re
import subprocess
import types

import jax
import pytest

from gptjax import config, divergence, errors, resume, setup, workdir
from gptjax.chips import GIB
from gptjax.config import Config, GPTConfig, MeshConfig
from gptjax.data.prepare import ensure_prepared
from gptjax.data.tokenizer import load_tokenizer
from gptjax.history import History
from gptjax.plan import aot
from gptjax.sharding import make_mesh
from gptjax.workdir import local_directory
from tests import runs

ROOT = runs.REPOSITORY
TEXT = (ROOT / "docs" / "pods.md").read_text()
SHORTEST = 12  # characters of a message that tell something
MESSAGES = [line for block in re.findall(r"^```text\n(.*?)^```$", TEXT, re.M | re.S) for line in block.splitlines()]
BUCKET = "gs://my-project-gptjax/runs/gpt2_small"


def section(begin: str) -> str:
    """Returns the text from the heading `begin` to the next one."""
    return re.split(r"^## ", TEXT[TEXT.index(f"## {begin}") + 3 :], flags=re.M)[0]


def shell_blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", TEXT, re.M | re.S)


def source_messages() -> list[list[str]]:
    """Returns every line of text in gptjax's source as its fixed pieces: f-strings and formats cut at their values."""
    found = []
    for path in (ROOT / "gptjax").rglob("*.py"):
        inside: set[ast.AST] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                inside |= set(node.values)
                pieces = [v.value if isinstance(v, ast.Constant) else "%s" for v in node.values]
                found += "".join(map(str, pieces)).splitlines()
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
                found += node.value.splitlines()
    messages = ([piece for piece in re.split(r"%[sdr]", line) if piece] for line in found)
    return [pieces for pieces in messages if sum(map(len, pieces)) >= SHORTEST]


SOURCE = source_messages()


def quoted_share(message: str) -> float:
    """Returns how much of the message stands in the source, of texts whose every piece is in it, in order."""
    covered = [False] * len(message)
    for pieces in SOURCE:
        match = re.search("(.*?)".join(f"({re.escape(piece)})" for piece in pieces), message)
        for group in range(1, 2 * len(pieces), 2) if match else ():
            covered[match.start(group) : match.end(group)] = [True] * (match.end(group) - match.start(group))
    return sum(covered) / len(message)


@pytest.mark.parametrize("message", MESSAGES)
def test_quoted_messages_exist_in_the_source(message):
    assert quoted_share(re.sub(r"^error: (--\w+=\S+: )?|\.\.\.|gs://[\w/-]*", "", message)) > 0.4


@pytest.mark.parametrize(
    "message",
    [
        "the slice is too small for this model; take more chips, or a smaller mesh, and start again",
        "data.global_batch_size=500: has to be divisible by all 16 chips of the whole mesh",
        "preempted after step 1200, checkpoint written: rerun the same command to resume",
    ],
)
def test_message_missing_from_the_source_is_detected(message):
    assert quoted_share(message) < 0.4


def wrong_batch() -> None:
    settings = config.from_dict({"data": {"global_batch_size": 500}})
    mesh = types.SimpleNamespace(shape={"data": 16, "fsdp": 1, "tensor": 1})
    setup.choose_num_microbatches(settings, None, mesh, state_bytes=0)


def locked() -> None:
    path = local_directory(BUCKET)
    os.makedirs(path)
    with open(os.path.join(path, ".lock"), "w") as file:
        file.write("process 4711 on t1v-n-1234abcd-w-0")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with workdir.lock_workdir(path):
            pass


def not_finite() -> None:
    nan = float("nan")
    verdict = divergence.judge(History(), {"loss": nan, "grad_norm": nan}, Config().train, finite=False)
    raise divergence.divergence_error(verdict, step=1200, windows=[7, 3], last_saved=1000, workdir=BUCKET)


def out_of_memory() -> None:
    raise aot.out_of_memory_error("configs/gpt2_xl.py on v5e:4x4: does not fit", 42.39 * GIB, 15.75 * GIB)


@pytest.mark.parametrize(
    "trouble",
    [
        lambda: make_mesh(MeshConfig(fsdp=6), jax.devices() * 2),
        wrong_batch,
        lambda: ensure_prepared(config.DataConfig(path="data/mine"), load_tokenizer("bytes")),
        locked,
        lambda: resume.compare_configs(Config().to_dict(), Config(model=GPTConfig(n_layer=24))),
        lambda: resume.compare_data({"data.seed": 0}, {"data.seed": 5}, allowed=False),
        not_finite,
        out_of_memory,
    ],
    ids=["mesh", "batch", "data", "locked", "model", "other data", "not finite", "memory"],
)
def test_reproducible_errors_print_exactly_the_quoted_messages(trouble, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.UserError) as caught:
        trouble()
    quoted = [message.removesuffix("; ...") for message in MESSAGES]
    said = [f"error: {line}" for line in str(caught.value).splitlines()]
    assert set(said) <= set(quoted)
    of_the_trouble = next(t for t in troubles() if said[0] in t)
    assert f"({caught.value.exit_code})" in of_the_trouble


def troubles() -> list[str]:
    text = section("What goes wrong")
    return re.split(r"^\d+\. ", text[: text.index("A run that is preempted")], flags=re.M)[1:]


def test_each_of_ten_troubles_has_message_and_exit_code():
    codes = {f"({getattr(errors, name)})" for name in dir(errors) if name.isupper()}
    assert len(troubles()) == 10
    for trouble in troubles():
        assert "```text\n" in trouble
        assert re.search(r"\(\d+[^)\n]*\)(?=\n\n```)", trouble).group() in codes


def test_page_states_what_has_not_been_run():
    assert "**Not yet run on a real pod.**" in "\n".join(TEXT.splitlines()[:5])
    for way in re.findall(r"^- \*\*(?!This machine)(.*)", section("Other ways to start it"), re.M):
        assert "(not yet run)" in way
    paragraphs = TEXT.split("\n\n")
    shown = [i for i, paragraph in enumerate(paragraphs) if paragraph.startswith("```\n")]
    assert len(shown) > 3
    for i in shown:  # a run printed it, or it is what is expected
        assert re.search(r"\*Expected\*|run on \d{4}-|for example", paragraphs[i - 1])


def test_prices_have_date_source_and_a_not_checked_note():
    text = section("What it costs")
    assert re.search(
        r"commit [0-9a-f]{7}\), read on \d{4}-\d\d-\d\d\. \*\*Not checked against Google's own page\*\*", text
    )
    assert "https://cloud.google.com/tpu/pricing" in text
    assert not re.search(r"\d USD|\$ ?\d|USD \d", TEXT.replace(text, ""))


def test_the_computed_costs_follow_from_the_prices():
    text = section("What it costs")
    on_demand, spot = map(float, re.search(r"^\| v5e .*\| ([\d.]+) \| ([\d.]+) \|$", text, re.M).groups())
    assert f"16 chips: {16 * spot:.2f} USD spot, {16 * on_demand:.2f} on demand" in text
    hours = 2.7e20 / (0.4 * 16 * 197e12) / 3600
    assert hours == pytest.approx(60, abs=1)
    assert 16 * hours == pytest.approx(950, abs=5)
    assert f"950 chip-hours, {950 * spot:,.0f} USD spot, {950 * on_demand:,.0f} on demand" in text
    assert f"--price_per_chip_hour={spot}" in TEXT


def test_commands_and_files_of_the_page_exist():
    text = "\n".join(shell_blocks())
    assert [f for f in set(re.findall(r"(?:launch|configs)/[\w.]+\w", TEXT)) if not (ROOT / f).exists()] == []
    subcommands = set(re.findall(r"tpu_pod\.sh (\w+)", text))
    script = (ROOT / "launch" / "tpu_pod.sh").read_text()
    assert {"create", "install", "start", "watch", "logs", "status", "delete"} == subcommands
    assert all(re.search(rf"^    (\w+ \| )*{name}( \| \w+)*\)", script, re.M) for name in subcommands)
    modules = {ROOT / m.replace(".", "/") for m in re.findall(r"python -m (gptjax[\w.]*)", text)}
    assert [m for m in modules if not (m.with_suffix(".py").exists() or (m / "__main__.py").exists())] == []


def test_commands_of_the_page_are_valid_shell():
    for block in shell_blocks():
        subprocess.run(["bash", "-n", "-c", block], check=True)


def test_script_reads_the_variables_named_by_the_page():
    script = (ROOT / "launch" / "tpu_pod.sh").read_text()
    for name in ("ZONE", "TYPE", "NAME", "DATA", "SPOT", "TAIL", "MAX_RESTARTS"):
        assert name in TEXT
        assert f"{name}=${{{name}:-" in script


def test_config_fields_named_by_the_page_exist():
    known = set(config.flatten(config.Config()))
    named = set(re.findall(r"--config\.([\w.]+\w)", TEXT))
    assert named
    assert named <= known


def test_documented_watch_exit_codes_equal_those_of_the_script():
    script = (ROOT / "launch" / "tpu_pod.sh").read_text()
    again = re.search(r"^again='([\d|]+)'", script, re.M).group(1).split("|")
    [row] = [line for line in TEXT.splitlines() if "preempted, or a worker was lost |" in line]
    assert set(re.findall(r"\d+", row.split(":")[0])) == set(again) - {"0"}
