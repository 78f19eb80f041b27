"""C1 to C4: a damaged checkpoint is never loaded silently, and never ends in a silent fresh start."""

import dataclasses
import errno
import functools
import os
import random
import shutil

import jax
import jax.numpy as jnp
import pytest

from gptjax.checkpoint import Checkpointer
from gptjax.config import Config, GPTConfig, MeshConfig, OptimConfig
from gptjax.errors import CheckpointError, ConfigError, WorkdirError
from gptjax.model import GPT
from gptjax.optim import make_optimizer
from gptjax.sharding import make_mesh
from gptjax.state import make_init
from tests.helpers import failing, os_error, raises, snapshot
from tests.runs import checkpoint_steps, state_bytes, temporary_directories

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("quick_compiler")]
MODEL = GPTConfig(block_size=8, vocab_size=100, n_layer=1, n_head=1, n_embd=16)


@functools.cache
def states():
    """Returns the abstract state and the states of the steps 1 and 2, which differ in every array.

    Of a model's arrays they have some, as all have the same files.
    """
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    abstract, init = make_init(GPT(MODEL), make_optimizer(OptimConfig(name="lion")), mesh=mesh, seed=0)
    abstract, first = (some_arrays(state) for state in (abstract, init()))
    second = jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), first)
    return abstract, {1: first, 2: second}


def some_arrays(state):
    params, count = state.params, jax.tree.leaves(state.opt_state)[0]
    some = {"h": {"mlp": {"c_fc": params["h"]["mlp"]["c_fc"]}}, "wte": params["wte"], "ln_f": params["ln_f"]}
    return dataclasses.replace(state, params=some, opt_state=[count, {"mu": dict(some)}])


