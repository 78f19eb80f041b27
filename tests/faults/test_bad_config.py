"""B1, B2, O2, M3: what cannot work is refused with code 2 and names the field, before anything is written."""

import contextlib
import re
import shutil
import sys
import time

import pytest

from gptjax.data.prepare import prepare
from gptjax.data.tokenizer import load_tokenizer
from gptjax.errors import ConfigError
from tests.helpers import raises, sweep
from tests.runs import checkpoint_steps, losses, make_run_on

pytestmark = pytest.mark.faults

BAD = {  # arguments: what the messages name
    "--config.model.n_layers=3": ("model.n_layers: ", " model.n_layer,"),
    "--config.optimizer.name=lion": ("optimizer.name: ", " optim.name"),
    "--workdri=x": ("--workdri=x: ", " --workdir"),
    "--config.model.n_layer": ("--config.model.n_layer: ",),
    "--config.model.n_layer=two": ("model.n_layer=two: ",),
    "--config.train.num_steps=2.5": ("train.num_steps=2.5: ",),
    "--config.optim.peak_lr=nan": ("optim.peak_lr=nan: ",),
    "--config.train.num_steps=-5": ("train.num_steps=-5: ", " 0"),
    "--config.model.n_head=3": ("model.n_head=3: ", " model.n_embd=32", ": 2, 4"),
    "--config.optim.name=adam": ("optim.name=adam: ", "adamw, lion, adafactor, muon"),
    "--config.model.bias=perhaps": ("model.bias=perhaps: ",),
    "--config.model.dropout=1": ("model.dropout=1.0: ", " 1"),
    "--config.model=3": ("model: ",),
    "--config.model.n_layer=0 --config.data.seed=-1": ("model.n_layer=0: ", "data.seed=-1: "),
}


def call_main(lab, *arguments, expect=2):
    return lab.call([sys.executable, "-m", "gptjax.main", *arguments], expect=expect)


@pytest.mark.parametrize("mistakes", BAD)
def test_b1_bad_config_is_refused_before_anything_is_written(mistakes, lab, tmp_path):
    arguments = mistakes.split()
    done = call_main(lab, f"--config={lab.config_file}", f"--workdir={tmp_path}/run", *arguments)
    lines = done.stderr.splitlines()
    assert len(lines) == len(arguments), "one line for each mistake"
    assert all(line.startswith("error: ") for line in lines)
    assert done.stderr.startswith(f"error: {BAD[mistakes][0]}")
    assert all(name in done.stderr for name in BAD[mistakes]), done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == [], "nothing may be written"


def test_b1_missing_or_broken_config_file_is_refused(lab, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config():\n    return 1 / 0\n")
    missing = f"--config={lab.root}/tini.py"
    for flags, begin, named in (
        ([missing], f"{missing}: ", str(lab.config_file)),
        ([f"--config={broken}"], f"--config={broken}: ", "ZeroDivisionError: division by zero"),
        ([], "", "--config"),
    ):
        (line,) = call_main(lab, *flags, f"--workdir={tmp_path}/run").stderr.splitlines()
        assert line.startswith(f"error: {begin}")
        assert named in line
    assert list(tmp_path.iterdir()) == [broken]


def test_b1_help_is_quick_and_does_not_import_jax(lab):
    begin = time.monotonic()
    shown = lab.call([sys.executable, "-X", "importtime", "-m", "gptjax.main", "--help"])
    assert time.monotonic() - begin < 2
    assert "--config" in shown.stdout
    assert "gptjax.config" in shown.stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in shown.stderr.splitlines()}
    assert not imported & {"jax", "numpy", "orbax", "flax", "tensorflow_datasets"}


@pytest.mark.parametrize(
    ("batch", "micro_batch", "devices", "field", "of", "nearest"),
    [
        (12, 0, 8, "data.global_batch_size", 8, "8, 16"),
        (24, 5, 2, "train.micro_batch_size", 12, "4, 6"),
        (3, 0, 8, "data.global_batch_size", 8, "8"),
        (16, 16, 8, "train.micro_batch_size", 2, "1, 2"),
    ],
)
def test_m3_batch_that_does_not_divide_names_nearest_sizes(batch, micro_batch, devices, field, of, nearest, lab):
    settings = lab.config(data={"global_batch_size": batch}, train={"micro_batch_size": micro_batch})
    with raises(ConfigError, field, value=micro_batch or batch, match=rf"mesh.data x mesh.fsdp.* = {of};") as caught:
        make_run_on(settings, devices=devices)
    assert caught.value.remedy == f"nearest valid: {nearest}"


