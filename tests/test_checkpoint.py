"""Fingerprints, records, the way to disk and back of every optimizer's state, and saves that fail."""

import contextlib
import dataclasses
import errno
import functools
import gc
import hashlib
import json
import logging
import os
import pwd
import re
import shutil
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from orbax.checkpoint import v1 as ocp

from gptjax import checkpoint as checkpoint_module
from gptjax import record as record_module
from gptjax.checkpoint import Checkpointer
from gptjax.config import CHOICES, Config, GPTConfig, OptimConfig
from gptjax.convert.native import save_leaves
from gptjax.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    SaveError,
    UnavailableError,
    UnreadableError,
    WorkdirError,
)
from gptjax.fingerprint import fingerprints
from gptjax.model import GPT
from gptjax.optim import make_optimizer
from gptjax.orbax_context import suppress_tensorstore_metrics
from gptjax.record import FORMAT, CorruptCheckpointError
from gptjax.sharding import path_name
from gptjax.state import make_init
from gptjax.stored import StoredParams, load_params
from tests.helpers import failing, mesh_of, os_error, raises
from tests.runs import checkpoint_steps, leaf_bytes, state_bytes, temporary_directories

pytestmark = pytest.mark.usefixtures("quick_compiler")
MODEL = GPTConfig(block_size=8, vocab_size=100, n_layer=2, n_head=2, n_embd=16, bias=False)
CONFIG = Config(model=MODEL)


@pytest.mark.faults
def test_l2_disk_space_check_does_not_follow_links(tmp_path):
    outside, checkpoints = tmp_path / "outside", tmp_path / "run" / "checkpoints"
    outside.write_text("do not touch")
    checkpoints.mkdir(parents=True)
    (checkpoints / f".probe-{os.getpid()}").symlink_to(outside)  # a name that can be guessed
    Checkpointer(str(tmp_path / "run")).check_disk_space(make_state()[0])
    assert outside.read_text() == "do not touch"
    assert len(list(checkpoints.iterdir())) == 1


@pytest.mark.faults
@pytest.mark.parametrize("number", [0, 1])
def test_p5_unreadable_arrays_in_one_process_end_the_restore(number, tmp_path, monkeypatch):
    """The others wait for it in Orbax, so it cannot take the step before. It leaves, and the next start takes that."""
    save_steps(tmp_path, 1, 2, keep=2)
    reads = []

    def read(path, abstract):
        reads.append(path.name)
        raise ValueError("NOT_FOUND: Chunk is missing")

    checkpointer = Checkpointer(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(ocp, "load_checkpointables", read)
        patch.setattr(jax, "process_count", lambda: 2)
        patch.setattr(jax, "process_index", lambda: number)
        where = f"{checkpointer.directory}/2"
        with raises(UnavailableError, where, remedy="on every host", match=f"process {number}"):
            checkpointer.restore_latest(make_state()[0])
    assert reads == ["2"], "once: the others would not read it again with this one"
    assert sorted(path.name.partition("-")[0] for path in checkpointer.directory.iterdir()) == ["1", "2.corrupt"]
    _, record = restore(tmp_path)
    assert record.step == 1


@pytest.mark.faults
def test_d5_save_is_synced_before_its_rename(tmp_path, monkeypatch):
    """Else a power failure could leave neither. The directory it is moved in, and the one above, are synced, too."""
    events, fsync, rename = [], os.fsync, os.rename

    def record_sync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        fsync(descriptor)
        events.append(("sync", path, sorted(os.listdir(tmp_path / "run" / "checkpoints"))))

    def record_rename(old, new, **options):
        inside = [os.path.join(place, name) for place, _, names in os.walk(old) for name in [".", *names]]
        events.append(("rename", str(new), {os.path.normpath(path) for path in inside}))
        rename(old, new, **options)

    with contextlib.closing(Checkpointer(str(tmp_path / "run"))) as checkpointer:
        save(checkpointer, 1)
        checkpointer.wait_for_pending_save()
        monkeypatch.setattr(os, "fsync", record_sync)
        monkeypatch.setattr(os, "rename", record_rename)
        save(checkpointer, 2)
    at = next(i for i, (what, path, _) in enumerate(events) if what == "rename" and path.endswith("/checkpoints/2"))
    synced = {path for what, path, _ in events[:at] if what == "sync"}
    assert len(events[at][2]) > 50
    assert events[at][2] <= synced
    above = [str(tmp_path / "run" / "checkpoints"), str(tmp_path / "run"), str(tmp_path)]
    assert [(path, there) for _, path, there in events[at + 1 : at + 4]] == [(path, ["1", "2"]) for path in above]
    assert checkpoint_steps(tmp_path / "run") == [2]


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


def save_steps(workdir, *steps, state=None, keep=1):
    with contextlib.closing(Checkpointer(str(workdir), keep=keep)) as checkpointer:
        for step in steps or (5,):
            save(checkpointer, step, state)


def restore(workdir, *optimizer):
    """Returns (state, record) of the newest checkpoint."""
    return Checkpointer(str(workdir)).restore_latest(make_state(*optimizer)[0])


# There and back


@pytest.mark.parametrize("optimizer", CHOICES["optim.name"])
def test_state_round_trips_onto_other_meshes(optimizer, tmp_path):
    _, state = make_state(optimizer, fsdp=8)
    save_steps(tmp_path, state=state)
    for sizes in ((1, 1, 1), (2, 2, 2)):
        abstract, _ = make_state(optimizer, *sizes)
        restored, record = restore(tmp_path, optimizer, *sizes)
        assert int(restored.step) == record.step == 5
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert state_bytes(restored) == state_bytes(state)
        for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True):
            assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
            assert leaf.dtype == wanted.dtype