@pytest.fixture(scope="module", autouse=True)
def some_are_a_model():
    """Has checkpoints take a part of a model's parameters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptjax.checkpoint.check_params", lambda params, config: None)
        yield


def write_checkpoints(workdir, steps=(1, 2)):
    checkpointer = Checkpointer(str(workdir), keep=2)
    for step in steps:
        checkpointer.save(states()[1][step], step, config=Config(), history={"n": step}, data={}, metrics=None)
    checkpointer.close()


@pytest.fixture(scope="module")
def healthy(quick_compiler, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("healthy")
    write_checkpoints(workdir)
    return workdir


@pytest.fixture
def workdir(healthy, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(healthy, tmp_path / "run")


def files_of(workdir, step=2):
    return sorted(path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file())


def restore(workdir):
    """Returns the step that restore_latest gives, whose bits must be those that were saved."""
    abstract, saved = states()
    state, record = Checkpointer(str(workdir)).restore_latest(abstract)
    assert int(state.step) == record.step
    assert record.history == {"n": record.step}
    assert state_bytes(state) == state_bytes(saved[record.step]), "wrong bits"
    return record.step


def assert_falls_back_or_loads_equal_bits(workdir, said, what):
    """Returns whether the damage was noticed."""
    del said[:]
    step = restore(workdir)
    if step == 2:
        assert said == [], what
        return False
    (line,) = said
    assert f"{workdir}/checkpoints/2 " in line, what
    assert checkpoint_steps(workdir) == [1]
    (renamed,) = (workdir / "checkpoints").glob("2.corrupt-*")
    assert line.endswith(f" {renamed.name}")
    return True


def zero_4_kib(data):
    start = max(0, len(data) // 2 - 2048)
    return data[:start] + bytes(min(4096, len(data) - start)) + data[start + 4096 :]


DAMAGES = {
    "deleted": None,
    "emptied": lambda data: b"",
    "halved": lambda data: data[: len(data) // 2],
    "zeroed": zero_4_kib,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_c1_damage_in_any_file_falls_back_or_is_harmless(damage, healthy, said, tmp_path):
    change, noticed = DAMAGES[damage], {}
    names = [path.relative_to(healthy) for path in files_of(healthy)]
    for number, name in enumerate(names):
        workdir = tmp_path / str(number)
        shutil.copytree(healthy, workdir)
        data = (workdir / name).read_bytes()
        (workdir / name).unlink() if change is None else (workdir / name).write_bytes(change(data))
        noticed[str(name)] = assert_falls_back_or_loads_equal_bits(workdir, said, f"{damage} {name}")
        shutil.rmtree(workdir)
    arrays = [name for name in noticed if "/c/" in name]
    assert len(arrays) == sum(leaf.ndim > 0 for leaf in jax.tree.leaves(states()[0])), "each has a file of its own"
    assert all(noticed[name] for name in arrays), "damaged arrays went unnoticed"
    assert noticed["checkpoints/2/_CHECKPOINT_METADATA"]


def flip_a_bit(workdir, chance, *, anywhere):
    """Flips one bit: of all bytes, or of a file that is chosen first, so that the small ones get their share."""
    files = [path for path in files_of(workdir) if path.stat().st_size]
    sizes = [path.stat().st_size for path in files]
    path = chance.choices(files, sizes)[0] if anywhere else chance.choice(files)
    data = bytearray(path.read_bytes())
    bit = chance.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return f"bit {bit} of {path.relative_to(workdir)}"


def test_c2_random_bit_flips_never_load_wrong_bits(healthy, said, tmp_path):
    chance, noticed = random.Random(2), 0
    for number in range(30):
        workdir = tmp_path / str(number)
        shutil.copytree(healthy, workdir)
        what = flip_a_bit(workdir, chance, anywhere=bool(number % 2))
        noticed += assert_falls_back_or_loads_equal_bits(workdir, said, what)
        shutil.rmtree(workdir)
    assert noticed >= 8, f"only {noticed} of 30 flips were noticed: they hardly hit anything"


def flip_a_bit_of_an_array(workdir, step):
    """Damages the largest data file, in its second half: far from every index."""
    path = max((p for p in files_of(workdir, step) if "/c/" in str(p)), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(data)


def test_c3_resume_fails_if_every_checkpoint_is_damaged(workdir, said):
    for step in (1, 2):
        flip_a_bit_of_an_array(workdir, step)
    for named in ("step {}: ", "{}.corrupt-"):
        with raises(CheckpointError, f"{workdir}/checkpoints", remedy="choose another --workdir") as caught:
            Checkpointer(str(workdir)).restore_latest(states()[0])
        assert [caught.value.problem.count(named.format(step)) for step in (1, 2)] == [1, 1]
    assert len(said) == 2


def test_c3_command_exits_65_if_every_checkpoint_is_damaged(lab, reference, tmp_path):
    workdir = shutil.copytree(reference, tmp_path / "run")
    steps = checkpoint_steps(workdir)
    for step in steps:
        flip_a_bit_of_an_array(workdir, step)
    for _ in range(2):
        line = lab.refusal(workdir, expect=65)
        assert all(f"step {step}: " in line or f"{step}.corrupt-" in line for step in steps)
    metrics = (workdir / "metrics.jsonl").read_bytes()
    assert metrics == (reference / "metrics.jsonl").read_bytes(), "a run that cannot start leaves the logs alone"


def test_c4_foreign_files_beside_checkpoints_are_ignored(workdir, said):
    directory = workdir / "checkpoints"
    (directory / "9").mkdir()
    (directory / "notes.txt").write_text("mine")
    (directory / "7").write_text("a file with a number for a name")
    shutil.copytree(directory / "2", directory / "8.orbax-checkpoint-tmp")
    assert restore(workdir) == 2
    assert [line.split()[1] for line in said] == [f"{directory}/{n}" for n in (9, 7)]
    checkpointer = Checkpointer(str(workdir), keep=2)
    state = dataclasses.replace(states()[1][2], step=jnp.asarray(3))
    checkpointer.save(state, 3, config=Config(), history={"n": 3}, data={})
    checkpointer.close()
    assert temporary_directories(workdir) == []
    assert checkpoint_steps(workdir) == [2, 3]
    assert (directory / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", ["an empty record", "an empty directory"])
@pytest.mark.parametrize("number", [errno.EPERM, errno.EROFS])
def test_c4_damaged_step_that_cannot_be_renamed_ends_the_run(damage, number, workdir, said, monkeypatch):
    step = 9 if damage == "an empty directory" else 2
    if step == 9:
        (workdir / "checkpoints" / "9").mkdir()
    else:
        (workdir / "checkpoints" / "2" / "_CHECKPOINT_METADATA").write_text("")
    before = snapshot(workdir)
    checkpointer = Checkpointer(str(workdir))
    monkeypatch.setattr(type(checkpointer.directory), "rename", failing(os_error(number)))
    problem = f"damaged .record unreadable .* and cannot be renamed: {os.strerror(number)}; nothing was changed"
    with raises(WorkdirError, f"{workdir}/checkpoints/{step}", remedy="rename it", match=problem):
        checkpointer.restore_latest(states()[0])
    assert said == []
    assert snapshot(workdir) == before


def test_c4_step_that_another_process_has_renamed_is_left_out(workdir, monkeypatch):
    (workdir / "checkpoints" / "2" / "_CHECKPOINT_METADATA").write_text("")
    rename = type(Checkpointer(str(workdir)).directory).rename

    def rename_twice(path, target):
        rename(path, target)
        return rename(path, f"{target}-again")

    monkeypatch.setattr(type(Checkpointer(str(workdir)).directory), "rename", rename_twice)
    assert restore(workdir) == 1


def test_c4_empty_step_directory_alone_prevents_a_fresh_start(tmp_path):
    (tmp_path / "checkpoints" / "9").mkdir(parents=True)
    with raises(CheckpointError, f"{tmp_path}/checkpoints", remedy="another --workdir", match="step 9: "):
        Checkpointer(str(tmp_path)).restore_latest(states()[0])


def test_c1_step_damaged_twice_is_renamed_twice(workdir, said):
    """The second time its new name is taken."""
    for _ in range(2):
        flip_a_bit_of_an_array(workdir, 2)
        assert restore(workdir) == 1
        write_checkpoints(workdir, steps=(2,))
    assert restore(workdir) == 2
    assert len(list((workdir / "checkpoints").glob("2.corrupt-*"))) == 2


def test_c1_swapped_checkpoint_files_are_detected(workdir, said):
    """Whole files, each intact, but of another step: only the record's step or the fingerprints can tell."""
    directory = workdir / "checkpoints"
    shutil.rmtree(directory / "2" / "params")
    shutil.copytree(directory / "1" / "params", directory / "2" / "params")
    assert restore(workdir) == 1
    assert "params/" in said[0]
    shutil.copytree(directory / "1", directory / "5")
    del said[:]
    assert restore(workdir) == 1
    assert "/5 " in said[0]
    assert "of step 1" in said[0]


def test_b2_refused_check_leaves_the_checkpoints_unchanged(workdir):
    refuse = failing(ConfigError(field="refused", value=2))
    with raises(ConfigError, "refused", value=2):
        Checkpointer(str(workdir)).restore_latest(states()[0], check=refuse)
    assert checkpoint_steps(workdir) == [1, 2]
