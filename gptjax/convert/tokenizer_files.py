"""A tokenizer as the files of transformers' AutoTokenizer and the tokenizers library, read and written."""

import json
import os
import re
from typing import Any, NamedTuple

from gptjax.convert.byte_level import (
    ALPHABET,
    UnsupportedTokenizerError,
    bytes_to_unicode,
    derive_merges,
    unicode_to_bytes,
)
from gptjax.convert.files import name_of, resolve_inside
from gptjax.convert.tokenizer_json import make_settings, make_tokenizer_json
from gptjax.convert.tokenizer_regex import choose_pattern, express_regex
from gptjax.data.patterns import (
    BYTES_PATTERN,
    GPT2_PATTERN,
    BadPattern,
    HostilePattern,
    check_pattern,
)
from gptjax.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, make_tokenizer
from gptjax.errors import DataError, one_line
from gptjax.strict_json import InvalidTextError, decode_text, parse_json, read_at_most

TOKENIZER_JSON = "tokenizer.json"
MAX_FILE_BYTES = 100_000_000
SHOWN_NAME = 40  # characters of a name from a file in a message
SHOWN_LEFT_OUT = 5  # tokens or options in a note
BUILT_IN = {"gpt2": GPT2_PATTERN, "bytes": BYTES_PATTERN}


class _CorruptError(Exception):
    """A file that no program writes."""

    def __init__(self, problem: str, *, remedy: str = "") -> None:
        super().__init__(problem)
        self.remedy = remedy


class _Parts(NamedTuple):
    """A vocabulary: the ids of text's tokens in rising order, those of special tokens, and the name of end-of-text."""

    ranks: dict[bytes, int]
    specials: dict[str, int]
    eot: str


