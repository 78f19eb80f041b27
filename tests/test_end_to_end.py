"""The one command, started as users start it: its files, its restarts, and that nothing depends on how it was cut."""

import json
import math
import re
import shutil

import pytest

from tests import processes
from tests.runs import checkpoint_steps, copy_until, losses, restored_bytes, rows, validations

STEP_KEYS = {"step", "loss", "lr", "grad_norm", "tokens_per_second", "mfu"}
VALIDATION_KEYS = {"step", "val_loss", "val_perplexity", "val_bits_per_byte"}


def test_resumed_run_is_bit_equal_to_an_uninterrupted_run(lab, reference, tiny_run, tmp_path):
    """In two processes, with dropout and accumulation; being traced changes nothing either."""
    workdir = tmp_path / "run"
    first = lab.train(workdir, "train.num_steps=8", "train.profile_step=5")
    assert checkpoint_steps(workdir) == [4, 8]
    (trace,) = (workdir / "profile").rglob("*.xplane.pb")
    assert b"train_step" in trace.read_bytes()
    second = lab.train(workdir)
    assert "resumed from step 8" in second.stdout
    assert_summary(first.stdout, workdir, rows(workdir), step=8)
    assert_summary(second.stdout, workdir, rows(workdir), step=16)
    assert "goodput" not in first.stdout, "nothing was lost, and there is no --verbose"
    assert "goodput" in second.stdout
    assert ["h/mlp/c_fc/kernel " in said for said in (first.stdout, second.stdout)] == [False, True], "as with goodput"
    assert list(losses(workdir)) == list(range(1, 17))
    assert losses(workdir) == losses(reference)
    assert validations(workdir) == validations(reference)
    assert restored_bytes(workdir, tiny_run.abstract_state) == restored_bytes(reference, tiny_run.abstract_state)
    assert len({row["lr"] for row in rows(reference) if "lr" in row}) > 8, "a learning rate that cannot go wrong"
    assert "2 accumulation steps" in second.stdout


def assert_summary(said, workdir, logged, *, step):
    """The last lines say what the run reached, where it is, and the next commands."""
    lines = said[said.index(f"done: {step} steps in ") :].splitlines()
    [loss] = [row["val_loss"] for row in logged if row["step"] == step and "val_loss" in row]
    end = lines.index("next:")
    reached = " ".join(" ".join(lines[1:end]).split())
    assert reached.startswith(f"validation loss {loss:.4f}, perplexity ")
    per_token = "loss and perplexity are per token (1.00 bytes on average); compare bits per byte across tokenizers"
    where = f"everything is in {workdir}: checkpoints/, metrics.jsonl, config.json"
    assert reached.endswith(f" (16 sequences) {per_token} {where}")
    assert all(len(line) <= 80 or f"{workdir}" in line for line in lines[:end]), "as a terminal is wide"
    *commands, report = lines[end + 1 :]
    assert [line.split()[:5] for line in commands] == [
        ["python", "-m", "gptjax", command, f"--workdir={workdir}"] for command in ("sample", "evaluate")
    ]
    assert report == f"  open in a browser: {workdir}/report.html"
    assert (workdir / "report.html").exists()


def test_verbose_run_shows_parameters_and_goodput(lab, tmp_path):
    quiet = lab.train(tmp_path / "a", "train.num_steps=4").stdout
    done = lab.call([*lab.command(tmp_path / "b", "train.num_steps=4"), "--verbose"]).stdout
    for text in ("h/mlp/c_fc/kernel ", "goodput "):
        assert text not in quiet
        assert text in done


