"""Fingerprints, records, the way to disk and back of every optimizer's state, and saves that fail."""

import contextlib
import dataclasses
import functools
import gc
import json
import logging
import os
import re
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax import checkpoint as checkpoint_module
from gptjax.checkpoint import (
    FORMAT,
    Checkpointer,
    Damaged,
    StoredParams,
    compare_configs,
    fingerprint_array,
    fingerprints,
    load_params,
    save_params,
    without_counters,
)
from gptjax.config import CHOICES, Config, GPTConfig, MeshConfig, OptimConfig, TrainConfig
from gptjax.errors import CheckpointError, ConfigError, DivergedError, SaveError, WorkdirError
from gptjax.model import GPT
from gptjax.optim import make_optimizer
from gptjax.sharding import make_mesh, path_name
from gptjax.state import TrainState, make_init
from tests.runs import checkpoint_steps, state_bytes, temporary_directories

pytestmark = pytest.mark.usefixtures("quick_compiler")
MODEL = GPTConfig(block_size=8, vocab_size=100, n_layer=2, n_head=2, n_embd=16, bias=False)
CONFIG = Config(model=MODEL)


def mesh_of(data=1, fsdp=1, tensor=1):
    return make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])


@functools.cache
def make_state(optimizer="adamw", data=1, fsdp=1, tensor=1):
    """Returns the abstract state and a state whose every array has values of its own."""
    mesh = mesh_of(data, fsdp, tensor)
    abstract, _ = make_init(GPT(MODEL), make_optimizer(OptimConfig(name=optimizer)), mesh=mesh, seed=0)
    rng = np.random.default_rng(0)

    def fill(leaf):
        values = rng.normal(size=leaf.shape) * 100
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return abstract, jax.tree.map(fill, abstract)


def save(checkpointer, step, state=None, **options):
    state = make_state()[1] if state is None else state
    checkpointer.save(state, step, config=CONFIG, history={"skipped_steps": 3}, data={"data.seed": 0}, **options)


def save_one(workdir, state=None, step=5):
    checkpointer = Checkpointer(str(workdir))
    save(checkpointer, step, state)
    checkpointer.close()


# Fingerprints


def fingerprint(x):
    (value,) = fingerprints({"x": x}).values()
    return tuple(value)


@pytest.mark.parametrize("spec", [P("fsdp"), P(None, "fsdp"), P(("data", "fsdp"), "tensor"), P()])
def test_fingerprints_do_not_depend_on_the_placement(spec):
    x = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    mesh = mesh_of(2, 2, 2)
    placed = jax.device_put(x, NamedSharding(mesh, spec))
    assert fingerprint(placed) == fingerprint(jnp.asarray(x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "uint8"])
