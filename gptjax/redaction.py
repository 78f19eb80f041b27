"""Removes the secrets of the environment, and characters that control a terminal, from everything a command prints."""

import contextlib
import functools
import json
import os
import re
import sys
import unicodedata
import urllib.parse
from collections.abc import Mapping
from typing import Any, NamedTuple

from gptjax.errors import ConfigError

# Variables whose names end so hold secrets.
SECRETS = re.compile(
    r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|(?<!BY)(?<!COM)PASS|PWD|(^|_)(PAT|AUTH|JWT))"
    r"(_?\d+|_BASE|_VALUE)?$"
)
SHELL = ("PWD", "OLDPWD")  # the shell's directories
# The keys among them that are secrets even if they look like a word: SORT_KEY names a column, OPENAI_API_KEY does not.
SECRET_KEY = re.compile(r"(API|ACCESS|SECRET|PRIVATE|ENCRYPTION|SIGNING|SSH|MASTER)_?KEY(_?\d+|_BASE|_VALUE)?$")
# Tokens with a prefix of their issuer are secrets in a variable of any name.
MARKED = re.compile(
    r"(gh[pousr]_|github_pat_|glpat-|hf_|xox[abprs]-|AKIA|eyJ)\w[\w.-]{10,}|sk-[\w-]{20,}|-----BEGIN [A-Z ]*PRIVATE"
)
SHORTEST_SECRET = 8  # characters; a shorter value would occur in ordinary text
SHORTEST_PART = 16  # characters; text with this many consecutive characters of a long secret contains a part of it
LONGEST_WORD = 20  # characters; a longer value is no ordinary word
# A piece of an ordinary word: letters, perhaps in camel case, with a number after them.
WORD = re.compile(r"[a-z]{0,14}\d{0,4}|[A-Z]{0,14}\d{0,4}|[A-Z]?[a-z]{2,13}([A-Z][a-z]{2,13})*\d{0,4}|\d{1,10}")
URL = r"[A-Za-z][\w+.-]{0,20}://"
USERINFO = re.compile(rf"(?P<start>{URL}[^\s/:@'\"]{{0,200}}:)(?P<password>[^\s/'\"]+)@")
# As far as the last @ of a word, since a password may contain / and @; bounded, so that no text takes long to search.
LONG_USERINFO = re.compile(rf"(?P<start>{URL}[^\s/:@'\"]{{0,200}}:)(?P<password>[^\s'\"]{{1,1000}})@")
USER = re.compile(rf"{URL}([^\s/:@'\"]{{16,}})(:[^\s'\"]{{0,1000}})?@")  # a long user name may be a token
# The secret of a connection string, such as Azure's AccountName=x;AccountKey=y.
CONNECTION = re.compile(
    r"(?P<start>\b(?:AccountKey|SharedAccessKey|SharedAccessSignature|Password|Pwd)=)(?P<password>[^\s;'\"]{8,})",
    re.IGNORECASE,
)
NAME = re.compile(r"\[\w+\]")  # in place of a secret
# Characters that reverse the direction of text, or end a line, in some terminals and editors.
CONTROLS = {
    *"\u061c\u200e\u200f\u2028\u2029",
    *map(chr, range(0x202A, 0x202F)),
    *map(chr, range(0x2066, 0x206A)),
}


class Secret(NamedTuple):
    """A value that must not be printed."""

    name: str  # of its environment variable
    value: str
    is_word: bool  # a setting may hold it by chance


def shown(text: str) -> str:
    """Returns `text` with control characters escaped, except line ends and tabs."""
    if text.isprintable():
        return text
    return "".join(repr(c)[1:-1] if _is_control(c) else c for c in text)


def _is_control(c: str) -> bool:
    return c in CONTROLS or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t")


def say(text: str) -> None:
    """Prints lines to stdout, as `shown` and without secrets, in a command whose product they are.

    Raises:
        OutputError: stdout cannot be written.
    """
    print(shown(redact(text)), flush=True)


def print_error(text: str) -> None:
    """Prints to stderr. A closed pipe is ignored, so that a process can exit when nobody reads its errors."""
    with contextlib.suppress(OSError):
        print(shown(redact(text)), file=sys.stderr, flush=True)


def redact(text: str) -> str:
    """Returns `text` with [NAME] in place of each secret of the environment, and of any part of a long secret.

    A secret is the value of a variable whose name or value looks like one, or the password in a URL. The passwords of
    other URLs become [password].
    """
    secrets, passwords = _environment()
    for secret in secrets:
        text = _hide_short_lines(_hide(text, secret), secret)
    text = CONNECTION.sub(_hide_password, text)
    if "://" not in text:
        return text
    for name, password in passwords:
        text = text.replace(f":{password}@", f":[{name}]@")
    return LONG_USERINFO.sub(_hide_password, text)


def _hide_password(match: re.Match[str]) -> str:
    if NAME.fullmatch(match["password"]):
        return match[0]
    end = "@" if match[0].endswith("@") else ""
    return f"{match['start']}[password]{end}"


def refuse_secrets(settings: Mapping[str, Any]) -> None:
    """Checks that no setting holds a secret of the environment, because every checkpoint would contain it.

    An ordinary word, which a setting may hold by chance, is allowed.

    Raises:
        ConfigError: a setting holds a secret.
    """
    secrets, passwords = _environment()
    for name, value in settings.items():
        if not isinstance(value, str):
            continue
        found = [secret.name for secret in secrets if not secret.is_word and _hide(value, secret) != value]
        found += [variable for variable, password in passwords if f":{password}@" in value]
        if found:  # the message does not show the value
            raise ConfigError(f"contains the value of {found[0]}, which would be in every checkpoint", field=name)


