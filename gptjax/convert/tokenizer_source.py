"""The tokenizer that data.tokenizer or --tokenizer names, in gptjax's form or Hugging Face's."""

import logging
import os

from gptjax.convert import hub
from gptjax.convert.hub_listing import TOKENIZER
from gptjax.convert.tokenizer_files import BUILT_IN, read_tokenizer
from gptjax.data.tokenizer import Tokenizer, load_tokenizer
from gptjax.errors import ConfigError
from gptjax.strict_json import InvalidTextError, parse_json
from gptjax.workdir import CONFIG_FILE, TOKENIZER_FILE, read_file

log = logging.getLogger("gptjax")
HUB = "hf:"  # before OWNER/NAME[@REVISION]
HF_FILE = "tokenizer.json"
# gptjax saves its own form as tokenizer.json, too. A file of the tokenizers library has this key, and ours does not.
HF_KEY = b'"model"'
PEEKED = 2**16  # bytes at either end of a file, in which the key is searched


def open_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer `name`.

    name: gpt2, bytes, a file saved by gptjax, a tokenizer.json of Hugging Face, a directory with one (or with
        vocab.json and merges.txt), or hf:OWNER/NAME[@REVISION], which is downloaded to huggingface_hub's cache.

    Raises:
        ConfigError: there is no such tokenizer, or gptjax cannot represent it.
        DataError: a file is damaged, or its pattern cannot cut text; or the repository has none.
        UnavailableError: a file cannot be read now, or a server cannot be reached.
    """
    if name in BUILT_IN:
        return load_tokenizer(name)
    if name.startswith(HUB) and not os.path.lexists(name):
        repo, _, revision = name.removeprefix(HUB).partition("@")
        snapshot, commit = hub.download(repo, revision, kind=TOKENIZER)
        return _from_directory(name, snapshot, title=f"{HUB}{repo}@{commit}")
    if os.path.isdir(name):
        return _from_directory(name, name, title=os.path.basename(os.path.abspath(name)))
    if os.path.basename(name) == HF_FILE and os.path.isfile(name) and _is_of_hugging_face(name):
        return _from_directory(name, os.path.dirname(name) or ".", title="")
    return load_tokenizer(name)


def open_run_tokenizer(name: str, workdir: str) -> Tokenizer:
    """Returns the tokenizer `name` of a run in the local directory `workdir`.

    A run whose tokenizer comes from the Hub makes a connection at its first start only. Afterwards it takes the copy in
    its work directory: the Hub may be out of reach, or have another file under the same name.

    Raises:
        UserError: as `open_tokenizer`.
    """
    saved = os.path.join(workdir, TOKENIZER_FILE)
    if name.startswith(HUB) and _recorded_name(workdir) == name and os.path.isfile(saved):
        return load_tokenizer(saved)
    return open_tokenizer(name)


def _recorded_name(workdir: str) -> str:
    """Returns data.tokenizer in the config.json of a work directory, "" if it cannot be read."""
    try:
        content = read_file(workdir, CONFIG_FILE)
        values = parse_json(content, dict) if content else {}
        return str(values["data"]["tokenizer"])
    except (OSError, InvalidTextError, KeyError, TypeError):
        return ""


def _from_directory(name: str, directory: str, *, title: str) -> Tokenizer:
    """Returns the tokenizer of the files in `directory`.

    title: of a directory; other files of gptjax are named after it.
    """
    own = os.path.join(directory, HF_FILE)
    if os.path.isfile(own) and not _is_of_hugging_face(own):  # a work directory
        return load_tokenizer(own)
    tokenizer, note = read_tokenizer(directory)
    if tokenizer is None:
        raise ConfigError(note, field="data.tokenizer", value=name)
    log.info("%s: %s", title or name, note)
    return tokenizer


def _is_of_hugging_face(path: str) -> bool:
    """Returns whether a tokenizer.json is of the tokenizers library; a damaged one is taken for gptjax's."""
    try:
        with open(path, "rb") as file:
            start = file.read(PEEKED)
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - PEEKED))
            end = file.read(PEEKED)
    except OSError:
        return False
    return HF_KEY in start + end or b'"added_tokens"' in start