def test_any_bit_flip_changes_both_sums(dtype):
    x = np.asarray(jnp.arange(60).reshape(3, 4, 5).astype(dtype))
    before, rng = fingerprint(x), np.random.default_rng(0)
    for bit in rng.choice(8 * x.nbytes, 40, replace=False).tolist():
        raw = bytearray(x.tobytes())
        raw[bit // 8] ^= 1 << bit % 8
        after = fingerprint(np.frombuffer(bytes(raw), x.dtype).reshape(x.shape))
        assert after[0] != before[0], bit
        assert after[1] != before[1], bit


def test_a_swap_of_two_elements_changes_it():
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    before = fingerprint(x)
    for i, j in [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((3, 5), (0, 0)), ((1, 2), (2, 1))]:
        y = x.copy()
        y[i], y[j] = x[j], x[i]
        assert fingerprint(y) != before
    assert fingerprint(x[::-1]) != before
    assert fingerprint(x.T.copy()) != before


def test_dtype_and_shape_count_even_where_the_bits_are_equal():
    zeros = [jnp.zeros((4, 6), dtype) for dtype in ("float32", "int32", "uint32", "bfloat16")]
    zeros += [jnp.zeros((6, 4)), jnp.zeros((24,)), jnp.zeros((4, 6, 1))]
    assert len({fingerprint(x) for x in zeros}) == len(zeros)


def test_changes_that_cancel_in_a_plain_sum():
    x = np.zeros(8, np.float32)
    y = x.copy()
    y[2], y[3] = 1.0, -1.0
    assert fingerprint(y) != fingerprint(x)
    assert fingerprint(np.float32(0.0)) != fingerprint(np.float32(-0.0))


@pytest.mark.parametrize("shape", [(1,), (7, 3), (2**16,), (3, 2**16 + 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_numpy_finds_the_same_fingerprint(shape, dtype):
    x = np.random.default_rng(0).integers(0, 2**32, shape, np.uint32).view(dtype)
    (expected,) = fingerprints({"x": jnp.asarray(x)}).values()
    assert fingerprint_array(x) == expected
    assert fingerprint_array(np.asfortranarray(x)) == expected
    changed = x.copy()
    changed.reshape(-1).view(np.uint32)[-1] ^= 1
    assert fingerprint_array(changed) != expected


def test_fingerprints_are_compiled_once():
    tree = {"a": jnp.ones(7), "b": jnp.ones((3, 11))}
    compiled = checkpoint_module._fingerprint_all._cache_size
    before = compiled()
    fingerprints(tree)
    assert compiled() == before + 1
    fingerprints({"a": jnp.zeros(7), "b": jnp.zeros((3, 11))})
    assert compiled() == before + 1


# There and back


@pytest.mark.parametrize("optimizer", CHOICES["optim.name"])
def test_round_trip_onto_other_meshes(optimizer, tmp_path):
    _, state = make_state(optimizer, fsdp=8)
    save_one(tmp_path, state)
    for sizes in ((1, 1, 1), (2, 2, 2)):
        abstract, _ = make_state(optimizer, *sizes)
        restored, record = Checkpointer(str(tmp_path)).restore_latest(abstract)
        assert int(restored.step) == record.step == 5
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert state_bytes(restored) == state_bytes(state)
        for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True):
            assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
            assert leaf.dtype == wanted.dtype


def test_a_restored_state_can_be_donated(tmp_path):
    save_one(tmp_path)
    restored, _ = Checkpointer(str(tmp_path)).restore_latest(make_state()[0])
    leaves = jax.tree.leaves(restored)
    jax.block_until_ready(jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(restored))
    assert all(leaf.is_deleted() for leaf in leaves)


def test_the_record(tmp_path):
    save_one(tmp_path)
    record = Checkpointer(str(tmp_path)).read_record(5)
    assert (record.step, record.config, record.history) == (5, CONFIG.to_dict(), {"skipped_steps": 3})
    assert record.data == {"data.seed": 0}
    state = make_state()[1]
    assert record.fingerprints == fingerprints({"params": state.params, "opt_state": state.opt_state})
    assert {"gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"} == record.versions.keys()


def edit_record(workdir, change, *, seal):
    """Rewrites the record of step 5, with a right checksum only where `seal` is true."""
    path = workdir / "checkpoints/5/_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text())
    custom = metadata["custom_metadata"]
    values = json.loads(custom["record"])
    change(values)
    custom["record"] = json.dumps(values, sort_keys=True)
    if seal:
        custom["sha256"] = checkpoint_module.hashlib.sha256(custom["record"].encode()).hexdigest()
    path.write_text(json.dumps(metadata))


def test_a_record_that_was_edited_is_refused(tmp_path):
    save_one(tmp_path)
    edit_record(tmp_path, lambda values: values["history"].update(skipped_steps=0), seal=False)
    with pytest.raises(Damaged, match=r"record unreadable \(wrong checksum\)"):
        Checkpointer(str(tmp_path)).read_record(5)


def test_a_link_is_refused(tmp_path):
    """Orbax would read the file it leads to, wherever that is."""
    save_one(tmp_path)
    directory = tmp_path / "checkpoints/5"
    (directory / "params").rename(tmp_path / "params")
    (directory / "params").symlink_to(tmp_path / "params")
    with pytest.raises(Damaged, match="'params' is a link"):
        Checkpointer(str(tmp_path)).read_record(5)


def test_a_pipe_is_refused(tmp_path):
    """Orbax would wait for ever for somebody to write into it."""
    save_one(tmp_path)
    path = tmp_path / "checkpoints/5/params/wte.embedding/zarr.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(Damaged, match=r"'zarr.json' is not a file"):
        Checkpointer(str(tmp_path)).read_record(5)


@pytest.mark.parametrize("damage", ["long", "deep"])
def test_a_hostile_record_is_refused(damage, monkeypatch, tmp_path):
    save_one(tmp_path)
    path = tmp_path / "checkpoints/5/_CHECKPOINT_METADATA"
    if damage == "deep":
        path.write_text("[" * 100_000)
    else:
        monkeypatch.setattr(checkpoint_module, "LARGEST_RECORD", path.stat().st_size - 1)
    with pytest.raises(Damaged, match="record unreadable"):
        Checkpointer(str(tmp_path)).read_record(5)


def test_a_record_that_cannot_be_read_now_is_no_damage(monkeypatch, tmp_path):
    """As on a network disk that is away for a moment: nothing is renamed."""
    save_one(tmp_path)

    def fail(directory):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint_module, "_refuse_strange_files", fail)
    with pytest.raises(CheckpointError, match="cannot be read now: Input/output error; nothing was changed"):
        Checkpointer(str(tmp_path)).restore_latest(make_state()[0])
    assert checkpoint_steps(tmp_path) == [5]


def test_what_fails_once_is_no_damage(monkeypatch, said, tmp_path):
    """Orbax makes the same error of a Ctrl-C, too many open files and a lost file."""
    save_one(tmp_path)
    original, failures = checkpoint_module.ocp.load_checkpointables, [KeyError("no entry")]

    def load(*arguments):
        if failures:
            raise failures.pop()
        return original(*arguments)

    monkeypatch.setattr(checkpoint_module.ocp, "load_checkpointables", load)
    restored, _ = Checkpointer(str(tmp_path)).restore_latest(make_state()[0])
    assert state_bytes(restored) == state_bytes(make_state()[1])
    assert checkpoint_steps(tmp_path) == [5]
    assert said == []


def test_there_must_be_room_for_one_checkpoint(monkeypatch, said, tmp_path):
    abstract = make_state()[0]
    size = sum(len(leaf) for leaf in state_bytes(make_state()[1]))
    checkpointer, usage = Checkpointer(str(tmp_path / "a"), keep=2), checkpoint_module.shutil.disk_usage("/")

    def free(amount):
        monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda path: usage._replace(free=amount))
        return checkpointer.check_room(abstract)

    line = free(10**10)
    assert re.fullmatch(r"checkpoints: [\d.e-]+ GB each, 4 of them at most; 10 GB are free", line)
    assert said == []
    with pytest.raises(WorkdirError, match=r"a checkpoint takes .* GB are free; make room") as caught:
        free(size - 1)
    assert caught.value.exit_code == 73
    free(4 * size)
    assert said == []
    free(4 * size - 1)
    assert len(said) == 1
    assert "may be needed" in said[0]
    assert not checkpointer.directory.exists(), "a run may still be refused, and leaves nothing behind"
    checkpointer.directory.mkdir()
    free(4 * size)
    assert list(checkpointer.directory.iterdir()) == [], "the probe is removed"


def test_a_newer_format_is_not_damage(tmp_path):
    save_one(tmp_path)
    edit_record(tmp_path, lambda values: values.update(format=FORMAT + 1, something_new=1), seal=True)
    with pytest.raises(CheckpointError, match="made by a newer gptjax"):
        Checkpointer(str(tmp_path)).restore_latest(make_state()[0])
    assert checkpoint_steps(tmp_path) == [5]


def test_nothing_there(tmp_path):
    assert Checkpointer(str(tmp_path)).steps() == []
    assert Checkpointer(str(tmp_path)).restore_latest(make_state()[0]) is None
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept(tmp_path):
    """The newest two, and the best by validation loss; not the highest, and not one without a validation."""
    checkpointer = Checkpointer(str(tmp_path), keep=2)
    for step, loss in ((1, 3.0), (2, 1.5), (3, None), (4, 2.0), (5, 9.0), (6, None)):
        save(checkpointer, step, metrics=None if loss is None else {"val_loss": loss})
    checkpointer.close()
    assert checkpoint_steps(tmp_path) == [2, 5, 6]
    checkpointer = Checkpointer(str(tmp_path), keep=2)  # a restart knows the best again
    save(checkpointer, 7, metrics={"val_loss": 1.6})
    save(checkpointer, 8, metrics={"val_loss": 1.4})
    checkpointer.close()
    assert checkpoint_steps(tmp_path) == [7, 8]


def test_a_save_leaves_no_objects_behind(monkeypatch, tmp_path):
    """tensorstore's counters alone, which Orbax reads, are 200 of them a save."""
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)  # pytest keeps what is said
    blocks = []
    with without_counters(), contextlib.closing(Checkpointer(str(tmp_path))) as checkpointer:
        for step in range(21):
            save(checkpointer, step)
            checkpointer.finish_save()
            if step in (10, 20):
                gc.collect()
                blocks.append(sys.getallocatedblocks())
    assert (blocks[1] - blocks[0]) / 10 < 100


