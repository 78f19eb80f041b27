"""A tokenizer as the files that transformers' AutoTokenizer and the tokenizers library read, and back."""

import itertools
import json
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from gptjax.convert.files import resolve_inside
from gptjax.data.tokenizer import BYTES_PATTERN, END_OF_TEXT, GPT2_PATTERN, Tokenizer, load_tokenizer, make_tokenizer
from gptjax.errors import DataError

MAX_FILE_BYTES = 100_000_000
MAX_DERIVING = 200_000_000  # sum of squared token lengths, GPT-2: 3 million; some 20 s at most

# GPT-2 writes each byte as one visible letter (Radford et al. 2019, bytes_to_unicode in encoder.py): itself where
# Latin-1 shows something, and the other bytes in turn from U+0100 on.
_SHOWN = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
_HIDDEN = [byte for byte in range(256) if byte not in _SHOWN]
_LETTERS = {byte: chr(byte) for byte in _SHOWN} | {byte: chr(256 + i) for i, byte in enumerate(_HIDDEN)}
_BYTES = {letter: byte for byte, letter in _LETTERS.items()}

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
_WHOLE_PATTERN = r"(?s).+"

# What tiktoken's regular expressions (fancy-regex) and those of tokenizers (Oniguruma, Ruby's syntax) have in common,
# and beyond that `$`, a leading `(?s)` and `{1,3}+`, which Ruby writes in another way. Not \w and \b, whose letters
# differ, nor `^`, which is the start of any line in Ruby.
_ESCAPE = r"\\[pP]\{\w+\}|\\[sSdDrntfv]|\\[!-/:;=?@\[-^{-~]"
_ATOM = rf"{_ESCAPE}|\[\^?(?:{_ESCAPE}|(?!&&|--|~~)[^\\\[\]^])+\]|[^\\\[\](){{}}?*+|^$]"
_REPEAT = r"[?*+][?+]?|\{\d+\}(?![?+])|\{\d+,\d*\}(?!\+)\??"
_SYNTAX = re.compile(
    rf"(?P<dotall>\A\(\?s\))|(?P<end>\$)|(?P<possessive>(?:{_ATOM})\{{\d+(?:,\d*)?\}}(?=\+))"
    rf"|(?P<same>\\z|\||\((?!\?)|\(\?(?:i?:|[=!>])|(?:{_ATOM}|\))(?:{_REPEAT})?)"
)
# Under `(?i`, Ruby takes these for one letter as well, and fancy-regex does not.
_FOLDED = re.compile(r"ss|st|ff|fi|fl|[^\x00-\x7f]", re.IGNORECASE)


class _Unlike(Exception):
    """What a Tokenizer, or the other side's files, cannot express."""


class _Damaged(Exception):
    """What no program can have meant to write."""


class _Found(NamedTuple):
    ids: dict[str, int]  # of all tokens, also special and added ones
    merges: list[str]
    cut: str | None  # the regular expression in tokenizers' syntax; "" cuts nothing; None is GPT-2's, built in there
    left_out: list[str]


