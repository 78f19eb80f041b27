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
OWN = "bpe:"  # before the number of ids of a tokenizer that is trained on the data and stored with them
HF_FILE = "tokenizer.json"
# gptjax saves its own form as tokenizer.json, too. A file of the tokenizers library has one of these keys; ours begins
# with its format, and may have the name "model".
HF_KEY = b'"model"'
HF_START = b'"added_tokens"'
OWN_START = b'"format": "gptjax-tokenizer-'
PEEKED = 2**16  # bytes at either end of a file, in which the key is searched


def open_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer `name`.

    name: gpt2, bytes, a file saved by gptjax or the tokenizers library, a directory with a tokenizer.json (or with
        vocab.json and merges.txt), hf: before either, or hf:OWNER/NAME[@REVISION], which is downloaded to
        huggingface_hub's cache.

    Raises:
        ConfigError: there is no such tokenizer, or gptjax cannot represent it.
        DataError: a file is damaged, or its pattern cannot cut text; or the repository has none.
        UnavailableError: a file cannot be read now, or a server cannot be reached.
    """
    if name in BUILT_IN:
        return load_tokenizer(name)
    if name.startswith(OWN):
        raise ConfigError(
            "is trained on data, and none are named here",
            field="data.tokenizer",
            value=name,
            remedy="give the tokenizer.json of the data or of the run",
        )
    place = name
    if name.startswith(HUB) and not os.path.lexists(name):
        place = os.path.expanduser(name.removeprefix(HUB))
        # The name of a file or directory here shall not reach a server.
        if not os.path.lexists(place):
            return _from_hub(name, place)
    if os.path.isdir(place):
        own = os.path.join(place, HF_FILE)
        if os.path.isfile(own) and not _is_of_hugging_face(own):  # a work directory
            return load_tokenizer(own)
        return _from_files(name, place)
    if os.path.isfile(place) and _is_of_hugging_face(place):
        return _from_files(name, os.path.dirname(place) or ".", file=os.path.basename(place))
    return load_tokenizer(place)


def _from_hub(name: str, place: str) -> Tokenizer:
    """Downloads and returns the tokenizer OWNER/NAME[@REVISION]."""
    if not hub.NAME.fullmatch(place):
        problem = "no such file or directory, and not OWNER/NAME[@REVISION] of the Hub"
        raise ConfigError(problem, field="data.tokenizer", value=name)
    repo, _, revision = place.partition("@")
    snapshot, commit = hub.download(repo, revision, kind=TOKENIZER)
    return _from_files(f"{HUB}{repo}@{commit}", snapshot)


def open_run_tokenizer(name: str, workdir: str) -> Tokenizer:
    """Returns the tokenizer `name` of a run in the local directory `workdir`.

    Raises:
        UserError: as `open_tokenizer`.
    """
    return saved_tokenizer(name, workdir) or open_tokenizer(name)


def saved_tokenizer(name: str, workdir: str) -> Tokenizer | None:
    """Returns the copy of the tokenizer `name` in a run's local directory `workdir`; None if it is not to be used.

    A run whose tokenizer comes from the Hub makes a connection at its first start only. Afterwards it takes its copy:
    the Hub may be out of reach, or have another file under the same name. The same holds for a tokenizer that was
    trained on the data, which may be gone.

    Raises:
        UserError: as `open_tokenizer`.
    """
    saved = os.path.join(workdir, TOKENIZER_FILE)
    if name.startswith((HUB, OWN)) and _recorded_name(workdir) == name and os.path.isfile(saved):
        return load_tokenizer(saved)
    return None


def _recorded_name(workdir: str) -> str:
    """Returns data.tokenizer in the config.json of a work directory, "" if it cannot be read."""
    try:
        content = read_file(workdir, CONFIG_FILE)
        values = parse_json(content, dict) if content else {}
        return str(values["data"]["tokenizer"])
    except (OSError, InvalidTextError, KeyError, TypeError):
        return ""


def _from_files(name: str, directory: str, *, file: str = HF_FILE) -> Tokenizer:
    """Returns the tokenizer of Hugging Face's files in `directory`; `name` is the user's for it."""
    tokenizer, note = read_tokenizer(directory, file=file)
    if tokenizer is None:
        raise ConfigError(note, field="data.tokenizer", value=name)
    log.info("%s: %s", name, note)
    return tokenizer


def _is_of_hugging_face(path: str) -> bool:
    """Returns whether a file is of the tokenizers library; a damaged one is taken for gptjax's."""
    try:
        with open(path, "rb") as file:
            start = file.read(PEEKED)
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - PEEKED))
            end = file.read(PEEKED)
    except OSError:
        return False
    return OWN_START not in start and (HF_KEY in start + end or HF_START in start)