def test_a_step_that_was_found_damaged_can_be_saved_again(tmp_path):
    """By the same Checkpointer, as after a rollback past it: Orbax would leave out a step that it knows."""
    abstract, state = make_state()
    with contextlib.closing(Checkpointer(str(tmp_path), keep=5)) as checkpointer:
        for step in (1, 2):
            save(checkpointer, step)
        checkpointer.finish_save()
        (tmp_path / "checkpoints" / "2" / "_CHECKPOINT_METADATA").write_text("{}")
        restored = checkpointer.restore_latest(abstract)
        assert restored is not None
        assert restored[1].step == 1
        save(checkpointer, 2)
    assert checkpoint_steps(tmp_path) == [1, 2]
    restored = Checkpointer(str(tmp_path)).restore_latest(abstract)
    assert restored is not None
    assert (restored[1].step, state_bytes(restored[0])) == (2, state_bytes(state))


# Parameters of a run


def test_load_params(tmp_path):
    _, state = make_state("adamw", fsdp=8)
    for step in (5, 6):
        save_one(tmp_path, state, step)
    config, params, step = load_params(str(tmp_path))
    assert (config, step) == (CONFIG, 6)
    expected = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state.params)]
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)] == expected
    assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(params))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7; there are: "):
        load_params(str(tmp_path), step=7)
    with pytest.raises(CheckpointError, match=r"no checkpoint; there are: none"):
        load_params(str(tmp_path / "nowhere"))


