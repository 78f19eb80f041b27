"""A tokenizer as the files of transformers' AutoTokenizer and the tokenizers library, read and written."""

import json
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from gptjax.convert.byte_level import (
    UnsupportedTokenizerError,
    bytes_to_unicode,
    derive_merges,
    unicode_to_bytes,
)
from gptjax.convert.files import resolve_inside
from gptjax.convert.tokenizer_json import make_settings, make_tokenizer_json
from gptjax.convert.tokenizer_regex import express_regex, translate_regex
from gptjax.data.patterns import (
    BYTES_PATTERN,
    GPT2_PATTERN,
    WHOLE_PATTERN,
    BadPattern,
    HostilePattern,
    check_pattern,
)
from gptjax.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, make_tokenizer
from gptjax.errors import DataError, one_line
from gptjax.strict_json import InvalidTextError, decode_text, parse_json, read_at_most

MAX_FILE_BYTES = 100_000_000
SHOWN_NAME = 40  # characters of a name from a file in a message
SHOWN_LEFT_OUT = 5  # tokens or options in a note
BUILT_IN = {"gpt2": GPT2_PATTERN, "bytes": BYTES_PATTERN}


class _CorruptError(Exception):
    """A file that no program writes."""

    def __init__(self, problem: str, *, remedy: str = "") -> None:
        super().__init__(problem)
        self.remedy = remedy


class _Found(NamedTuple):
    """A tokenizer as files describe it, before it is compared with byte-level BPE."""

    ids: dict[str, int]  # of all tokens, with special and added ones
    merges: list[str]
    regex: str | None  # in tokenizers' syntax; "" means no splitting, None means GPT-2's, which is built in there
    left_out: list[str]  # for the note: options that a Tokenizer cannot hold


