"""Tasks at the command line and in a run, on a task whose answers are known."""

import json
import random
import shutil
import sys

import pytest

from gptjax.data import prepare
from tests.runs import losses, rows

COLOURS = ["red", "blue", "green", "black", "white", "pink", "grey", "gold"]


def question(key, colour, choices):
    return {"context": f"key {key} is", "choices": [f" {one}" for one in choices], "label": choices.index(colour)}


@pytest.fixture(scope="module")
def colours(lab, tmp_path_factory):
    """A run on sentences that give each of eight keys a colour, files of questions, and the run's settings."""
    root = tmp_path_factory.mktemp("colours")
    generator = random.Random(0)
    text = "".join(f"key {n} is {COLOURS[n]}.\n" for n in (generator.randrange(8) for _ in range(4000)))
    (root / "text").mkdir()
    for part in range(8):
        (root / "text" / str(part)).write_text(text[part * 8000 : part * 8000 + 8000])
    prepare.main([f"--source=text:{root}/text", "--tokenizer=bytes", f"--out={root}/data", "--val_fraction=0.3"])
    known, unknown = [], []
    for _ in range(100):
        key = generator.randrange(8)
        choices = generator.sample(COLOURS, 4)
        if COLOURS[key] not in choices:
            choices[0] = COLOURS[key]
        generator.shuffle(choices)
        known.append(question(key, COLOURS[key], choices))
        unknown.append(question(key, generator.choice(choices), choices))
    for name, items in {"known": known, "unknown": unknown}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    settings = [
        f"data.path={root}/data",
        "train.num_steps=400",
        "train.eval_every=200",
        "checkpoint.save_every=200",
        "optim.peak_lr=5e-3",
        "model.dropout=0.0",
        f"tasks.names=file:{root}/known.jsonl,file:{root}/unknown.jsonl",
        "tasks.every=200",
        "tasks.limit=80",
    ]
    done = lab.train(root / "run", *settings)
    return root, settings, done.stdout


def task_rows(workdir):
    return {row["step"]: row for row in rows(workdir) if "tasks/known/acc" in row}


def test_run_learns_what_can_be_known_and_nothing_else(colours):
    root, _, said = colours
    found = task_rows(root / "run")
    assert list(found) == [200, 400]
    assert found[400]["tasks/known/acc"] > 0.99
    assert 0.1 < found[400]["tasks/unknown/acc"] < 0.4, "chance is 0.25"
    assert 0.03 < found[400]["tasks/unknown/acc_stderr"] < 0.06
    assert "val_loss" in found[400]
    assert "step 400  known: acc " in said
    stored = json.loads((root / "run/results/tasks.json").read_text())
    assert stored["model"] == "step 400"
    assert stored["tasks"]["known"]["acc"] == found[400]["tasks/known/acc"]
    assert (stored["tasks"]["known"]["count"], stored["tasks"]["known"]["protocol"]) == (80, "file")


def test_command_gives_the_results_of_the_run(colours, lab):
    root, _, _ = colours
    command = [sys.executable, "-m", "gptjax.evaluate", f"--workdir={root}/run", f"--tasks=file:{root}/known.jsonl"]
    said = lab.call([*command, "--limit=80"]).stdout
    accuracy = task_rows(root / "run")[400]["tasks/known/acc"]
    assert said.startswith(f"step 400: known: acc {accuracy:.4f} ± ")
    assert "(80 questions)" in said
    assert "(100 questions)" in lab.call([*command, "--step=200"], devices=4).stdout
    exported = root / "weights"
    lab.call([sys.executable, "-m", "gptjax.convert", f"--from=gptjax:{root}/run", f"--to=hf:{exported}"])
    model = [sys.executable, "-m", "gptjax.evaluate", f"--model=hf:{exported}", f"--tasks=file:{root}/known.jsonl"]
    assert f"known: acc {accuracy:.4f}" in lab.call([*model, "--limit=80"]).stdout
    assert json.loads((lab.root / "results/tasks.json").read_text())["tasks"]["known"]["count"] == 80


