"""V: a damaged or foreign msgpack file is refused."""

import random

import msgpack as packing
import numpy as np
import pytest

from gptjax.errors import UserError
from tests.convert import models
from tests.faults.conversion.shared import FC, LittleMemory

pytestmark = pytest.mark.faults


NOT_FLAX = {
    "empty": b"",
    "nothing": packing.packb(None),
    "a number": packing.packb(3),
    "a list": packing.packb([1, 2]),
    "a text": packing.packb("x" * 1000),
    "numbers as keys": packing.packb({1: {2: models.pack_array(np.ones(2))}}),
    "a text for an array": packing.packb({"wte": {"embedding": "x"}}),
    "an array alone": packing.packb(models.pack_array(np.ones(2))),
    "an array of objects": packing.packb(
        {"a": packing.ExtType(1, packing.packb(((1,), "object", b"\x08\0\0\0\0\0\0\0")))}
    ),
    "an array of no such shape": packing.packb({"a": packing.ExtType(1, packing.packb(((9,), "float32", b"\0" * 4)))}),
    "an array of no such type": packing.packb({"a": packing.ExtType(1, packing.packb(((1,), "os.system", b"\0" * 4)))}),
    "chunks of nothing": packing.packb({"a": {"__msgpack_chunked_array__": True}}),
    "an unknown extension": packing.packb({"a": packing.ExtType(77, b"x")}),
    "a complex number": packing.packb({"a": packing.ExtType(2, packing.packb((1.0, 2.0)))}),
    "deep dicts": b"\x81\xa1a" * 10**5 + b"\xc0",
    "deep lists": b"\x91" * 10**6,
    "a list of four billion": b"\xdd\xff\xff\xff\xff",
    "a dict of four billion": b"\xdf\xff\xff\xff\xff",
    "bytes of four billion": b"\xc6\xff\xff\xff\xff",
    "a hostile key": packing.packb({"a\nb\x1b[2J": models.pack_array(np.ones(2, "f4"))}),
    "a hostile key of no array": packing.packb({"a\nb\x1b[2J": 3}),
    "a hostile type": packing.packb({"a": packing.ExtType(1, packing.packb(((1,), "\x1b[2J\n", b"\0" * 4)))}),
    "two things": packing.packb({}) + packing.packb({}),
}


@pytest.mark.parametrize("what", NOT_FLAX)
def test_v_msgpack_not_written_by_flax_is_refused(what, model, refuse):
    models.write_msgpack(model)
    file = model / "flax_model.msgpack"
    file.write_bytes(NOT_FLAX[what])
    with LittleMemory():
        refuse(f"msgpack:{model}", field=None if what in ("an array alone", "numbers as keys") else file)


@pytest.mark.parametrize("part", [0.0005, 1 / 3, 2 / 3, 0.9999])
def test_v_msgpack_truncated_file_is_refused(part, model, refuse):
    models.write_msgpack(model)
    file = model / "flax_model.msgpack"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(part * len(whole))])
    refuse(f"msgpack:{model}", field=file)


def test_v_msgpack_with_flipped_bits_keeps_shapes_or_is_refused(model, accept, tmp_path):
    """It has no checksums: a flip in a weight is another weight. But nothing else may come of it."""
    tensors = models.write_msgpack(model)
    file = model / "flax_model.msgpack"
    whole, chance, refused = file.read_bytes(), random.Random(0), 0
    for number in range(60):
        damaged = bytearray(whole)
        damaged[chance.randrange(400)] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        try:
            found = accept(f"msgpack:{model}", "--allow_nonfinite", out=f"out{number}")
        except UserError:
            refused += 1
        else:
            assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in tensors.items()}
    assert refused > 5


@pytest.mark.parametrize("kind", ["float64", "int8", "complex64"])
def test_v_msgpack_of_unsupported_dtype_is_refused(kind, model, refuse):
    models.write_msgpack(model, changes={FC: lambda t: t.astype(kind)})
    refuse(f"msgpack:{model}", match=f"{kind}; .* float32")
