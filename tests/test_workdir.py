import json
from pathlib import Path

import pytest
from etils import epath

from gptjax import workdir


def test_a_local_work_directory_holds_its_own_logs() -> None:
    assert workdir.local_directory("runs/a") == "runs/a"
    assert workdir.local_directory("runs/a", process=2) == "runs/a/process-2"


def test_a_bucket_has_its_logs_on_this_machine() -> None:
    assert workdir.local_directory("gs://bucket/my run") == "runs/gs-bucket-my-run"
    assert workdir.is_bucket("gs://bucket/run")
    assert not workdir.is_bucket("/runs/a b")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket by name that is a folder in fact: only the way to reach it is made up."""
    folder = tmp_path / "bucket"
    folder.mkdir()
    real = epath.Path
    monkeypatch.setattr(workdir.epath, "Path", lambda p: real(str(p).replace("gs://bucket", str(folder))))
    return "gs://bucket"


def test_logs_go_to_the_bucket_and_come_back_to_another_machine(bucket: str, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    (here / "metrics.jsonl").write_text('{"step": 1}\n')
    (here / "tokenizer.json").write_text("{}")
    workdir.store_logs(str(here), bucket)
    workdir.fetch_logs(bucket, str(there))
    assert (there / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (there / "tokenizer.json").read_text() == "{}"
    assert not (there / "samples.txt").exists()


def test_fetching_never_overwrites_newer_logs(bucket: str, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "metrics.jsonl").write_text("old\n")
    workdir.store_logs(str(here), bucket)
    (here / "metrics.jsonl").write_text("newer\n")
    workdir.fetch_logs(bucket, str(here))
    assert (here / "metrics.jsonl").read_text() == "newer\n"


def test_a_local_work_directory_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("x\n")
    workdir.store_logs(str(tmp_path), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_json_is_written_at_once_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    workdir.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        workdir.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
