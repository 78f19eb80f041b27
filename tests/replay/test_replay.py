"""A step computed again is the step, and looking at it changes nothing."""

import fcntl
import json
import math
import re
import shutil
import types

import pytest

from gptjax.errors import ConfigError
from gptjax.history import History, SkippedRange
from gptjax.record import Record
from gptjax.replay import __main__ as command
from gptjax.replay import update
from tests.helpers import raises
from tests.runs import losses, make_reference, rows


def look(lab, workdir, step, *flags, devices=1, expect=0):
    arguments = ["gptjax.replay", f"--workdir={workdir}", f"--step={step}", *flags]
    return lab.call([*lab.command(workdir)[:2], *arguments], devices=devices, expect=expect)


def contents(workdir):
    return {
        path.relative_to(workdir): path.read_bytes()
        for path in sorted(workdir.rglob("*"))
        if path.is_file() and not path.name.startswith("replay-")
    }


def shown_loss(said):
    return float(re.search(r"^  loss (\S+)", said, re.MULTILINE)[1])


@pytest.mark.parametrize(
    ("step", "origin"),
    [
        (1, "replayed 0 steps from the initial state"),
        (8, "replayed 3 steps from the checkpoint of step 4"),
        (9, "replayed 0 steps from the checkpoint of step 8"),
    ],
)
def test_replayed_step_is_bit_equal_and_changes_no_file(lab, reference, step, origin, tmp_path):
    """With dropout, two micro-batches; while another process holds the work directory."""
    workdir, out = shutil.copytree(reference, tmp_path / "run"), tmp_path / "page.html"
    before = contents(workdir)
    with open(workdir / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = look(lab, workdir, step, f"--out={out}").stdout
    assert contents(workdir) == before
    assert not list(workdir.glob("replay-*"))
    assert f"step {step} of {workdir}" in said
    assert origin in said
    assert "equal to metrics.jsonl, bit for bit" in said
    assert "last bits may differ" not in said
    logged = next(row for row in rows(reference) if row["step"] == step and "loss" in row)
    assert shown_loss(said) == pytest.approx(logged["loss"], rel=1e-5)

    page = out.read_text()
    found = [float(loss) for loss in re.findall(r'title="loss ([\d.]+), ', page)]
    assert len(found) == 8 * 32
    assert sum(found) / len(found) == pytest.approx(logged["loss"], abs=1e-4), "dropout and all"
    layers = said[said.index("layer  ") : said.index("parameter  ")]
    norms = [float(line.split()[-1]) for line in layers.splitlines()[1:] if line]
    assert len(norms) == 5
    assert math.hypot(*norms) == pytest.approx(logged["grad_norm"], rel=1e-4)
    shards = re.findall(r"^ +(\d) +(\d+)  (\S+\.bin) +(\d+) ", said, re.MULTILINE)
    assert sorted(int(row) for row, *_ in shards) == list(range(8))


def test_replay_lists_the_rows_of_the_batch(lab, reference, tiny_run, tmp_path):
    data, out = tiny_run.train_data, tmp_path / "page.html"
    said = look(lab, reference, 9, f"--out={out}").stdout
    found = {
        int(n): (int(w), s, int(t)) for n, w, s, t in re.findall(r"^ +(\d) +(\d+)  (\S+\.bin) +(\d+) ", said, re.M)
    }
    for number, window in enumerate(data.window_ids(8).tolist()):
        shard, start = data.locate(window)
        assert found[number] == (window, data.split.paths[shard].rpartition("/")[2], start)
        ids = data.split.shards[shard].read(start, start + 33).tolist()
        about = re.search(rf"row {number}: .*?</details>", out.read_text(), re.DOTALL)[0]
        assert [int(i) for i in re.findall(r'id (\d+)"', about)] == ids


def test_replay_reports_a_difference_from_the_log(lab, reference, tmp_path):
    workdir = shutil.copytree(reference, tmp_path / "run")
    changed = [row | ({"grad_norm": 1.5} if row["step"] == 9 else {}) for row in rows(workdir)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed) + '{"step": 9, "lo')
    assert "DIFFERENT from metrics.jsonl, which has grad_norm 1.5\n" in look(lab, workdir, 9).stdout
    assert (workdir / "replay-9.html").read_text().endswith("</html>\n")


