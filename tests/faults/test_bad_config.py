"""B1, B2, O2, M3: what cannot work is refused with code 2 and names the field, before anything is written."""

import shutil
import sys
import time

import pytest

from gptjax.data.prepare import prepare
from gptjax.data.tokenizer import load_tokenizer
from gptjax.errors import ConfigError
from tests.helpers import sweep
from tests.runs import checkpoint_steps, losses, make_run_on

pytestmark = pytest.mark.faults

BAD = {
    "unknown field": (["--config.model.n_layers=3"], ["model.n_layers: no such config field; nearest: model.n_layer"]),
    "unknown section": (["--config.optimizer.name=lion"], ["optimizer.name: no such config field", "optim.name"]),
    "unknown flag": (["--workdri=x"], ["--workdri=x: no such flag; nearest: --workdir"]),
    "no value": (["--config.model.n_layer"], ["--config.model.n_layer: needs a value"]),
    "not a number": (["--config.model.n_layer=two"], ["model.n_layer=two: expected a whole number"]),
    "not a whole number": (["--config.train.num_steps=2.5"], ["train.num_steps=2.5: expected a whole number"]),
    "nan": (["--config.optim.peak_lr=nan"], ["optim.peak_lr=nan: expected a finite number"]),
    "negative steps": (["--config.train.num_steps=-5"], ["train.num_steps=-5: must be at least 0"]),
    "heads": (["--config.model.n_head=3"], ["model.n_head=3: must divide model.n_embd=32; nearest valid: 2, 4"]),
    "choice": (["--config.optim.name=adam"], ["optim.name=adam: expected one of adamw, lion, adafactor, muon"]),
    "boolean": (["--config.model.bias=perhaps"], ["model.bias=perhaps: expected true or false"]),
    "dropout": (["--config.model.dropout=1"], ["model.dropout=1.0: must be below 1"]),
    "section as value": (["--config.model=3"], ["model: no such config field"]),
    "two mistakes": (["--config.model.n_layer=0", "--config.data.seed=-1"], ["model.n_layer=0", "data.seed=-1"]),
}


def call_main(lab, *arguments, expect=2):
    return lab.call([sys.executable, "-m", "gptjax.main", *arguments], expect=expect)


@pytest.mark.parametrize("mistake", BAD)
def test_b1_bad_config_is_refused_before_anything_is_written(mistake, lab, tmp_path):
    arguments, messages = BAD[mistake]
    workdir = tmp_path / "run"
    refused = call_main(lab, f"--config={lab.config_file}", f"--workdir={workdir}", *arguments)
    lines = refused.stderr.splitlines()
    assert len(lines) == (2 if mistake == "two mistakes" else 1), "one line for each mistake"
    assert all(line.startswith("error: ") for line in lines)
    assert all(message in refused.stderr for message in messages), refused.stderr
    assert refused.stdout == ""
    assert list(tmp_path.iterdir()) == [], "nothing may be written"


def test_b1_missing_or_broken_config_file_is_refused(lab, tmp_path):
    missing = call_main(lab, f"--config={lab.root}/tini.py", f"--workdir={tmp_path}/run")
    assert missing.stderr == f"error: --config={lab.root}/tini.py: file not found; available: {lab.config_file}\n"
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config():\n    return 1 / 0\n")
    failed = call_main(lab, f"--config={broken}", f"--workdir={tmp_path}/run")
    assert failed.stderr == f"error: --config={broken}: get_config() failed: ZeroDivisionError: division by zero\n"
    without = call_main(lab, f"--workdir={tmp_path}/run")
    assert len(without.stderr.splitlines()) == 1
    assert "--config" in without.stderr
    assert list(tmp_path.iterdir()) == [broken]


def test_b1_help_is_quick_and_does_not_import_jax(lab):
    begin = time.monotonic()
    shown = lab.call([sys.executable, "-X", "importtime", "-m", "gptjax.main", "--help"])
    assert time.monotonic() - begin < 2
    assert "--config" in shown.stdout
    assert "gptjax.config" in shown.stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in shown.stderr.splitlines()}
    assert not imported & {"jax", "numpy", "orbax", "flax", "tensorflow_datasets"}


