import json
import os
import shutil
import types

import numpy as np
import pytest

from gptjax.checkpoint import Checkpointer, load_params, save_params
from gptjax.config import GPTConfig, from_dict
from gptjax.convert import huggingface, native
from gptjax.convert.weights import read_leaves, read_tensors
from gptjax.data.tokenizer import load_tokenizer, make_tokenizer
from gptjax.errors import DataError
from tests.convert.models import CONFIG, write_hf


@pytest.fixture
def imported(tmp_path):
    """A work directory made of a model in Hugging Face's form, and its tensors."""
    tensors = write_hf(tmp_path / "hf", dtype="bfloat16")
    weights = huggingface.read(str(tmp_path / "hf"), origin="hf:x")
    (tmp_path / "run").mkdir()
    native.write(str(tmp_path / "run"), str(tmp_path / "run"), weights, read_tensors(weights))
    return tmp_path / "run", tensors


def read(path):
    return native.read(str(path))


def test_the_way_back_is_exact_and_remembers_the_dtype(imported):
    workdir, tensors = imported
    weights = read(workdir)
    assert weights.origin == f"gptjax:{workdir}@0"
    assert (weights.dtype, weights.config) == ("bfloat16", GPTConfig(8, 50, 2, 2, 16, dropout=0.1))
    found = dict(read_tensors(weights))
    assert {t.dtype for t in found.values()} == {np.dtype("float32")}
    assert {n: t.astype("bfloat16").tobytes() for n, t in found.items()} == {n: t.tobytes() for n, t in tensors.items()}


def test_the_trainer_s_own_reader_takes_it(imported):
    workdir, tensors = imported
    config, params, step = load_params(str(workdir))
    assert (step, config.model.n_layer, config.data.tokenizer) == (0, 2, "gpt2")
    assert np.array_equal(params["wte"]["embedding"][:50], tensors["wte.weight"].astype(np.float32))
    assert not np.asarray(params["wte"]["embedding"][50:]).any()
    assert json.loads((workdir / "config.json").read_text()) == config.to_dict()


def test_a_directory_and_a_checkpoint_in_it_are_the_same(imported):
    workdir, _ = imported
    tensors = [dict(read_tensors(read(place))) for place in (workdir, workdir / "checkpoints" / "0")]
    assert {n: t.tobytes() for n, t in tensors[0].items()} == {n: t.tobytes() for n, t in tensors[1].items()}
    assert read(f"{workdir}@0").origin == read(workdir / "checkpoints" / "0").origin == f"gptjax:{workdir}@0"


def test_an_at_sign_in_a_name_is_no_step(imported):
    workdir, _ = imported
    twin = workdir.rename(workdir.with_name("me@home"))
    assert read(twin).origin == f"gptjax:{twin}@0"
    twin = twin.rename(twin.with_name("run@5"))
    assert read(twin).origin == f"gptjax:{twin}@0"
    assert read(f"{twin}@0").origin == f"gptjax:{twin}@0"


def test_what_is_not_there_is_told(imported, tmp_path):
    workdir, _ = imported
    with pytest.raises(DataError, match=r"no checkpoint of step 7; there are: 0"):
        read(f"{workdir}@7")
    with pytest.raises(DataError, match="no such directory"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no checkpoint; there are: none"):
        read(tmp_path / "empty")


@pytest.mark.parametrize("folder", [False, True])
def test_a_link_in_a_checkpoint_is_refused(imported, tmp_path, folder):
    """Else it would be read, wherever it leads."""
    workdir, _ = imported
    step = workdir / "checkpoints" / "0"
    place = next(p for p in sorted(step.rglob("*")) if p.is_dir() == folder)
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=f"damaged: '{place.name}' is a link"):
        read(workdir)


def rewrite_record(workdir, **model):
    """Gives a checkpoint another config, with a checksum that fits: what a hostile one would have."""
    record = Checkpointer(str(workdir)).read_record(0)
    config = record.config | {"model": record.config["model"] | model}
    shutil.rmtree(workdir / "checkpoints" / "0")
    params = [("wte/embedding", np.zeros((128, 16), np.float32))]
    save_params(str(workdir), params, config=types.SimpleNamespace(to_dict=lambda: config), history={})


@pytest.mark.parametrize(
    "said",
    [[1], {"dtype": "int8", "history": 3}, {"dtype": ["x"], "history": {"step": "x", "loss": float("nan"), "data": 1}}],
)
def test_an_import_that_says_nonsense_of_its_source_is_read_without_that(imported, said):
    workdir, _ = imported
    weights = read(workdir)
    leaves, config = list(read_leaves(weights, read_tensors(weights))), Checkpointer(str(workdir)).read_record(0).config
    shutil.rmtree(workdir / "checkpoints" / "0")
    save_params(str(workdir), leaves, config=from_dict(config), history={"imported": said})
    weights = read(workdir)
    assert (weights.dtype, weights.history) == ("float32", {})


