"""G3, G4: a spike goes back to the last good step without the data that led to it, the same way every time."""

import dataclasses
import functools
import gc
import hashlib
import json
import re
import shutil

import jax
import numpy as np
import pytest

from gptjax import train as train_module
from gptjax.checkpoint import Checkpointer
from gptjax.data.dataset import Dataset
from gptjax.data.header import HEADER_BYTES
from gptjax.data.tokenizer import load_tokenizer
from gptjax.data.tokens import open_split
from gptjax.errors import DivergedError
from gptjax.history import History
from tests import runs
from tests.helpers import raises, sweep
from tests.processes import SECONDS, group
from tests.runs import checkpoint_steps, copy_until, event_steps, losses, restored_bytes, rows, state_bytes

pytestmark = pytest.mark.faults
LONG = {"num_steps": 100, "eval_every": 0, "nan_policy": "rollback"}
SAVES = {"save_every": 20, "keep": 9}


@pytest.fixture
def spiking_at(tiny_run):
    """spiking_at(90) is a train step whose metrics, and parameters, are off where it is given batch 90 of the data."""

    def make(*indices, value=50.0, name="loss"):
        bad = [np.asarray(tiny_run.batch(index)) for index in indices]

        def train_step(state, tokens):
            state, metrics = tiny_run.train_step(state, tokens)
            if any(np.array_equal(tokens, batch) for batch in bad):
                state = dataclasses.replace(state, params=jax.tree.map(lambda x: x + 1.0, state.params))
                metrics = metrics | {name: metrics[name] + value}
            return state, metrics

        return {"train_step": train_step}

    return make


@pytest.fixture(scope="session")
def without(tiny_run):
    """without(80, 11) is (bits of the state, losses) after 100 steps, with 11 batches left out from step 80 on."""

    @functools.cache
    def run(at, count):
        found = {}
        state = tiny_run.init()
        for step in range(100):
            index = step + count if step >= at else step
            state, metrics = tiny_run.train_step(state, tiny_run.batch(index))
            found[step + 1] = float(metrics["loss"]).hex()
        return state_bytes(state), found

    return run


@pytest.fixture
def before_restore(monkeypatch):
    """before_restore(call) has call(checkpointer) come before the restore of a rollback."""

    def watch(call):
        restore = train_module.restore

        def watched(run, checkpointer, identity):
            call(checkpointer)
            return restore(run, checkpointer, identity)

        monkeypatch.setattr(train_module, "restore", watched)

    return watch


def history_of(workdir, step):
    return Checkpointer(str(workdir)).read_record(step).history


def ranges_of(workdir, step):
    return [
        (part["rollback"], part["step"], part["batches"], part["spike"])
        for part in history_of(workdir, step)["skipped_ranges"]
    ]


def test_g3_rollback_restores_a_checkpoint_and_skips_the_data(
    train_here, tiny_run, without, spiking_at, said, tmp_path
):
    workdir = tmp_path / "run"
    assert train_here(workdir, train=LONG, checkpoint=SAVES, parts=spiking_at(90)) == 0
    (told,) = [line for line in said if "rollback 1 of at most 3" in line]
    assert re.match(r"step 91: loss 5\S* .* 6 .* 90: .* step 80, .* 80 to 90 ", told)
    assert any(line.endswith(f"--workdir={workdir} --step=91 --rollbacks=0") for line in said)

    state, expected = without(80, 11)
    assert losses(workdir) == expected
    assert restored_bytes(workdir, tiny_run.abstract_state) == (100, state)
    assert expected[81] != without(0, 0)[1][81], "data that make no difference test nothing"
    assert event_steps(workdir, "train/loss") == list(range(1, 101))
    assert [row.get("rollbacks", 0) for row in rows(workdir) if "loss" in row] == [0] * 80 + [1] * 20
    assert ranges_of(workdir, 80) == []
    assert ranges_of(workdir, 100) == [(1, 80, 11, 91)]


def test_g3_spiking_step_is_not_saved_before_the_rollback(train_here, spiking_at, tmp_path, before_restore):
    """Also where the step that is about to be saved is the one that spiked."""
    workdir, seen = tmp_path / "run", []
    before_restore(lambda checkpointer: seen.append((checkpointer.steps(), checkpointer._pending)))
    assert train_here(workdir, train=LONG, checkpoint=SAVES, parts=spiking_at(79)) == 0
    assert seen == [([20, 40, 60], None)]
    assert ranges_of(workdir, 100) == [(1, 60, 20, 80)]


