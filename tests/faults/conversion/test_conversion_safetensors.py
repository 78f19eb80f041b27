"""V: a damaged safetensors file is refused, whatever its header says, without taking memory for it."""

import json

import numpy as np
import pytest

from tests.convert import models
from tests.faults.conversion.shared import LittleMemory

pytestmark = pytest.mark.faults


def shift(header, name, by_start, by_end):
    start, end = header[name]["data_offsets"]
    header[name] = header[name] | {"data_offsets": [start + by_start, end + by_end]}


def damage_header(what, header, data):
    """Returns (header, data) of a file that is damaged as `what` says."""
    first, last = ("transformer.h.0.attn.c_attn.bias", "transformer.wte.weight")
    if what == "overlap":
        shift(header, first, -4, -4)
    elif what == "hole":
        largest = max((h for n, h in header.items() if n != "__metadata__"), key=lambda h: h["data_offsets"][0])
        largest["data_offsets"] = [end + 4 for end in largest["data_offsets"]]
        data += bytes(4)
    elif what == "beyond the end":
        shift(header, last, 10**6, 10**6)
    elif what == "start after end":
        header[first]["data_offsets"].reverse()
    elif what == "negative":
        header[first]["data_offsets"] = [-4, 0]
    elif what == "short":
        data = data[:-1]
    elif what == "long":
        data += bytes(1)
    elif what == "no data":
        data = b""
    elif what == "enormous shape":
        header[last]["shape"] = [2**62, 16]
    elif what == "shape of no such size":
        header[last]["shape"] = [51, 16]
    elif what == "metadata of numbers":
        header["__metadata__"] = {"format": 3}
    return header, data


@pytest.mark.parametrize(
    "what",
    [
        "overlap",
        "hole",
        "beyond the end",
        "start after end",
        "negative",
        "short",
        "long",
        "no data",
        "enormous shape",
        "shape of no such size",
        "metadata of numbers",
    ],
)
def test_v_damaged_safetensors_file_is_refused(what, model, refuse):
    models.write_hf(model)
    file = model / "model.safetensors"
    models.write_header(file, *damage_header(what, *models.read_header(file)))
    with LittleMemory():
        refuse(f"hf:{model}", field=file)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**63 - 1, 2**40, 10**8, 10**8 + 1, 0, 1, 2])
def test_v_impossible_header_length_is_refused(length, model, refuse):
    models.write_hf(model)
    file = model / "model.safetensors"
    models.write_header(file, *models.read_header(file), length=length)
    with LittleMemory():
        refuse(f"hf:{model}", field=file)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100])
def test_v_truncated_safetensors_file_is_refused(size, model, refuse):
    models.write_hf(model)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refuse(f"hf:{model}", field=file)


def test_v_header_of_100_megabytes_is_refused(model, refuse):
    """It is as valid as such a header can be: a million tensors of no size, and spaces."""
    models.write_hf(model)
    file = model / "model.safetensors"
    header, data = models.read_header(file)
    text = json.dumps(header)[:-1].encode()
    entry = b',"%08d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text += b"".join(entry % number for number in range(10**6)) + b"}"
    models.write_header(file, text.ljust(100_000_000), data)
    with LittleMemory():
        refuse(f"hf:{model}", field=file, match=" 100000000 ")


@pytest.mark.parametrize("name", ["transformer.ln_f.bias", "__metadata__"])
def test_v_duplicate_header_key_is_refused(name, model, refuse):
    """One program would take the first, another the last."""
    models.write_hf(model)
    file = model / "model.safetensors"
    header, data = models.read_header(file)
    again = json.dumps({name: header[name]})[1:-1]
    models.write_header(file, json.dumps(header)[:-1].encode() + f", {again}}}".encode(), data)
    refuse(f"hf:{model}", field=file, match=f"['`]{name}['`]")


OTHER_TYPES = [
    ("F64", 8, "float64"),
    ("I8", 1, "int8"),
    ("U16", 2, "uint16"),
    ("BOOL", 1, "bool"),
    ("F8_E4M3", 1, "of an unknown type"),
]


@pytest.mark.parametrize(("stored", "size", "shown"), OTHER_TYPES)
def test_v_unsupported_dtype_is_refused(stored, size, shown, model, refuse):
    models.write_hf(model)
    file = model / "model.safetensors"
    header, data = models.read_header(file)
    name = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"][0])
    start = header[name]["data_offsets"][0]
    end = start + size * int(np.prod(header[name]["shape"]))
    header[name] |= {"dtype": stored, "data_offsets": [start, end]}
    models.write_header(file, header, data[:start] + bytes(end - start))
    refuse(f"hf:{model}", field=f"hf:{model}", match=f"{name} is {shown}; expected float32, bfloat16, float16")
