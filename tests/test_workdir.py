import contextlib
import errno
import functools
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptjax import workdir
from gptjax.checkpoint import Checkpointer
from gptjax.config import CheckpointConfig, Config, DataConfig
from gptjax.convert import __main__ as convert
from gptjax.convert import native
from gptjax.data import prepare
from gptjax.data.tokenizer import load_tokenizer
from gptjax.errors import ConfigError, UnavailableError, WorkdirError
from gptjax.stored import load_params
from gptjax.train import train
from tests.helpers import failing, os_error, raises


def test_logs_are_in_a_local_directory_also_of_a_bucket():
    assert workdir.local_directory("runs/a") == "runs/a"
    assert workdir.local_directory("runs/a", process=2) == "runs/a/process-2"
    assert workdir.local_directory("gs://bucket/my run") == "runs/gs-bucket-my-run"
    assert workdir.is_bucket("gs://bucket/run")
    assert not workdir.is_bucket("/runs/a b")


def test_a_directory_with_locks_only_is_new(tmp_path):
    assert workdir.is_new(str(tmp_path / "missing"))
    for name in (".lock", "process-1", "process-12"):
        (tmp_path / name).touch()
    assert workdir.is_new(str(tmp_path))
    (tmp_path / "process-1.old").touch()
    assert not workdir.is_new(str(tmp_path))


def test_a_bucket_with_a_run_is_not_new(tmp_path, monkeypatch):
    real = workdir.epath.Path
    monkeypatch.setattr(workdir.epath, "Path", lambda path: real(str(path).replace("gs://bucket", str(tmp_path))))
    assert workdir.is_new("gs://bucket/run")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert not workdir.is_new("gs://bucket/run")
    monkeypatch.setattr(type(real(tmp_path)), "exists", failing(RuntimeError("403 Forbidden")))
    with raises(WorkdirError, "--workdir", value="gs://bucket/run", match="403 Forbidden"):
        workdir.is_new("gs://bucket/run")


def test_replace_file_is_atomic_and_synced(tmp_path, monkeypatch):
    path, synced = tmp_path / "a", []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(descriptor) or fsync(descriptor))
    workdir.replace_file(path, b"one")
    workdir.replace_file(str(path), b"two")
    assert (path.read_bytes(), len(synced)) == (b"two", 4), "each time the file and its directory"
    monkeypatch.setattr(os, "replace", failing(os_error(errno.ENOSPC)))
    with pytest.raises(OSError, match=f"Errno {errno.ENOSPC}"):
        workdir.replace_file(path, b"three")
    with pytest.raises(TypeError):
        workdir.write_json(path, {"a": object()})
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", b"two")]


def test_read_file_returns_bytes_or_none(tmp_path):
    (tmp_path / "a").write_bytes(b"x\xff")
    assert workdir.read_file(str(tmp_path), "a") == b"x\xff"
    assert workdir.read_file(tmp_path, "b") is None
    with workdir.open_file(tmp_path, "a", "ab") as file:
        file.write(b"y")
    assert workdir.read_file(tmp_path, "a") == b"x\xffy"


NAMES = (*workdir.LOGS, workdir.LOCK_FILE)


def make(kind: str, path: Path, outside: Path) -> None:
    """Puts something at `path` that is no regular file."""
    if kind == "a symbolic link":
        path.symlink_to(outside)
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    elif kind == "a socket":
        with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as bound:  # whose path must be short
            bound.bind(path.name)
    elif os.geteuid():
        pytest.skip("only root makes devices")
    else:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 7))  # /dev/full


