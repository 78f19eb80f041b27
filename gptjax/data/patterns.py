"""The regular expressions by which tiktoken cuts text into pieces: the known ones, and trials of the others.

tiktoken's engine (fancy-regex) has three ways to fail. A search that backtracks a million times, or has to remember a
million places to backtrack to, ends in a panic of its Rust code, which Python sees as a BaseException. So does a piece
of length 0. And a search that is only slow may never end. Known patterns do none of this once `cut_long_blanks` has cut
out long runs of blanks. Any other pattern from a file is tried in a separate process first.
"""

import contextlib
import functools
import json
import math
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import tiktoken

from gptjax.errors import DataError, UnavailableError, one_line

# GPT-2's pattern, which cuts text into words before merging (Radford et al. 2019, encoder.py), with the possessive
# quantifiers of tiktoken's own gpt2: the same pieces, but a long run of one kind of character takes linear time.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# The same as encoder.py and transformers write it.
GPT2_FIRST = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# GPT-4's, as tiktoken's cl100k_base has it.
CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
    r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
# The same as it was first written: Llama 3's.
LLAMA3 = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# GPT-4o's, as tiktoken's o200k_base has it.
O200K = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
# Any pieces will do, since no bytes are merged; short ones are the fastest.
BYTES_PATTERN = r"(?s).{1,64}"
WHOLE_PATTERN = r"(?s).+"

# Unicode's White_Space, which is \s to tiktoken; Python's \s has four characters more.
_SAME_LINE = "\t\x0b\x0c \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_BLANKS = re.compile(rf"[\r\n{_SAME_LINE}]{{2,}}")
_SAME_LINE_BLANKS = re.compile(rf"[{_SAME_LINE}]{{2,}}")
# For each known pattern: the runs that it makes one piece, except for a last blank that may begin the next piece. These
# are runs of any blanks for GPT-2, and runs of blanks without a line end for the others. None: no run needs to be cut.
KNOWN: dict[str, re.Pattern[str] | None] = {
    GPT2_PATTERN: _BLANKS,
    GPT2_FIRST: _BLANKS,
    CL100K: _SAME_LINE_BLANKS,
    LLAMA3: _SAME_LINE_BLANKS,
    QWEN2: _SAME_LINE_BLANKS,
    O200K: _SAME_LINE_BLANKS,
    BYTES_PATTERN: None,
    WHOLE_PATTERN: None,
}
LONG = 100_000  # characters: a tenth of the places that the engine can remember in one search

# The limits of a trial.
SECONDS = 4  # of CPU time to cut the probe; a sound pattern takes about 0.2 s
CHARACTERS_PER_SECOND = 250_000  # more CPU time for a long text; a sound pattern cuts about 10 million
PATIENCE = 15  # seconds of wall time per second of CPU time, since other programs may occupy the CPUs
MEMORY_BYTES = 2**31
BYTES_PER_CHARACTER = 64  # more memory for a long text

# The probe.
RUN = 20_000  # characters of a run; a quadratic search takes 200 million steps
PATTERN_CHARACTERS = 2000  # only the beginning of the pattern adds to the probe, since a file can have any length

Result = TypeVar("Result")
Verdict = tuple[str, str]  # ("", ""), or "hostile" or "unfit" and the reason, a sentence about "its pattern"


class BadPattern(Exception):
    """A pattern cannot be used; the message is the reason, a sentence about "its pattern"."""


class HostilePattern(BadPattern):
    """The pattern takes more time or memory than any sound one."""


class Panic(DataError):
    """tiktoken's Rust code panicked in the middle of a call."""


def guarded(
    call: Callable[..., Result],
    *arguments: Any,
    **named: Any,
) -> Result:
    """Returns call(...). All calls of tiktoken's encoders, decoders and constructors go through here.

    Raises:
        Panic: instead of pyo3's PanicException, which `except Exception` does not see.
    """
    try:
        return call(*arguments, **named)
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise Panic(f"tiktoken has given up: {one_line(error)}") from error
        raise


def cut_long_blanks(pattern: str, text: str) -> Iterator[tuple[str, bool]]:
    """Yields the parts of `text`, cut where the known `pattern` cuts it, and whether a part is one piece.

    The engine fails at a million blanks before another character, since it remembers each of them. The pattern makes
    one piece of all except the last of them, so there is no need to search for that piece. The engine can search all
    other runs.
    """
    runs = KNOWN.get(pattern)
    if runs is None or len(text) < LONG:
        yield text, False
        return
    at = 0
    for run in runs.finditer(text):
        start, end = run.span()
        if end < len(text):
            if text[end] in "\r\n":  # the line end is one piece with these blanks and with any before them
                continue
            end -= 1  # the last blank may begin the next piece
        elif pattern == CL100K:  # its `\s++$` takes the line ends before these as well
            continue
        if end - start >= LONG:
            yield text[at:start], False
            yield text[start:end], True
            at = end
    yield text[at:], False