def write_tokenizer(tokenizer: Tokenizer, directory: str, *, block_size: int) -> None:
    """Writes tokenizer.json, vocab.json, merges.txt and tokenizer_config.json into `directory`.

    Raises:
        DataError: those files cannot make the same ids of every text.
    """
    tokens = tokenizer.tokens()
    try:
        merges = [f"{_show(left)} {_show(right)}" for left, right in _derive_merges(tokens)]
        cut = _express_cut(tokenizer.pattern, merges)
        _check_cover(tokenizer)
        if END_OF_TEXT.encode() in tokens:
            raise _Unlike(f"{END_OF_TEXT} is also a token of text")
    except _Unlike as why:
        raise DataError(f"tokenizer {tokenizer.name}: cannot be written for transformers: {why}") from why
    ids = {_show(token): rank for rank, token in enumerate(tokens)} | {END_OF_TEXT: tokenizer.eot_id}
    os.makedirs(directory, exist_ok=True)
    _write(directory, "tokenizer.json", json.dumps(_make_tokenizer_json(ids, merges, cut), ensure_ascii=False))
    _write(directory, "vocab.json", json.dumps(ids))
    _write(directory, "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    _write(directory, "tokenizer_config.json", json.dumps(_make_settings(tokenizer, cut, block_size), indent=2) + "\n")


def read_tokenizer(directory: str) -> tuple[Tokenizer | None, str]:
    """Returns the tokenizer of a model directory, and one line: what it is and lacks, or why there is none.

    Raises:
        DataError: a file is damaged, too large, or a link that leads elsewhere.
        UnavailableError: GPT-2's own vocabulary files, to compare with, are missing or damaged.
    """
    try:
        settings = _read_json(directory, "tokenizer_config.json") or {}
        found = _read_whole(directory, settings) or _read_pair(directory, settings)
        if found is None:
            return None, "no tokenizer: there is neither tokenizer.json nor vocab.json with merges.txt"
        return _represent(found, settings, directory)
    except _Unlike as why:
        return None, f"no tokenizer: the one in {directory!r} cannot be represented: {why}"
    except _Damaged as why:
        raise DataError(f"{directory}: {why}") from why


def _show(token: bytes) -> str:
    return "".join(map(_LETTERS.__getitem__, token))


def _hide(shown: str) -> bytes:
    try:
        return bytes(map(_BYTES.__getitem__, shown))
    except KeyError:
        raise _Unlike(f"token {shown[:40]!a} is not in GPT-2's alphabet of bytes") from None


def _derive_merges(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    if sum(len(token) ** 2 for token in tokens) > MAX_DERIVING:
        raise _Unlike("its tokens are too many and too long")
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if b"" in ranks:
        raise _Unlike("a token is empty")
    return [_halve(token, ranks) for token in tokens if len(token) > 1]


def _halve(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Returns the two parts into which the tokens of lower rank merge the bytes of `token`.

    If every token has two, then merging by the rank of the result, as tiktoken does, and by the list of these pairs,
    as GPT-2 does, are the same.
    """
    own = ranks[token]
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        results = [ranks.get(left + right, own) for left, right in itertools.pairwise(parts)]
        best = min(results)
        if best >= own:
            raise _Unlike(f"token {own} ({token[:40]!r}) is not a merge of two tokens before it")
        at = results.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _express_cut(pattern: str, merges: Sequence[str]) -> str | None:
    if pattern == GPT2_PATTERN:
        return None
    return _translate(pattern) if merges else ""  # without merges any cut will do, so none is the safest


def _translate(pattern: str) -> str:
    """Returns the regular expression of tiktoken in the syntax of tokenizers."""
    parts, at = [], 0
    while at < len(pattern):
        match = _SYNTAX.match(pattern, at)
        if match is None:
            raise _Unlike(f"its pattern may mean different things to tiktoken and tokenizers at {pattern[at:][:20]!a}")
        written = {"dotall": "(?m)", "end": r"\z", "possessive": f"(?>{match[0]})", "same": match[0]}
        parts.append(written[match.lastgroup or "same"])
        at = match.end() + (match.lastgroup == "possessive")
    if "(?i" in pattern and _FOLDED.search(pattern):
        raise _Unlike("its pattern ignores the case of letters which tiktoken and tokenizers fold differently")
    return "".join(parts)


def _check_cover(tokenizer: Tokenizer) -> None:
    # tiktoken leaves out what no piece covers, tokenizers keeps it: the two agree where nothing is left out.
    letters = [chr(code) for code in (*range(0x3100), 0x4E00, 0xAC00, 0xE000, 0xFFFD, 0x1F600, 0x10FFFF)]
    for text in map("".join, (letters, [f" {a}\n\n{a}{a}  " for a in letters])):
        try:
            ids = tokenizer.encode(text)
        except BaseException as error:  # a panic of tiktoken's, which is no Exception, for pieces of length 0
            if type(error).__name__ == "PanicException" or isinstance(error, Exception):
                raise _Unlike("its pattern does not cut text into pieces") from error
            raise
        if tokenizer.decode_bytes(ids) != text.encode():
            raise _Unlike("its pattern leaves out some text")


def _make_tokenizer_json(ids: dict[str, int], merges: Sequence[str], cut: str | None) -> dict[str, Any]:
    byte_level = _BYTE_LEVEL | {"use_regex": cut is None}
    split = {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    model = {"dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": ""}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[END_OF_TEXT], "content": END_OF_TEXT, **flags, "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]} if cut else byte_level,
        "post_processor": _BYTE_LEVEL | {"use_regex": True},  # adds nothing; None would let transformers choose
        "decoder": _BYTE_LEVEL | {"use_regex": True},
        "model": {"type": "BPE", **model, "fuse_unk": False, "byte_fallback": False, "vocab": ids, "merges": merges},
    }


def _make_settings(tokenizer: Tokenizer, cut: str | None, block_size: int) -> dict[str, Any]:
    return {
        # transformers 5 builds a GPT2Tokenizer anew, with GPT-2's pattern; the other is tokenizer.json as it stands.
        "tokenizer_class": "GPT2Tokenizer" if cut is None else "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": block_size,
        "gptjax": {"name": tokenizer.name, "pattern": tokenizer.pattern},
    }


def _write(directory: str, name: str, text: str) -> None:
    with open(os.path.join(directory, name), "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def _read_text(directory: str, name: str) -> str | None:
    try:
        with open(resolve_inside(directory, name), "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _Damaged(f"{name}: cannot be read: {error}") from error
    if len(content) > MAX_FILE_BYTES:
        raise _Damaged(f"{name}: larger than {MAX_FILE_BYTES:,} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Damaged(f"{name}: damaged: {error}") from error


def _read_json(directory: str, name: str) -> dict[str, Any] | None:
    text = _read_text(directory, name)
    if text is None:
        return None
    try:
        return _expect(json.loads(text), dict, name)
    except (ValueError, RecursionError) as error:
        raise _Damaged(f"{name}: damaged: {error}") from error


def _expect(value: Any, kind: type, what: str) -> Any:
    if type(value) is not kind:  # exactly, since True is an int
        raise _Damaged(f"{what}: damaged: expected {kind.__name__}, not {type(value).__name__}")
    return value


def _take(holder: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """Returns holder[name], or `default` where it is missing or null."""
    value = holder.get(name)
    return default if value is None else _expect(value, kind, f"{name!a} of the tokenizer")


def _read_whole(directory: str, settings: dict[str, Any]) -> _Found | None:
    """Returns what tokenizer.json says."""
    saved = _read_json(directory, "tokenizer.json")
    if saved is None:
        return None
    model = _take(saved, "model", dict, {})
    kind = _take(model, "type", str, "BPE" if "merges" in model else "no")
    if kind != "BPE":
        raise _Unlike(f"it has a {kind[:40]!a} model; here it is byte-level BPE")
    _refuse_options(saved, model, settings)
    ids = _merge_added(_take(model, "vocab", dict, {}), _take(saved, "added_tokens", list, []))
    merges = [_join_merge(merge) for merge in _take(model, "merges", list, [])]
    post = _take(_take(saved, "post_processor", dict, {}), "type", str, "ByteLevel")
    left_out = [] if post == "ByteLevel" else [f"post_processor {post[:40]!a}"]
    return _Found(ids, merges, _read_cut(_take(saved, "pre_tokenizer", dict, {})), left_out)


def _read_pair(directory: str, settings: dict[str, Any]) -> _Found | None:
    """Returns what vocab.json and merges.txt say, as GPT-2 was published."""
    vocab, merges = _read_json(directory, "vocab.json"), _read_text(directory, "merges.txt")
    if vocab is None or merges is None:
        return None
    kind = _take(settings, "tokenizer_class", str, "GPT2Tokenizer")
    if kind.removesuffix("Fast") != "GPT2Tokenizer":
        raise _Unlike(f"it is a {kind[:40]!a} without tokenizer.json")
    _refuse_options({}, {}, settings)
    added = _take(settings, "added_tokens_decoder", dict, {})
    tokens = [_expect(token, dict, "added_tokens_decoder") | {"id": _read_id(key)} for key, token in added.items()]
    lines = merges.replace("\r\n", "\n").split("\n")
    lines = lines[lines[0].startswith("#version") :]
    left_out = [option for option in ("add_bos_token", "add_eos_token") if settings.get(option)]
    return _Found(_merge_added(vocab, tokens), [line for line in lines if line], None, left_out)


def _read_id(key: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", key):
        raise _Damaged(f"added_tokens_decoder: damaged: {key[:40]!a} is not an id")
    return int(key)


def _refuse_options(saved: dict[str, Any], model: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuses whatever gives other ids than plain byte-level BPE."""
    if _take(saved, "normalizer", dict, None):
        raise _Unlike("it has a normalizer, which changes text first")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise _Unlike(f"it has the option {option}")
    if settings.get("add_prefix_space"):
        raise _Unlike("it has the option add_prefix_space")
    decoder = _take(_take(saved, "decoder", dict, {}), "type", str, "ByteLevel")
    if decoder != "ByteLevel":
        raise _Unlike(f"it has a {decoder[:40]!a} decoder; here it is ByteLevel")


def _join_merge(merge: Any) -> str:
    if type(merge) is list and len(merge) == 2:  # since tokenizers 0.20; a string with a space before
        return f"{_expect(merge[0], str, 'merges')} {_expect(merge[1], str, 'merges')}"
    return _expect(merge, str, "merges")


def _merge_added(ids: dict[str, int], added: list[Any]) -> dict[str, int]:
    """Returns `ids` and those of the added tokens, which are cut out of a text before anything else."""
    ids, contents = dict(ids), []
    for token in added:
        content, number = _take(_expect(token, dict, "added_tokens"), "content", str, ""), _take(token, "id", int, -1)
        if ids.setdefault(content, number) != number:
            raise _Unlike(f"its token {content[:40]!a} has two ids")
        contents.append(content)
    for content in contents:
        if _take(ids, content, int, 0) < _take(ids, END_OF_TEXT, int, 0):
            raise _Unlike(f"its added token {content[:40]!a} has an id before that of {END_OF_TEXT}")
    return ids


def _read_cut(pre_tokenizer: dict[str, Any]) -> str | None:
    steps = _take(pre_tokenizer, "pretokenizers", list, []) if "pretokenizers" in pre_tokenizer else [pre_tokenizer]
    kinds = [_take(_expect(step, dict, "pre_tokenizer"), "type", str, "") for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise _Unlike(f"its pre_tokenizer is {str(kinds)[:80]!a}; here it is ByteLevel, alone or after one Split")
    if _take(steps[-1], "add_prefix_space", bool, True):
        raise _Unlike("it has the option add_prefix_space")
    use_regex = _take(steps[-1], "use_regex", bool, True)
    if len(steps) == 1:
        return None if use_regex else ""
    regex = _take(_take(steps[0], "pattern", dict, {}), "Regex", str, "")
    if use_regex or not regex or steps[0].get("behavior") != "Isolated" or steps[0].get("invert"):
        raise _Unlike("its pre_tokenizer is not one Split by a Regex, Isolated, and then ByteLevel without use_regex")
    return regex


def _represent(found: _Found, settings: dict[str, Any], directory: str) -> tuple[Tokenizer, str]:
    tokens, beyond = _order(found.ids)
    merges = [f"{_show(left)} {_show(right)}" for left, right in _derive_merges(tokens)]
    if merges != found.merges:
        raise _Unlike("its merges are not those of its tokens in the order of their ids")
    tokenizer = _name(tokens, found, _take(settings, "gptjax", dict, {}), directory)
    _check_cover(tokenizer)
    line = f"tokenizer {tokenizer.name!a}, {tokenizer.vocab_size:,} tokens"
    left_out = [*beyond, *found.left_out]
    more = f" and {len(left_out) - 5:,} more" if len(left_out) > 5 else ""
    return tokenizer, line + (f"; left out: {', '.join(left_out[:5])}{more}" if left_out else "")


def _order(ids: dict[str, int]) -> tuple[list[bytes], list[str]]:
    """Returns the tokens before end-of-text in the order of ids, and how to call those after it."""
    for number in ids.values():
        _expect(number, int, "ids of tokens")
    if END_OF_TEXT not in ids:
        raise _Unlike(f"it has no {END_OF_TEXT}")
    eot = ids[END_OF_TEXT]
    before = sorted((number, token) for token, number in ids.items() if number < eot)
    if [number for number, _ in before] != list(range(len(before))) or len(before) != eot:
        raise _Unlike(f"the ids before {END_OF_TEXT} are not 0 ... {eot - 1}, one for each token")
    tokens = [_hide(token) for _, token in before]
    if len(b"".join(sorted(token for token in tokens if len(token) == 1))) != 256:
        raise _Unlike(f"not every single byte is a token before {END_OF_TEXT}, which has id {eot}")
    after = sorted((number, token) for token, number in ids.items() if number >= eot and token != END_OF_TEXT)
    return tokens, [f"{token[:40]!a}" for _, token in after]


def _name(tokens: Sequence[bytes], found: _Found, saved: dict[str, Any], directory: str) -> Tokenizer:
    """Returns the tokenizer under its own name if gptjax wrote it, as a built-in one if it is, or as the directory."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    name, pattern = _take(saved, "name", str, ""), _take(saved, "pattern", str, "")
    if name and pattern and _express_cut(pattern, found.merges) == found.cut:
        return _make(name, pattern, ranks)
    pattern = _take_pattern(found)
    for built_in, its_pattern in (("gpt2", GPT2_PATTERN), ("bytes", BYTES_PATTERN)):
        if pattern == its_pattern and (known := load_tokenizer(built_in)).tokens() == tokens:
            return known
    name = os.path.basename(os.path.abspath(directory)) or "custom"
    return _make(f"{name}-custom" if name in ("gpt2", "bytes") else name, pattern, ranks)


def _take_pattern(found: _Found) -> str:
    if not found.merges:
        return BYTES_PATTERN
    if found.cut is None:
        return GPT2_PATTERN
    if found.cut and _translate(found.cut) != found.cut:
        raise _Unlike("its pattern means different things to tiktoken and tokenizers")
    return found.cut or _WHOLE_PATTERN


def _make(name: str, pattern: str, ranks: dict[bytes, int]) -> Tokenizer:
    try:
        return make_tokenizer(name, pattern, ranks)
    except ValueError as error:
        raise _Unlike(f"tiktoken does not take its pattern: {str(error)[:80]!a}") from error
