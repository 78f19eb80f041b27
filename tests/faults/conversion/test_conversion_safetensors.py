"""V: a damaged safetensors file is refused, whatever its header says, without taking memory for it."""

import json

import numpy as np
import pytest

from tests.convert import models
from tests.faults.conversion.shared import LittleMemory

pytestmark = pytest.mark.faults


FIRST, TABLE = "transformer.h.0.attn.c_attn.bias", "transformer.wte.weight"


def shifted(name, by):
    """Returns a change of a header: the tensor's bytes are `by` further on."""
    return lambda header, data: header[name].update(data_offsets=[at + by for at in header[name]["data_offsets"]])


def last_tensor(header):
    return max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][0])


def leave_a_hole(header, data):
    shifted(last_tensor(header), 4)(header, data)
    return data + bytes(4)


DAMAGES = {  # each changes the header, or returns other data
    "overlap": shifted(FIRST, -4),
    "hole": leave_a_hole,
    "beyond the end": shifted(TABLE, 10**6),
    "start after end": lambda header, data: header[FIRST]["data_offsets"].reverse(),
    "negative": lambda header, data: header[FIRST].update(data_offsets=[-4, 0]),
    "short": lambda header, data: data[:-1],
    "long": lambda header, data: data + bytes(1),
    "no data": lambda header, data: b"",
    "enormous shape": lambda header, data: header[TABLE].update(shape=[2**62, 16]),
    "shape of no such size": lambda header, data: header[TABLE].update(shape=[51, 16]),
    "metadata of numbers": lambda header, data: header.update(__metadata__={"format": 3}),
}


@pytest.fixture
def file(hf):
    return hf / "model.safetensors"


@pytest.mark.parametrize("damage", DAMAGES)
def test_v_damaged_safetensors_file_is_refused(damage, hf, file, refuse):
    header, data = models.read_header(file)
    changed = DAMAGES[damage](header, data)
    models.write_header(file, header, data if changed is None else changed)
    with LittleMemory():
        refuse(f"hf:{hf}", field=file)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**63 - 1, 2**40, 10**8, 10**8 + 1, 0, 1, 2])
def test_v_impossible_header_length_is_refused(length, hf, file, refuse):
    models.write_header(file, *models.read_header(file), length=length)
    with LittleMemory():
        refuse(f"hf:{hf}", field=file)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100])
def test_v_truncated_safetensors_file_is_refused(size, hf, file, refuse):
    file.write_bytes(file.read_bytes()[:size])
    refuse(f"hf:{hf}", field=file)


def test_v_header_of_100_megabytes_is_refused(hf, file, refuse):
    """It is as valid as such a header can be: a million tensors of no size, and spaces."""
    header, data = models.read_header(file)
    text = json.dumps(header)[:-1].encode()
    entry = b',"%08d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text += b"".join(entry % number for number in range(10**6)) + b"}"
    models.write_header(file, text.ljust(100_000_000), data)
    with LittleMemory():
        refuse(f"hf:{hf}", field=file, match=" 100000000 ")


@pytest.mark.parametrize("name", ["transformer.ln_f.bias", "__metadata__"])
def test_v_duplicate_header_key_is_refused(name, hf, file, refuse):
    """One program would take the first, another the last."""
    header, data = models.read_header(file)
    again = json.dumps({name: header[name]})[1:-1]
    models.write_header(file, json.dumps(header)[:-1].encode() + f", {again}}}".encode(), data)
    refuse(f"hf:{hf}", field=file, match=f"['`]{name}['`]")


@pytest.mark.parametrize(
    ("stored", "size", "shown"),
    [
        ("F64", 8, "float64"),
        ("I8", 1, "int8"),
        ("U16", 2, "uint16"),
        ("BOOL", 1, "bool"),
        ("F8_E4M3", 1, "of an unknown type"),
    ],
)
def test_v_unsupported_dtype_is_refused(stored, size, shown, hf, file, refuse):
    header, data = models.read_header(file)
    name = last_tensor(header)
    start = header[name]["data_offsets"][0]
    end = start + size * int(np.prod(header[name]["shape"]))
    header[name] |= {"dtype": stored, "data_offsets": [start, end]}
    models.write_header(file, header, data[:start] + bytes(end - start))
    refuse(f"hf:{hf}", field=f"hf:{hf}", match=f"{name} is {shown}; expected float32, bfloat16, float16")
