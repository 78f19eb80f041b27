"""O4: a checkpoint of another run is known by its run's id, and refused unless it is asked for."""

import json
import pathlib
import shutil

import pytest

from gptjax import config
from gptjax.checkpoint import Checkpointer
from gptjax.convert import native
from gptjax.errors import CheckpointError, ConfigError, DataError
from gptjax.identity import RUN_ID, Identity, read_identity
from gptjax.record import Record, seal, unseal
from gptjax.replay.update import read_records
from gptjax.stored import load_params
from tests import runs
from tests.helpers import failing, raises

pytestmark = pytest.mark.faults
OTHER = "f" * 32


def records(workdir: pathlib.Path) -> dict[int, Record]:
    checkpointer = Checkpointer(str(workdir))
    return {step: checkpointer.read_record(step) for step in checkpointer.steps()}


def edit_history(workdir: pathlib.Path, step: int, **changes: object) -> None:
    """Changes the history in a checkpoint's record; None removes a key."""
    path = workdir / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    values = unseal(content["custom_metadata"])
    history = {name: value for name, value in (values["history"] | changes).items() if value is not None}
    path.write_text(json.dumps(content | {"custom_metadata": seal(Record(**values | {"history": history}))}))


def edit_config(workdir: pathlib.Path, **changes: object) -> None:
    path = workdir / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


@pytest.fixture
def foreign(reference, tmp_path):
    """A copy of a run in which the newest checkpoint, of step 8, is another run's."""
    workdir = runs.copy_until(reference, tmp_path / "a", 8)
    edit_history(workdir, 8, run_id=OTHER)
    return workdir


def test_o4_each_run_has_its_own_id_kept_by_copies(train_here, reference, tmp_path, said):
    short = {"train": {"num_steps": 4}}
    train_here(tmp_path / "a", **short)
    train_here(tmp_path / "b", **short)
    ids = [read_identity(str(workdir)).run_id for workdir in (tmp_path / "a", tmp_path / "b")]
    assert all(RUN_ID.fullmatch(found) for found in ids)
    assert ids[0] != ids[1]
    assert [record.history["run_id"] for record in records(tmp_path / "a").values()] == ids[:1]
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    train_here(tmp_path / "copy", train={"num_steps": 8})
    assert {record.history["run_id"] for record in records(tmp_path / "copy").values()} == {ids[0]}
    assert read_identity(str(tmp_path / "copy")) == Identity(ids[0])
    assert runs.losses(tmp_path / "copy") == {step: loss for step, loss in runs.losses(reference).items() if step <= 8}
    assert not [line for line in said if "run id" in line or "is of run" in line]
    # The config.json of a run is a config file. The id is no setting in it.
    assert config.load(str(tmp_path / "copy" / "config.json"), {}).train.num_steps == 8


def test_o4_foreign_checkpoint_is_refused_unless_allowed(foreign, train_here, reference, said):
    own = read_identity(str(foreign)).run_id
    before = (foreign / "config.json").read_bytes()
    allow = "--config.checkpoint.allow_foreign=True"
    with raises(ConfigError, f"{foreign}/checkpoints/8", remedy=allow, match=f"run {OTHER}, .* run {own}\n") as caught:
        train_here(foreign)
    assert runs.checkpoint_steps(foreign) == [4, 8], "nothing is renamed"
    assert (foreign / "config.json").read_bytes() == before
    assert train_here(foreign, checkpoint={"allow_foreign": True, "keep": 8}) == 0
    assert f"note: {caught.value.errors[0]}" in said
    found = {step: record.history["run_id"] for step, record in records(foreign).items()}
    assert found == {4: own, 8: OTHER, 12: own, 16: own}
    assert runs.losses(foreign) == runs.losses(reference)
    assert train_here(foreign, train={"num_steps": 20}) == 0, "from then on it is asked no more"


def test_o4_readers_accept_a_foreign_checkpoint_by_explicit_step(foreign, said):
    step, own = f"{foreign}/checkpoints/8", read_identity(str(foreign)).run_id
    for kind, remedy, read in ((CheckpointError, "--step=8", load_params), (DataError, f"{foreign}@8", native.read)):
        with raises(kind, step, remedy=remedy, match=f"run {OTHER}, .* run {own}"):
            read(str(foreign))
    assert load_params(str(foreign), step=8)[2] == 8
    assert native.read(f"{foreign}@8").origin == f"gptjax:{foreign}@8"
    assert list(read_records(Checkpointer(str(foreign)), read_identity(str(foreign)))) == [4]
    assert [line for line in said if line.startswith(f"{step}: ")]
    shutil.rmtree(foreign / "checkpoints" / "8")
    assert load_params(str(foreign))[2] == 4


def test_o4_checkpoints_without_an_id_are_adopted_once(train_here, reference, tmp_path, said):
    """As an earlier version left them; another one without an id, that comes later, is another run's."""
    workdir = runs.copy_until(reference, tmp_path / "a", 8)
    for step in (4, 8):
        edit_history(workdir, step, run_id=None)
    edit_config(workdir, run_id=None)
    assert train_here(workdir, train={"num_steps": 12}, checkpoint={"keep": 8}) == 0
    found = read_identity(str(workdir))
    assert found.adopted_steps == (4, 8)
    (told,) = [line for line in said if "no run id yet" in line]
    assert told.endswith(f" {found.run_id} (steps 4, 8)")
    assert records(workdir)[12].history["run_id"] == found.run_id
    shutil.rmtree(workdir / "checkpoints" / "12")  # as if it had been killed before that save
    assert train_here(workdir, checkpoint={"keep": 8}) == 0
    assert len([line for line in said if "no run id yet" in line]) == 1
    assert read_identity(str(workdir)) == found
    assert runs.losses(workdir) == runs.losses(reference)
    edit_history(workdir, 16, run_id=None)
    with raises(ConfigError, f"{workdir}/checkpoints/16", remedy=" --config.checkpoint", match=f"run {found.run_id}\n"):
        train_here(workdir, train={"num_steps": 20})


@pytest.mark.parametrize("content", [None, "{", "[]", '{"run_id": 7}', '{"run_id": "../x"}'])
def test_o4_missing_run_id_is_taken_from_the_newest_checkpoint(content, reference, train_here, tmp_path, said):
    workdir = runs.copy_until(reference, tmp_path / "a", 4)
    own = read_identity(str(workdir)).run_id
    (workdir / "config.json").unlink()
    if content is not None:
        (workdir / "config.json").write_text(content)
    assert train_here(workdir, train={"num_steps": 8}) == 0
    assert read_identity(str(workdir)).run_id == own
    assert {record.history["run_id"] for record in records(workdir).values()} == {own}
    assert not [line for line in said if "no run id" in line]


def test_o4_unreadable_bucket_is_reported(said, monkeypatch):
    monkeypatch.setattr("gptjax.workdir.epath.Path", failing(RuntimeError("the bucket is away")))
    assert read_identity("gs://bucket/run") == Identity()
    (line,) = said
    assert line.startswith("gs://bucket/run/config.json: ")
    assert line.endswith(": the bucket is away")


@pytest.mark.parametrize("steps", [None, 3, ["4", True, None, 5.0]])
def test_o4_invalid_adopted_steps_are_ignored(steps, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"run_id": OTHER, "adopted_steps": steps}))
    assert read_identity(str(tmp_path)) == Identity(OTHER)
