import jax
import numpy as np
import pytest
from flax import serialization

from gptjax.convert import msgpack
from gptjax.convert.weights import read_tensors
from tests.convert.models import CONFIG, make_tensors, write_msgpack


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("named", ["directory", "file"])
def test_it_reads_what_flax_wrote(tmp_path, prefix, named):
    tensors = write_msgpack(tmp_path, prefix=prefix)
    place = tmp_path if named == "directory" else tmp_path / msgpack.FILE
    weights = msgpack.read(str(place), origin="msgpack:x")
    found = dict(read_tensors(weights))
    assert {n: t.tobytes() for n, t in found.items()} == {n: t.tobytes() for n, t in tensors.items()}


def test_flax_itself_writes_such_a_file(tmp_path):
    """The file that the other tests read is one that flax could have written."""
    write_msgpack(tmp_path, prefix="")
    tree = serialization.msgpack_restore((tmp_path / msgpack.FILE).read_bytes())
    again = serialization.msgpack_restore(serialization.msgpack_serialize(tree))
    assert jax.tree.all(jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), tree, again))
    kernel = tree["h"]["0"]["attn"]["c_attn"]["kernel"]
    assert np.array_equal(kernel.T, make_tensors()["h.0.attn.c_attn.weight"]), "FlaxConv1D keeps [out, in]"


def test_an_untied_head_is_a_dense_layer(tmp_path):
    head_VD = np.arange(800, dtype=np.float32).reshape(50, 16)
    untied = CONFIG | {"tie_word_embeddings": False}
    write_msgpack(tmp_path, config=untied, extra={"lm_head.kernel": head_VD})  # which writes kernels transposed
    weights = msgpack.read(str(tmp_path), origin="msgpack:x")
    assert np.array_equal(weights.tensors["lm_head.weight"].read(), head_VD)
