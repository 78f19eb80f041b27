"""X1: damaged shards end a run with 65 and the name of the shard, before or while it trains, and never in a NaN."""

import math
import pathlib
import re
import shutil
import struct

import pytest

from gptjax.data import tokens as tokens_module
from gptjax.data.dataset import Dataset
from gptjax.data.header import HEADER_BYTES
from gptjax.data.tokenizer import load_tokenizer
from gptjax.data.tokens import open_split
from gptjax.errors import DataError
from tests.helpers import raises
from tests.runs import checkpoint_steps, rows

pytestmark = pytest.mark.faults
TOKEN = 1000  # of the shard, which gets an id that is none
SHARD = "train_000000.bin"


def put(data, at, value, form):
    struct.pack_into(form, data, at, value)
    return data


@pytest.fixture
def data(lab, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(lab.data, tmp_path / "data"))


def test_x1_command_exits_65_for_a_damaged_shard(lab, data, tmp_path):
    path = data / SHARD
    path.write_bytes(put(bytearray(path.read_bytes()), HEADER_BYTES + 2 * TOKEN, 300, "<H"))
    line = lab.refusal(tmp_path / "run", f"data.path={data}", expect=65)
    assert re.match(f"{path}: .* {TOKEN} .* 300, .* 257 ids; ", line)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_x1_bad_id_in_a_large_shard_ends_the_run(data, tiny_run, train_here, monkeypatch, tmp_path):
    """Too much to be hashed at every start: the run meets it as it trains, and no loss is ever made of it."""
    monkeypatch.setattr(tokens_module, "SMALL_BYTES", 0)
    monkeypatch.setattr(tokens_module, "EDGE_TOKENS", 100)
    windows = tiny_run.train_data.window_ids(5)  # of the update that makes step 6
    token = int(windows[3]) * tiny_run.config.model.block_size + 7
    path = data / SHARD
    path.write_bytes(put(bytearray(path.read_bytes()), HEADER_BYTES + 2 * token, 300, "<H"))
    split = open_split(str(data), "train", tokenizer=load_tokenizer("bytes"))
    bad = Dataset(split, tiny_run.config.model.block_size, tiny_run.config.data.global_batch_size, 0)
    with raises(DataError, str(path), match=f"token {token} is id 300"):
        train_here(tmp_path / "run", parts={"train_data": bad})
    found = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert 3 <= len(found) <= 5
    assert all(loss is not None and math.isfinite(loss) for loss in found)
    assert checkpoint_steps(tmp_path / "run") == [4]