def test_load_params_falls_back_and_leaves_the_directory_alone(said, tmp_path):
    checkpointer = Checkpointer(str(tmp_path), keep=2)
    for step in (5, 6):
        save(checkpointer, step)
    checkpointer.close()
    (tmp_path / "checkpoints/6/_CHECKPOINT_METADATA").write_text("{")
    assert load_params(str(tmp_path))[2] == 5
    (line,) = said
    assert line.startswith(f"checkpoint {tmp_path}/checkpoints/6 refused: record unreadable")
    with pytest.raises(CheckpointError, match="step 6: record unreadable"):
        load_params(str(tmp_path), step=6)
    assert checkpoint_steps(tmp_path) == [5, 6]


# Saves that fail


def failing_writes(monkeypatch, times, *, after=False):
    """Makes the next background writes fail, as a full disk does; with `after`, when all is on disk."""
    original, left = checkpoint_module.ocp.training.Checkpointer.save_checkpointables_async, [times]
    monkeypatch.setattr(checkpoint_module, "RETRY_SECONDS", 0.01)

    class Failing:
        def __init__(self, response, directory):
            self.response, self.directory = response, directory

        def result(self, timeout=None):
            self.response.result(timeout)
            if not after:
                self.directory.rename(self.directory.with_name(f"{self.directory.name}.orbax-checkpoint-tmp"))
            raise OSError(28, "No space left on device")

    def save_async(self, step, *args, **kwargs):
        response = original(self, step, *args, **kwargs)
        if left[0] <= 0:
            return response
        left[0] -= 1
        return Failing(response, self.directory / str(step))

    monkeypatch.setattr(checkpoint_module.ocp.training.Checkpointer, "save_checkpointables_async", save_async)