def test_a_restored_state_can_be_donated(tmp_path):
    save_steps(tmp_path)
    restored, _ = restore(tmp_path)
    leaves = jax.tree.leaves(restored)
    jax.block_until_ready(jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(restored))
    assert all(leaf.is_deleted() for leaf in leaves)


def test_record_has_config_history_fingerprints_and_versions(tmp_path):
    save_steps(tmp_path)
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
        custom["sha256"] = hashlib.sha256(custom["record"].encode()).hexdigest()
    path.write_text(json.dumps(metadata))


def replace_an_array(workdir, kind):
    """Orbax would read the file that a link leads to, and wait for ever for somebody to write into a pipe."""
    path = workdir / "checkpoints/5/params/wte.embedding/zarr.json"
    path.rename(workdir / "zarr.json")
    path.symlink_to(workdir / "zarr.json") if kind == "link" else os.mkfifo(path)


BAD_RECORDS = {  # what is done to a checkpoint, and what is said of it
    "edited": (lambda run: edit_record(run, lambda values: values["history"].clear(), seal=False), "wrong checksum"),
    "link": (lambda run: replace_an_array(run, "link"), "'zarr.json'"),
    "pipe": (lambda run: replace_an_array(run, "pipe"), "'zarr.json'"),
    "deep": (lambda run: (run / "checkpoints/5/_CHECKPOINT_METADATA").write_text("[" * 100_000), ""),
    "long": (lambda run: os.truncate(run / "checkpoints/5/_CHECKPOINT_METADATA", record_module.LARGEST_RECORD + 1), ""),
}


@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_checkpoint_that_was_tampered_with_is_refused(kind, tmp_path):
    damage, problem = BAD_RECORDS[kind]
    save_steps(tmp_path)
    damage(tmp_path)
    with pytest.raises(CorruptCheckpointError, match=problem or None):
        Checkpointer(str(tmp_path)).read_record(5)


READS = {"a link": "_reject_links", "the record": "_read"}
NOT_NOW = [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.EPERM]


@pytest.mark.faults
@pytest.mark.parametrize("number", NOT_NOW, ids=lambda number: errno.errorcode[number])
@pytest.mark.parametrize("where", ["a link", "the record", "an array", "an array, as tensorstore tells it"])
def test_c6_temporarily_unreadable_files_are_not_damage(where, number, monkeypatch, tmp_path):
    """As on a network disk that is away for a moment: nothing is renamed."""
    save_steps(tmp_path)
    error = os_error(number)
    if where.endswith("tells it"):
        error = ValueError(f"NOT_FOUND: Error reading ... [os_error_code='{number}' source=...]")
    if where in READS:
        monkeypatch.setattr(record_module, READS[where], failing(error))
    else:
        monkeypatch.setattr(ocp, "load_checkpointables", failing(error))
    with raises(UnreadableError, f"{tmp_path}/checkpoints/5", remedy="rename it", match=os.strerror(number)):
        restore(tmp_path)
    assert checkpoint_steps(tmp_path) == [5]


