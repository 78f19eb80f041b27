"""The contents of a tokenizer's files: tokenizer.json and tokenizer_config.json."""

from collections.abc import Sequence
from typing import Any

from gptjax.data.tokenizer import END_OF_TEXT, Tokenizer

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}


def make_tokenizer_json(
    tokenizer: Tokenizer,
    ids: dict[str, int],
    merges: Sequence[str],
    *,
    regex: str | None,
) -> dict[str, Any]:
    """Returns tokenizer.json of a byte-level BPE.

    ids: of all tokens in GPT-2's alphabet, with the special ones under their names.
    merges: 'LEFT RIGHT' in GPT-2's alphabet.
    regex: as `express_regex` returns it.
    """
    # GPT-2's regex is built into ByteLevel; any other is a Split before it.
    pre_tokenizer: dict[str, Any] = _BYTE_LEVEL | {
        "add_prefix_space": tokenizer.prefix_space,
        "use_regex": regex is None,
    }
    if regex:
        split = {
            "type": "Split",
            "pattern": {"Regex": regex},
            "behavior": "Isolated",
            "invert": False,
        }
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, pre_tokenizer]}
    added = []
    for name, number in sorted(tokenizer.specials.items(), key=lambda item: item[1]):
        token = {
            "id": number,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        added.append(token)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _BYTE_LEVEL | {"use_regex": True},  # adds nothing; with None transformers would choose one
        "decoder": _BYTE_LEVEL | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": ids,
            "merges": merges,
        },
    }


def make_settings(tokenizer: Tokenizer, regex: str | None, block_size: int) -> dict[str, Any]:
    """Returns tokenizer_config.json; its field gptjax restores the tokenizer's own name and pattern.

    regex: as `express_regex` returns it.
    block_size: becomes model_max_length.
    """
    # transformers 5 rebuilds a GPT2Tokenizer with GPT-2's pattern; the other class uses tokenizer.json unchanged.
    # GPT2Tokenizer would also put its own end-of-text behind other special tokens.
    is_plain = regex is None and list(tokenizer.specials) == [END_OF_TEXT]
    return {
        "tokenizer_class": "GPT2Tokenizer" if is_plain else "PreTrainedTokenizerFast",
        "add_prefix_space": tokenizer.prefix_space,
        "bos_token": tokenizer.eot,
        "eos_token": tokenizer.eot,
        "unk_token": tokenizer.eot,
        "clean_up_tokenization_spaces": False,
        "model_max_length": block_size,
        "gptjax": {"name": tokenizer.name, "pattern": tokenizer.pattern},
    }
