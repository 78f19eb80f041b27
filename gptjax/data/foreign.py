"""Directories of shards that other programs have made: which files are a split, and nanoGPT's meta.pkl."""

import os
import re
from typing import TYPE_CHECKING

from gptjax.data.characters import META_PICKLE, load_meta_pickle
from gptjax.data.meta import META_FILE
from gptjax.errors import ConfigError, DataError, one_line

if TYPE_CHECKING:
    from gptjax.data.tokenizer import Tokenizer

# Whole words of a file's name, by which other projects name the files of a split.
SPLITS = {"train": {"train", "training"}, "validation": {"val", "valid", "validation"}}
SUFFIXES = (".bin", ".npy")
SHOWN_FILES = 5  # in a message


def split_of(path: str) -> str:
    """Returns the split that the name of a shard says, by a whole word in it; "" if none.

    Raises:
        DataError: it says both.
    """
    words = set(re.findall("[a-z]+", os.path.basename(path).lower()))
    splits = [split for split, names in SPLITS.items() if words & names]
    if len(splits) > 1:
        raise DataError("its name says both train and validation", field=path)
    return splits[0] if splits else ""


def find_shards(directory: str, split: str) -> tuple[str, ...]:
    """Returns the paths of a split's shards in a directory without meta.json, in order."""
    files = sorted(name for name in os.listdir(directory) if name.endswith(SUFFIXES))
    paths = [os.path.join(directory, name) for name in files]
    found = [path for path in paths if split_of(path) == split]
    if not found:
        wanted = " or ".join(sorted(SPLITS[split]))
        there = ", ".join(map(one_line, files[:SHOWN_FILES])) or "none"
        raise DataError(
            f"no {META_FILE}, and no .bin or .npy file with the word {wanted} in its name: there is no {split} split",
            field=directory,
            remedy=f"its files: {there}",
        )
    return tuple(found)


def check_characters(directory: str, tokenizer: "Tokenizer") -> None:
    """Checks that nanoGPT's meta.pkl in a directory, if there is one, has the characters of `tokenizer`.

    Raises:
        ConfigError: it has others.
        DataError: it is damaged.
    """
    path = os.path.join(directory, META_PICKLE)
    if not os.path.isfile(path):
        return
    characters = load_meta_pickle(path).characters
    if getattr(tokenizer, "characters", None) != characters:
        raise ConfigError(
            f"{path} has {len(characters)} characters, and this tokenizer other ids",
            field="data.tokenizer",
            value=tokenizer.name,
            remedy=f"set data.tokenizer={path} and model.vocab_size={len(characters)}",
        )
