"""V: the real command says one line and leaves nothing."""

import os
import subprocess
import sys

import pytest

from gptjax.errors import BAD_CONFIG, BAD_DATA
from tests import runs
from tests.convert import models
from tests.faults.conversion.shared import QKV, set_header, spoil_bits
from tests.helpers import snapshot

pytestmark = pytest.mark.faults


def write_transposed(root):
    models.write_hf(root / "model", changes={QKV: lambda t: t.T})
    return f"hf:{root}/model"


def write_nan(root):
    models.write_hf(root / "model", changes={QKV: spoil_bits})
    return f"hf:{root}/model"


def write_long_header(root):
    models.write_hf(root / "model")
    file = root / "model" / "model.safetensors"
    models.write_header(file, *models.read_header(file), length=2**63)
    return f"hf:{root}/model"


def write_many_layers(root):
    models.write_llmc(root / "model.bin")
    set_header(root / "model.bin", at4=2**31 - 1)
    return f"llmc:{root}/model.bin"


def write_not_flax(root):
    models.write_msgpack(root / "model")
    (root / "model" / "flax_model.msgpack").write_bytes(b"\x91" * 10**6)
    return f"msgpack:{root}/model"


COMMANDS = {
    "transposed": (write_transposed, BAD_DATA, "48x16, expected 16x48"),
    "NaN": (write_nan, BAD_DATA, f"{QKV}: 5 values"),
    "header of 2^63": (write_long_header, BAD_DATA, "/model.safetensors: "),
    "2^31 layers": (write_many_layers, BAD_DATA, "/model.bin: "),
    "deep msgpack": (write_not_flax, BAD_DATA, "/flax_model.msgpack: "),
    "unknown format": (lambda root: "pt:model", BAD_CONFIG, "--from=pt:model"),
}


@pytest.mark.parametrize("what", COMMANDS)
def test_v_failed_command_prints_one_line_and_writes_nothing(what, tmp_path):
    write, code, named = COMMANDS[what]
    source = write(tmp_path)
    before = snapshot(tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(runs.OFFLINE), str(runs.REPOSITORY)])}
    command = [sys.executable, "-m", "gptjax.convert", f"--from={source}", f"--to=gptjax:{tmp_path}/run"]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert named in line
    assert snapshot(tmp_path) == before
