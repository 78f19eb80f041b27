import numpy as np
import pytest

from gptjax.convert import msgpack
from gptjax.convert.weights import read_tensors
from tests.convert.models import CONFIG, write_msgpack


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("named", ["directory", "file"])
def test_flax_msgpack_is_read_from_a_directory_or_file(tmp_path, prefix, named):
    tensors = write_msgpack(tmp_path, prefix=prefix)
    place = tmp_path if named == "directory" else tmp_path / msgpack.FILE
    weights = msgpack.read(str(place), origin="msgpack:x")
    found = dict(read_tensors(weights))
    assert {n: t.tobytes() for n, t in found.items()} == {n: t.tobytes() for n, t in tensors.items()}


def test_untied_head_is_read_from_a_dense_kernel(tmp_path):
    head_VD = np.arange(800, dtype=np.float32).reshape(50, 16)
    untied = CONFIG | {"tie_word_embeddings": False}
    write_msgpack(tmp_path, config=untied, extra={"lm_head.kernel": head_VD})  # which writes kernels transposed
    weights = msgpack.read(str(tmp_path), origin="msgpack:x")
    assert np.array_equal(weights.tensors["lm_head.weight"].read(), head_VD)