def utf8(text: str) -> bytes:
    """Returns the bytes that tiktoken encodes: UTF-8, with U+FFFD for each surrogate without its other half."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        pairs = text.encode("utf-16", "surrogatepass")
        repaired = pairs.decode("utf-16", "replace")
        return repaired.encode()


def check_pattern(pattern: str) -> None:
    """Tries the pattern of a file on text that is hard to cut; a known one needs no trial.

    Raises:
        BadPattern: it cannot be used, or is hostile.
        UnavailableError: no process can be started to try it.
    """
    if pattern not in KNOWN:
        _raise_for(_judge(pattern))


def check_text(pattern: str, text: str) -> None:
    """Tries whether a pattern that is not known can cut a text of LONG characters or more.

    Raises:
        BadPattern: it cannot.
        UnavailableError: no process can be started to try it.
    """
    if pattern not in KNOWN and len(text) >= LONG:
        _raise_for(_ask(pattern, text))


def _raise_for(verdict: Verdict) -> None:
    kind, reason = verdict
    if kind == "hostile":
        raise HostilePattern(reason)
    if kind:
        raise BadPattern(reason)


@functools.lru_cache(maxsize=64)
def _judge(pattern: str) -> Verdict:
    return _ask(pattern, None)


_CHILD = """
import json, sys
asked = json.load(sys.stdin)
sys.path[:] = asked["path"]
from gptjax.data import patterns
patterns.answer(asked)
"""


def _ask(pattern: str, text: str | None) -> Verdict:
    """Returns the verdict of a separate process on `pattern`.

    Args:
        pattern: not a known one.
        text: the text to cut; None for the probe.

    Raises:
        UnavailableError: no process can be started.
    """
    size = len(text or "")
    seconds = SECONDS + size // CHARACTERS_PER_SECOND
    asked: dict[str, Any] = {
        "path": [place for place in sys.path if isinstance(place, str)],
        "seconds": seconds,
        "bytes": MEMORY_BYTES + BYTES_PER_CHARACTER * size,
        "pattern": pattern,
        "text": text,
    }
    which = "this" if text else "a short"
    too_slow = ("hostile", f"its pattern takes more than {seconds} s to cut {which} text")
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD],
            input=json.dumps(asked).encode(),
            capture_output=True,
            timeout=PATIENCE * seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return too_slow
    except OSError as error:
        raise UnavailableError(f"a tokenizer's pattern cannot be tried: no process can be started: {error}") from error
    if done.returncode == -signal.SIGXCPU:
        return too_slow
    if done.returncode < 0:  # out of memory, or of the stack
        return "hostile", f"its pattern takes too much memory, or harms its process ({-done.returncode})"
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines()
        reason = one_line(lines[-1] if lines else "")
        raise UnavailableError(f"a tokenizer's pattern cannot be tried: {sys.executable} -I fails: {reason}")
    lines = done.stdout.splitlines()
    kind, reason = json.loads(lines[-1])
    return kind, reason


def answer(asked: dict[str, Any]) -> None:
    """Prints the verdict that `_ask` returns; this process first limits its own CPU time and memory as `asked` says."""
    start_seconds = math.ceil(time.process_time())  # already used, to import gptjax
    limits = {
        resource.RLIMIT_CPU: start_seconds + asked["seconds"],
        resource.RLIMIT_AS: asked["bytes"],
        resource.RLIMIT_CORE: 0,
    }
    for limit, most in limits.items():
        _, hard = resource.getrlimit(limit)
        soft = most
        if hard != resource.RLIM_INFINITY:
            soft = min(most, hard)
        with contextlib.suppress(OSError, ValueError):  # macOS has no limit of memory; the timeout in `_ask` remains
            resource.setrlimit(limit, (soft, hard))
    pattern = asked["pattern"]
    text = asked["text"]
    try:
        texts = probe(pattern) if text is None else [text]
        verdict = _try(pattern, texts)
    except MemoryError:
        verdict = ("hostile", "its pattern takes too much memory")
    print(json.dumps(verdict))


def _try(pattern: str, texts: list[str]) -> Verdict:
    ranks = {bytes([byte]): byte for byte in range(256)}  # so that the ids are the bytes of the pieces
    try:
        encoding = guarded(
            tiktoken.Encoding,
            "probe",
            pat_str=pattern,
            mergeable_ranks=ranks,
            special_tokens={},
        )
    except (ValueError, Panic) as error:
        return "unfit", f"tiktoken does not take its pattern: {one_line(error, longest=100)}"
    for text in texts:
        excerpt = f"{text[:10]!a}..."
        try:
            ids = guarded(encoding.encode_ordinary, text)
        except Panic as error:
            if "RuntimeError" in str(error):  # the search was given up
                return "hostile", f"its pattern takes more than a million steps for one piece of {excerpt}"
            return "unfit", f"its pattern does not cut text into pieces: one is empty in {excerpt}"
        if bytes(ids) != utf8(text):
            return "unfit", f"its pattern leaves out some text of {excerpt}"
    return "", ""


def probe(pattern: str) -> list[str]:
    """Returns texts that show which text a pattern leaves out, and which of its repetitions take quadratic time."""
    codes = [*range(0x3100), 0x4E00, 0xAC00, 0xE000, 0xFFFD, 0x1F600, 0x10FFFF]
    letters = [chr(code) for code in codes]
    spaced = [f" {letter}\n\n{letter}{letter}  " for letter in letters]

    units = [" ", "\t", "\n", "\xa0", " \n"]
    units += ["a", "A", "1", "!", "'", "é", "日"]
    units += ["ab", "aB", "a1", "a!", "a ", "ab cd "]
    # The words and letters in the pattern, which it may treat specially.
    beginning = pattern[:PATTERN_CHARACTERS]
    words = re.findall(r"[A-Za-z0-9]{2,20}", beginning)
    units += words[:20]
    others = [letter for letter in dict.fromkeys(beginning) if letter not in units]
    units += others[:60]

    texts = ["".join(letters), "".join(spaced)]
    for unit in units:
        texts += [unit * 40, unit * 40 + "\x01"]
    for unit in units:
        repeats = RUN // len(unit)
        texts.append(unit * repeats + "\x01")
    return texts
