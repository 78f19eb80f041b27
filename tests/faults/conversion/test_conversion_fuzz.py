"""F1: whatever the bytes of a weight file, only the documented errors."""

import contextlib
import json

import msgpack as packing
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.convert import huggingface, llmc, msgpack, safetensors_file
from tests import fuzzing
from tests.convert import models
from tests.faults.conversion.shared import MIB, LittleMemory, set_header

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """A small whole model in the three forms, and a directory to damage copies in."""
    root = tmp_path_factory.mktemp("healthy")
    models.write_hf(root / "hf", config=models.CONFIG | {"n_layer": 1})
    models.write_msgpack(root / "msgpack", config=models.CONFIG | {"n_layer": 1})
    models.write_llmc(root / "model.bin", config=models.CONFIG | {"n_layer": 1})
    return root


ODD = st.one_of(
    fuzzing.ODD,
    st.sampled_from(["F32", "BF16", "F64", "I8", "h.0.ln_1.weight", "__metadata__", "h.².x", "\n", "transformer."]),
    st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), st.integers(), max_size=3),
)


def only_user_errors(call):
    with LittleMemory():
        fuzzing.only_documented_errors(call)


@contextlib.contextmanager
def changed(file, change):
    """Gives the file other bytes for the block: those that change(its own) returns."""
    original = file.read_bytes()
    try:
        file.write_bytes(change(original))
        yield
    finally:
        file.write_bytes(original)


def read_all(weights):
    for tensor in weights.tensors.values():
        assert tensor.read().shape == tensor.shape


@st.composite
def damaged_safetensors(draw):
    """Returns how to change a safetensors file: a function of (header, data) that gives its bytes."""
    field = st.sampled_from(["dtype", "shape", "data_offsets", "all", "drop", "name"])
    edits = draw(st.lists(st.tuples(st.integers(0, 2**16), field, ODD, st.text(max_size=6)), max_size=3))
    patches = draw(st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3)), max_size=2))
    length = draw(st.one_of(st.none(), st.none(), st.integers(-3, 3), st.integers(2**20, 2**64 - 1)))
    tail = draw(st.sampled_from([0, 0, 0, -1, -100, 1, 64]))

    def change(header, data):
        header = json.loads(json.dumps(header))
        for which, field, value, name in edits:
            key = list(header)[which % len(header)] if header else "x"
            if field == "drop":
                header.pop(key, None)
            elif field == "name":
                header[name] = header.pop(key, value)
            elif field == "all" or not isinstance(header.get(key), dict):
                header[key] = value
            else:
                header[key][field] = value
        text = bytearray(json.dumps(header).encode())
        for where, patch in patches:
            at = int(where * len(text))
            text[at : at + len(patch)] = patch
        size = len(text) if length is None else length if length > 3 else max(0, len(text) + length)
        return size.to_bytes(8, "little") + bytes(text) + (data[:tail] if tail < 0 else data + bytes(tail))

    return change


@fuzzing.cases(300)
@given(damaged_safetensors())
def test_f1_any_safetensors_file_raises_only_user_errors(healthy, change):
    file = healthy / "hf" / "model.safetensors"
    with changed(file, lambda _: change(*models.read_header(file))):
        only_user_errors(lambda: safetensors_file.open_safetensors(str(file)))
        only_user_errors(lambda: read_all(huggingface.read(str(file.parent), origin="hf:x")))


FIELDS = [*huggingface.REQUIRED, *huggingface.SIZES, *huggingface.DROPOUTS, "n_inner"]


@fuzzing.cases(300)
@given(st.dictionaries(st.sampled_from(FIELDS), ODD, min_size=1))
def test_f1_any_config_json_raises_only_user_errors(healthy, fields):
    file = healthy / "hf" / "config.json"
    with changed(file, lambda text: json.dumps(json.loads(text) | fields).encode()):
        only_user_errors(lambda: read_all(huggingface.read(str(file.parent), origin="hf:x")))


WORDS = st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(-1, 60), st.sampled_from([128, 16, 2**31 - 1]))


@fuzzing.cases(300)
@given(
    st.dictionaries(st.integers(0, 9), WORDS, max_size=4),
    st.sampled_from([0, 0, 0, -1, 1, -4, 4, -1023]),
    st.booleans(),
)
def test_f1_any_llmc_header_raises_only_user_errors(healthy, fields, tail, fits):
    """fits: the file has as many bytes as the header says, up to a few MiB."""
    original = (healthy / "model.bin").read_bytes()
    file = healthy / "damaged.bin"
    file.write_bytes(original[:tail] if tail < 0 else original + bytes(tail))
    set_header(file, **{f"at{at}": value for at, value in fields.items()})
    if fits:
        T, _, L, _, D, padded = np.frombuffer(file.read_bytes()[8:32], "<i4").tolist()
        size = 1024 + 4 * ((padded + T) * D + L * (12 * D * D + 13 * D) + 2 * D)
        if 0 < size < 4 * MIB:
            file.write_bytes(file.read_bytes()[:size].ljust(size, b"\0"))
    only_user_errors(lambda: llmc.read_header(str(file)))
    only_user_errors(lambda: read_all(llmc.read(str(file), origin="llmc:x")))


KEYS = st.text(max_size=3) | st.sampled_from(["h", "0", "__msgpack_chunked_array__"])
EXTENSIONS = st.tuples(st.integers(0, 4), st.binary(max_size=20)).map(lambda pair: packing.ExtType(*pair))
NESTED = st.recursive(
    st.one_of(st.none(), st.integers(-9, 9), st.text(max_size=4), st.binary(max_size=9)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3) | EXTENSIONS,
)


@st.composite
def damaged_msgpack(draw):
    """Returns how to change the bytes of a msgpack file."""
    if draw(st.booleans()):
        instead = draw(st.binary(max_size=200) | NESTED.map(packing.packb))
        return lambda whole: instead
    patches = draw(st.lists(st.tuples(st.integers(0, 600), st.binary(min_size=1, max_size=4)), min_size=1, max_size=3))

    def change(whole):
        whole = bytearray(whole)
        for at, patch in patches:
            whole[at : at + len(patch)] = patch
        return bytes(whole)

    return change


@fuzzing.cases(300)
@given(damaged_msgpack())
def test_f1_any_msgpack_file_raises_only_user_errors(healthy, change):
    file = healthy / "msgpack" / "flax_model.msgpack"
    with changed(file, change):
        only_user_errors(lambda: read_all(msgpack.read(str(file.parent), origin="msgpack:x")))