def test_g3_rollback_waits_for_a_pending_save(train_here, spiking_at, tmp_path, monkeypatch, before_restore):
    """The spike comes one step after the save of step 80, which is then the one gone back to."""
    workdir, seen, pending = tmp_path / "run", [], []
    finish = Checkpointer.wait_for_pending_save

    def finishing(checkpointer):
        pending.append(checkpointer._pending)
        finish(checkpointer)

    monkeypatch.setattr(Checkpointer, "wait_for_pending_save", finishing)
    before_restore(lambda checkpointer: seen.append((pending[-1], checkpointer._pending)))
    assert train_here(workdir, train=LONG, checkpoint=SAVES, parts=spiking_at(80)) == 0
    [(before, after)] = seen
    assert before is not None, "a save was running"
    assert after is None
    assert ranges_of(workdir, 100) == [(1, 80, 1, 81)]


def test_g3_rollback_without_checkpoint_restarts_from_initial_state(
    train_here, tiny_run, without, spiking_at, tmp_path
):
    workdir = tmp_path / "run"
    saves = SAVES | {"save_every": 100}
    assert train_here(workdir, train=LONG, checkpoint=saves, parts=spiking_at(70)) == 0
    state, expected = without(0, 71)
    assert losses(workdir) == expected
    assert restored_bytes(workdir, tiny_run.abstract_state) == (100, state)


def test_g3_run_ends_after_the_last_allowed_rollback(train_here, tiny_run, without, spiking_at, said, tmp_path):
    """Batches 90, 95 and 100: twice back to step 80, and the third time it is enough."""
    workdir = tmp_path / "run"
    with raises(
        DivergedError, "step 85", remedy=" train.max_rollbacks", match="loss 5.*train.max_rollbacks=2"
    ) as caught:
        train_here(workdir, train=LONG | {"max_rollbacks": 2}, checkpoint=SAVES, parts=spiking_at(90, 95, 100))
    cause, restart, inspect = caught.value.errors
    assert str(tiny_run.train_data.window_ids(100).tolist()) in cause.problem
    assert restart.remedy.endswith(" step 80")
    assert inspect.remedy.endswith(f" python -m gptjax.replay --workdir={workdir} --step=85")
    told = [line.partition(" (rollback ")[0].partition("skipping data ")[2] for line in said if "(rollback " in line]
    assert told == ["batches 80 to 90", "batches 91 to 95"]
    assert checkpoint_steps(workdir) == [20, 40, 60, 80]

    assert train_here(workdir, train=LONG, checkpoint=SAVES, parts=spiking_at(90, 95, 100)) == 0
    state, _ = without(80, 21)
    assert restored_bytes(workdir, tiny_run.abstract_state) == (100, state), "and one more was enough"


def test_g3_rollback_count_survives_restarts(train_here, spiking_at, tmp_path):
    workdir, parts = tmp_path / "run", spiking_at(70, 105)
    policy = LONG | {"max_rollbacks": 1}
    train_here(workdir, train=policy | {"num_steps": 80}, checkpoint=SAVES, parts=parts)
    assert ranges_of(workdir, 80) == [(1, 60, 11, 71)]
    with raises(DivergedError, "step 95", match="loss .*train.max_rollbacks=1"):
        train_here(workdir, train=policy, checkpoint=SAVES, parts=parts)


@pytest.mark.parametrize(
    ("name", "value"), [("grad_norm", 100.0), ("loss", float("nan")), ("update_norm", float("inf"))]
)
def test_g3_gradient_spikes_and_nonfinite_values_cause_rollback(
    train_here, tiny_run, without, spiking_at, tmp_path, name, value
):
    workdir = tmp_path / "run"
    parts = spiking_at(90, value=value, name=name)
    if name == "update_norm":
        step = parts["train_step"]

        def train_step(state, tokens):
            state, metrics = step(state, tokens)
            return state, metrics | {"finite": metrics["finite"] * (metrics["update_norm"] < 1e30)}

        parts = {"train_step": train_step}
    assert train_here(workdir, train=LONG, checkpoint=SAVES, parts=parts) == 0
    assert losses(workdir) == without(80, 11)[1]


def test_g3_spike_within_a_dispatch_rolls_back(train_here, tiny_run, without, spiking_at, tmp_path):
    """Of four steps, the third spikes; the fourth and the dispatch after it have been taken by then."""
    workdir, one = tmp_path / "run", spiking_at(90)["train_step"]

    def train_step(state, batches):
        found = []
        for tokens in batches.tokens_KABT[: int(batches.num_steps)]:
            state, metrics = one(state, tokens)
            found.append(metrics)
        return state, jax.tree.map(lambda *values: np.stack(values), *found)

    parts = {"train_step": train_step, "steps_per_dispatch": 4}
    assert train_here(workdir, train=LONG | {"log_every": 4}, checkpoint=SAVES, parts=parts) == 0
    assert ranges_of(workdir, 100) == [(1, 80, 11, 91)]
    state, expected = without(80, 11)
    assert losses(workdir) == {step: loss for step, loss in expected.items() if step % 4 == 0}
    assert restored_bytes(workdir, tiny_run.abstract_state) == (100, state)


