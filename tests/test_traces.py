"""D3, L2: a trace that cannot be written is one warning, and nothing is written through a link."""

import errno
import os
import pathlib
from collections.abc import Iterator

import jax
import pytest

from gptjax.traces import profiled
from tests.helpers import failing, os_error


@pytest.fixture(autouse=True)
def _no_trace_is_left_running() -> Iterator[None]:
    yield
    with pytest.raises(RuntimeError, match="No profile started"):
        jax.profiler.stop_trace()


def entries(directory: pathlib.Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_trace_is_written_where_tensorboard_looks_for_it(said, tmp_path):
    for name in ("first", "second"):
        with profiled(name == "first", str(tmp_path)):
            jax.numpy.ones(3).block_until_ready()
    assert entries(tmp_path) == ["profile"]
    assert len(list((tmp_path / "profile" / "plugins" / "profile").glob("*/*.xplane.pb"))) == 1
    assert said == [f"profile written to {tmp_path}/profile"]


@pytest.mark.faults
def test_l2_link_in_place_of_the_profile_is_not_followed(said, tmp_path):
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    run.mkdir()
    with profiled(wanted=True, directory=str(run)):
        (run / "profile").symlink_to(outside)
    assert entries(outside) == []
    assert entries(run) == ["profile"]
    [line] = said
    assert line.startswith(f"{run}/profile: no trace was written: ")
    assert "is a symbolic link, not a directory" in line


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("tempfile.mkdtemp", os_error(errno.EPERM), "Operation not permitted"),
        (
            "jax.profiler.start_trace",
            RuntimeError("FAILED_PRECONDITION: no directory"),
            "FAILED_PRECONDITION: no directory",
        ),
        ("os.makedirs", os_error(errno.EPERM), "Operation not permitted"),
        ("os.rename", os_error(errno.EPERM), "Operation not permitted"),
    ],
)
def test_d3_trace_that_cannot_be_written_is_one_warning(name, error, reason, said, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(f"gptjax.traces.{name}", failing(error))
        with profiled(wanted=True, directory=str(tmp_path)):
            pass
    assert said == [f"{tmp_path}/profile: no trace was written: {reason}; training continues"]
    assert not any(name.startswith("profile-") for name in os.listdir(tmp_path))


@pytest.mark.faults
def test_d3_failed_trace_keeps_the_error_of_its_block(said, tmp_path):
    (tmp_path / "profile").touch()
    with pytest.raises(KeyError, match="of the block"), profiled(wanted=True, directory=str(tmp_path)):
        raise KeyError("of the block")
    assert "is a file, not a directory" in said[0]
