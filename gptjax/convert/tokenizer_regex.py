"""A tokenizer's regular expression, translated from tiktoken's syntax to that of the tokenizers library."""

import re
from collections.abc import Sequence

from gptjax.convert.byte_level import UnsupportedTokenizerError
from gptjax.data.patterns import BYTES_PATTERN, GPT2_PATTERN, WHOLE_PATTERN

SHOWN_PATTERN = 20  # characters of a pattern in a message

# The syntax that tiktoken's engine (fancy-regex) and that of tokenizers (Oniguruma, Ruby's syntax) share, and also `$`,
# a leading `(?s)` and `{1,3}+`, for which Ruby has another notation. Not \w and \b, whose letters differ, and not `^`,
# which is the start of any line in Ruby.
_ESCAPE = r"\\[pP]\{\w+\}|\\[sSdDrntfv]|\\[!-/:;=?@\[-^{-~]"
_ATOM = rf"{_ESCAPE}|\[\^?(?:{_ESCAPE}|(?!&&|--|~~)[^\\\[\]^])+\]|[^\\\[\](){{}}?*+|^$]"
_REPEAT = r"[?*+][?+]?|\{\d+\}(?![?+])|\{\d+,\d*\}(?!\+)\??"
_SYNTAX = re.compile(
    rf"(?P<dotall>\A\(\?s\))|(?P<end>\$)|(?P<possessive>(?:{_ATOM})\{{\d+(?:,\d*)?\}}(?=\+))"
    rf"|(?P<same>\\z|\||\((?!\?)|\(\?(?:i?:|[=!>])|(?:{_ATOM}|\))(?:{_REPEAT})?)"
)
# With `(?i`, Ruby folds the case of these in more ways than fancy-regex: it also matches ss against ß.
_FOLDED = re.compile(r"ss|st|ff|fi|fl|[^\x00-\x7f]", re.IGNORECASE)


def express_regex(pattern: str, merges: Sequence[str]) -> str | None:
    """Returns `pattern` in tokenizers' syntax; None for GPT-2's, which is built in there, and "" for no splitting.

    Raises:
        UnsupportedTokenizerError: the pattern may have another meaning there.
    """
    if pattern == GPT2_PATTERN:
        return None
    if not merges:
        return ""  # without merges the ids do not depend on the pieces, so no splitting is the safest
    return translate_regex(pattern)


def choose_pattern(regex: str | None, merges: Sequence[str]) -> str:
    """Returns tiktoken's pattern for a `regex` as `express_regex` returns it.

    Raises:
        UnsupportedTokenizerError: it may have another meaning there.
    """
    if not merges:
        return BYTES_PATTERN
    if regex is None:
        return GPT2_PATTERN
    if not regex:
        return WHOLE_PATTERN
    if translate_regex(regex) != regex:
        raise UnsupportedTokenizerError("its pattern means different things to tiktoken and tokenizers")
    return regex


def translate_regex(pattern: str) -> str:
    """Returns tiktoken's `pattern` in tokenizers' syntax.

    Raises:
        UnsupportedTokenizerError: the pattern may have another meaning there.
    """
    parts = []
    at = 0
    while at < len(pattern):
        match = _SYNTAX.match(pattern, at)
        if match is None:
            rest = pattern[at:][:SHOWN_PATTERN]
            reason = f"its pattern may mean different things to tiktoken and tokenizers at {rest!a}"
            raise UnsupportedTokenizerError(reason)
        at = match.end()
        if match.lastgroup == "dotall":
            parts.append("(?m)")
        elif match.lastgroup == "end":
            parts.append(r"\z")
        elif match.lastgroup == "possessive":
            parts.append(f"(?>{match[0]})")
            at += 1  # the `+` that makes it possessive
        else:
            parts.append(match[0])
    if "(?i" in pattern and _FOLDED.search(pattern):
        reason = "its pattern ignores the case of letters which tiktoken and tokenizers fold differently"
        raise UnsupportedTokenizerError(reason)
    return "".join(parts)
