"""JSON is taken as other programs mean it, and what they would not is refused with a reason."""

import json
import math
import os

import pytest

from gptjax.data.journal import read_journal
from gptjax.data.meta import read_meta
from gptjax.errors import DataError
from gptjax.strict_json import MOST_DIGITS, MOST_LEVELS, InvalidTextError, decode_text, parse_json, read_at_most
from tests.helpers import raises

GOOD = [
    "null",
    "[]",
    '{"a": [1, -2.5, 1e300, 1e-400, true, null, "x"]}',
    '{"model_max_length": 1000000000000000019884624838656}',  # as transformers writes it
    '"' + "9" * 400 + '"',
    '{"emoji": "\\ud83d\\ude00", "nul": "\\u0000", "é": "e999"}',
    "[" * MOST_LEVELS + "]" * MOST_LEVELS,
    "[" + "[]," * 1000 + "{}]",
    "9" * MOST_DIGITS,
]


@pytest.mark.parametrize("text", GOOD)
def test_valid_json_is_parsed_like_python(text):
    expected = json.loads(text)
    assert parse_json(text.encode()) == parse_json(text) == parse_json(b"\xef\xbb\xbf" + text.encode()) == expected


BAD = {
    b"": "not JSON: Expecting value",
    b"{": "not JSON: Expecting property name",
    b"{} {}": "not JSON: Extra data",
    b"\0" * 9: "not JSON: Expecting value",
    b'"\0"': "not JSON: Invalid control character",
    b'{"a": "\xff"}': "not UTF-8: byte 7 is 0xff",
    "{}".encode("utf-16"): "not UTF-8: byte 0 is 0xff",
    b"[" * 100_000: "nested deeper than 100 levels",
    b'{"a":' * 100_000: "nested deeper than 100 levels",
    b"[" * (MOST_LEVELS + 1) + b"]" * (MOST_LEVELS + 1): "nested deeper than 100 levels",
    b'{"a":' * MOST_LEVELS + b"[]" + b"}" * MOST_LEVELS: "nested deeper than 100 levels",
    b'[{"a": 1, "b": 2, "a": 1}]': "'a' appears twice",
    b'{"\\u001b": 1, "\\u001b": 1}': r"'\x1b' appears twice",
    b"[NaN]": "NaN is not a finite number",
    b"[-Infinity]": "-Infinity is not a finite number",
    b"[1e999]": "1e999 is not a finite number",
    b"[1" + b"0" * 400 + b".0]": "is not a finite number",
    b"9" * (MOST_DIGITS + 1): "an integer of 301 digits",
    b"[-" + b"9" * 5000 + b"]": "an integer of 5000 digits",
    b'["\\ud800"]': "half of a surrogate pair",
    b'{"\\udfff": 1}': "half of a surrogate pair",
    b'["\\ude00\\ud83d"]': "half of a surrogate pair",
}


@pytest.mark.parametrize("content", BAD, ids=range(len(BAD)))
def test_invalid_json_is_refused_with_a_reason(content):
    with pytest.raises(InvalidTextError) as error:
        parse_json(content)
    message = str(error.value)
    assert BAD[content] in message
    assert message.isprintable()
    assert len(message) < 200


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("[1]", "a list"), ("null", "null"), ('"x"', "a string"), ("1", "a number"), ("1.5", "a number"),
        ("true", "true"),
    ],
)  # fmt: skip
def test_another_type_is_refused(text, name):
    with pytest.raises(InvalidTextError, match=f"expected an object, not {name}"):
        parse_json(text, dict)


def test_nonfinite_numbers_become_null_or_are_kept_on_request():
    found = parse_json(b'{"a": NaN, "b": [-Infinity, 1e999, 1.5]}', nan="null")
    assert found == {"a": None, "b": [None, None, 1.5]}
    first, *rest = parse_json(b"[NaN, -1e999, 1]", nan="keep")
    assert math.isnan(first)
    assert rest == [-math.inf, 1]


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert read_at_most(str(tmp_path / "x"), 3) == b"abc"
    with pytest.raises(InvalidTextError, match="larger than 2 bytes"):
        read_at_most(str(tmp_path / "x"), 2)


def test_decode_text_removes_only_one_byte_order_mark():
    assert decode_text(b"\xef\xbb\xbf\xef\xbb\xbfa\r\n") == "\ufeffa\r\n"
    with pytest.raises(InvalidTextError, match="not UTF-8: byte 2 is 0xed"):
        decode_text(b"ab\xed\xa0\x80")


@pytest.mark.faults
@pytest.mark.parametrize("name", ["meta.json", "journal.json"])
def test_j1_pipe_in_place_of_a_file_does_not_block(name, tmp_path):
    os.mkfifo(tmp_path / name)
    if name == "journal.json":
        assert read_journal(str(tmp_path)) is None
    else:
        with raises(DataError, f"{tmp_path}/meta.json", match="regular file"):
            read_meta(str(tmp_path))