OUT_OF_REACH = [
    TimeoutError("timed out"),
    OSError("Forbidden: https://storage"),
    ValueError("PERMISSION_DENIED: Error reading gs://b/run/checkpoints/5 [HTTP code 403]"),
    ValueError("UNAUTHENTICATED: no credentials"),
    ValueError("UNAVAILABLE: HTTP 503"),
    ValueError("DEADLINE_EXCEEDED: Error reading"),
    MemoryError("Unable to allocate 8 GiB"),
]


@pytest.mark.faults
@pytest.mark.parametrize("directory", ["gs://bucket/run/checkpoints/5", "/run/checkpoints/5"])
@pytest.mark.parametrize("error", OUT_OF_REACH, ids=lambda error: str(error)[:20])
def test_c6_unreachable_store_is_not_damage(error, directory):
    for raised in (error, caused_by(error)):
        with raises(UnreadableError, directory):
            raise record_module.judge(epath.Path(directory), "unreadable", raised)


def caused_by(error):
    """An error of Orbax's that says nothing of its cause."""
    try:
        raise KeyError("no entry") from error
    except KeyError as raised:
        return raised


@pytest.mark.faults
def test_c6_unreachable_bucket_record_is_not_damage(monkeypatch, tmp_path):
    """Its libraries raise errors of their own classes."""

    class HttpError(Exception):
        pass

    monkeypatch.setattr(record_module, "is_bucket", lambda path: True)
    save_steps(tmp_path)
    assert Checkpointer(str(tmp_path)).read_record(5).step == 5
    monkeypatch.setattr(type(epath.Path(tmp_path)), "open", failing(HttpError("Forbidden, 403")))
    with raises(UnreadableError, f"{tmp_path}/checkpoints/5", match="Forbidden, 403"):
        Checkpointer(str(tmp_path)).read_record(5)


@pytest.mark.faults
@pytest.mark.parametrize(
    "error",
    [
        os_error(errno.EBADMSG),
        os_error(errno.EUCLEAN),
        ValueError("INTERNAL: Error reading [os_error_code='117']"),
        ValueError("NOT_FOUND: Error opening zarr3"),
        ValueError("DATA_LOSS: digest mismatch"),
        FileNotFoundError("no record"),
    ],
    ids=str,
)
def test_c6_errors_about_bad_content_are_damage(error, tmp_path):
    assert isinstance(record_module.judge(epath.Path(tmp_path), "unreadable", error), CorruptCheckpointError)


@pytest.mark.faults
def test_c6_unlistable_directory_is_not_damage(monkeypatch, tmp_path):
    save_steps(tmp_path)
    checkpointer = Checkpointer(str(tmp_path))
    monkeypatch.setattr(type(checkpointer.directory), "iterdir", failing(os_error(errno.ESTALE)))
    with raises(UnreadableError, f"{tmp_path}/checkpoints", match=os.strerror(errno.ESTALE)):
        checkpointer.restore_latest(make_state()[0])


@pytest.mark.faults
def test_b2_other_optimizer_tree_is_refused_without_renaming(tmp_path):
    """As after a change of make_optimizer, or by another version of optax."""
    save_steps(tmp_path)
    with raises(CheckpointError, f"{tmp_path}/checkpoints/5", match="has opt_state/0/nu/.* optimizer"):
        restore(tmp_path, "lion")
    assert checkpoint_steps(tmp_path) == [5]


@pytest.mark.faults
def test_c6_error_without_a_cause_is_checked_by_reading_files(monkeypatch, tmp_path):
    """Orbax says that an entry is missing where its file may not be read."""
    save_steps(tmp_path)
    monkeypatch.setattr(ocp, "load_checkpointables", lambda *_: {}["no entry"])
    real = open
    refused = next(path for path in (tmp_path / "checkpoints/5/params").rglob("*") if path.is_file())

    def opened(path, *rest, **options):
        if str(path) == str(refused):
            raise os_error(errno.EACCES)
        return real(path, *rest, **options)

    monkeypatch.setattr(record_module, "open", opened, raising=False)
    with raises(UnreadableError, f"{tmp_path}/checkpoints/5", match="Permission denied"):
        restore(tmp_path)
    monkeypatch.setattr(record_module, "open", real)
    with raises(CheckpointError, f"{tmp_path}/checkpoints", remedy="remove that directory", match="step 5: unreadable"):
        restore(tmp_path)