def test_g3_rollback_skips_a_damaged_checkpoint_and_resaves_it(
    train_here, tiny_run, without, spiking_at, tmp_path, before_restore
):
    """Step 80's is damaged when it is wanted: from 60 on without what was read since, and step 80 is saved anew."""
    workdir = tmp_path / "run"
    before_restore(lambda _: (workdir / "checkpoints/80/_CHECKPOINT_METADATA").write_text("{}"))
    assert train_here(workdir, train=LONG, checkpoint=SAVES, parts=spiking_at(90)) == 0
    assert checkpoint_steps(workdir) == [20, 40, 60, 80, 100]
    assert ranges_of(workdir, 80) == [(1, 60, 31, 91)]
    state, _ = without(60, 31)
    assert restored_bytes(workdir, tiny_run.abstract_state) == (100, state)


def test_g3_spiked_state_is_freed_before_the_restore(train_here, spiking_at, tmp_path, before_restore):
    """Both at once might not fit the devices' memory."""

    def bytes_alive():
        return sum(leaf.nbytes for leaf in jax.live_arrays() if leaf.ndim == 4 and not leaf.is_deleted())

    alive = []
    before_restore(lambda _: alive.append(bytes_alive()))
    gc.collect()  # what earlier tests have left
    before = bytes_alive()
    train_here(tmp_path / "run", train=LONG, checkpoint=SAVES, parts=spiking_at(90))
    assert alive == [before]


def test_g4_normal_run_never_rolls_back(train_here, said, tmp_path):
    """Where the loss falls from 5.5 to 3 in 100 steps."""
    assert train_here(tmp_path / "run", train=LONG, checkpoint=SAVES) == 0
    assert not any("rollback" in line for line in said)


# Real processes, and data in which one batch is of one byte that is nowhere else

REAL = ("model.activation=gelu", "train.num_steps=120", "train.eval_every=60", "train.nan_policy=rollback")
REAL += ("checkpoint.save_every=20",)


@pytest.fixture(scope="session")
def spiky_data(lab):
    """The lab's data with the windows of batch 90 overwritten."""

    def make(target):
        shutil.copytree(lab.data, target)
        overwrite_batch(lab.config(), lab.data, target, 90)

    return runs.make_once(lab, "spiky", make)


def overwrite_batch(config, source, target, index):
    split = open_split(str(source), "train", tokenizer=load_tokenizer("bytes"))
    data = Dataset(split, config.model.block_size, config.data.global_batch_size, config.data.seed)
    assert data.num_windows > 130 * config.data.global_batch_size, "no batch may come twice"
    meta = json.loads((target / "meta.json").read_text())
    for window in data.window_ids(index).tolist():
        shard, start = data.locate(window)
        about = meta["splits"]["train"]["shards"][shard]
        content = bytearray((target / about["file"]).read_bytes())
        first = HEADER_BYTES + 2 * start
        content[first : first + 2 * 33] = np.full(33, 200, "<u2").tobytes()
        (target / about["file"]).write_bytes(content)
        about["sha256"] = hashlib.sha256(content).hexdigest()
    (target / "meta.json").write_text(json.dumps(meta))


@pytest.fixture(scope="session")
def rolled(lab, spiky_data):
    """The work directory of a finished run that has rolled back once."""
    return runs.make_reference(lab, "rolled", *REAL, f"data.path={spiky_data}")


def assert_equal(workdir, reference, abstract):
    runs.assert_equals_reference(workdir, reference, abstract)
    assert max(losses(workdir)) == 120
    assert [row.get("rollbacks") for row in rows(workdir)] == [row.get("rollbacks") for row in rows(reference)]
    assert ranges_of(workdir, 120) == ranges_of(reference, 120) == [(1, 80, 11, 91)]
    assert history_of(workdir, 120)["recent"] == history_of(reference, 120)["recent"]


def test_g3_repeated_run_rolls_back_identically(lab, rolled, spiky_data, tiny_run, tmp_path):
    workdir = tmp_path / "run"
    done = lab.train(workdir, *REAL, f"data.path={spiky_data}")
    assert re.search(r"step 91: gradient norm .* step 80, .* 80 to 90 \(rollback 1 ", done.stdout)
    assert_equal(workdir, rolled, tiny_run.abstract_state)


