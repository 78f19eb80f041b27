"""An output and the file beside it appear together or not at all."""

import os

import pytest

from gptjax.convert.staging import SideFile, staged
from gptjax.errors import ConfigError, WorkdirError
from tests.helpers import raises

BESIDE = SideFile("meta", b"new")


def write(root, *, force=False, content=b"model"):
    with staged(f"{root}/model", force=force, beside=BESIDE) as path, open(path, "wb") as file:
        file.write(content)


def contents(root):
    return {path.name: path.read_bytes() for path in root.iterdir()}


def test_both_files_appear_in_a_new_directory(tmp_path):
    write(tmp_path / "new")
    assert contents(tmp_path / "new") == {"model": b"model", "meta": b"new"}


@pytest.mark.parametrize("other", [b"old", b"longer"])
def test_another_file_beside_is_replaced_only_by_force(tmp_path, other):
    (tmp_path / "meta").write_bytes(other)
    with raises(ConfigError, f"{tmp_path}/meta", remedy="--force replaces it"):
        write(tmp_path)
    assert contents(tmp_path) == {"meta": other}
    write(tmp_path, force=True)
    assert contents(tmp_path) == {"model": b"model", "meta": b"new"}


def test_another_file_beside_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "meta").symlink_to("nowhere")
    with raises(ConfigError, f"{tmp_path}/meta"), staged(f"{tmp_path}/model", force=False, beside=BESIDE):
        pytest.fail("begun")
    assert os.listdir(tmp_path) == ["meta"]


def test_equal_file_beside_is_kept_as_it_is(tmp_path):
    (tmp_path / "real").write_bytes(b"new")
    (tmp_path / "meta").symlink_to("real")
    write(tmp_path)
    assert (tmp_path / "meta").is_symlink()
    assert contents(tmp_path) == {"model": b"model", "meta": b"new", "real": b"new"}


def test_directory_beside_is_never_replaced(tmp_path):
    (tmp_path / "meta").mkdir()
    with raises(ConfigError, f"{tmp_path}/meta", match="is a directory"):
        write(tmp_path, force=True)
    assert os.listdir(tmp_path) == ["meta"]


def test_file_that_appeared_beside_meanwhile_is_kept(tmp_path):
    output = staged(f"{tmp_path}/model", force=False, beside=BESIDE)
    with raises(ConfigError, f"{tmp_path}/meta", remedy="--force"), output as path, open(path, "wb"):
        (tmp_path / "meta").write_bytes(b"theirs")
    assert contents(tmp_path) == {"meta": b"theirs"}


@pytest.mark.parametrize("before", [{}, {"meta": b"old", "model": b"old"}])
@pytest.mark.parametrize("failing", ["meta", "model"])
def test_failed_move_leaves_both_as_they_were(tmp_path, monkeypatch, failing, before):
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    rename = os.rename

    def fail(source, target):
        if target == f"{tmp_path}/{failing}" and "/new" in source:
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with raises(WorkdirError, f"{tmp_path}/model", match="Permission denied"):
        write(tmp_path, force=True)
    assert contents(tmp_path) == before


def test_failed_output_leaves_the_file_beside_it_out(tmp_path):
    with pytest.raises(ZeroDivisionError), staged(f"{tmp_path}/new/model", force=False, beside=BESIDE):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()
