"""A file of a model directory is inside it, or refused."""

import os
from pathlib import Path

import pytest

from gptjax.convert import llmc, msgpack, safetensors_file, torch_file
from gptjax.convert.files import require_regular, resolve_inside
from gptjax.errors import DataError
from tests.helpers import raises


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "weights").write_text("w")
    (folder / "inside").symlink_to("sub/weights")
    (tmp_path / "other").symlink_to(folder)
    return folder


SNAPSHOT = "models--a--b/snapshots/0123"


@pytest.mark.usefixtures("model", "snapshot")
@pytest.mark.parametrize("is_relative", [True, False])
@pytest.mark.parametrize(
    ("directory", "name", "file"),
    [
        ("model", "config.json", "model/config.json"),
        ("model", "sub/weights", "model/sub/weights"),
        ("model", "inside", "model/sub/weights"),
        ("other", "config.json", "model/config.json"),
        (SNAPSHOT, "config.json", "models--a--b/blobs/abcd"),
    ],
)
def test_file_inside_the_model_directory_is_resolved(directory, name, file, is_relative, tmp_path, monkeypatch):
    """Links are followed within the directory and to it, and from a snapshot to its blobs."""
    monkeypatch.chdir(tmp_path)
    found = resolve_inside(directory if is_relative else str(tmp_path / directory), name)
    assert found == os.path.realpath(tmp_path / file)


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "sub/../config.json",
        "sub/../../secret",
        "/etc/hosts",
        "..",
        "",
        "a\\..\\b",
        "a\0b",
        "a\ud800",
        "a\nb",
    ],
)
def test_file_name_outside_the_directory_is_refused(model, name):
    with raises(DataError, str(model), match="not the name") as error:
        resolve_inside(str(model), name)
    assert "\n" not in str(error.value)


def test_missing_file_raises_file_not_found(model):
    with pytest.raises(FileNotFoundError):
        resolve_inside(str(model), "none")
    with pytest.raises(FileNotFoundError):
        resolve_inside(str(model / "none"), "none")


@pytest.mark.parametrize("target", ["../secret", "../nothing", "/etc/hosts", "sub/out/secret", "../model2/config.json"])
def test_link_out_of_the_directory_is_refused(model, target):
    (model.parent / "model2").mkdir()
    (model.parent / "model2" / "config.json").write_text("{}")
    (model / "sub" / "out").symlink_to(model.parent)
    (model / "link").symlink_to(target)
    with raises(DataError, str(model), match="leads out"):
        resolve_inside(str(model), "link")


@pytest.mark.parametrize("kind", ["directory", "pipe"])
def test_directory_or_pipe_in_place_of_a_file_is_refused(model, kind):
    (model / "thing").mkdir() if kind == "directory" else os.mkfifo(model / "thing")
    with raises(DataError, str(model), match="'thing' is not"):
        resolve_inside(str(model), "thing")


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A directory in a Hugging Face cache."""
    folder = tmp_path / SNAPSHOT
    folder.mkdir(parents=True)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (blobs / "abcd").write_text("{}")
    (tmp_path / "secret").write_text("secret")
    (folder / "config.json").symlink_to("../../blobs/abcd")
    return folder


def test_only_a_snapshot_may_link_to_blobs(snapshot):
    folder = snapshot.parent.rename(snapshot.parent.parent / "others") / snapshot.name
    with raises(DataError, str(folder), match="leads out"):
        resolve_inside(str(folder), "config.json")


@pytest.mark.parametrize("through", ["link", "blob", "blobs"])
def test_snapshot_link_outside_its_blobs_is_refused(snapshot, tmp_path, through):
    blobs = tmp_path / "models--a--b" / "blobs"
    (snapshot / "link").symlink_to("../../blobs/secret" if through != "link" else tmp_path / "secret")
    if through == "blob":
        (blobs / "secret").symlink_to(tmp_path / "secret")
    if through == "blobs":
        blobs.rename(tmp_path / "kept")
        blobs.symlink_to(tmp_path)
    with raises(DataError, str(snapshot), match="leads out"):
        resolve_inside(str(snapshot), "link")


IRREGULAR = {"pipe": "a pipe", "link to a pipe": "a pipe", "device": "a device", "directory": "a directory"}
READERS = [llmc.read_header, msgpack._load, safetensors_file.open_safetensors, torch_file.load]


def make_irregular(kind: str, directory: Path) -> Path:
    path = directory / "weights"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(directory / "pipe")
        path.symlink_to("pipe")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    return path


@pytest.mark.faults
@pytest.mark.parametrize("kind", IRREGULAR)
@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__module__)
def test_v_irregular_model_file_is_named_unopened(read, kind, tmp_path):
    path = make_irregular(kind, tmp_path)
    with raises(DataError, str(path), match=f": is {IRREGULAR[kind]}, not a regular file$"):
        read(str(path))


def test_a_model_file_may_be_a_link_to_a_file(tmp_path):
    (tmp_path / "weights").symlink_to(__file__)
    require_regular(str(tmp_path / "weights"))
    require_regular(str(tmp_path / "missing"))