def test_metrics_have_the_documented_keys(reference):
    steps = [row for row in rows(reference) if "loss" in row]
    evaluations = [row for row in rows(reference) if "val_loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 17))
    assert [row["step"] for row in evaluations] == [8, 16]
    assert all(row.keys() >= STEP_KEYS for row in steps)
    assert all(row.keys() == VALIDATION_KEYS for row in evaluations)
    assert all(math.isfinite(row["loss"] + row["lr"] + row["grad_norm"]) for row in steps)
    assert all(row["mfu"] is None for row in steps), "the peak of this CPU is not known"
    assert all(row["tokens_per_second"] > 0 for row in steps[1:])
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1, "nothing was learnt"


def test_work_directory_holds_config_tokenizer_events_and_checkpoints(lab, reference):
    config = json.loads((reference / "config.json").read_text())
    assert config["model"] == lab.config().to_dict()["model"]
    assert config["checkpoint"]["keep"] == 8
    parameters = {row["parameter"] for row in json.loads((reference / "parameters.json").read_text())}
    assert {"wte/embedding", "h/mlp/c_fc/kernel", "ln_f/scale"} <= parameters
    assert (reference / "tokenizer.json").stat().st_size > 0
    assert list((reference / "tensorboard").glob("events*"))
    assert checkpoint_steps(reference) == [4, 8, 12, 16]


def test_finished_run_reports_it_and_changes_nothing(lab, reference, tmp_path):
    workdir = shutil.copytree(reference, tmp_path / "run")
    before = (workdir / "metrics.jsonl").read_bytes()
    again = lab.train(workdir, "checkpoint.keep=8", "checkpoint.resume=require")
    assert again.stdout.splitlines()[-1] == f"{workdir}: finished at step 16 of 16; nothing to do"
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_evaluate_command_gives_the_loss_of_the_run(lab, reference):
    command = [*lab.command(reference)[:2], "gptjax.evaluate", f"--workdir={reference}", "--batches=2"]
    said = lab.call(command).stdout
    last = rows(reference)[-1]
    found = re.search(r"step 16: validation loss ([\d.]+), perplexity ([\d.]+), ([\d.]+) bits per byte", said)
    expected = f"{last['val_loss']:.4f} {last['val_perplexity']:.2f} {last['val_bits_per_byte']:.3f}"
    assert found.groups() == tuple(expected.split())
    earlier = lab.call([*command, "--step=8"]).stdout
    assert earlier.startswith("step 8: validation loss")
    assert found[1] not in earlier
    assert "(16 sequences)" in earlier
    assert "gzip" not in earlier, "it would be of the whole text, not of these sequences"
    assert "gzip -9 needs" in lab.call(command[:-1]).stdout
    named = lab.call([*command[:3], f"--model=gptjax:{reference}@8", "--batches=1"]).stdout
    assert named.startswith(f"gptjax:{reference}@8: validation loss"), "on the run's own data"


@pytest.mark.parametrize(
    ("resume", "exists", "message"),
    [("require", False, "checkpoint.resume=require"), ("never", True, "checkpoint.resume=never")],
)
def test_resume_modes_refuse_unsuitable_work_directories(lab, tmp_path, resume, exists, message):
    workdir = tmp_path / "run"
    if exists:
        workdir.mkdir()
        (workdir / "notes.txt").write_text("mine")
    line = lab.refusal(workdir, f"checkpoint.resume={resume}", expect=2)
    assert line.startswith(message)
    assert str(workdir) in line
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == (["run", "run/notes.txt"] if exists else [])


def test_init_from_takes_the_parameters_and_nothing_else(lab, reference, tmp_path):
    workdir = tmp_path / "tuned"
    first = lab.train(workdir, f"init_from={reference}", "train.num_steps=4", "train.eval_every=0")
    assert f"parameters from gptjax:{reference}@16" in first.stdout
    tuned, fresh = rows(workdir), rows(reference)
    assert tuned[0]["step"] == 1
    assert tuned[0]["lr"] == pytest.approx(fresh[0]["lr"]), "the schedule starts again"
    assert tuned[0]["loss"] < fresh[0]["loss"] - 0.1, "the parameters are the trained ones"


def test_init_from_another_model_is_refused(lab, reference, tmp_path):
    refused = lab.train(tmp_path / "run", f"init_from={reference}", "model.n_layer=3", expect=2)
    cause, remedy = refused.stderr.splitlines()
    assert re.fullmatch(f"error: init_from={reference}: .* n_layer=2, .* model.n_layer=3", cause)
    assert remedy.endswith(" --config.model.n_layer=2")


def test_newest_and_best_checkpoints_are_kept(lab, reference, tmp_path):
    """From a copy that ends at step 16, on with a learning rate that ruins the model: step 16 stays the best."""
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    periods = ("checkpoint.keep=2", "checkpoint.save_every=2", "train.num_steps=24", "train.eval_every=4")
    lab.train(workdir, *periods, "optim.peak_lr=1", "optim.grad_clip=0", "optim.schedule=constant")
    found = {row["step"]: row["val_loss"] for row in rows(workdir) if "val_loss" in row}
    assert min(found, key=found.__getitem__) == 16, found
    assert checkpoint_steps(workdir) == [16, 22, 24]


def test_four_processes_resume_a_run_of_one(lab, reference, tmp_path):
    workdir = copy_until(reference, tmp_path / "run", 12)
    compiling = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # each compiles what no other test needs
    [first, *_] = processes.train(lab, workdir, 4, **compiling)
    assert "resumed from step 12" in first
    found, expected = losses(workdir), losses(reference)
    assert list(found) == list(range(1, 17))
    for step in range(13, 17):
        assert float.fromhex(found[step]) == pytest.approx(float.fromhex(expected[step]), rel=1e-6), step