def test_a_record_of_another_shape_is_damaged(imported):
    workdir, _ = imported
    weights = read(workdir)
    leaves, config = list(read_leaves(weights, read_tensors(weights))), Checkpointer(str(workdir)).read_record(0).config
    shutil.rmtree(workdir / "checkpoints" / "0")
    save_params(str(workdir), leaves, config=from_dict(config), history=[1])
    with pytest.raises(DataError, match="damaged: record unreadable"):
        read(workdir)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"n_layer": 10**9}, "n_layer=1000000000: expected at most"),
        ({"n_layer": 0}, "damaged: model.n_layer=0: must be at least 1"),
        ({"n_embd": "x"}, "damaged: model.n_embd='x': expected a whole number"),
        ({"n_embd": 2**31, "n_head": 2}, "damaged: wte/embedding"),
    ],
)
def test_a_record_that_promises_too_much(imported, model, reason):
    workdir, _ = imported
    rewrite_record(workdir, **model)
    with pytest.raises(DataError, match=reason):
        list(read_tensors(read(workdir)))


def test_one_flipped_bit_in_any_data_file_is_found(imported):
    workdir, tensors = imported
    stored = workdir / "checkpoints" / "0" / "params"
    files = [path for path in stored.rglob("*") if path.is_file() and path.name[0] in "0123456789"]  # chunks of arrays
    assert len(files) == 16
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[:-20] + bytes([whole[-20] ^ 16]) + whole[-19:])
        with pytest.raises(DataError, match=r"damaged: .* is (not what was saved|unreadable)"):
            dict(read_tensors(read(workdir)))
        path.write_bytes(whole)
    assert len(dict(read_tensors(read(workdir)))) == len(tensors)


def test_a_damaged_record_names_the_other_checkpoints(twin, tmp_path):
    shutil.copytree(twin, tmp_path / "run")
    steps = Checkpointer(str(tmp_path / "run")).steps()
    (tmp_path / "run" / "checkpoints" / str(steps[-1]) / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(DataError, match=rf"{steps[-1]}: damaged: record unreadable .* take another with @STEP: 4, 8"):
        read(tmp_path / "run")
    assert read(f"{tmp_path}/run@8").origin.endswith("run@8")


def test_a_trained_run_says_what_was_trained_and_how_well(twin):
    weights = read(f"{twin}@8")
    history = weights.history
    rows = [json.loads(line) for line in (twin / "metrics.jsonl").read_text().splitlines()]
    expected = next(row["val_loss"] for row in rows if row["step"] == 8 and "val_loss" in row)
    assert history["val_loss"] == expected
    assert history["loss"] == next(row["loss"] for row in rows if row["step"] == 8 and "loss" in row)
    assert (history["step"], history["tokens"]) == (8, 8 * 8 * 32)
    assert weights.tokenizer.sha256 == load_tokenizer("bytes").sha256
    assert weights.dtype == "float32"


def test_a_tokenizer_of_one_s_own_is_kept_by_its_file(tmp_path):
    write_hf(tmp_path / "hf", config=CONFIG | {"vocab_size": 258})
    saved = json.loads(load_tokenizer_bytes(tmp_path))
    saved["name"], saved["tokens"] = "mine", [*saved["tokens"], "YWI="]
    (tmp_path / "mine.json").write_text(json.dumps(saved))
    weights = huggingface.read(str(tmp_path / "hf"), origin="hf:x")
    weights = type(weights)(**vars(weights) | {"tokenizer": load_tokenizer(str(tmp_path / "mine.json"))})
    (tmp_path / "new").mkdir()
    native.write(str(tmp_path / "new"), str(tmp_path / "run"), weights, read_tensors(weights))
    (tmp_path / "new").rename(tmp_path / "run")
    config, _, _ = load_params(str(tmp_path / "run"))
    assert config.data.tokenizer == str(tmp_path / "run" / "tokenizer.json")
    assert load_tokenizer(config.data.tokenizer).sha256 == weights.tokenizer.sha256


def test_a_tokenizer_of_one_s_own_may_have_the_name_of_a_built_in_one():
    mine = make_tokenizer("bytes", ".", {bytes([byte]): byte for byte in range(256)})
    assert native._tokenizer_name(mine, "run") == os.path.abspath("run/tokenizer.json")
    assert native._tokenizer_name(load_tokenizer("bytes"), "run") == "bytes"
    assert native._tokenizer_name(None, "run") == "gpt2"


def load_tokenizer_bytes(folder):
    load_tokenizer("bytes").save(str(folder / "bytes.json"))
    return (folder / "bytes.json").read_text()