@pytest.mark.parametrize("end", [Checkpointer.wait, Checkpointer.close])
def test_the_last_save_is_tried_again(end, monkeypatch, said, tmp_path):
    failing_writes(monkeypatch, 2)
    checkpointer = Checkpointer(str(tmp_path))
    save(checkpointer, 5)
    end(checkpointer)
    assert [line.split(":")[0] for line in said] == ["save failed, training goes on"] * 2
    checkpointer.close()
    assert checkpoint_steps(tmp_path) == [5]
    assert temporary_directories(tmp_path) == []
    assert state_bytes(Checkpointer(str(tmp_path)).restore_latest(make_state()[0])[0]) == state_bytes(make_state()[1])


@pytest.mark.parametrize("end", [Checkpointer.wait, Checkpointer.close])
def test_a_last_save_that_keeps_failing_is_reported(end, monkeypatch, tmp_path):
    failing_writes(monkeypatch, 3)
    checkpointer = Checkpointer(str(tmp_path))
    save(checkpointer, 5)
    with pytest.raises(SaveError, match=r"3 saves failed: .*No space left on device") as caught:
        end(checkpointer)
    assert caught.value.exit_code == 74
    checkpointer.close()
    assert checkpoint_steps(tmp_path) == []
    assert temporary_directories(tmp_path) == []