KINDS = ["a symbolic link", "a pipe", "a directory", "a socket", "a device"]


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A file that is not of the work directory; it stays as it is."""
    path = tmp_path / "outside"
    path.write_bytes(b"do not touch")
    yield path
    assert path.read_bytes() == b"do not touch"
    assert path.stat().st_nlink == 1


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_l2_irregular_file_is_refused_before_locking(name, kind, outside, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    make(kind, run / name, outside)
    with raises(WorkdirError, f"{run}/{name}", remedy="another --workdir", match=kind), workdir.lock_workdir(str(run)):
        pytest.fail("it was taken")
    assert [path.name for path in run.iterdir()] == [name]


@pytest.mark.faults
@pytest.mark.parametrize("kind", [*KINDS, "a dangling link"])
def test_l2_irregular_files_are_not_opened_during_a_run(kind, outside, tmp_path):
    path = tmp_path / "samples.txt"
    if kind == "a dangling link":
        path.symlink_to(tmp_path / "missing")
        kind = "a symbolic link"
    else:
        make(kind, path, outside)
    for call in (
        lambda: workdir.open_file(tmp_path, path.name, "ab"),
        lambda: workdir.open_file(tmp_path, path.name, "a+b"),
        lambda: workdir.read_file(tmp_path, path.name),
        lambda: workdir.read_regular(path),
    ):
        with pytest.raises(workdir.NotAFileError, match=kind):
            call()
    assert not (tmp_path / "missing").exists()
    if kind != "a directory":
        workdir.replace_file(path, b"new")  # the link itself is replaced
        assert path.read_bytes() == b"new"


@pytest.mark.faults
def test_l2_link_created_between_check_and_open_is_refused(outside, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(outside)
    monkeypatch.setattr(workdir.os, "lstat", lambda path: os.stat(__file__))
    with pytest.raises(OSError, match=f"Errno {errno.ELOOP}"):
        workdir.open_regular(tmp_path / "link", os.O_WRONLY)


@pytest.mark.faults
def test_l2_temporary_names_cannot_be_guessed_and_are_new(outside, tmp_path, monkeypatch):
    opened = []
    real = os.open

    def record(path, flags, *mode):
        opened.append((str(path), flags))
        return real(path, flags, *mode)

    monkeypatch.setattr(workdir.os, "open", record)
    for _ in range(2):
        workdir.replace_file(tmp_path / "config.json", b"{}")
    temporary = [(path, flags) for path, flags in opened if path.endswith(".tmp")]
    assert len({path for path, _ in temporary}) == 2
    assert all(flags & os.O_EXCL and flags & os.O_NOFOLLOW for _, flags in temporary)
    monkeypatch.setattr(workdir.secrets, "token_hex", lambda size: "guessed")
    (tmp_path / "config.json.guessed.tmp").symlink_to(outside)
    with pytest.raises(FileExistsError):
        workdir.replace_file(tmp_path / "config.json", b"new")


@pytest.mark.faults
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "a directory"])
@pytest.mark.parametrize("name", ["profile", "profile/plugins", "profile/plugins/profile"])
def test_l2_irregular_profile_is_refused_before_locking(name, kind, outside, tmp_path):
    run = tmp_path / "run"
    path = run / name
    path.parent.mkdir(parents=True)
    make(kind, path, outside)
    with raises(WorkdirError, str(path), remedy="another --workdir", match=kind), workdir.lock_workdir(str(run)):
        pytest.fail("it was taken")
    assert not (run / ".lock").exists()
    path.unlink()
    path.write_bytes(b"")
    with raises(WorkdirError, str(path), match="is a file, not a directory"):
        workdir.check_files(str(run))


@pytest.mark.faults
@pytest.mark.parametrize("name", ["tensorboard", "profile", "process-1"])
def test_l2_linked_run_directory_is_refused(name, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    place = tmp_path / "run" / name if name == "process-1" else tmp_path / "run"
    with raises(WorkdirError, f"{tmp_path}/run/{name}", remedy="remove it", match="symbolic link"):
        workdir.check_files(str(place))


def test_a_link_to_a_work_directory_is_fine(tmp_path):
    (tmp_path / "real" / "elsewhere").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "checkpoints").symlink_to(tmp_path / "real" / "elsewhere")
    with workdir.lock_workdir(str(tmp_path / "link")):
        workdir.replace_file(tmp_path / "link" / "config.json", b"{}")
    assert (tmp_path / "real" / "config.json").read_bytes() == b"{}"


@pytest.mark.faults
def test_l2_oversized_file_is_not_read(tmp_path):
    with open(tmp_path / "a", "wb") as file:
        file.truncate(10**12)
    with pytest.raises(OSError, match=f"Errno {errno.EFBIG}"):
        workdir.read_regular(tmp_path / "a", limit=1000)
    assert workdir.LARGEST_FILE <= 2**31


@pytest.mark.faults
@pytest.mark.parametrize(
    ("bucket", "error", "kind", "parts"),
    [
        ("abc://b/run", None, ConfigError, {"remedy": "gs://", "match": "abc://"}),
        ("file:///b/run", None, ConfigError, {"remedy": "gs://", "match": "file://"}),
        ("gs://b/run", ImportError("Please install gcsfs"), UnavailableError, {"match": "gcsfs$"}),
        ("s3://b/run", OSError("403 Forbidden"), UnavailableError, {"match": "403 Forbidden$"}),
        ("gs://b/run", RuntimeError("no\nroute"), UnavailableError, {"match": "no route$"}),
    ],
)
def test_c6_a_bucket_that_cannot_be_reached_is_named(bucket, error, kind, parts, monkeypatch, tmp_path):
    if error is not None:
        monkeypatch.setattr(type(workdir.epath.Path(bucket)), "exists", failing(error))
    monkeypatch.chdir(tmp_path)
    new = Config(checkpoint=CheckpointConfig(resume="never"))
    trained = (functools.partial(train, config) for config in (Config(), new))
    opened = (Checkpointer, native.read, load_params, *trained)
    for open_it in opened:
        with raises(kind, bucket, **parts):
            open_it(bucket)
    assert list(tmp_path.iterdir()) == [], "nothing was written"


@pytest.mark.faults
def test_c6_unlistable_directory_of_data_or_results_is_named(monkeypatch, tmp_path):
    path = str(tmp_path)
    assert workdir.is_empty(path)
    monkeypatch.setattr(os, "listdir", failing(os_error(errno.EACCES)))
    for call in (
        lambda: workdir.is_empty(path),
        lambda: prepare.ensure_prepared(DataConfig(path=path), load_tokenizer("bytes")),
        lambda: convert.refuse_existing(path, force=False),
    ):
        with raises(UnavailableError, path, match="cannot be listed now: Permission denied"):
            call()
