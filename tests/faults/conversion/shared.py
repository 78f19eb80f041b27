"""What the tests of damaged and foreign weights share."""

import tracemalloc

import numpy as np

from tests.convert import models

MIB = 2**20
WRITERS = {"hf": models.write_hf, "msgpack": models.write_msgpack}
QKV, FC = "h.1.attn.c_attn.weight", "h.0.mlp.c_fc.weight"


def assert_equal_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert found[name].tobytes() == tensor.tobytes(), name


class LittleMemory:
    """Fails if Python and NumPy ever hold more than a few MiB for what happens inside."""

    def __enter__(self):
        tracemalloc.start()

    def __exit__(self, *_):
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 32 * MIB, f"{peak / MIB:.0f} MiB"


def spoil_bits(tensor):
    """Puts NaNs of several payloads and signs, and infinities, into a float32 tensor."""
    bits = tensor.reshape(-1).view(np.uint32)
    bits[:5] = [0x7FC00001, 0xFFC12345, 0x7FFFFFFF, 0x7F800000, 0xFF800000]
    return tensor


def putting(value, at):
    """Returns a change of a tensor: `value` at this position."""

    def change(tensor):
        tensor[at] = value
        return tensor

    return change


def set_header(path, **fields):
    """Overwrites header fields, named by their position: at0=magic, at1=version ..."""
    whole = bytearray(path.read_bytes())
    for name, value in fields.items():
        at = 4 * int(name.removeprefix("at"))
        whole[at : at + 4] = int(value).to_bytes(4, "little", signed=True)
    path.write_bytes(whole)