def test_a_last_save_whose_state_is_gone_is_reported(monkeypatch, tmp_path):
    failing_writes(monkeypatch, 1)
    checkpointer = Checkpointer(str(tmp_path))
    state = jax.tree.map(lambda leaf: leaf + jnp.zeros((), leaf.dtype), make_state()[1])
    save(checkpointer, 5, state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    with pytest.raises(SaveError, match="1 saves failed"):
        checkpointer.wait()


def test_what_fails_after_a_save_does_not_undo_it(monkeypatch, tmp_path):
    failing_writes(monkeypatch, 1, after=True)
    checkpointer = Checkpointer(str(tmp_path))
    save(checkpointer, 5)
    checkpointer.close()
    assert checkpoint_steps(tmp_path) == [5]


def test_training_goes_on_after_a_failed_save(monkeypatch, said, tmp_path):
    checkpointer = Checkpointer(str(tmp_path), keep=2)
    save(checkpointer, 4)
    failing_writes(monkeypatch, 2)
    for step in (5, 6, 7, 8):
        save(checkpointer, step)
    checkpointer.close()
    assert [line.split(":")[0] for line in said] == ["save failed, training goes on"] * 2
    assert checkpoint_steps(tmp_path) == [7, 8]
    assert temporary_directories(tmp_path) == []


def test_three_failed_saves_end_the_run(monkeypatch, said, tmp_path):
    checkpointer = Checkpointer(str(tmp_path), keep=5)
    save(checkpointer, 4)
    failing_writes(monkeypatch, 3)
    for step in (5, 6, 7):
        save(checkpointer, step)
    with pytest.raises(SaveError, match="3 saves failed"):
        save(checkpointer, 8)
    checkpointer.close()
    assert 4 in checkpoint_steps(tmp_path)


def test_a_save_that_orbax_leaves_out_has_failed(tmp_path):
    """Orbax answers a step that is not above the newest with None, and no word."""
    checkpointer = Checkpointer(str(tmp_path))
    save(checkpointer, 5)
    with pytest.raises(SaveError, match="a checkpoint after step 3 is there already"):
        save(checkpointer, 3)
    checkpointer.close()
    assert checkpoint_steps(tmp_path) == [5]


@pytest.mark.parametrize("where", ["params", "opt_state"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_never_saved(where, value, tmp_path):
    state = make_state()[1]
    tree = getattr(state, where)
    leaves, structure = jax.tree.flatten(tree)
    index = max(range(len(leaves)), key=lambda i: leaves[i].size)
    leaves[index] = leaves[index].at[(0,) * leaves[index].ndim].set(value)
    broken = dataclasses.replace(state, **{where: jax.tree.unflatten(structure, leaves)})
    checkpointer = Checkpointer(str(tmp_path))
    with pytest.raises(DivergedError, match=rf"^step 5: {where}/.* is not finite: not saved"):
        save(checkpointer, 5, broken)
    checkpointer.close()
    assert checkpoint_steps(tmp_path) == []


# Parameters alone


def params_alone():
    return jax.tree.map(np.asarray, make_state()[1].params)


def leaves_alone():
    return ((path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(params_alone()))


def test_parameters_alone_are_a_checkpoint_of_step_0(tmp_path):
    save_params(str(tmp_path), leaves_alone(), config=CONFIG, history={"imported": {"from": "hf:x"}})
    config, params, step = load_params(str(tmp_path))
    assert (config, step) == (CONFIG, 0)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.tobytes() == np.asarray(b).tobytes(), params_alone(), params))
    assert Checkpointer(str(tmp_path)).read_record(0).history == {"imported": {"from": "hf:x"}}
    assert temporary_directories(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_of_parameters_that_come_one_at_a_time_one_is_in_memory(tmp_path):
    """Each of them takes 32 MB, and is made when it is asked for."""
    tracemalloc.start()
    try:
        leaves = ((f"h/{n}/kernel", np.full((8, 2**20), n, np.float32)) for n in range(8))
        save_params(str(tmp_path), leaves, config=CONFIG, history={})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * 2**25
    stored = StoredParams(str(tmp_path), 0)
    assert (stored.read("h/7/kernel", (8, 2**20)) == 7).all()


def test_a_failure_leaves_no_leaves(tmp_path):
    def fail():
        yield "wpe/embedding", np.zeros((8, 16), np.float32)
        raise KeyError("x")

    with pytest.raises(KeyError):
        save_params(str(tmp_path), fail(), config=CONFIG, history={})
    assert list(tmp_path.iterdir()) == []


def test_a_run_does_not_go_on_from_parameters_alone(tmp_path):
    save_params(str(tmp_path), leaves_alone(), config=CONFIG, history={})
    with pytest.raises(ConfigError, match=f"--config.init_from=gptjax:{tmp_path}"):
        Checkpointer(str(tmp_path)).restore_latest(make_state()[0])
    assert checkpoint_steps(tmp_path) == [0]


def test_parameters_of_a_run_are_read_one_at_a_time(tmp_path):
    save_one(tmp_path)
    stored = StoredParams(str(tmp_path), 5)
    leaf = stored.read("h/mlp/c_fc/kernel", (2, 16, 64))
    assert type(leaf) is np.ndarray
    assert leaf.tobytes() == np.asarray(make_state()[1].params["h"]["mlp"]["c_fc"]["kernel"]).tobytes()
    with pytest.raises(Damaged, match="ln_f/bias"):
        stored.read("ln_f/bias", (16,))
    record = stored.record.fingerprints
    record["params/wte/embedding"], record["params/wpe/embedding"] = [1, 2], record["params/wte/embedding"]
    with pytest.raises(Damaged, match="wpe/embedding is not what was saved"):
        stored.read("wpe/embedding", (8, 16))


# Configs


def test_compare_configs(said):
    old = CONFIG.to_dict()
    compare_configs(old, CONFIG)
    assert said == []
    compare_configs(old, dataclasses.replace(CONFIG, train=TrainConfig(num_steps=7, nan_policy="skip")))
    assert [re.sub(r"from .*", "", line) for line in said] == [
        "note: train.num_steps changed ",
        "note: train.nan_policy changed ",
    ]
    with pytest.raises(ConfigError) as caught:
        compare_configs(old, dataclasses.replace(CONFIG, model=GPTConfig(block_size=8, vocab_size=100)))
    assert len(str(caught.value).splitlines()) == 4, "n_layer, n_head, n_embd and bias, a line each"
    assert isinstance(make_state()[1], TrainState)
