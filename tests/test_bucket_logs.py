"""The logs of a run in a bucket."""

import json
from pathlib import Path

import pytest
from etils import epath

from gptjax import bucket_logs
from tests.helpers import failing


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket by name that is a folder in fact: only the way to reach it is made up."""
    folder = tmp_path / "bucket"
    folder.mkdir()
    real = epath.Path
    monkeypatch.setattr(bucket_logs.epath, "Path", lambda p: real(str(p).replace("gs://bucket", str(folder))))
    return "gs://bucket"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def test_stored_logs_are_fetched_on_another_machine(bucket, here, tmp_path):
    there = tmp_path / "there"
    (here / "metrics.jsonl").write_text('{"step": 1}\n')
    (here / "tokenizer.json").write_text("{}")
    bucket_logs.store_logs(str(here), bucket)
    bucket_logs.fetch_logs(bucket, str(there))
    assert (there / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (there / "tokenizer.json").read_text() == "{}"
    assert not (there / "samples.txt").exists()


def test_answers_to_tasks_are_stored_and_fetched(bucket, here, tmp_path):
    (here / "results").mkdir()
    for answers in ("{}", '{"model": "step 8"}'):
        (here / "results" / "tasks.json").write_text(answers)
        bucket_logs.store_logs(str(here), bucket)
    bucket_logs.fetch_logs(bucket, str(tmp_path / "there"))
    assert (tmp_path / "there" / "results" / "tasks.json").read_text() == '{"model": "step 8"}'


@pytest.mark.parametrize("removed", [False, True])
def test_machine_that_is_behind_takes_all_logs_of_the_bucket(bucket, here, tmp_path, removed):
    """Its own earlier samples and answers would otherwise replace those of the bucket at its next save."""
    there = tmp_path / "there"
    for machine, step in ((here, 1), (there, 2)):
        (machine / "results").mkdir(parents=True)
        (machine / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
        (machine / "results" / "tasks.json").write_text(f'{{"model": "step {step}"}}')
        (machine / "samples.txt").write_text("".join(f"--- step {n}\ntext\n" for n in range(1, step + 1)))
        bucket_logs.store_logs(str(machine), bucket)
    if removed:
        (here / "metrics.jsonl").unlink()
    bucket_logs.fetch_logs(bucket, str(here))
    bucket_logs.store_logs(str(here), bucket)
    stored = tmp_path / "bucket"
    for directory in (here, stored):
        assert (directory / "results" / "tasks.json").read_text() == '{"model": "step 2"}'
        assert "step 2" in (directory / "samples.txt").read_text()


def test_fetching_never_overwrites_newer_logs(bucket, here):
    (here / "metrics.jsonl").write_text("old\n")
    bucket_logs.store_logs(str(here), bucket)
    (here / "metrics.jsonl").write_text("newer\n")
    bucket_logs.fetch_logs(bucket, str(here))
    assert (here / "metrics.jsonl").read_text() == "newer\n"


def test_a_local_work_directory_is_not_copied(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("x\n")
    bucket_logs.store_logs(str(tmp_path), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def write_rows(directory: Path, steps: range) -> None:
    (directory / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": s / 7}) + "\n" for s in steps))


def steps_of(directory: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.faults
def test_d4_removed_local_logs_delete_nothing_in_the_bucket(bucket, here, tmp_path):
    there = tmp_path / "bucket"
    write_rows(here, range(1, 101))
    (here / "samples.txt").write_text("--- step 50\nold\n--- step 100\nold, too\n")
    bucket_logs.store_logs(str(here), bucket)
    (here / "metrics.jsonl").write_text("")  # made again, nothing written yet
    (here / "samples.txt").unlink()
    bucket_logs.store_logs(str(here), bucket)
    assert steps_of(there) == list(range(1, 101))
    for last in (102, 104):
        write_rows(here, range(101, last))
        (here / "samples.txt").write_text("".join(f"--- step {step}\nnew\n" for step in range(150, 50 * last, 5000)))
        bucket_logs.store_logs(str(here), bucket)
        assert steps_of(there) == list(range(1, last))
        samples = (there / "samples.txt").read_text()
        assert samples == "--- step 50\nold\n--- step 100\nold, too\n" + (here / "samples.txt").read_text()


def test_repeated_steps_replace_those_in_the_bucket(bucket, here, tmp_path):
    write_rows(here, range(1, 101))
    bucket_logs.store_logs(str(here), bucket)
    write_rows(here, range(1, 61))  # cut at a restart
    bucket_logs.store_logs(str(here), bucket)
    assert steps_of(tmp_path / "bucket") == list(range(1, 61))
    write_rows(here, range(41, 51))
    bucket_logs.store_logs(str(here), bucket)
    assert steps_of(tmp_path / "bucket") == list(range(1, 51))


def test_returning_machine_fetches_rows_added_by_others(bucket, tmp_path):
    """It went from machine A to B and back: A's own metrics lack what B did."""
    a, b = tmp_path / "a", tmp_path / "b"
    for directory, steps in ((a, range(1, 11)), (b, range(1, 21))):
        bucket_logs.fetch_logs(bucket, str(directory))
        write_rows(directory, steps)
        bucket_logs.store_logs(str(directory), bucket)
    for directory in (a, b):
        (directory / "tensorboard").mkdir()
        bucket_logs.fetch_logs(bucket, str(directory))
    assert steps_of(a) == list(range(1, 21))
    assert not (a / "tensorboard").exists(), "its events are re-created"
    assert (b / "tensorboard").exists(), "it lacks nothing"


@pytest.mark.faults
def test_d3_directory_in_the_way_of_logs_gives_only_a_warning(bucket, tmp_path, said):
    (tmp_path / "file").write_text("")
    bucket_logs.fetch_logs(bucket, str(tmp_path / "file" / "run"))
    [line] = said
    assert "its logs could not be copied: " in line


@pytest.mark.faults
def test_d3_unreachable_bucket_gives_only_a_warning(bucket, tmp_path, monkeypatch, said):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    error = type("HttpError", (Exception,), {})("403, Forbidden")
    monkeypatch.setattr(type(epath.Path(tmp_path)), "exists", failing(error))
    bucket_logs.store_logs(str(tmp_path), bucket)
    bucket_logs.fetch_logs(bucket, str(tmp_path))
    assert said == ["gs://bucket: its logs could not be copied: 403, Forbidden; the run continues"] * 2