def write_tokenizer(
    tokenizer: Tokenizer,
    directory: str,
    *,
    block_size: int,
) -> None:
    """Writes tokenizer.json, vocab.json, merges.txt and tokenizer_config.json into `directory`.

    block_size: becomes model_max_length.

    Raises:
        DataError: with those files, some text would have other ids.
        UnavailableError: no process can be started to test an unknown pattern.
    """
    tokens = tokenizer.tokens()
    try:
        merges = derive_merges(tokens)
        regex = express_regex(tokenizer.pattern, merges)
        check_pattern(tokenizer.pattern)  # tiktoken drops text between pieces, tokenizers keeps it
        if END_OF_TEXT.encode() in tokens:
            raise UnsupportedTokenizerError(f"{END_OF_TEXT} is also a token of text")
    except (UnsupportedTokenizerError, BadPattern) as reason:
        raise DataError(
            f"cannot be written for transformers: {reason}",
            field=f"tokenizer {tokenizer.name}",
        ) from reason
    ids = {bytes_to_unicode(token): rank for rank, token in enumerate(tokens)}
    ids[END_OF_TEXT] = tokenizer.eot_id
    tokenizer_json = make_tokenizer_json(ids, merges, regex)
    settings = make_settings(tokenizer, regex, block_size)
    merge_lines = ["#version: 0.2", *merges, ""]
    os.makedirs(directory, exist_ok=True)
    _write(directory, "tokenizer.json", json.dumps(tokenizer_json, ensure_ascii=False))
    _write(directory, "vocab.json", json.dumps(ids))
    _write(directory, "merges.txt", "\n".join(merge_lines))
    _write(directory, "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def read_tokenizer(directory: str) -> tuple[Tokenizer | None, str]:
    """Returns the tokenizer of a model directory, or None, and a note for the user about it.

    Raises:
        DataError: a file is damaged, too large, or a link that leads outside; or its pattern takes too much time.
        UnavailableError: GPT-2's own vocabulary files, for comparison, are missing or damaged; or no process can be
            started to test an unknown pattern.
    """
    try:
        settings = _read_json(directory, "tokenizer_config.json") or {}
        found = _read_tokenizer_json(directory, settings) or _read_vocab_and_merges(directory, settings)
        if found is None:
            return None, "no tokenizer: neither tokenizer.json nor vocab.json with merges.txt exists"
        return _represent(found, settings, directory)
    except UnsupportedTokenizerError as reason:
        return None, f"no tokenizer: the one in {directory!r} cannot be represented: {reason}"
    except _CorruptError as damage:
        raise DataError(str(damage), field=directory, remedy=damage.remedy) from damage


def _write(directory: str, name: str, text: str) -> None:
    path = os.path.join(directory, name)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def _read_text(directory: str, name: str) -> str | None:
    content = _read_bytes(directory, name)
    try:
        return None if content is None else decode_text(content)
    except InvalidTextError as error:
        raise _CorruptError(f"{name}: damaged: {one_line(error)}") from error


def _read_bytes(directory: str, name: str) -> bytes | None:
    try:
        path = resolve_inside(directory, name)
        return read_at_most(path, MAX_FILE_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _CorruptError(f"{name}: cannot be read: {error}") from error
    except InvalidTextError as error:
        raise _CorruptError(f"{name}: {error}") from error


def _read_json(directory: str, name: str) -> dict[str, Any] | None:
    content = _read_bytes(directory, name)
    try:
        return None if content is None else parse_json(content, dict)
    except InvalidTextError as error:
        raise _CorruptError(f"{name}: damaged: {one_line(error)}") from error


def _expect(value: Any, kind: type, name: str) -> Any:
    if type(value) is not kind:  # exactly, since True is an int
        raise _CorruptError(f"{name}: damaged: expected {kind.__name__}, not {type(value).__name__}")
    return value


def _take(
    holder: dict[str, Any],
    name: str,
    kind: type,
    default: Any,
) -> Any:
    """Returns holder[name], or `default` if it is missing or null."""
    value = holder.get(name)
    if value is None:
        return default
    return _expect(value, kind, f"{name!a} of the tokenizer")


def _take_type(holder: dict[str, Any], name: str) -> str:
    """Returns the type of the component holder[name]; ByteLevel, which changes nothing, if it has none."""
    component = _take(holder, name, dict, {})
    return _take(component, "type", str, "ByteLevel")


def _read_tokenizer_json(directory: str, settings: dict[str, Any]) -> _Found | None:
    saved = _read_json(directory, "tokenizer.json")
    if saved is None:
        return None
    model = _take(saved, "model", dict, {})
    default = "BPE" if "merges" in model else "no"  # only BPE has merges
    kind = _take(model, "type", str, default)
    if kind != "BPE":
        raise UnsupportedTokenizerError(f"it has a {kind[:SHOWN_NAME]!a} model; here it is byte-level BPE")
    _reject_options(saved, model, settings)
    ids = _merge_added(
        _take(model, "vocab", dict, {}),
        _take(saved, "added_tokens", list, []),
    )
    merges = [_join_merge(merge) for merge in _take(model, "merges", list, [])]
    post_processor = _take_type(saved, "post_processor")
    left_out = []
    if post_processor != "ByteLevel":
        left_out.append(f"post_processor {post_processor[:SHOWN_NAME]!a}")
    regex = _read_regex(_take(saved, "pre_tokenizer", dict, {}))
    return _Found(ids, merges, regex, left_out)


def _read_vocab_and_merges(directory: str, settings: dict[str, Any]) -> _Found | None:
    """Reads vocab.json and merges.txt, the two files as which GPT-2 was published."""
    vocab = _read_json(directory, "vocab.json")
    merges = _read_text(directory, "merges.txt")
    if vocab is None or merges is None:
        return None
    kind = _take(settings, "tokenizer_class", str, "GPT2Tokenizer")
    if kind.removesuffix("Fast") != "GPT2Tokenizer":
        raise UnsupportedTokenizerError(f"it is a {kind[:SHOWN_NAME]!a} without tokenizer.json")
    _reject_options({}, {}, settings)
    added = []
    for key, token in _take(settings, "added_tokens_decoder", dict, {}).items():
        fields = _expect(token, dict, "added_tokens_decoder")
        added.append(fields | {"id": _read_id(key)})
    lines = merges.replace("\r\n", "\n").split("\n")
    if lines[0].startswith("#version"):
        del lines[0]
    left_out = [option for option in ("add_bos_token", "add_eos_token") if settings.get(option)]
    return _Found(
        ids=_merge_added(vocab, added),
        merges=[line for line in lines if line],
        regex=None,
        left_out=left_out,
    )


def _read_id(key: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", key):
        raise _CorruptError(f"added_tokens_decoder: damaged: {key[:SHOWN_NAME]!a} is not an id")
    return int(key)


def _reject_options(saved: dict[str, Any], model: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises UnsupportedTokenizerError for options whose ids differ from those of plain byte-level BPE."""
    if _take(saved, "normalizer", dict, None):
        raise UnsupportedTokenizerError("it has a normalizer, which changes text first")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise UnsupportedTokenizerError(f"it has the option {option}")
    if settings.get("add_prefix_space"):
        raise UnsupportedTokenizerError("it has the option add_prefix_space")
    decoder = _take_type(saved, "decoder")
    if decoder != "ByteLevel":
        raise UnsupportedTokenizerError(f"it has a {decoder[:SHOWN_NAME]!a} decoder; here it is ByteLevel")


def _join_merge(merge: Any) -> str:
    """Returns a merge as 'LEFT RIGHT'; since tokenizers 0.20 files have a list of two."""
    if type(merge) is list and len(merge) == 2:
        left = _expect(merge[0], str, "merges")
        right = _expect(merge[1], str, "merges")
        return f"{left} {right}"
    return _expect(merge, str, "merges")


def _merge_added(vocab: dict[str, int], added: list[Any]) -> dict[str, int]:
    """Returns the ids of `vocab` and of the added tokens, which are matched in a text before its pieces."""
    ids = dict(vocab)
    contents = []
    for token in added:
        fields = _expect(token, dict, "added_tokens")
        content = _take(fields, "content", str, "")
        number = _take(fields, "id", int, -1)
        if ids.setdefault(content, number) != number:
            raise UnsupportedTokenizerError(f"its token {content[:SHOWN_NAME]!a} has two ids")
        contents.append(content)
    for content in contents:
        if _take(ids, content, int, 0) < _take(ids, END_OF_TEXT, int, 0):
            name = f"{content[:SHOWN_NAME]!a}"
            raise UnsupportedTokenizerError(f"its added token {name} has an id before that of {END_OF_TEXT}")
    return ids


def _read_regex(pre_tokenizer: dict[str, Any]) -> str | None:
    """Returns the regular expression of a pre_tokenizer as in `_Found`."""
    steps = [pre_tokenizer]
    if "pretokenizers" in pre_tokenizer:
        steps = _take(pre_tokenizer, "pretokenizers", list, [])
    kinds = []
    for step in steps:
        fields = _expect(step, dict, "pre_tokenizer")
        kinds.append(_take(fields, "type", str, ""))
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        found = str(kinds)[:80]
        raise UnsupportedTokenizerError(
            f"its pre_tokenizer is {found!a}; here it is ByteLevel, alone or after one Split"
        )
    byte_level = steps[-1]
    if _take(byte_level, "add_prefix_space", bool, True):
        raise UnsupportedTokenizerError("it has the option add_prefix_space")
    use_regex = _take(byte_level, "use_regex", bool, True)
    if len(steps) == 1:
        return None if use_regex else ""
    split = steps[0]
    pattern = _take(split, "pattern", dict, {})
    regex = _take(pattern, "Regex", str, "")
    is_isolated = split.get("behavior") == "Isolated" and not split.get("invert")
    if use_regex or not regex or not is_isolated:
        raise UnsupportedTokenizerError(
            "its pre_tokenizer is not one Split by a Regex, Isolated, and then ByteLevel without use_regex"
        )
    return regex


def _represent(found: _Found, settings: dict[str, Any], directory: str) -> tuple[Tokenizer, str]:
    """Returns the Tokenizer with the same ids, and a note about it and the parts that it cannot hold."""
    tokens, after = _order(found.ids)
    if derive_merges(tokens) != found.merges:
        raise UnsupportedTokenizerError("its merges are not those of its tokens in the order of their ids")
    tokenizer = _name(tokens, found, _take(settings, "gptjax", dict, {}), directory)
    note = f"tokenizer {tokenizer.name!a}, {tokenizer.vocab_size:,} tokens"
    left_out = [*after, *found.left_out]
    if left_out:
        note += f"; left out: {', '.join(left_out[:SHOWN_LEFT_OUT])}"
    if len(left_out) > SHOWN_LEFT_OUT:
        note += f" and {len(left_out) - SHOWN_LEFT_OUT:,} more"
    return tokenizer, note


def _order(ids: dict[str, int]) -> tuple[list[bytes], list[str]]:
    """Returns the tokens before end-of-text in the order of ids, and the names of those after it."""
    for number in ids.values():
        _expect(number, int, "ids of tokens")
    if END_OF_TEXT not in ids:
        raise UnsupportedTokenizerError(f"it has no {END_OF_TEXT}")
    eot = ids[END_OF_TEXT]
    before = []
    after = []
    for number, token in sorted((number, token) for token, number in ids.items()):
        if number < eot:
            before.append((number, token))
        elif token != END_OF_TEXT:
            after.append(f"{token[:SHOWN_NAME]!a}")
    numbers = [number for number, _ in before]
    if len(before) != eot or numbers != list(range(len(before))):
        raise UnsupportedTokenizerError(f"the ids before {END_OF_TEXT} are not 0 ... {eot - 1}, one for each token")
    tokens = [unicode_to_bytes(token) for _, token in before]
    single_bytes = [token for token in tokens if len(token) == 1]
    if len(single_bytes) != 256:
        raise UnsupportedTokenizerError(f"not every single byte is a token before {END_OF_TEXT}, which has id {eot}")
    return tokens, after


def _name(
    tokens: Sequence[bytes],
    found: _Found,
    saved: dict[str, Any],
    directory: str,
) -> Tokenizer:
    """Returns the tokenizer under the name that gptjax stored, a built-in one's name, or the directory's name."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    saved_name = _take(saved, "name", str, "")
    saved_pattern = _take(saved, "pattern", str, "")
    # Another program may have changed tokenizer.json since: then the stored pattern does not count.
    if saved_name and saved_pattern and express_regex(saved_pattern, found.merges) == found.regex:
        return _make(saved_name, saved_pattern, ranks, "tokenizer_config.json")
    pattern = _choose_pattern(found)
    for name, its_pattern in BUILT_IN.items():
        if pattern != its_pattern:
            continue
        built_in = load_tokenizer(name)
        if built_in.tokens() == tokens:
            return built_in
    name = os.path.basename(os.path.abspath(directory)) or "custom"
    if name in BUILT_IN:
        name = f"{name}-custom"
    return _make(name, pattern, ranks, "tokenizer.json")


def _choose_pattern(found: _Found) -> str:
    """Returns tiktoken's pattern for the tokenizer that was found."""
    if not found.merges:
        return BYTES_PATTERN
    if found.regex is None:
        return GPT2_PATTERN
    if not found.regex:
        return WHOLE_PATTERN
    if translate_regex(found.regex) != found.regex:
        raise UnsupportedTokenizerError("its pattern means different things to tiktoken and tokenizers")
    return found.regex


def _make(
    name: str,
    pattern: str,
    ranks: dict[bytes, int],
    file: str,
) -> Tokenizer:
    """Returns the tokenizer, if the pattern, which was read from `file`, can be used."""
    try:
        check_pattern(pattern)
        return make_tokenizer(name, pattern, ranks)
    except HostilePattern as error:
        raise _CorruptError(
            f"{file}: {error}",
            remedy=f"correct {file}, or remove the tokenizer's files and name another tokenizer",
        ) from error
    except BadPattern as error:
        raise UnsupportedTokenizerError(str(error)) from error
    except ValueError as error:
        reason = str(error)[:80]
        raise UnsupportedTokenizerError(f"tiktoken does not take its pattern: {reason!a}") from error
