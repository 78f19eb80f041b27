"""The tokenizer beside a model of nanoGPT or llm.c, where special tokens do not come last."""

import dataclasses
import pickle

import pytest

from gptjax.convert.beside import make_side_file
from gptjax.data.patterns import BYTES_PATTERN, GPT2_PATTERN
from gptjax.data.tokenizer import load_tokenizer, make_tokenizer
from tests.convert.models import read_llmc_tokenizer

SPECIALS = {"<s>": 0, "<pad>": 1, "</s>": 2}


def specials_first(merged=(), **options):
    tokens = [*(bytes([byte]) for byte in range(256)), *merged]
    ranks = {token: number + len(SPECIALS) for number, token in enumerate(tokens)}
    pattern = GPT2_PATTERN if merged else BYTES_PATTERN
    return make_tokenizer("mine", pattern, ranks, specials=SPECIALS, eot="</s>", **options)


def test_llmc_decodes_ids_behind_special_tokens():
    tokenizer = specials_first([b"th", b"the", b" the"])
    file, _ = make_side_file(tokenizer, "llmc", vocab_size=tokenizer.vocab_size)
    tokens, eot = read_llmc_tokenizer(file.content)
    assert eot == 2
    text = "the house, the  tree ü"
    assert b"".join(tokens[number] for number in tokenizer.encode(text)).decode() == text
    assert tokens[:3] == [b"<s>", b"<pad>", b"</s>"]


def test_nanogpt_decodes_ids_behind_special_tokens():
    tokenizer = specials_first()
    file, _ = make_side_file(tokenizer, "nanogpt", vocab_size=300)
    meta = pickle.loads(file.content)
    text = "the house"
    assert [meta["stoi"][character] for character in text] == tokenizer.encode(text)
    assert "".join(meta["itos"][number] for number in [2, *tokenizer.encode(text), 1, 299]) == text
    assert sorted(meta["itos"]) == list(range(300))


def test_gpt2s_tokenizer_under_another_name_is_what_nanogpt_assumes():
    tokenizer = dataclasses.replace(load_tokenizer("gpt2"), name="copy")
    assert make_side_file(tokenizer, "nanogpt", vocab_size=50257) == (None, "")


@pytest.mark.parametrize("target", ["nanogpt", "llmc"])
def test_tokenizer_with_a_space_before_each_text_is_left_out(target):
    file, line = make_side_file(specials_first(prefix_space=True), target, vocab_size=259)
    assert file is None
    assert "left out" in line