def test_m3_batch_that_does_not_divide_names_nearest_sizes(lab, said):
    with pytest.raises(ConfigError) as caught:
        make_run_on(lab.config(data={"global_batch_size": 12}, train={"micro_batch_size": 0}), devices=8)
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        "data.global_batch_size=12: must be a multiple of mesh.data x mesh.fsdp = 8; nearest valid: 8, 16"
    )
    with pytest.raises(ConfigError) as caught:
        make_run_on(lab.config(data={"global_batch_size": 24}, train={"micro_batch_size": 5}), devices=2)
    assert str(caught.value) == (
        "train.micro_batch_size=5: must divide data.global_batch_size / (mesh.data x mesh.fsdp) = 12; "
        "nearest valid: 4, 6"
    )
    with pytest.raises(ConfigError, match=r"^data.global_batch_size=3: .* nearest valid: 8$"):
        make_run_on(lab.config(data={"global_batch_size": 3}, train={"micro_batch_size": 0}), devices=8)


def test_m3_command_refuses_a_micro_batch_that_does_not_divide(lab, tmp_path):
    refused = lab.train(tmp_path / "run", "train.micro_batch_size=3", expect=2)
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: train.micro_batch_size=3: must divide ")
    assert line.endswith("= 8; nearest valid: 2, 4")


@pytest.fixture
def workdir(twin, tmp_path):
    shutil.copytree(twin, tmp_path / "run")
    return tmp_path / "run"


def refused(lab, workdir, train_module_call):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(ConfigError) as caught:
        train_module_call()
    after = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before, "a refused run leaves the work directory alone"
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


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
    lines = refused(lab, workdir, lambda: train_on(workdir, train={"num_steps": 17}, **sections))
    assert lines[0].startswith(f"the data changed since the checkpoint: {change} was ")
    assert lines[1:] == ["to resume anyway: --config.data.allow_changed=True"]
    del said[:]
    sections["data"]["allow_changed"] = True
    assert train_on(workdir, train={"num_steps": 17}, **sections) == 0
    assert any(line.startswith(f"note: the data changed since the checkpoint: {change} was ") for line in said)
    assert list(losses(workdir)) == list(range(1, 18))


@pytest.mark.parametrize(
    ("field", "value"), [("n_embd", 64), ("block_size", 16), ("n_layer", 3), ("dropout", 0.2), ("bias", False)]
)
def test_b2_o2_another_model_is_refused_with_the_difference(field, value, lab, workdir, train_on):
    """The block size is the model's: data.allow_changed does not help there."""
    old = getattr(lab.config().model, field)
    lines = refused(lab, workdir, lambda: train_on(workdir, model={field: value}, data={"allow_changed": True}))
    assert lines == [f"model.{field}: the checkpoint has {old!r}, the config {value!r}; choose another --workdir"]


def test_b2_another_optimizer_is_refused(lab, workdir, train_on):
    (line,) = refused(lab, workdir, lambda: train_on(workdir, optim={"name": "lion"}))
    assert line == "optim.name: the checkpoint has 'adamw', the config 'lion'; choose another --workdir"


def test_b2_another_schedule_is_allowed_with_a_note(lab, workdir, train_on, said):
    code = train_on(workdir, optim={"schedule": "cosine", "peak_lr": 1e-4}, train={"num_steps": 17})
    assert code == 0
    notes = [line for line in said if line.startswith("note: ")]
    assert "note: optim.schedule changed from 'constant' to 'cosine' since the checkpoint" in notes
    assert "note: optim.peak_lr changed from 0.002 to 0.0001 since the checkpoint" in notes
    assert checkpoint_steps(workdir)[-1] == 17


@pytest.fixture
def train_on(lab, monkeypatch):
    """train_on(workdir, ...) trains in this process, on one device, whatever the config changes."""
    from gptjax import train as train_module

    monkeypatch.setattr(train_module, "make_run", make_run_on)
    return lambda workdir, **sections: train_module.train(lab.config(**sections), str(workdir))