def test_run_killed_among_its_tasks_ends_in_the_same_bits(colours, lab, tmp_path):
    root, settings, _ = colours
    lab.train(tmp_path / "run", *settings, expect=-9, GPTJAX_FAULT="evaluation:2:kill")
    lab.train(tmp_path / "run", *settings)
    assert losses(tmp_path / "run") == losses(root / "run")
    for step, row in task_rows(tmp_path / "run").items():
        assert {k: v for k, v in row.items() if k != "time"} == task_rows(root / "run")[step]


def test_tasks_change_no_update(colours, lab, tmp_path):
    root, settings, _ = colours
    lab.train(tmp_path / "run", *[one for one in settings if not one.startswith("tasks.")])
    assert losses(tmp_path / "run") == losses(root / "run")
    assert not task_rows(tmp_path / "run")


def test_missing_task_ends_the_run_before_its_first_step(colours, lab, tmp_path):
    _, settings, _ = colours
    refused = lab.refusal(tmp_path / "run", *settings, "tasks.names=piqa", expect=65)
    assert refused.startswith("data/tasks/piqa.jsonl: the task's questions are not there; ")
    assert refused.endswith("run: gptjax evaluate --fetch_tasks=piqa")
    refused = lab.refusal(tmp_path / "run", *settings, "tasks.every=250", expect=2)
    assert refused == "tasks.every=250: must be a multiple of train.eval_every=200; nearest valid: 200"


def test_stored_task_is_fetched_and_asked(colours, lab, tmp_path):
    root, _, _ = colours
    row = {"goal": "g", "sol1": "a", "sol2": "b", "label": 1}
    (tmp_path / "valid.jsonl").write_text(json.dumps(row) + "\n")
    evaluate = [sys.executable, "-m", "gptjax.evaluate"]
    said = lab.call([*evaluate, f"--fetch_tasks=piqa={tmp_path}/valid.jsonl"]).stdout
    assert said == f"data/tasks/piqa.jsonl: 1 questions from {tmp_path}/valid.jsonl\n"
    assert lab.call([*evaluate, "--fetch_tasks=piqa"]).stdout == "piqa: already stored in data/tasks\n"
    assert "piqa: acc " in lab.call([*evaluate, f"--workdir={root}/run", "--tasks=piqa"]).stdout
    shutil.rmtree(lab.root / "data/tasks")


def test_other_tokenizer_than_the_models_is_refused(colours, lab):
    root, _, _ = colours
    command = [sys.executable, "-m", "gptjax.evaluate", f"--workdir={root}/run", f"--tasks=file:{root}/known.jsonl"]
    assert "the tokenizer 'gpt2' has 50257 ids" in lab.call([*command, "--tokenizer=gpt2"], expect=2).stderr


def test_validation_needs_no_questions(colours, lab, tmp_path):
    """They may be on another machine than the run's checkpoints."""
    root, _, _ = colours
    shutil.copytree(root / "run", tmp_path / "run")
    (root / "known.jsonl").rename(root / "hidden.jsonl")
    try:
        said = lab.call([sys.executable, "-m", "gptjax.evaluate", f"--workdir={tmp_path}/run", "--batches=1"]).stdout
    finally:
        (root / "hidden.jsonl").rename(root / "known.jsonl")
    assert "validation loss" in said


def test_evaluation_reads_several_sets(colours, lab):
    root, _, _ = colours
    command = [sys.executable, "-m", "gptjax.evaluate", f"--workdir={root}/run", "--batches=1"]
    lines = lab.call([*command, f"--data={root}/data,{lab.data}"]).stdout.splitlines()
    assert [line.split(": ")[0] for line in lines if "validation loss" in line] == [
        f"step 400, {root}/data",
        f"step 400, {lab.data}",
    ]
    assert "names an empty directory" in lab.call([*command, f"--data={root}/data,"], expect=2).stderr
