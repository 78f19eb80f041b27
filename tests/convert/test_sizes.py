"""The four published sizes, in full: there and back byte for byte, in at most 1.5 times the memory of the weights."""

import hashlib
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open

from tests.convert.models import make_config, make_shapes, write_header
from tests.runs import REPOSITORY

pytestmark = pytest.mark.large
SIZES = {"small": (12, 12, 768), "medium": (24, 16, 1024), "large": (36, 20, 1280), "xl": (48, 25, 1600)}
BLOCK = 2**24  # random values that are repeated: making them all would take longer than converting them


def write_random(directory, config):
    """Writes a model in Hugging Face's form, a tensor at a time; returns the hash of each tensor's bytes."""
    block = (0.02 * np.random.default_rng(0).standard_normal(BLOCK)).astype(np.float32)
    header, end, hashes = {"__metadata__": {"format": "pt"}}, 0, {}
    shapes = make_shapes(config)
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header["transformer." + name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    make_config(directory, config)
    write_header(directory / "model.safetensors", header, b"")
    with open(directory / "model.safetensors", "ab") as file:
        for number, (name, shape) in enumerate(shapes.items()):
            data = np.resize(np.roll(block, 1009 * number), math.prod(shape)).tobytes()
            hashes["transformer." + name] = hashlib.sha256(data).hexdigest()
            file.write(data)
    return hashes


def read_hashes(path):
    hashes = {}
    for name in open_names(path):
        with safe_open(path, framework="np", backend="pread") as file:
            hashes[name] = hashlib.sha256(file.get_tensor(name).tobytes()).hexdigest()
    return hashes


def open_names(path):
    with safe_open(path, framework="np", backend="pread") as file:
        return list(file.keys())


# The command, which tells its own peak at the end: what wait4 tells of a child starts with the memory of its parent.
TELLING = """
import atexit, os, re
from gptjax.convert.__main__ import cli
def tell():
    with open("/proc/self/status") as status, open(os.environ["PEAK"], "w") as out:
        out.write(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1])
atexit.register(tell)
cli()
"""


def convert(folder, source, target):
    """Returns the most memory that the command took, in bytes."""
    command = [sys.executable, "-c", TELLING, f"--from={source}", f"--to={target}"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": "", "PEAK": str(folder / "peak")}
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    return 1024 * int((folder / "peak").read_text())


@pytest.mark.parametrize("size", SIZES)
def test_round_trip_is_byte_equal_within_the_memory_limit(tmp_path, size):
    n_layer, n_head, n_embd = SIZES[size]
    config = {"vocab_size": 50257, "n_positions": 1024, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
    expected = write_random(tmp_path / "a", config)
    model_bytes = (tmp_path / "a" / "model.safetensors").stat().st_size
    peaks = [convert(tmp_path, f"hf:{tmp_path}/a", f"gptjax:{tmp_path}/b")]
    shutil.rmtree(tmp_path / "a")
    peaks += [convert(tmp_path, f"gptjax:{tmp_path}/b", f"hf:{tmp_path}/c")]
    shutil.rmtree(tmp_path / "b")
    found = read_hashes(tmp_path / "c" / "model.safetensors")
    shutil.rmtree(tmp_path / "c")
    assert found == expected
    assert max(peaks) <= 1.5 * model_bytes, [p / model_bytes for p in peaks]
