"""One question of a task, in the three forms that a file of questions may have."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from gptjax.errors import DataError, one_line

FORMS = (
    '{"context": ..., "choices": [...], "label": 0}',
    '{"context": ..., "continuation": ...}',
    '{"contexts": [...], "continuation": ..., "label": 0}',
)


class Item(NamedTuple):
    """A question: contexts and their continuations, one pair for each choice, and the number of the right one.

    Without choices there is one pair, and the answer is right if the model itself would write the continuation.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    label: int
    lengths: tuple[int, ...]  # of the choices in characters, without the blank before them
    text_bytes: tuple[int, ...]  # the same in bytes of UTF-8

    @property
    def has_choices(self) -> bool:
        """Whether one of several continuations is right."""
        return len(self.contexts) > 1


class Score(NamedTuple):
    """What a model says of one continuation."""

    logprob: float  # nats
    is_greedy: bool  # whether each token was the likeliest one
    is_cut: bool  # whether the context was cut at the left, because both are longer than the model's context


def choose_continuation(context: str, choices: list[str], label: int) -> dict[str, Any]:
    """Returns the row of a question whose choices continue one context, after a blank."""
    return {"context": context, "choices": [f" {choice}" for choice in choices], "label": label}


def parse_item(row: Mapping[str, Any], name: str) -> Item:
    """Returns the question of a row in one of FORMS.

    name: of the row, for an error.

    Raises:
        DataError: it has none of the forms, or its label is no choice.
    """
    found = set(row) & {"context", "contexts", "continuation", "choices"}
    if found == {"context", "continuation"}:
        return _make([row["context"]], [row["continuation"]], 0, name)
    several = row.get("choices", row.get("contexts"))
    if isinstance(several, list) and len(several) == 1:
        raise DataError("has one choice, and so no question", field=name)
    if found == {"context", "choices"} and isinstance(row["choices"], list):
        choices = row["choices"]
        return _make([row["context"]] * len(choices), choices, row.get("label"), name)
    if found == {"contexts", "continuation"} and isinstance(row["contexts"], list):
        contexts = row["contexts"]
        return _make(contexts, [row["continuation"]] * len(contexts), row.get("label"), name)
    raise DataError(
        f"has the fields {', '.join(map(one_line, sorted(map(str, row)))) or 'of none'}",
        field=name,
        remedy=f"give it one of the forms {'  '.join(FORMS)}",
    )


def _make(contexts: list[Any], continuations: list[Any], label: Any, name: str) -> Item:
    texts = [*contexts, *continuations]
    if not all(isinstance(text, str) for text in texts):
        raise DataError("a context, choice or continuation is no string", field=name)
    if not all(continuations) or not contexts:
        raise DataError("a choice or continuation is empty", field=name)
    if not all(continuation.strip() for continuation in continuations):
        raise DataError("a choice or continuation is blank", field=name)
    if type(label) is not int or not 0 <= label < len(contexts):
        raise DataError(f"its label is {one_line(label)}, expected 0 to {len(contexts) - 1}", field=name)
    shown = [continuation.removeprefix(" ") for continuation in continuations]
    return Item(
        contexts=tuple(contexts),
        continuations=tuple(continuations),
        label=label,
        lengths=tuple(max(1, len(text)) for text in shown),
        text_bytes=tuple(max(1, len(text.encode())) for text in shown),
    )
