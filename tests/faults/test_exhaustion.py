"""R1: memory that runs out ends a command with 71, the size that was asked for, and what helps."""

import re
import subprocess
import sys

import jax
import pytest

from gptjax import setup
from gptjax.errors import OutOfMemoryError
from gptjax.exhaustion import bytes_asked_for
from gptjax.train import naming_what_needs_memory
from tests.helpers import raises

pytestmark = pytest.mark.faults
TOLD = {
    "RESOURCE_EXHAUSTED: Out of memory allocating 4398046511104 bytes.": 4398046511104,
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12884901888 bytes.": 12884901888,
    "RESOURCE_EXHAUSTED: Failed to allocate request for 2.00GiB (2147483648B) on device ordinal 0": 2147483648,
    "RESOURCE_EXHAUSTED: Attempting to allocate 1.50G. That was not possible. There are 1.2G free.": 1.5 * 2**30,
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm.": 20.5 * 2**30,
    "RESOURCE_EXHAUSTED: something else": 0,
}


@pytest.mark.parametrize("text", TOLD)
def test_r1_requested_bytes_are_parsed_from_jax_errors(text):
    assert bytes_asked_for(jax.errors.JaxRuntimeError(text)) == TOLD[text]
    assert bytes_asked_for(jax.errors.JaxRuntimeError(text.replace("RESOURCE_EXHAUSTED", "INTERNAL"))) is None


def test_r1_out_of_memory_error_states_size_estimate_and_remedies(tiny_run):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4398046511104 bytes.")
    with raises(OutOfMemoryError) as caught, naming_what_needs_memory(tiny_run):
        raise error
    assert re.search(r"4\.4 TB .*\d [kM]B of state and \d\S* [kM]B", caught.value.errors[0].problem)
    micro = tiny_run.config.data.global_batch_size // tiny_run.num_microbatches
    now = f"train.micro_batch_size={micro // 2} (now {micro})"
    order = [now, "compute.loss_chunk=", "compute.remat=full", "mesh.fsdp is 1, of 1 devices"]
    places = [caught.value.remedy.index(part) for part in order]
    assert places == sorted(places)
    with pytest.raises(jax.errors.JaxRuntimeError), naming_what_needs_memory(tiny_run):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")


def test_r1_suggested_micro_batch_divides_the_present_one(tiny_run, monkeypatch):
    monkeypatch.setattr(setup, "estimated_memory", lambda run: (1.0, 1.0, 9))
    assert "--config.train.micro_batch_size=3 (now 9)" in setup.out_of_memory_error(tiny_run, 0).remedy


ASKING = """
import numpy as np
from gptjax.cli import run_cli
run_cli(lambda arguments: np.empty(2**50))
"""


def test_r1_out_of_memory_in_any_command_exits_71():
    result = subprocess.run([sys.executable, "-c", ASKING], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 71
    assert re.fullmatch("error: out of memory: 9,007 TB .*; .*\n", result.stderr)