@pytest.mark.faults
def test_c6_file_owner_without_a_name_is_not_damage(monkeypatch, tmp_path):
    """As under `docker run --user`: etils looks the owner up by name."""
    save_steps(tmp_path)
    monkeypatch.setattr(pwd, "getpwuid", failing(KeyError("uid not found: 1")))
    with pytest.raises(KeyError):
        epath.Path(tmp_path).stat()
    state, record = restore(tmp_path)
    assert (int(state.step), record.step) == (5, 5)


def test_single_load_failure_is_retried(monkeypatch, said, tmp_path):
    """Orbax makes the same error of a Ctrl-C, too many open files and a lost file."""
    save_steps(tmp_path)
    original, failures = ocp.load_checkpointables, [KeyError("no entry")]

    def load(*arguments):
        if failures:
            raise failures.pop()
        return original(*arguments)

    monkeypatch.setattr(ocp, "load_checkpointables", load)
    restored, _ = restore(tmp_path)
    assert state_bytes(restored) == state_bytes(make_state()[1])
    assert checkpoint_steps(tmp_path) == [5]
    assert said == []


def test_check_disk_space_requires_room_for_one_checkpoint(monkeypatch, said, tmp_path):
    abstract = make_state()[0]
    size = sum(len(leaf) for leaf in state_bytes(make_state()[1]))
    checkpointer, usage = Checkpointer(str(tmp_path / "a"), keep=2), shutil.disk_usage("/")

    def free(amount):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=amount))
        return checkpointer.check_disk_space(abstract)

    line = free(10**10)
    assert re.fullmatch(r"checkpoints: [\d.]+ kB each, at most 4 kept; 10 GB free", line)
    assert said == []
    with raises(WorkdirError, str(checkpointer.directory), remedy="another --workdir", match=r"\d kB.*\d kB"):
        free(size - 1)
    free(4 * size)
    assert said == []
    free(4 * size - 1)
    assert [line.split(":")[0] for line in said] == [str(checkpointer.directory)]
    assert not checkpointer.directory.exists(), "a run may still be refused, and leaves nothing behind"
    checkpointer.directory.mkdir()
    free(4 * size)
    assert list(checkpointer.directory.iterdir()) == [], "the probe is removed"


def test_a_newer_format_is_not_damage(tmp_path):
    save_steps(tmp_path)
    edit_record(tmp_path, lambda values: values.update(format=FORMAT + 1, something_new=1), seal=True)
    with raises(CheckpointError, f"{tmp_path}/checkpoints/5", remedy="upgrade"):
        restore(tmp_path)
    assert checkpoint_steps(tmp_path) == [5]


def test_empty_directory_has_no_checkpoint(tmp_path):
    assert Checkpointer(str(tmp_path)).steps() == []
    assert restore(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_newest_and_best_checkpoints_are_kept(tmp_path):
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


def test_saves_do_not_leak_objects(monkeypatch, tmp_path):
    """tensorstore's counters alone, which Orbax reads, are 200 of them a save."""
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)  # pytest keeps what is said
    blocks = []
    with suppress_tensorstore_metrics(), contextlib.closing(Checkpointer(str(tmp_path))) as checkpointer:
        for step in range(21):
            save(checkpointer, step)
            checkpointer.wait_for_pending_save()
            if step in (10, 20):
                gc.collect()
                blocks.append(sys.getallocatedblocks())
    assert (blocks[1] - blocks[0]) / 10 < 100


def test_damaged_step_can_be_saved_again(tmp_path):
    """By the same Checkpointer, as after a rollback past it: Orbax would leave out a step that it knows."""
    abstract, state = make_state()
    with contextlib.closing(Checkpointer(str(tmp_path), keep=5)) as checkpointer:
        for step in (1, 2):
            save(checkpointer, step)
        checkpointer.wait_for_pending_save()
        (tmp_path / "checkpoints" / "2" / "_CHECKPOINT_METADATA").write_text("{}")
        assert checkpointer.restore_latest(abstract)[1].step == 1
        save(checkpointer, 2)
    assert checkpoint_steps(tmp_path) == [1, 2]
    restored, record = restore(tmp_path)
    assert (record.step, state_bytes(restored)) == (2, state_bytes(state))


