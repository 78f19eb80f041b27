import os
import signal
import subprocess
import sys
import threading

import pytest

from gptjax import runtime
from gptjax.errors import ConfigError


def parser() -> runtime.Parser:
    made = runtime.Parser("what it does")
    made.add_argument("--workdir")
    return made


def test_overrides_come_in_one_argument_or_two():
    arguments = ["--config.model.n_layer=6", "--config.data.source", "text:a=b", "--config.init_from="]
    expected = {"model.n_layer": "6", "data.source": "text:a=b", "init_from": ""}
    assert runtime.parse_overrides(parser(), arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.model.n_layer"], "--config.model.n_layer: needs a value, as in --config.model.n_layer=VALUE"),
        (["--config.a", "--config.b=1"], "--config.a: needs a value, as in --config.a=VALUE"),
        (["--wokdir=x"], "--wokdir=x: no such flag; nearest: --workdir"),
        (["stray"], "stray: no such flag"),
    ],
)
def test_other_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError) as caught:
        runtime.parse_overrides(parser(), arguments)
    assert str(caught.value) == message


def test_flags_are_never_abbreviated_and_never_end_the_process():
    with pytest.raises(ConfigError, match="--work=x: no such flag; nearest: --workdir"):
        parser().parse_strictly(["--work=x"])
    with pytest.raises(ConfigError, match="expected one argument"):
        parser().parse_strictly(["--workdir"])


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
    ],
)
def test_a_cluster_is_known_by_its_environment(environment, expected):
    assert runtime.is_cluster(environment) is expected


def test_a_fault_happens_at_the_passage_that_was_asked_for(monkeypatch: pytest.MonkeyPatch):
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    runtime.fault_point("step")
    monkeypatch.setenv("GPTJAX_FAULT", "step:2:term")
    runtime.fault_point("save")
    runtime.fault_point("step")
    assert sent == []
    runtime.fault_point("step")
    runtime.fault_point("step")
    assert sent == [(os.getpid(), signal.SIGTERM)]


def test_what_has_come_to_its_end_is_not_ended_by_its_watcher(monkeypatch):
    exits, asked, past = [], threading.Event(), threading.Event()
    monkeypatch.setattr(runtime.os, "_exit", exits.append)

    def over():
        asked.set()
        return past.wait(5)

    with runtime._ending_after(60, lambda: "waiting", over=over):
        assert asked.wait(5)
    past.set()
    for thread in threading.enumerate():
        if thread.name == "joining":
            thread.join(5)
    assert exits == []


def test_coroutines_that_orbax_forgets_when_a_save_fails_are_not_told():
    source = """
import warnings
from gptjax import runtime
runtime.start_logging()
async def forgotten(): pass
forgotten()
warnings.warn("another", RuntimeWarning)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=60)
    assert "never awaited" not in done.stderr
    assert "tracemalloc" not in done.stderr
    assert "another" in done.stderr


@pytest.mark.parametrize(
    ("text", "told"), [*((text + ": (slice(0, 8),)", False) for text in runtime.FORGOTTEN), ("the disk is gone", True)]
)
def test_what_libraries_forget_is_not_told(text, told, monkeypatch, capsys):
    class Forgotten:
        def __del__(self):
            raise ValueError(text)

    monkeypatch.setattr(sys, "unraisablehook", runtime.tell_unraisable)
    Forgotten()
    assert (text in capsys.readouterr().err) == told
