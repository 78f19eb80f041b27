"""M1: what eight devices saved goes on, to the bit and then to 1e-5, on any other mesh."""

import shutil

import numpy as np
import pytest

from gptjax import train as train_module
from gptjax.checkpoint import Checkpointer, fingerprints
from tests.helpers import sweep
from tests.runs import copy_until, make_once, make_run_on, rows, state_bytes

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("quick_compiler")]

MESHES = {
    "4 devices": (4, {"data": 1, "fsdp": 4, "tensor": 1}),
    "1 device": (1, {"data": 1, "fsdp": 1, "tensor": 1}),
    "data parallel": (8, {"data": 8, "fsdp": 1, "tensor": 1}),
    "2x2x2": (8, {"data": 2, "fsdp": 2, "tensor": 2}),
}
FSDP = {"data": 1, "fsdp": 8, "tensor": 1}


def train_on(lab, monkeypatch, workdir, devices, mesh, **checkpoint):
    """Trains 24 steps, one micro-batch an update, so that dropout is the same on every mesh; returns the Run."""
    made = []

    def make_run(config, **_):
        made.append(make_run_on(config, devices))
        return made[-1]

    monkeypatch.setattr(train_module, "make_run", make_run)
    assert train_module.train(make_config(lab, mesh, **checkpoint), str(workdir)) == 0
    (run,) = made
    return run


def make_config(lab, mesh, **checkpoint):
    train = {"num_steps": 24, "micro_batch_size": 0, "eval_every": 0, "eval_batches": 1}
    model = {"activation": "gelu"}
    return lab.config(mesh=mesh, model=model, train=train, checkpoint={"save_every": 24} | checkpoint)


@pytest.fixture(scope="module")
def saved(quick_compiler, lab):
    """A run on eight devices: as it was at step 4, and whole."""

    def make(root):
        with pytest.MonkeyPatch.context() as monkeypatch:
            train_on(lab, monkeypatch, root / "whole", 8, FSDP, save_every=4, keep=9)
        copy_until(root / "whole", root / "at-4", 4)

    root = make_once(lab, "mesh", make)
    run = make_run_on(make_config(lab, FSDP), 8)
    state, record = Checkpointer(str(root / "at-4")).restore_latest(run.abstract_state)
    assert record.step == 4
    assert not state.params["wte"]["embedding"].sharding.is_fully_replicated
    return root, record, state_bytes(state)


@pytest.mark.parametrize("name", [sweep("4 devices"), sweep("1 device"), sweep("data parallel"), "2x2x2"])
def test_m1_checkpoint_restores_and_trains_alike_on_another_mesh(name, saved, lab, monkeypatch, tmp_path):
    devices, mesh = MESHES[name]
    root, record, expected = saved
    workdir = tmp_path / "run"
    shutil.copytree(root / "at-4", workdir)
    run = train_on(lab, monkeypatch, workdir, devices, mesh)
    assert dict(run.mesh.shape) == mesh
    assert run.mesh.size == devices

    shutil.rmtree(workdir / "checkpoints")
    shutil.copytree(root / "at-4" / "checkpoints", workdir / "checkpoints")
    state, again = Checkpointer(str(workdir)).restore_latest(run.abstract_state)
    assert again == record
    assert fingerprints({"params": state.params, "opt_state": state.opt_state}) == record.fingerprints
    assert state_bytes(state) == expected
    assert state.params["wte"]["embedding"].sharding == run.abstract_state.params["wte"]["embedding"].sharding

    here, there = (
        {row["step"]: row["loss"] for row in rows(directory) if "loss" in row}
        for directory in (workdir, root / "whole")
    )
    assert list(here) == list(there) == list(range(1, 25))
    assert here[5] == pytest.approx(there[5], rel=1e-6)
    np.testing.assert_allclose(list(here.values()), list(there.values()), rtol=1e-5)
    assert there[24] < there[5] - 0.05, "nothing was learnt"
