"""V: missing shards, and links or names that lead out of the model's directory, are refused."""

import json
import os
import re

import pytest

from tests.convert import models
from tests.faults.conversion.shared import assert_equal_bits

pytestmark = pytest.mark.faults


def test_v_missing_shard_is_reported(model, refuse):
    models.write_hf(model, num_shards=3)
    (model / "model-00002-of-00003.safetensors").unlink()
    refuse(f"hf:{model}", field=model / "model.safetensors.index.json", match="model-00002-of-00003.safetensors is")


def test_v_tensor_missing_from_its_shard_is_reported(model, refuse):
    models.write_hf(model, num_shards=2)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["transformer.h.7.x"] = "model-00001-of-00002.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(f"hf:{model}", field=model / "model-00001-of-00002.safetensors", match="transformer.h.7.x ")


@pytest.mark.parametrize("name", ["../other/model.safetensors", "OTHER/model.safetensors", "", ".", "a\nb", "\0", "\\"])
def test_v_index_with_an_outside_file_name_is_refused(name, model, refuse, tmp_path):
    models.write_hf(tmp_path / "other")
    tensors = models.write_hf(model)
    (model / "model.safetensors").unlink()
    shard = name.replace("OTHER", f"{tmp_path}/other")
    index = {"weight_map": {models.PREFIX + tensor: shard for tensor in tensors}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(f"hf:{model}", field=model, match=re.escape(repr(shard)))


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": ["a"]}']
)
def test_v_invalid_index_is_refused(index, hf, refuse):
    (hf / "model.safetensors").unlink()
    (hf / "model.safetensors.index.json").write_text(index)
    refuse(f"hf:{hf}", field=hf / "model.safetensors.index.json")


@pytest.mark.parametrize("kind", ["absolute", "relative", "directory", "chain"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "vocab.json", "model-00001-of-00002.safetensors"]
)
def test_v_link_out_of_the_directory_is_refused(kind, name, model, refuse, tmp_path):
    models.write_hf(model, num_shards=2 if "-of-" in name else 1)
    secret = tmp_path / "secret"
    secret.mkdir()
    if (model / name).exists():
        (model / name).rename(secret / name)
    else:
        (secret / name).write_text("{}")
    if kind == "directory":
        (model / "sub").symlink_to(secret)
        (model / name).symlink_to(f"sub/{name}")
    elif kind == "chain":
        (model / "hop").symlink_to(secret / name)
        (model / name).symlink_to("hop")
    else:
        (model / name).symlink_to(secret / name if kind == "absolute" else f"../secret/{name}")
    refuse(f"hf:{model}", field=model, match=f"'{name}' is a link")


def test_v_msgpack_link_out_of_the_directory_is_refused(model, refuse, tmp_path):
    models.write_msgpack(model)
    (model / "flax_model.msgpack").rename(tmp_path / "secret")
    (model / "flax_model.msgpack").symlink_to(tmp_path / "secret")
    refuse(f"msgpack:{model}", field=model, match="'flax_model.msgpack' is a link")


@pytest.mark.parametrize("num_shards", [1, 2])
def test_v_a_snapshot_of_the_hub_cache_is_accepted(num_shards, accept, tmp_path):
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("c" * 40)
    tensors = models.write_hf(snapshot, num_shards=num_shards)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(repository / "blobs" / f"{number:040x}")
        path.symlink_to(f"../../blobs/{number:040x}")
    assert_equal_bits(accept(f"hf:{snapshot}"), tensors)


def test_v_pipe_in_place_of_a_file_is_refused(hf, refuse):
    (hf / "model.safetensors").unlink()
    os.mkfifo(hf / "model.safetensors")
    refuse(f"hf:{hf}", field=hf, match="'model.safetensors'")