class _Found(NamedTuple):
    """A tokenizer as files describe it, before it is compared with byte-level BPE."""

    ids: dict[str, int]  # of all tokens, with special and added ones
    merges: list[str]
    regex: str | None  # in tokenizers' syntax; "" means no splitting, None means GPT-2's, which is built in there
    left_out: list[str]  # for the note: options that a Tokenizer cannot hold
    added: dict[str, bool]  # tokens that are matched in a text before its pieces, and whether they are special
    prefix_space: bool  # whether a text that does not begin with a space is encoded as if it did


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
        for name in tokenizer.specials:
            if name.encode() in tokens:
                raise UnsupportedTokenizerError(f"{name} is also a token of text")
    except (UnsupportedTokenizerError, BadPattern) as reason:
        raise DataError(
            f"cannot be written for transformers: {reason}",
            field=f"tokenizer {tokenizer.name}",
        ) from reason
    ids = {bytes_to_unicode(token): number for token, number in tokenizer.ranks().items()}
    ids |= dict(sorted(tokenizer.specials.items(), key=lambda item: item[1]))
    tokenizer_json = make_tokenizer_json(tokenizer, ids, merges, regex=regex)
    settings = make_settings(tokenizer, regex, block_size)
    merge_lines = ["#version: 0.2", *merges, ""]
    os.makedirs(directory, exist_ok=True)
    _write(directory, "tokenizer.json", json.dumps(tokenizer_json, ensure_ascii=False))
    _write(directory, "vocab.json", json.dumps(ids))
    _write(directory, "merges.txt", "\n".join(merge_lines))
    _write(directory, "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def read_tokenizer(directory: str, *, file: str = TOKENIZER_JSON) -> tuple[Tokenizer | None, str]:
    """Returns the tokenizer of a model directory, or None, and a note for the user about it.

    file: of the tokenizers library. Under another name than the usual one it stands for itself, without settings.

    Raises:
        DataError: a file is damaged, too large, or a link that leads outside; or its pattern takes too much time.
        UnavailableError: GPT-2's own vocabulary files, for comparison, are missing or damaged; or no process can be
            started to test an unknown pattern.
    """
    try:
        settings = (_read_json(directory, "tokenizer_config.json") or {}) if file == TOKENIZER_JSON else {}
        title = name_of(directory) if file == TOKENIZER_JSON else os.path.splitext(file)[0]
        found = _read_tokenizer_json(directory, file, settings) or _read_vocab_and_merges(directory, settings)
        if found is None:
            return None, "no tokenizer: neither tokenizer.json nor vocab.json with merges.txt exists"
        return _represent(found, settings, title)
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


def _read_tokenizer_json(directory: str, file: str, settings: dict[str, Any]) -> _Found | None:
    saved = _read_json(directory, file)
    if saved is None:
        return None
    model = _take(saved, "model", dict, {})
    default = "BPE" if "merges" in model else "no"  # only BPE has merges
    kind = _take(model, "type", str, default)
    if kind != "BPE":
        raise UnsupportedTokenizerError(f"it has a {kind[:SHOWN_NAME]!a} model; here it is byte-level BPE")
    _reject_options(saved, model, settings)
    ids, added = _merge_added(
        _take(model, "vocab", dict, {}),
        _take(saved, "added_tokens", list, []),
    )
    merges = [_join_merge(merge) for merge in _take(model, "merges", list, [])]
    post_processor = _take_type(saved, "post_processor")
    left_out = []
    if post_processor != "ByteLevel":
        left_out.append(f"post_processor {post_processor[:SHOWN_NAME]!a}")
    if model.get("ignore_merges"):
        _reject_whole_words(ids, merges, added)
    regex, in_file = _read_regex(_take(saved, "pre_tokenizer", dict, {}))
    prefix_space = _replaced_prefix_space(directory, settings, in_file)
    if regex and (in_file or prefix_space):
        raise UnsupportedTokenizerError("it has the option add_prefix_space, and a Split before it")
    return _Found(ids, merges, regex, left_out, added, prefix_space)


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
    ids, is_special = _merge_added(vocab, added)
    return _Found(
        ids=ids,
        merges=[line for line in lines if line],
        regex=None,
        left_out=left_out,
        added=is_special,
        prefix_space=_take(settings, "add_prefix_space", bool, False),
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


def _merge_added(vocab: dict[str, int], added: list[Any]) -> tuple[dict[str, int], dict[str, bool]]:
    """Returns the ids of `vocab` and of the added tokens; and the added tokens, and whether they are special."""
    ids = dict(vocab)
    is_special = {}
    for token in added:
        fields = _expect(token, dict, "added_tokens")
        content = _take(fields, "content", str, "")
        number = _take(fields, "id", int, -1)
        if ids.setdefault(content, number) != number:
            raise UnsupportedTokenizerError(f"its token {content[:SHOWN_NAME]!a} has two ids")
        is_special[content] = _take(fields, "special", bool, False)
    return ids, is_special


def _replaced_prefix_space(directory: str, settings: dict[str, Any], in_file: bool) -> bool:
    """Returns add_prefix_space as transformers 5 takes it, where tokenizer.json has `in_file`.

    Its GPT2Tokenizer, which is also the class of a model of GPT-2 without tokenizer_class, has a setting of its own,
    false by default. Other classes take that of the file.
    """
    is_model = settings or os.path.isfile(os.path.join(directory, "config.json"))
    kind = _take(settings, "tokenizer_class", str, "GPT2Tokenizer" if is_model else "")
    has_own = kind.removesuffix("Fast") == "GPT2Tokenizer"
    return _take(settings, "add_prefix_space", bool, False) if has_own else in_file


def _reject_whole_words(ids: dict[str, int], merges: list[str], added: dict[str, bool]) -> None:
    """Raises UnsupportedTokenizerError if a token of text is no result of merges: `ignore_merges` would use it."""
    merged = {merge.replace(" ", "", 1) for merge in merges}
    if any(len(token) > 1 and token not in merged and token not in added for token in ids):
        raise UnsupportedTokenizerError("it has the option ignore_merges, and tokens that no merge makes")


def _read_regex(pre_tokenizer: dict[str, Any]) -> tuple[str | None, bool]:
    """Returns the regular expression of a pre_tokenizer and its add_prefix_space, both as in `_Found`."""
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
    prefix_space = _take(byte_level, "add_prefix_space", bool, True)
    use_regex = _take(byte_level, "use_regex", bool, True)
    if len(steps) == 1:
        return (None if use_regex else ""), prefix_space
    split = steps[0]
    pattern = _take(split, "pattern", dict, {})
    regex = _take(pattern, "Regex", str, "")
    is_isolated = split.get("behavior") == "Isolated" and not split.get("invert")
    if use_regex or not regex or not is_isolated:
        raise UnsupportedTokenizerError(
            "its pre_tokenizer is not one Split by a Regex, Isolated, and then ByteLevel without use_regex"
        )
    return regex, prefix_space


def _represent(found: _Found, settings: dict[str, Any], title: str) -> tuple[Tokenizer, str]:
    """Returns the Tokenizer with the same ids, and a note about it and the parts that it cannot hold."""
    parts, after = _split_vocabulary(found, settings)
    if derive_merges(list(parts.ranks)) != found.merges:
        raise UnsupportedTokenizerError("its merges are not those of its tokens in the order of their ids")
    tokenizer = _name(parts, found, _take(settings, "gptjax", dict, {}), title)
    note = f"tokenizer {tokenizer.name!a}, {tokenizer.vocab_size:,} tokens"
    if parts.eot != END_OF_TEXT:
        note += f", end-of-text is {parts.eot[:SHOWN_NAME]!a}"
    left_out = [*after, *found.left_out]
    if left_out:
        note += f"; left out: {', '.join(left_out[:SHOWN_LEFT_OUT])}"
    if len(left_out) > SHOWN_LEFT_OUT:
        note += f" and {len(left_out) - SHOWN_LEFT_OUT:,} more"
    return tokenizer, note


def _split_vocabulary(found: _Found, settings: dict[str, Any]) -> tuple[_Parts, list[str]]:
    """Returns the tokens of text and the special tokens, and the names of those after both, which are left out."""
    ids = found.ids
    for number in ids.values():
        _expect(number, int, "ids of tokens")
    eot = _end_of_text(ids, settings)
    if "" in ids:
        raise UnsupportedTokenizerError("a token is empty")
    # Text is only ever encoded to single bytes and to results of merges. Every other token is special, or unused.
    merged = {merge.replace(" ", "", 1) for merge in found.merges}
    ranks: dict[bytes, int] = {}
    specials: dict[str, int] = {}
    for number, token in sorted((number, token) for token, number in ids.items()):
        if token in merged or (len(token) == 1 and token in ALPHABET):
            ranks[unicode_to_bytes(token)] = number
        else:
            specials[token] = number
    if eot not in specials:
        raise UnsupportedTokenizerError(f"{eot} is also a token of text")
    if sum(len(token) == 1 for token in ranks) != len(ALPHABET):
        raise UnsupportedTokenizerError("not every single byte is a token")
    for name, is_special in found.added.items():
        # Programs find such a token in a text; here a text has no special tokens, so only those may differ.
        is_text = name not in specials or not is_special
        if is_text and ids[name] < max(specials[eot], *ranks.values()):
            raise UnsupportedTokenizerError(
                f"its added token {name[:SHOWN_NAME]!a} is found in a text, and has an id before that of {eot}"
            )
    last = max(specials[eot], *ranks.values())
    after = [f"{name[:SHOWN_NAME]!a}" for name, number in specials.items() if number > last]
    kept = {name: number for name, number in specials.items() if number <= last}
    numbers = sorted([*ranks.values(), *kept.values()])
    if numbers != list(range(len(numbers))):  # not range(last + 1): a damaged id may be huge
        raise UnsupportedTokenizerError(f"its ids are not 0 ... {last}, one for each token")
    return _Parts(ranks, kept, eot), after


def _end_of_text(ids: dict[str, int], settings: dict[str, Any]) -> str:
    """Returns the name of the token that separates documents: GPT-2's, or the one that the settings name."""
    stated = settings.get("eos_token")
    if isinstance(stated, dict):
        stated = stated.get("content")
    for name in (END_OF_TEXT, stated, "</s>"):
        if isinstance(name, str) and name in ids:
            return name
    raise UnsupportedTokenizerError(f"it has no {END_OF_TEXT}, and no other end-of-text")


def _name(
    parts: _Parts,
    found: _Found,
    saved: dict[str, Any],
    title: str,
) -> Tokenizer:
    """Returns the tokenizer under the name that gptjax stored, a built-in one's name, or `title`."""
    saved_name = _take(saved, "name", str, "")
    saved_pattern = _take(saved, "pattern", str, "")
    # Another program may have changed tokenizer.json since: then the stored pattern does not count.
    if saved_name and saved_pattern and express_regex(saved_pattern, found.merges) == found.regex:
        return _make(saved_name, saved_pattern, parts, found, file="tokenizer_config.json")
    pattern = choose_pattern(found.regex, found.merges)
    for name, its_pattern in BUILT_IN.items():
        if pattern != its_pattern:
            continue
        built_in = load_tokenizer(name)
        is_same = built_in.ranks() == parts.ranks and built_in.specials == parts.specials
        if is_same and not found.prefix_space:
            return built_in
    name = title or "custom"
    if name in BUILT_IN:
        name = f"{name}-custom"
    return _make(name, pattern, parts, found, file="tokenizer.json")


def _make(
    name: str,
    pattern: str,
    parts: _Parts,
    found: _Found,
    *,
    file: str,
) -> Tokenizer:
    """Returns the tokenizer, if the pattern, which was read from `file`, can be used."""
    try:
        check_pattern(pattern)
        return make_tokenizer(
            name,
            pattern,
            parts.ranks,
            specials=parts.specials,
            eot=parts.eot,
            prefix_space=found.prefix_space,
        )
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