@pytest.mark.parametrize(
    ("fault", "newest"), [("step:13:kill", 80), sweep("step:20:kill", 80), sweep("step:38:hang", 100)]
)
def test_g3_run_killed_around_a_rollback_ends_bit_equal(lab, rolled, spiky_data, tiny_run, tmp_path, fault, newest):
    """From step 80, twelve dispatches come before the rollback to it: these are those of steps 81, 88 and 106."""
    workdir = copy_until(rolled, tmp_path / "run", 80)
    with lab.start(workdir, *REAL, f"data.path={spiky_data}", GPTJAX_FAULT=fault) as process:
        if fault.endswith("hang"):
            runs.wait_for(lambda: newest in checkpoint_steps(workdir), process)
            runs.kill(process)
        assert process.wait(timeout=SECONDS) == -9
    assert "rollback 1 of" in runs.said(workdir), "it was killed too early"
    assert checkpoint_steps(workdir)[-1] == newest
    again = lab.train(workdir, *REAL, f"data.path={spiky_data}")
    assert ("rollback 1 of" in again.stdout) == (newest == 80)
    assert_equal(workdir, rolled, tiny_run.abstract_state)


def test_g3_undone_and_final_steps_can_be_replayed(lab, rolled, tmp_path):
    module = [*lab.command(rolled)[:2], "gptjax.replay", f"--workdir={rolled}", f"--out={tmp_path}/page.html"]
    stands = lab.call([*module, "--step=91"]).stdout
    assert "replayed 10 steps from the checkpoint of step 80" in stands
    assert "batch 101 of the data, after 1 rollback(s)" in stands
    assert "equal to metrics.jsonl, bit for bit" in stands
    undone = lab.call([*module, "--step=91", "--rollbacks=0"]).stdout
    assert "replayed 10 steps from the checkpoint of step 80" in undone
    assert "batch 90 of the data\n" in undone
    assert "metrics.jsonl has this step after 1 rollback(s): not compared" in undone
    [part] = history_of(rolled, 100)["skipped_ranges"]
    norm = re.fullmatch(r"gradient norm (\S+) is more than 6 sigma .*", part["why"])[1]
    assert f"grad_norm {norm} " in undone, "the spike itself"
    later = lab.call([*module, "--step=99", "--rollbacks=0"]).stdout
    assert "replayed 18 steps from the checkpoint of step 80" in later


def test_g3_two_processes_roll_back_identically(lab, rolled, spiky_data, tmp_path):
    workdir = tmp_path / "two"
    with group(lab, workdir, 2, *REAL, "train.num_steps=100", "train.eval_every=0", f"data.path={spiky_data}") as made:
        codes = [process.wait(timeout=300) for process in made.processes.values()]
        assert codes == [0, 0], made.said(0) + made.said(1)
        assert all("rollback 1 of at most 3" in made.said(number) for number in range(2))
    found, expected = losses(workdir), losses(rolled)
    assert list(found) == list(range(1, 101))
    assert float.fromhex(found[100]) == pytest.approx(float.fromhex(expected[100]), rel=1e-4)
    assert ranges_of(workdir, 100) == [(1, 80, 11, 91)]


def test_goodput_is_logged_and_counts_lost_work(lab, rolled, spiky_data, tmp_path):
    """Of the rolled back run, and of one that is killed and started again."""
    row = rows(rolled)[-2]
    assert row["step"] == 120
    assert row["seconds/lost"] > 0
    assert row["seconds/rollback"] > 0
    assert 0 < row["goodput"] < 1
    assert event_steps(rolled, "time/goodput") == list(range(20, 121, 20))
    workdir = copy_until(rolled, tmp_path / "run", 40)
    with lab.start(workdir, *REAL, f"data.path={spiky_data}", GPTJAX_FAULT="step:15:kill") as process:
        assert process.wait(timeout=SECONDS) == -9
    again = lab.train(workdir, *REAL, f"data.path={spiky_data}")
    said = again.stdout.splitlines()
    at = next(number for number, line in enumerate(said) if line.startswith("goodput "))
    kinds = {line[:13].strip(): line for line in said[at + 1 :]}
    assert {"start", "restart", "compile", "down", "rollback"} <= kinds.keys()
    history = history_of(workdir, 120)
    assert min(history["seconds"][kind] for kind in ("lost", "step", "data_wait", "checkpoint", "evaluation")) > 0
    assert history["started_at"] + sum(history["seconds"].values()) == pytest.approx(history["saved_at"], abs=0.5)
    assert History().to_json().keys() <= history.keys()
