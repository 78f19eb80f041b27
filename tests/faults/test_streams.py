"""I1, I2, B3: streams that are closed, broken or full; odd arguments and environments; nothing written at code 2."""

import codecs
import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from gptjax import config, config_files, distributed, evaluate, fetch, main, sample, streams, workdir
from gptjax import train as train_module
from gptjax.convert import __main__ as convert
from gptjax.convert import formats
from gptjax.convert.model_ref import find_model
from gptjax.data import prepare
from gptjax.errors import ConfigError, OutputError
from gptjax.plan import __main__ as plan
from gptjax.replay import __main__ as replay
from tests.helpers import failing, raises
from tests.runs import checkpoint_steps, losses

pytestmark = pytest.mark.faults

COMMAND = """
import logging, os, sys
from gptjax import cli, redaction, streams

def main(arguments):
    if "run" in arguments:
        streams.go_on_without_output()
    logging.getLogger("gptjax").info("a line")
    if "product" in arguments:
        redaction.say("the product")
    logging.getLogger("gptjax").info("another line \\u8d70")
    sys.stderr.write("end\\n")
    assert os.open("/dev/null", os.O_RDONLY) > 2, "a file got the number of a stream"

cli.run_cli(main)
"""
FULL = "standard output: No space left on device"
STREAMS = {  # how the shell starts it: (of a product, of a run, of log lines only) as (code, pattern of stderr)
    ">/dev/full": ((74, f"error: {FULL}; .*\n"), (0, f"{FULL}: .*\nend\n"), (0, f"end\n{FULL}: .*\n")),
    ">&-": ((74, "error: standard output: .* closed; .*\n"), (0, "end\n"), (0, "end\n")),
    "| true": ((0, ""), (0, "end\n"), (0, "end\n")),
    "2>&- >/dev/null": ((0, ""), (0, ""), (0, "")),
    "<&- >&- 2>&-": ((74, ""), (0, ""), (0, "")),
    ">/dev/null": ((0, "end\n"), (0, "end\n"), (0, "end\n")),
}  # fmt: skip


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("kind", ["product", "run", "lines"])
def test_i1_closed_or_full_stream_gives_the_documented_code(streams, kind, lab):
    code, told = STREAMS[streams][["product", "run", "lines"].index(kind)]
    shell = f'(sleep 0.1; "$@") {streams}; exit ${{PIPESTATUS[0]}}'
    environment = lab.environment(PYTHONUNBUFFERED="", PYTHONIOENCODING="latin-1")
    done = subprocess.run(
        ["bash", "-c", shell, "bash", sys.executable, "-c", COMMAND, kind],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert re.fullmatch(told, done.stderr), done.stderr


def test_i1_run_survives_the_loss_of_its_terminal(lab, reference, tmp_path):
    command = lab.command(tmp_path / "run", "train.num_steps=8", "train.sample_every=8")
    master, slave = os.openpty()
    process = subprocess.Popen(
        ["bash", "-c", '"$@" 2>&-', "bash", *command], env=lab.environment(TERM="xterm"), cwd=lab.root, stdout=slave
    )
    os.close(slave)
    seen = b""
    while b"compiled the train step" not in seen:  # the first step, and the live line is there
        seen += os.read(master, 4096)
    os.close(master)
    assert process.wait(timeout=120) == 0
    assert checkpoint_steps(tmp_path / "run") == [4, 8]
    assert losses(tmp_path / "run") == {step: loss for step, loss in losses(reference).items() if step <= 8}


def test_i1_write_to_a_lost_terminal_raises_only_if_required():
    """Also rich's thread writes to it, and the end of its line: nothing of that may raise."""
    master, slave = os.openpty()
    os.close(master)
    with open(os.dup(slave), "w") as old:
        stream, raw = streams._replace(old, slave, required=True)
    with raises(OutputError, "standard output", remedy="a file or a pipe", match="Input/output error"):
        print("line", file=stream, flush=True)
    raw.required = False
    print("line", file=stream, flush=True)
    os.close(slave)


def test_i1_write_to_a_nonblocking_pipe_is_complete():
    read, write = os.pipe()
    os.set_blocking(write, False)
    raw = streams._Descriptor(write, required=True, is_closed=False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, bytes(4096))
    reader = subprocess.Popen(["wc", "-c"], stdin=read, stdout=subprocess.PIPE)
    os.close(read)
    assert raw.write(b"x" * 100_000) == 100_000
    os.close(write)
    assert int(reader.communicate()[0]) >= 100_000 + 65536


def test_i1_report_file_is_written_despite_closed_stdout(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "say", failing(OutputError("standard output: it is closed")))
    monkeypatch.setattr("gptjax.plan.report.describe", lambda found: ["line"])
    monkeypatch.setattr("gptjax.plan.search.plan", lambda *_: {"chips": 8})
    arguments = [f"--config={pathlib.Path('configs/gpt2_small.py').absolute()}", "--topology=h100:8"]
    with pytest.raises(OutputError):
        plan.main([*arguments, f"--json={tmp_path}/report.json"])
    assert (tmp_path / "report.json").read_text() == '{\n  "chips": 8\n}\n'


# Arguments and environment

COMMANDS = {
    "main": (main, ["--config=x"]), "sample": (sample, []), "evaluate": (evaluate, []),
    "convert": (convert, ["--from=x"]), "plan": (plan, ["--config=x", "--topology=local"]),
    "replay": (replay, ["--workdir=x", "--step=1"]), "prepare": (prepare, []),
    "fetch": (fetch, ["hf:a/b", "--out=x"]),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("argument", "field"),
    [(b"--config.data.path=a\xff", "--config.data.path"), (b"--workdir=\xe9", "--workdir"), (b"\xff", r"\udcff"),
     (b"--\xff=1", r"--\udcff=1")],
)  # fmt: skip
def test_i2_argument_that_is_not_utf8_is_refused(name, argument, field, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, needed = COMMANDS[name]
    with raises(ConfigError, field, remedy="UTF-8") as caught:
        module.main([*needed, os.fsdecode(argument)])
    assert str(caught.value).isprintable()
    assert os.listdir(tmp_path) == []


def test_i2_directory_name_that_is_not_utf8_is_refused(tmp_path, monkeypatch):
    place = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    os.mkdir(place)
    monkeypatch.chdir(place)
    with raises(ConfigError, rf"{tmp_path}/\udcff", remedy="another directory"):
        main.main(["--config=x"])
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", place)
    with raises(ConfigError, "JAX_COMPILATION_CACHE_DIR", value=place):
        distributed.compile_cache()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("HOME", place)
    assert distributed.compile_cache() is None


def test_i2_missing_home_directory_disables_the_compile_cache(tmp_path, monkeypatch, said):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert distributed.compile_cache() == f"{tmp_path}/.cache/gptjax/compiled"
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert distributed.compile_cache() is None
    monkeypatch.setattr(pathlib.Path, "home", failing(RuntimeError("Could not determine home directory.")))
    assert distributed.compile_cache() is None
    assert ["JAX_COMPILATION_CACHE_DIR" in line for line in said] == [True] * 2


SOURCE = "# café\ndef get_config():\n    return {'data': {'path': 'café'}}\n"
JSON = '{"data": {"path": "café"}}'
FILES = {
    "mark.py": codecs.BOM_UTF8 + SOURCE.encode(),
    "coding.py": b"# -*- coding: latin-1 -*-\n" + SOURCE.encode("latin-1"),
    "config.json": JSON.encode(),
    "mark.json": codecs.BOM_UTF8 + JSON.encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_i2_config_file_may_have_any_declared_encoding(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    expected = config.from_dict({"data": {"path": "café", "seed": 3}})
    assert config.load(f"{tmp_path}/{name}", {"data.seed": "3"}) == expected


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.json", b"{", "column 2"), ("a.json", b"\xff", "byte 0 is 0xff"), ("a.json", b"[1]", "list"),
        ("a.json", b'{"data": {"path": "\\udcff"}}', "surrogate"), ("a.json", b"[" * 100_000, "100 levels"),
        ("a.json", b'{"data": {"seed": 1, "seed": 2}}', "'seed'"),
        ("a.py", b"x = 'caf\xe9'\n", "SyntaxError"), ("a.py", b"get_config = lambda: 3", "TypeError"),
    ],
)  # fmt: skip
def test_i2_invalid_config_file_is_refused(name, content, named, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    remedy = "config.json of a run" if path.suffix == ".json" else ""
    with raises(ConfigError, "--config", value=str(path), remedy=remedy, match=named) as caught:
        config.load(str(path), {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "field", "parts"),
    [
        ("a.json", b'{"n_layer": 2}', "n_layer", {"remedy": "model.n_layer"}),
        ("a.py", b"get_config = lambda: {'data': {'path': '\\udcff'}}", "data.path", {"value": "\udcff"}),
    ],
)
def test_i2_wrong_field_in_a_config_file_is_named(name, content, field, parts, tmp_path):
    (tmp_path / name).write_bytes(content)
    with raises(ConfigError, field, **parts) as caught:
        config.load(str(tmp_path / name), {})
    assert str(caught.value).isprintable()


def test_i2_default_workdir_follows_the_config_path():
    assert config_files.default_workdir("runs/a/config.json") == "runs/a"
    assert config_files.default_workdir("configs/quickstart.py") == "runs/quickstart"
    assert config_files.default_workdir("other/small.json") == "runs/small"


def test_i2_directory_name_may_have_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "12:30").mkdir()
    assert find_model("init_from", "12:30") == formats.ModelRef("gptjax", "12:30")
    assert find_model("init_from", "gs://bucket/run") == formats.ModelRef("gptjax", "gs://bucket/run")
    assert find_model("init_from", "hf:12:30") == formats.ModelRef("hf", "12:30")
    with raises(ConfigError, "init_from", value="12:31", match="gptjax, hf"):
        find_model("init_from", "12:31")
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "config.json").write_text("{}")
    with raises(ConfigError, "init_from", value="exported", remedy="write init_from=hf:exported"):
        find_model("init_from", "exported")
    (tmp_path / "exported" / "checkpoints").mkdir()
    assert find_model("init_from", "exported") == formats.ModelRef("gptjax", "exported"), "a run has a config.json, too"


# Nothing is written

WHOLE = {"data": {"path": "", "source": "TEXT"}, "train": {"micro_batch_size": 0}}
REFUSED = {
    "mesh": {"mesh": {"tensor": 3}},
    "source": {"data": {"path": "", "source": "nowhere"}},
    "text": {"data": {"path": "", "source": "text:/nowhere"}},
    "vocabulary": {"model": {"vocab_size": 300}},
    "batch": {"data": {"path": "", "source": "TEXT", "global_batch_size": 12}},
    "resume": WHOLE | {"checkpoint": {"resume": "require"}},
    "weights": WHOLE | {"init_from": "nothing:x"},
}


@pytest.mark.parametrize("before", ["missing", "empty"])
@pytest.mark.parametrize("what", REFUSED)
def test_b3_refused_run_leaves_no_files(what, before, lab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sections = {name: value if isinstance(value, str) else dict(value) for name, value in REFUSED[what].items()}
    if sections.get("data", {}).get("source") == "TEXT":
        sections["data"]["source"] = f"text:{lab.root}/text"
    if before == "empty":
        (tmp_path / "runs").mkdir()
    with pytest.raises(ConfigError) as caught:
        train_module.train(lab.config(**sections), "runs/deep/run" if before == "missing" else "runs")
    assert caught.value.exit_code == 2
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == (["runs"] if before == "empty" else [])


def test_b3_refused_preparation_leaves_no_parent_directories(tmp_path):
    with pytest.raises(ConfigError):
        prepare.main(["--source=text:/nowhere", "--tokenizer=bytes", f"--out={tmp_path}/deep/er/data"])
    assert os.listdir(tmp_path) == []


def write_and_refuse(path):
    path.touch()
    raise ConfigError("refused")


@pytest.mark.parametrize("code", [2, 65])
def test_b3_lock_is_removed_only_after_exit_code_2(code, tmp_path):
    (tmp_path / "run").mkdir()
    error = ConfigError("refused")
    error.exit_code = code
    with pytest.raises(ConfigError), workdir.lock_workdir(str(tmp_path / "run")):
        raise error
    assert os.listdir(tmp_path / "run") == ([] if code == 2 else [".lock"])
    written = tmp_path / "run" / "deep" / "written"
    with pytest.raises(ConfigError), workdir.lock_workdir(str(written.parent)):
        write_and_refuse(written)
    assert os.listdir(tmp_path / "run" / "deep") == ["written"]


def test_b3_lock_removed_while_being_taken_is_recreated(tmp_path, monkeypatch):
    """Another process removes it with its directory, as it ends with code 2."""
    lock, calls = workdir._lock, []

    def remove_then_lock(file, directory):
        if not calls:
            shutil.rmtree(directory)
        calls.append(directory)
        lock(file, directory)

    monkeypatch.setattr(workdir, "_lock", remove_then_lock)
    with workdir.lock_workdir(str(tmp_path / "run")) as held:
        assert not held.renew()
        assert (tmp_path / "run" / ".lock").exists()
    assert len(calls) == 2