def test_m3_command_refuses_a_micro_batch_that_does_not_divide(lab, tmp_path):
    line = lab.refusal(tmp_path / "run", "train.micro_batch_size=3", expect=2)
    assert line.startswith("train.micro_batch_size=3: ")
    assert line.endswith(" = 8; nearest valid: 2, 4")


@pytest.fixture
def workdir(reference, tmp_path):
    return shutil.copytree(reference, tmp_path / "run")


@contextlib.contextmanager
def refused(workdir, field="", **parts):
    """As `raises` with ConfigError; the work directory stays as it is."""

    def files():
        return {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file() and path.name != ".lock"}

    before = files()
    with raises(ConfigError, field, **parts):
        yield
    assert files() == before, "a refused run leaves the work directory alone"


@pytest.fixture(scope="module")
def other_data(lab, tmp_path_factory):
    root = tmp_path_factory.mktemp("other")
    lines = root / "lines.txt"
    lines.write_text("".join(f"line {n} of another text, long enough to be one\n" for n in range(2000)))
    prepare(
        source=f"lines:{lines}",
        tokenizer=load_tokenizer("bytes"),
        out=str(root / "data"),
        val_fraction=0.2,
        log=lambda line: None,
    )
    return root / "data"


@pytest.mark.parametrize("change", ["fingerprint", sweep("data.seed"), sweep("data.global_batch_size")])
def test_o2_other_data_is_refused_unless_allowed(change, lab, workdir, other_data, train_on, said):
    sections = {
        "fingerprint": {"data": {"path": str(other_data)}},
        "data.seed": {"data": {"seed": 1}},
        "data.global_batch_size": {"data": {"global_batch_size": 4}},
    }[change]
    told = f"it was trained on {lab.data} (" if change == "fingerprint" else f" {change} was "
    only_line = rf"^[^\n]*{re.escape(told)}[^\n]*\n[^\n]*$"
    with refused(workdir, remedy="--config.data.allow_changed=True", match=only_line):
        train_on(workdir, train={"num_steps": 17}, **sections)
    del said[:]
    sections["data"]["allow_changed"] = True
    assert train_on(workdir, train={"num_steps": 17}, **sections) == 0
    assert any(told in line for line in said)
    assert list(losses(workdir)) == list(range(1, 18))


@pytest.mark.parametrize(
    ("field", "value"), [("n_embd", 64), ("block_size", 16), ("n_layer", 3), ("dropout", 0.2), ("bias", False)]
)
def test_b2_o2_another_model_is_refused_with_the_difference(field, value, lab, workdir, train_on):
    """The block size is the model's: data.allow_changed does not help there."""
    old = getattr(lab.config().model, field)
    with refused(workdir, f"model.{field}", remedy="another --workdir", match=f"^[^\n]* {old!r}, [^\n]* {value!r}; "):
        train_on(workdir, model={field: value}, data={"allow_changed": True})


def test_b2_another_optimizer_is_refused(workdir, train_on):
    with refused(workdir, "optim.name", remedy="another --workdir", match="'adamw', .*'lion'"):
        train_on(workdir, optim={"name": "lion"})


def test_b2_another_schedule_is_allowed_with_a_note(lab, workdir, train_on, said):
    assert train_on(workdir, optim={"schedule": "cosine", "peak_lr": 1e-4}, train={"num_steps": 17}) == 0
    notes = "\n".join(line for line in said if line.startswith("note: "))
    assert "optim.schedule changed from 'constant' to 'cosine'" in notes
    assert "optim.peak_lr changed from 0.002 to 0.0001" in notes
    assert checkpoint_steps(workdir)[-1] == 17


@pytest.fixture
def train_on(lab, monkeypatch):
    """train_on(workdir, ...) trains in this process, on one device, whatever the config changes."""
    from gptjax import train as train_module

    monkeypatch.setattr(train_module, "make_run", make_run_on)
    return lambda workdir, **sections: train_module.train(lab.config(**sections), str(workdir))