# Parameters of a run


def test_load_params_returns_parameters_on_one_device(tmp_path):
    _, state = make_state("adamw", fsdp=8)
    for step in (5, 6):
        save_steps(tmp_path, step, state=state)
    config, params, step = load_params(str(tmp_path))
    assert (config, step) == (CONFIG, 6)
    assert leaf_bytes(params) == leaf_bytes(state.params)
    assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(params))
    with raises(CheckpointError, "--workdir", value=str(tmp_path), remedy="available: 6", match="step 7"):
        load_params(str(tmp_path), step=7)
    with raises(CheckpointError, "--workdir", value=str(tmp_path / "nowhere"), match="no such directory"):
        load_params(str(tmp_path / "nowhere"))


def test_load_params_falls_back_and_leaves_the_directory_alone(said, tmp_path):
    save_steps(tmp_path, 5, 6, keep=2)
    (tmp_path / "checkpoints/6/_CHECKPOINT_METADATA").write_text("{")
    assert load_params(str(tmp_path))[2] == 5
    (line,) = said
    assert f"{tmp_path}/checkpoints/6 " in line
    with raises(CheckpointError, "--workdir", value=str(tmp_path), match="step 6: record unreadable"):
        load_params(str(tmp_path), step=6)
    assert checkpoint_steps(tmp_path) == [5, 6]


# Saves that fail


def failing_writes(monkeypatch, times, *, after=False):
    """Makes the next background writes fail, as a full disk does; with `after`, when all is on disk."""
    original, left = ocp.training.Checkpointer.save_checkpointables_async, [times]
    monkeypatch.setattr(checkpoint_module, "RETRY_SECONDS", 0.01)

    class Failing:
        def __init__(self, response, directory):
            self.response, self.directory = response, directory

        def result(self, timeout=None):
            self.response.result(timeout)
            if not after:
                self.directory.rename(self.directory.with_name(f"{self.directory.name}.orbax-checkpoint-tmp"))
            raise OSError(28, "No space left on device") if left[0] == times - 1 else OSError(17, "what follows of it")

    def save_async(self, step, *args, **kwargs):
        response = original(self, step, *args, **kwargs)
        if left[0] <= 0:
            return response
        left[0] -= 1
        return Failing(response, self.directory / str(step))

    monkeypatch.setattr(ocp.training.Checkpointer, "save_checkpointables_async", save_async)


@pytest.mark.parametrize("metrics", [None, {"val_loss": 2.5}])
@pytest.mark.parametrize("end", [Checkpointer.wait_until_finished, Checkpointer.close])
def test_failed_last_save_is_retried(end, metrics, monkeypatch, said, tmp_path):
    """Orbax adds the metrics to the dict of trees that it is given, and refuses a dict that has them."""
    failing_writes(monkeypatch, 2)
    checkpointer = Checkpointer(str(tmp_path))
    save(checkpointer, 5, metrics=metrics)
    end(checkpointer)
    assert len(said) == 2
    checkpointer.close()
    assert checkpoint_steps(tmp_path) == [5]
    assert temporary_directories(tmp_path) == []
    assert state_bytes(restore(tmp_path)[0]) == state_bytes(make_state()[1])


@pytest.mark.parametrize("end", [Checkpointer.wait_until_finished, Checkpointer.close])
def test_a_last_save_that_keeps_failing_is_reported(end, monkeypatch, tmp_path):
    failing_writes(monkeypatch, 3)
    checkpointer = Checkpointer(str(tmp_path))
    save(checkpointer, 5)
    with raises(SaveError, f"{tmp_path}/checkpoints", match="3 .*No space left on device"):
        end(checkpointer)
    checkpointer.close()
    assert checkpoint_steps(tmp_path) == []
    assert temporary_directories(tmp_path) == []


