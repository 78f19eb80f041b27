"""The name of a model in any format: FORMAT:PATH, as in hf:exported or nanogpt:ckpt.pt."""

import os
from typing import NamedTuple

from gptjax.errors import ConfigError

READABLE = ("gptjax", "hf", "nanogpt", "llmc", "msgpack")
WRITABLE = ("gptjax", "hf", "nanogpt", "llmc")
OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FORMATS_HELP = "hf:DIR, hf:OWNER/NAME[@REVISION], gptjax:WORKDIR[@STEP], nanogpt:ckpt.pt, llmc:model.bin, msgpack:DIR"


class ModelRef(NamedTuple):
    """A model as --from, --to and --model name it."""

    format: str
    path: str

    def __str__(self) -> str:
        return f"{self.format}:{self.path}"


def parse_model_ref(flag: str, text: str, formats: tuple[str, ...]) -> ModelRef:
    """Returns the ModelRef of FORMAT:PATH.

    Raises:
        ConfigError: the format is not one of `formats`, or the path is empty.
    """
    name, _, path = text.partition(":")
    if not path and (near := guess(text)):
        raise ConfigError("has no format", field=flag, value=text, remedy=f"write {flag}={near}")
    if not path or name not in formats:
        raise ConfigError(
            f"expected one of {', '.join(formats)}, a colon and a path, such as {FORMATS_HELP}",
            field=flag,
            value=text,
        )
    return ModelRef(name, os.path.expanduser(path))


def guess(text: str) -> str:
    """Returns FORMAT:PATH for the path of a model or the name of a GPT-2; "" if it can be several."""
    if text in OPENAI_MODELS:
        return f"hf:openai-community/{text}"
    if os.path.isdir(os.path.join(text, "checkpoints")):
        return f"gptjax:{text}"
    if os.path.isfile(os.path.join(text, "config.json")):
        return f"hf:{text}"
    if os.path.isfile(text) and text.endswith((".pt", ".bin")):
        return f"{'nanogpt' if text.endswith('.pt') else 'llmc'}:{text}"
    return ""
