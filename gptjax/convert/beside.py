"""The tokenizer of a model as the file that nanoGPT or llm.c reads beside the model."""

import struct

import numpy as np

from gptjax.convert.staging import SideFile
from gptjax.data.tokenizer import Tokenizer
from gptjax.documents import NO_EOT
from gptjax.errors import DataError

# The saved form of GPT-2's tokenizer under the name gpt2.
GPT2_SHA256 = "3a1f8b75c440cfc21bb4d737c0fa1ed7fbe68f224bc20a56d193189cfdc9e981"

# meta.pkl is written by these opcodes of pickle protocol 2. They build dicts, strings and whole numbers only.
PROTOCOL = b"\x80\x02"
EMPTY_DICT = b"}"
MARK = b"("
STRING = b"X"  # then the length as uint32, and UTF-8
INT = b"J"  # then int32
SET_ITEMS = b"u"  # of the dict before the mark, from the keys and values after it
STOP = b"."

# gpt2_tokenizer.bin: a header of 256 uint32, then for each token its length in a byte, and its bytes.
MAGIC = 20240328
VERSION = 2  # with end-of-text in the header
HEADER_LENGTH = 256
HEADER_DTYPE = np.dtype("<u4")
LONGEST_TOKEN = 255  # bytes


class _NoPlaceError(Exception):
    """A program has no place for a tokenizer; the message is the reason."""


def make_side_file(
    tokenizer: Tokenizer | None,
    target: str,
    *,
    vocab_size: int,
) -> tuple[SideFile | None, str]:
    """Returns (the file with the tokenizer beside a model of the format `target`, a line for the user).

    The file is None if there is none to write, and the line "" if nothing differs.

    Args:
        tokenizer: the model's; None if it has none.
        target: the format of the model.
        vocab_size: the model's, at least the tokenizer's.

    Raises:
        DataError: llm.c has no place for a tokenizer of characters, and its programs need end-of-text.
    """
    if tokenizer is None or target not in ("nanogpt", "llmc"):
        return None, ""
    if target == "llmc" and tokenizer.eot_id == NO_EOT:
        raise DataError(
            "is of characters, without the end-of-text that llm.c needs",
            field=f"tokenizer {tokenizer.name}",
            remedy="export it to nanogpt:",
        )
    try:
        if target == "llmc":
            content = _gpt2_tokenizer(tokenizer)
            return SideFile("gpt2_tokenizer.bin", content), "the tokenizer is in gpt2_tokenizer.bin beside the model"
        if tokenizer.has_hash(GPT2_SHA256, "gpt2"):
            return None, ""  # nanoGPT assumes GPT-2's
        content = _meta_pickle(tokenizer, vocab_size)
    except _NoPlaceError as reason:
        return None, f"the tokenizer is left out: {reason}"
    line = "the tokenizer is in meta.pkl beside the model, where sample.py of nanoGPT finds it; on another machine "
    line += "it belongs to data/NAME/meta.pkl, with that NAME as config['dataset'] of the checkpoint"
    return SideFile("meta.pkl", content), line


def _gpt2_tokenizer(tokenizer: Tokenizer) -> bytes:
    """Returns the content of gpt2_tokenizer.bin."""
    _require_no_prefix(tokenizer)
    # llm.c decodes only: it prints a special token by its name, as its own file has end-of-text.
    texts = {number: token for token, number in tokenizer.ranks().items()}
    texts |= {number: name.encode() for name, number in tokenizer.specials.items()}
    tokens = [texts[number] for number in range(tokenizer.vocab_size)]
    header = np.zeros(HEADER_LENGTH, HEADER_DTYPE)
    header[:4] = [MAGIC, VERSION, len(tokens), tokenizer.eot_id]
    parts = [header.tobytes()]
    for number, token in enumerate(tokens):
        if len(token) > LONGEST_TOKEN:
            raise _NoPlaceError(f"token {number} has {len(token)} bytes, and llmc has place for {LONGEST_TOKEN}")
        parts += [bytes([len(token)]), token]
    return b"".join(parts)


def _meta_pickle(tokenizer: Tokenizer, vocab_size: int) -> bytes:
    """Returns the content of meta.pkl, whose characters are the bytes in Latin-1."""
    _require_no_prefix(tokenizer)
    ranks = tokenizer.ranks()
    if tokenizer.eot_id == NO_EOT:
        characters = {token.decode(): number for token, number in ranks.items()}
    elif any(len(token) > 1 for token in ranks):
        raise _NoPlaceError("nanogpt has place for single characters only")
    else:
        characters = {token.decode("latin-1"): number for token, number in ranks.items()}
    # Special tokens and the ids that pad the vocabulary have no text.
    texts = dict.fromkeys(range(vocab_size), "")
    texts |= {number: character for character, number in characters.items()}
    meta = {
        "vocab_size": vocab_size,
        "stoi": characters,
        "itos": texts,
    }
    return PROTOCOL + _opcodes(meta) + STOP


def _require_no_prefix(tokenizer: Tokenizer) -> None:
    if tokenizer.prefix_space:
        raise _NoPlaceError("it has add_prefix_space, which only hf and gptjax hold")


def _opcodes(value: str | int | dict) -> bytes:
    """Returns the opcodes of pickle that build `value`."""
    if isinstance(value, str):
        text = value.encode()
        return STRING + struct.pack("<I", len(text)) + text
    if isinstance(value, int):
        return INT + struct.pack("<i", value)
    parts = [_opcodes(part) for item in value.items() for part in item]
    return EMPTY_DICT + MARK + b"".join(parts) + SET_ITEMS