def test_replay_skips_damaged_checkpoints_without_renaming_them(lab, reference, tmp_path):
    workdir = shutil.copytree(reference, tmp_path / "run")
    arrays = (path for path in (workdir / "checkpoints" / "8" / "params").rglob("c/**/*") if path.is_file())
    largest = max(arrays, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    (workdir / "checkpoints" / "4" / "_CHECKPOINT_METADATA").write_text("{}")
    before = contents(workdir)
    said = look(lab, workdir, 10).stdout
    assert "checkpoint of step 8 left out: " in said
    assert "checkpoint of step 4 left out: record unreadable" in said
    assert "replayed 9 steps from the initial state" in said
    assert "equal to metrics.jsonl, bit for bit" in said
    assert contents(workdir) == before


def test_replay_on_other_devices_warns_of_different_bits(lab, reference, tmp_path):
    said = look(lab, reference, 9, f"--out={tmp_path}/p.html", devices=4).stdout
    assert "the run was on 1 x cpu, this is 4 x cpu: last bits may differ" in said
    logged = losses(reference)[9]
    assert shown_loss(said) == pytest.approx(float.fromhex(logged), rel=1e-5), "with the same dropout"


def test_multi_device_run_is_replayed_on_one_device(lab, tmp_path):
    workdir = tmp_path / "run"
    lab.train(workdir, "mesh.fsdp=4", "train.micro_batch_size=1", "train.num_steps=6", "train.eval_every=0", devices=4)
    said = look(lab, workdir, 6).stdout
    assert "note: the run's mesh does not fit the 1 device(s) here: mesh.fsdp=1 instead" in said
    assert "the run was on 4 x cpu, this is 1 x cpu: last bits may differ" in said
    assert shown_loss(said) == pytest.approx(float.fromhex(losses(workdir)[6]), rel=1e-5), "with the same dropout"


def test_step_within_a_dispatch_can_be_replayed(lab, reference, tmp_path):
    workdir = make_reference(lab, "four", "train.log_every=4")
    for step in (8, 7):
        said = look(lab, workdir, step, f"--out={tmp_path}/p.html").stdout
        assert "from the checkpoint of step 4" in said
        assert ("equal to metrics.jsonl, bit for bit" in said) == (step == 8)
        found = [float(loss) for loss in re.findall(r'title="loss ([\d.]+), ', (tmp_path / "p.html").read_text())]
        assert sum(found) / len(found) == pytest.approx(shown_loss(said), abs=1e-4), "of the state before that step"
        assert shown_loss(said) == float(f"{float.fromhex(losses(reference)[step]):.6g}"), "of a run with K = 1"


def test_diverged_step_is_replayed_by_the_printed_command(lab, tmp_path):
    workdir = tmp_path / "run"
    ended = lab.train(workdir, "optim.peak_lr=1e17", "optim.grad_clip=0", "checkpoint.save_every=1", expect=70)
    printed, number = re.search(r" python -m (.*--step=(\d+))$", ended.stderr, re.M).groups()
    assert f"error: step {number}: loss " in ended.stderr
    module, *flags = printed.split()
    said = lab.call([*lab.command(workdir)[:2], module, *flags]).stdout
    assert "metrics.jsonl has no such step" in said
    at = said.index("\nlayer  ")
    assert "NOT FINITE" in said[at:].splitlines()[2]
    assert "class=n" in (workdir / f"replay-{number}.html").read_text()


@pytest.mark.parametrize(
    ("flag", "field", "value", "remedy"),
    [
        ("--step=0", "--step", 0, ""),
        ("--rows=-1", "--rows", -1, ""),
        ("--config.mesh.fsd=1", "mesh.fsd", None, "mesh.fsdp"),
        ("--ouch=1", "--ouch=1", None, "--out"),
    ],
)
def test_wrong_flag_is_refused(flag, field, value, remedy):
    with raises(ConfigError, field, value=value, remedy=remedy):
        command.parse_flags(["--workdir=x", "--step=3", flag])


def test_step_or_rollbacks_beyond_the_run_exit_with_code_2(lab, reference):
    assert "--step=17: " in look(lab, reference, 17, expect=2).stderr
    assert "--rollbacks=1: " in look(lab, reference, 3, "--rollbacks=1", expect=2).stderr


def test_missing_run_or_unwritable_page_is_refused(lab, reference, tmp_path):
    assert f"--workdir={tmp_path}: " in look(lab, tmp_path, 3, expect=65).stderr
    refused = look(lab, reference, 1, f"--out={tmp_path}/none/page.html", expect=73).stderr
    assert f"{tmp_path}/none/page.html: " in refused
    assert "--out=FILE" in refused


# Which config, machine and data a step had


def record(step, *, seed=0, **history):
    return Record(step, {"data": {"seed": seed}}, history, {}, {}, {})


def test_config_of_a_step_comes_from_the_next_checkpoint(tmp_path):
    records = {9: record(9, seed=9), 6: record(6, seed=6), 3: record(3, seed=3)}
    (tmp_path / "config.json").write_text('{"data": {"seed": 12}}')

    def seed_at(step, **overrides):
        return update.find_config(str(tmp_path), step, records=records, overrides=overrides).data.seed

    assert [seed_at(step) for step in (2, 3, 4, 9, 10)] == [3, 3, 6, 9, 12]
    assert seed_at(4, **{"data.seed": "5", "init_from": "x"}) == 5
    (tmp_path / "config.json").write_text('{"da')
    assert seed_at(10) == 9


def test_history_of_a_step_comes_from_the_next_checkpoint():
    records = {9: record(9, machine="9"), 6: record(6, machine="6"), 3: record(3, machine="3")}
    assert [update.history_of(records, step).machine for step in (3, 4, 9, 10)] == ["3", "6", "9", "9"]
    assert update.history_of({}, 4) == History()


def test_skipped_ranges_come_from_the_newest_checkpoint():
    ranges = [{"rollback": 1, "step": 4, "batches": 3}, {"rollback": 2, "step": 6, "batches": 1}]
    records = {9: record(9, skipped_ranges=ranges), 6: record(6, skipped_ranges=ranges[:1])}
    found = [SkippedRange(**part) for part in ranges]
    assert list(update.skipped_ranges(records, -1)) == found
    assert list(update.skipped_ranges(records, 1)) == found[:1]
    assert list(update.skipped_ranges(records, 0)) == []
    assert list(update.skipped_ranges({}, -1)) == []
    with raises(ConfigError, "--rollbacks", value=3, match="of 2"):
        update.skipped_ranges(records, 3)


def test_replay_advances_by_dispatches_and_logs_progress(said, monkeypatch):
    """From step 4 by twos, with a shorter one before step 9."""
    taken = []
    run = types.SimpleNamespace(
        dispatch_end=lambda step: step + 2,
        batch=lambda step, skipped, end: (step, end, skipped),
        train_step=lambda state, batch: (taken.append(batch) or types.SimpleNamespace(step=batch[1]), 0.0),
    )
    state = update.advance(run, types.SimpleNamespace(step=4), 9, skipped=["ranges"])
    assert (state.step, said) == (9, [])
    assert taken == [(4, 6, ["ranges"]), (6, 8, ["ranges"]), (8, 9, ["ranges"])]
    monkeypatch.setattr(update, "PROGRESS_SECONDS", -1.0)
    update.advance(run, types.SimpleNamespace(step=4), 9, skipped=[])
    assert said == [f"replay: step {step} of 9, from 4" for step in (6, 8, 9)]
