import dataclasses
import json
import os
import shutil
import types

import numpy as np
import pytest

from gptjax.checkpoint import Checkpointer
from gptjax.config import GPTConfig
from gptjax.convert import huggingface, native
from gptjax.convert.native import save_leaves
from gptjax.convert.weights import read_leaves, read_tensors
from gptjax.data.tokenizer import load_tokenizer, make_tokenizer
from gptjax.errors import DataError
from gptjax.params import rows
from gptjax.stored import load_params
from tests.convert.models import CONFIG, write_hf
from tests.helpers import raises


@pytest.fixture
def imported(tmp_path):
    """A work directory made of a model in Hugging Face's form, and its tensors."""
    tensors = write_hf(tmp_path / "hf", dtype="bfloat16")
    weights = huggingface.read(str(tmp_path / "hf"), origin="hf:x")
    (tmp_path / "run").mkdir()
    native.write(str(tmp_path / "run"), str(tmp_path / "run"), weights, tensors=read_tensors(weights))
    return tmp_path / "run", tensors


def read(path):
    return native.read(str(path))


def test_import_reads_back_exactly_and_keeps_its_dtype(imported):
    workdir, tensors = imported
    weights = read(workdir)
    assert weights.origin == f"gptjax:{workdir}@0"
    assert (weights.dtype, weights.config) == ("bfloat16", GPTConfig(8, 50, 2, 2, 16, dropout=0.1))
    found = dict(read_tensors(weights))
    assert {t.dtype for t in found.values()} == {np.dtype("float32")}
    assert {n: t.astype("bfloat16").tobytes() for n, t in found.items()} == {n: t.tobytes() for n, t in tensors.items()}


def test_load_params_reads_an_import(imported):
    workdir, tensors = imported
    config, params, step = load_params(str(workdir))
    assert (step, config.model.n_layer, config.data.tokenizer) == (0, 2, "gpt2")
    assert np.array_equal(params["wte"]["embedding"][:50], tensors["wte.weight"].astype(np.float32))
    assert not np.asarray(params["wte"]["embedding"][50:]).any()
    assert json.loads((workdir / "config.json").read_text()) == config.to_dict()


def test_workdir_and_checkpoint_paths_give_the_same_weights(imported):
    workdir, _ = imported
    tensors = [dict(read_tensors(read(place))) for place in (workdir, workdir / "checkpoints" / "0")]
    assert {n: t.tobytes() for n, t in tensors[0].items()} == {n: t.tobytes() for n, t in tensors[1].items()}
    assert read(f"{workdir}@0").origin == read(workdir / "checkpoints" / "0").origin == f"gptjax:{workdir}@0"


def test_at_sign_in_a_directory_name_is_not_a_step(imported):
    workdir, _ = imported
    for name in ("me@home", "run@5"):
        workdir = workdir.rename(workdir.with_name(name))
        assert read(workdir).origin == f"gptjax:{workdir}@0"
    assert read(f"{workdir}@0").origin == f"gptjax:{workdir}@0"


def test_missing_checkpoint_or_directory_is_reported(imported, tmp_path):
    workdir, _ = imported
    (tmp_path / "empty").mkdir()
    with raises(DataError, str(workdir), match="step 7; available: 0"):
        read(f"{workdir}@7")
    for step in ("9" * 5000, "\u00b2"):
        with raises(DataError, f"{workdir}@{step}", match="no such directory"):
            read(f"{workdir}@{step}")
    with raises(DataError, f"{workdir}/checkpoints/\u00b2", match="no such directory"):
        read(workdir / "checkpoints" / "\u00b2")
    for place, problem in ((tmp_path / "nowhere", "no such directory"), (tmp_path / "empty", "available: none")):
        with raises(DataError, str(place), match=problem):
            read(place)


@pytest.mark.parametrize("folder", [False, True])
def test_a_link_in_a_checkpoint_is_refused(imported, tmp_path, folder):
    """Else it would be read, wherever it leads."""
    workdir, _ = imported
    step = workdir / "checkpoints" / "0"
    place = next(p for p in sorted(step.rglob("*")) if p.is_dir() == folder)
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with raises(DataError, str(step), match=f"'{place.name}' is a link"):
        read(workdir)


def rewrite(workdir, leaves, *, config=None, history):
    """Gives a checkpoint another config or history, with a checksum that fits: what a hostile one would have."""
    config = config or Checkpointer(str(workdir)).read_record(0).config
    shutil.rmtree(workdir / "checkpoints" / "0")
    leaves = [("params", *leaf) for leaf in leaves]
    save_leaves(str(workdir), leaves, config=types.SimpleNamespace(to_dict=lambda: config), history=history)


def rewrite_history(workdir, history):
    weights = read(workdir)
    rewrite(workdir, list(read_leaves(weights, read_tensors(weights))), history=history)