def _hide(text: str, secret: Secret) -> str:
    """Returns `text` with [NAME] in place of the secret and of each part of it."""
    for form in _forms(secret.value):
        text = text.replace(form, f"[{secret.name}]")
    parts = _parts(secret.value)
    if not parts or len(text) < SHORTEST_PART:
        return text
    kept = []
    start = 0  # of the text after the last part
    at = 0
    while at + SHORTEST_PART <= len(text):
        if text[at : at + SHORTEST_PART] not in parts:
            at += 1
            continue
        kept.append(text[start:at])
        kept.append(f"[{secret.name}]")
        while text[at : at + SHORTEST_PART] in parts:  # overlapping parts form one longer part
            at += 1
        at += SHORTEST_PART - 1  # to the end of the last of them
        start = at
    kept.append(text[start:])
    return "".join(kept)


def _hide_short_lines(text: str, secret: Secret) -> str:
    """Returns `text` with [NAME] in place of the lines of a key that are too short to be recognised by a part."""
    for line in _short_lines(secret.value):
        text = re.sub(rf"(?<![\w+/=]){re.escape(line)}(?![\w+/=])", f"[{secret.name}]", text)
    return text


@functools.lru_cache
def _short_lines(value: str) -> tuple[str, ...]:
    """Returns the short lines of a key in PEM form, such as its last one."""
    if "-----BEGIN" not in value:
        return ()
    lines = re.split(r"[\r\n]+|\\n", value)
    return tuple(line for line in lines if len(line) < SHORTEST_PART and re.fullmatch("[A-Za-z0-9+/]+=*", line))


@functools.lru_cache
def _forms(value: str) -> tuple[str, ...]:
    """Returns a secret as it is, escaped by `repr` and by JSON, and on one line, the longest form first."""
    forms = {value, repr(value)[1:-1], json.dumps(value)[1:-1], " ".join(value.split())}
    return tuple(sorted(forms, key=lambda form: (-len(form), form)))


@functools.lru_cache
def _parts(value: str) -> frozenset[str]:
    """Returns all parts of SHORTEST_PART characters of a long secret: a message may truncate it, or print one line."""
    if len(value) < 2 * SHORTEST_PART:
        return frozenset()
    starts = range(len(value) - SHORTEST_PART + 1)
    return frozenset(value[at : at + SHORTEST_PART] for at in starts)


def _environment() -> tuple[list[Secret], list[tuple[str, str]]]:
    """Returns the secrets of the environment, and (variable's name, password) for each URL with a password."""
    return _find(tuple(os.environ.items()))


@functools.lru_cache(maxsize=4)
def _find(variables: tuple[tuple[str, str], ...]) -> tuple[list[Secret], list[tuple[str, str]]]:
    """Returns the result of `_environment` for these variables; the longest secrets first, which may contain others."""
    found = []
    passwords = []
    for name, value in variables:
        url_passwords = _passwords(value)
        passwords += [(name, password) for password in url_passwords]
        value = value.strip()
        users = [match[1] for match in USER.finditer(value)]
        connections = [match["password"] for match in CONNECTION.finditer(value)]
        candidates = [*url_passwords, *users, *connections]
        if _is_secret(name.upper(), value):
            candidates.append(value)
        for text in candidates:
            is_word = _is_word(text) and not MARKED.match(text)
            is_word_in_url = is_word and text != value
            if len(text) >= SHORTEST_SECRET and not is_word_in_url:
                found.append(Secret(name, text, is_word))
    passwords.sort(key=lambda pair: -len(pair[1]))
    return sorted(found, key=lambda secret: -len(secret.value)), passwords


def _is_secret(name: str, value: str) -> bool:
    """Returns whether a variable with this name, in capitals, and this value holds a secret."""
    if MARKED.match(value):
        return True
    if name in SHELL or not SECRETS.search(name) or _is_path(value):
        return False
    if not _is_word(value):
        return True
    is_key = name.rstrip("_0123456789").endswith("KEY")
    return not is_key or bool(SECRET_KEY.search(name))


def _is_path(value: str) -> bool:
    """Returns whether `value` names a file, as GOOGLE_APPLICATION_CREDENTIALS does."""
    directory = os.path.dirname(value)
    return os.path.lexists(value) or (len(directory) > 1 and os.path.isdir(directory))


def _passwords(value: str) -> list[str]:
    """Returns the passwords of the URLs in `value`, without duplicates, both percent-encoded and decoded."""
    if "://" not in value:
        return []
    found = []
    # A value with several URLs and no blanks has more passwords than LONG_USERINFO finds.
    for match in (*LONG_USERINFO.finditer(value), *USERINFO.finditer(value)):
        password = match["password"]
        found += [password, urllib.parse.unquote(password)]
    return list(dict.fromkeys(found))


def _is_word(value: str) -> bool:
    """Returns whether `value` may be ordinary words, names or a path of them: nothing in it looks random."""
    pieces = re.split(r"[^A-Za-z0-9]+", value)
    return len(value) < LONGEST_WORD and all(WORD.fullmatch(piece) for piece in pieces)