def test_failed_last_save_with_deleted_state_is_reported(monkeypatch, tmp_path):
    failing_writes(monkeypatch, 1)
    checkpointer = Checkpointer(str(tmp_path))
    state = jax.tree.map(lambda leaf: leaf + jnp.zeros((), leaf.dtype), make_state()[1])
    save(checkpointer, 5, state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    with raises(SaveError, f"{tmp_path}/checkpoints", match="1 .*No space left on device"):
        checkpointer.wait_until_finished()


def test_failure_after_a_complete_save_keeps_the_checkpoint(monkeypatch, said, tmp_path):
    failing_writes(monkeypatch, 4, after=True)
    checkpointer = Checkpointer(str(tmp_path))
    for step in (5, 6, 7, 8):
        save(checkpointer, step)
    checkpointer.close()
    assert checkpoint_steps(tmp_path) == [8]
    assert [line.split(":")[0] for line in said] == ["the checkpoint is complete, but its save ended with an error"] * 4


def test_training_continues_after_two_failed_saves_not_three(monkeypatch, said, tmp_path):
    checkpointer = Checkpointer(str(tmp_path), keep=2)
    save(checkpointer, 4)
    failing_writes(monkeypatch, 2)
    for step in (5, 6, 7, 8):
        save(checkpointer, step)
    checkpointer.wait_for_pending_save()
    assert len(said) == 2
    assert checkpoint_steps(tmp_path) == [7, 8]
    assert temporary_directories(tmp_path) == []
    failing_writes(monkeypatch, 3)
    for step in (9, 10, 11):
        save(checkpointer, step)
    with raises(SaveError, f"{tmp_path}/checkpoints", match="3 .*No space left on device"):
        save(checkpointer, 12)
    checkpointer.close()
    assert 8 in checkpoint_steps(tmp_path)


@pytest.mark.faults
def test_d1_replaced_checkpoint_directory_is_a_failed_save(said, tmp_path):
    """A file in its place makes both the save and the removal of its files fail."""
    checkpointer = Checkpointer(str(tmp_path))
    save(checkpointer, 4)
    checkpointer.wait_until_finished()
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").touch()
    for step in (5, 6):
        save(checkpointer, step)
    (tmp_path / "checkpoints").unlink()
    save(checkpointer, 7)
    checkpointer.wait_until_finished()
    assert checkpoint_steps(tmp_path) == [7]
    assert [line.split(":")[0] for line in said] == ["checkpoint save failed, training continues"] * 2
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").touch()
    for step in (8, 9):
        save(checkpointer, step)
    with raises(SaveError, f"{tmp_path}/checkpoints", match="3 saves failed"):
        save(checkpointer, 10)


@pytest.mark.faults
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_d1_failed_save_in_an_unlistable_directory_is_retried(number, monkeypatch, said, tmp_path):
    failing_writes(monkeypatch, 1)
    checkpointer = Checkpointer(str(tmp_path))
    save(checkpointer, 5)
    with monkeypatch.context() as patch:
        patch.setattr(type(checkpointer.directory), "iterdir", failing(os_error(number)))
        checkpointer.wait_for_pending_save()
    save(checkpointer, 6)
    checkpointer.close()
    assert checkpoint_steps(tmp_path) == [6]
    assert said == ["checkpoint save failed, training continues: No space left on device"]


@pytest.mark.faults
def test_d1_old_step_that_cannot_be_removed_is_one_warning(monkeypatch, said, tmp_path):
    remove = shutil.rmtree

    def refuse_4(path, *args, **kwargs):
        if str(path).endswith("/checkpoints/4"):
            raise os_error(errno.EPERM)
        remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", refuse_4)
    checkpointer = Checkpointer(str(tmp_path))
    for step in range(4, 10):
        save(checkpointer, step)
    checkpointer.close()
    assert checkpoint_steps(tmp_path) == [4, 9]
    problem = "the old checkpoint cannot be removed: Operation not permitted; training continues"
    assert said == [f"{tmp_path}/checkpoints/4: {problem}"]
    assert int(Checkpointer(str(tmp_path)).restore_latest(make_state()[0])[0].step) == 9


@pytest.mark.faults
def test_c6_unreachable_directory_is_no_traceback_in_the_check_for_space(monkeypatch, tmp_path):
    checkpointer = Checkpointer(str(tmp_path))
    monkeypatch.setattr(type(checkpointer.directory), "exists", failing(os_error(errno.EIO)))
    with raises(WorkdirError, f"{tmp_path}/checkpoints", match="Input/output error"):
        checkpointer.check_disk_space(make_state()[0])


def test_save_skipped_by_orbax_raises_an_error(tmp_path):
    """Orbax answers a step that is not above the newest with None, and no word."""
    checkpointer = Checkpointer(str(tmp_path))
    save(checkpointer, 5)
    with raises(SaveError, f"{tmp_path}/checkpoints", match="step 3"):
        save(checkpointer, 3)
    checkpointer.close()
    assert checkpoint_steps(tmp_path) == [5]


@pytest.mark.parametrize("where", ["params", "opt_state"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_state_is_never_saved(where, value, tmp_path):
    state = make_state()[1]
    leaves, structure = jax.tree.flatten_with_path({where: getattr(state, where)})
    paths, leaves = map(list, zip(*leaves, strict=True))
    index = max(range(len(leaves)), key=lambda i: leaves[i].size)
    leaves[index] = leaves[index].at[(0,) * leaves[index].ndim].set(value)
    broken = dataclasses.replace(state, **jax.tree.unflatten(structure, leaves))
    checkpointer = Checkpointer(str(tmp_path))
    with raises(DivergedError, path_name(paths[index]), match="step 5"):
        save(checkpointer, 5, broken)
    checkpointer.close()
    assert checkpoint_steps(tmp_path) == []


# Parameters alone


def params_alone():
    return jax.tree.map(np.asarray, make_state()[1].params)


def leaves_alone():
    return (("params", path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(params_alone()))


def test_parameters_alone_are_a_checkpoint_of_step_0(tmp_path):
    save_leaves(str(tmp_path), leaves_alone(), config=CONFIG, history={"imported": {"from": "hf:x"}})
    config, params, step = load_params(str(tmp_path))
    assert (config, step) == (CONFIG, 0)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.tobytes() == np.asarray(b).tobytes(), params_alone(), params))
    assert Checkpointer(str(tmp_path)).read_record(0).history == {"imported": {"from": "hf:x"}}
    assert temporary_directories(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_save_leaves_holds_one_in_memory(tmp_path):
    """Each of them takes 32 MB, and is made when it is asked for."""
    tracemalloc.start()
    try:
        leaves = (("params", f"h/{n}/kernel", np.full((8, 2**20), n, np.float32)) for n in range(8))
        save_leaves(str(tmp_path), leaves, config=CONFIG, history={})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * 2**25
    stored = StoredParams(str(tmp_path), 0)
    assert (stored.read("h/7/kernel", (8, 2**20)) == 7).all()


def test_failed_save_leaves_leaves_no_files(tmp_path):
    def fail():
        yield "params", "wpe/embedding", np.zeros((8, 16), np.float32)
        raise KeyError("x")

    with pytest.raises(KeyError):
        save_leaves(str(tmp_path), fail(), config=CONFIG, history={})
    assert list(tmp_path.iterdir()) == []


def test_run_does_not_resume_from_parameters_alone(tmp_path):
    save_leaves(str(tmp_path), leaves_alone(), config=CONFIG, history={})
    with raises(ConfigError, "--workdir", value=str(tmp_path), remedy=f"--config.init_from=gptjax:{tmp_path}"):
        restore(tmp_path)
    assert checkpoint_steps(tmp_path) == [0]


def test_parameters_of_a_run_are_read_one_at_a_time(tmp_path):
    save_steps(tmp_path)
    stored = StoredParams(str(tmp_path), 5)
    leaf = stored.read("h/mlp/c_fc/kernel", (2, 16, 64))
    assert type(leaf) is np.ndarray
    assert leaf.tobytes() == np.asarray(make_state()[1].params["h"]["mlp"]["c_fc"]["kernel"]).tobytes()
    moments = make_state()[1].opt_state[0]
    second = stored.read("0/nu/h/mlp/c_fc/kernel", (2, 16, 64), tree="opt_state")
    assert second.tobytes() == np.asarray(moments.nu["h"]["mlp"]["c_fc"]["kernel"]).tobytes()
    assert stored.read("0/count", (), tree="opt_state", dtype=np.int32) == moments.count
    with pytest.raises(CorruptCheckpointError, match="ln_f/bias"):
        stored.read("ln_f/bias", (16,))
    record = stored.record.fingerprints
    record["params/wte/embedding"], record["params/wpe/embedding"] = [1, 2], record["params/wte/embedding"]
    with pytest.raises(CorruptCheckpointError, match=r"wpe/embedding: .*fingerprint"):
        stored.read("wpe/embedding", (8, 16))