@pytest.mark.parametrize(
    "said",
    [[1], {"dtype": "int8", "history": 3}, {"dtype": ["x"], "history": {"step": "x", "loss": float("nan"), "data": 1}}],
)
def test_invalid_import_history_is_ignored(imported, said):
    workdir, _ = imported
    rewrite_history(workdir, {"imported": said})
    weights = read(workdir)
    assert (weights.dtype, weights.history) == ("float32", {})
    rewrite_history(workdir, [1])
    with raises(DataError, f"{workdir}/checkpoints/0", match="record unreadable"):
        read(workdir)


@pytest.mark.parametrize(
    ("model", "field", "problem"),
    [
        ({"n_layer": 10**9}, "gptjax:{}@0", "n_layer=1000000000"),
        ({"n_layer": 0}, "{}/checkpoints/0", "model.n_layer=0"),
        ({"n_embd": "x"}, "{}/checkpoints/0", "model.n_embd=x"),
        ({"n_embd": 2**31, "n_head": 2}, "{}/checkpoints/0", "wte/embedding"),
        ({"block_size": 300}, "{}/checkpoints/0", r"wpe/embedding .*\[128, 16\].*\[300, 16\]"),
    ],
)
def test_record_with_impossible_sizes_is_refused(imported, model, field, problem):
    workdir, _ = imported
    config = Checkpointer(str(workdir)).read_record(0).config
    leaves = [(row.path, np.zeros((128, 16), np.float32)) for row in rows(GPTConfig())]
    rewrite(workdir, leaves, config=config | {"model": config["model"] | model}, history={})
    with raises(DataError, field.format(workdir), match=problem):
        list(read_tensors(read(workdir)))


def test_one_flipped_bit_in_any_data_file_is_found(imported):
    workdir, tensors = imported
    stored = workdir / "checkpoints" / "0" / "params"
    files = [path for path in stored.rglob("*") if path.is_file() and path.name[0] in "0123456789"]  # chunks of arrays
    assert len(files) == 16
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[:-20] + bytes([whole[-20] ^ 16]) + whole[-19:])
        with raises(DataError, f"{workdir}/checkpoints/0", match="not what was saved|unreadable"):
            dict(read_tensors(read(workdir)))
        path.write_bytes(whole)
    assert len(dict(read_tensors(read(workdir)))) == len(tensors)


def test_a_damaged_record_names_the_other_checkpoints(reference, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    steps = Checkpointer(str(tmp_path / "run")).steps()
    newest = tmp_path / "run" / "checkpoints" / str(steps[-1])
    (newest / "_CHECKPOINT_METADATA").write_text("{}")
    with raises(DataError, str(newest), remedy="with @STEP: 4, 8", match="record unreadable"):
        read(tmp_path / "run")
    assert read(f"{tmp_path}/run@8").origin.endswith("run@8")


def test_trained_run_has_its_history_losses_and_tokenizer(reference):
    weights = read(f"{reference}@8")
    history = weights.history
    rows = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    expected = next(row["val_loss"] for row in rows if row["step"] == 8 and "val_loss" in row)
    assert history["val_loss"] == expected
    assert history["loss"] == next(row["loss"] for row in rows if row["step"] == 8 and "loss" in row)
    assert (history["step"], history["tokens"]) == (8, 8 * 8 * 32)
    assert weights.tokenizer.sha256 == load_tokenizer("bytes").sha256
    assert weights.dtype == "float32"


def test_custom_tokenizer_is_saved_in_the_work_directory(tmp_path):
    write_hf(tmp_path / "hf", config=CONFIG | {"vocab_size": 258})
    ranks = {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), b"ab"])}
    mine = make_tokenizer("mine", "(?s).+", ranks)
    weights = dataclasses.replace(huggingface.read(str(tmp_path / "hf"), origin="hf:x"), tokenizer=mine)
    (tmp_path / "new").mkdir()
    native.write(str(tmp_path / "new"), str(tmp_path / "run"), weights, tensors=read_tensors(weights))
    (tmp_path / "new").rename(tmp_path / "run")
    config, _, _ = load_params(str(tmp_path / "run"))
    assert config.data.tokenizer == str(tmp_path / "run" / "tokenizer.json")
    assert load_tokenizer(config.data.tokenizer).sha256 == mine.sha256


def test_custom_tokenizer_may_have_a_built_in_name():
    mine = make_tokenizer("bytes", ".", {bytes([byte]): byte for byte in range(256)})
    assert native._tokenizer_name(mine, "run") == os.path.abspath("run/tokenizer.json")
    assert native._tokenizer_name(load_tokenizer("bytes"), "run") == "bytes"
    assert native._tokenizer_name(None, "run") == "gpt2"
