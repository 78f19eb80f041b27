"""The protocols of tasks by name: how a row of the published data becomes a question.

Each is the protocol of the task of the same name in EleutherAI's lm-eval, so that figures can be compared.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from gptjax.tasks.item import choose_continuation

Row = Mapping[str, Any]
Question = dict[str, Any]  # a row in one of the forms of item.py


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a task is asked, and where its published data are."""

    name: str
    convert: Callable[[Row], Question]
    describe: str  # one sentence
    hub: str  # as in the source hf:OWNER/NAME/FOLDER
    split: str  # a word in the names of the files, and the split of TFDS
    tfds: str = ""  # the data set of TFDS; "" if it has none
    has_lengths: bool = True  # whether accuracy by length is a metric of the protocol
    only_last_token: bool = False  # whether the question is the last token of the text, wherever a tokenizer cuts it


def _clean(text: str) -> str:
    """Returns a text of WikiHow without the marks of its titles, as lm-eval does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _hellaswag(row: Row) -> Question:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return choose_continuation(_clean(context), [_clean(ending) for ending in row["endings"]], int(row["label"]))


def _last_word(row: Row) -> Question:
    context, _, word = _text(row).rstrip("\n").rpartition(" ")
    return {"context": context, "continuation": f" {word}"}


def _whole_text(row: Row) -> Question:
    return {"context": "", "continuation": _text(row)}


def _text(row: Row) -> str:
    for name in ("text", "passage"):  # TFDS calls it passage
        if name in row:
            return row[name]
    raise KeyError("text")


def _piqa(row: Row) -> Question:
    return choose_continuation(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def _winogrande(row: Row) -> Question:
    before, found, after = row["sentence"].partition("_")
    if not found:
        raise ValueError("the sentence has no _")
    contexts = [before + row["option1"], before + row["option2"]]
    return {"contexts": contexts, "continuation": f" {after.strip()}", "label": int(row["answer"]) - 1}


def _arc(row: Row) -> Question:
    question = row["question"]
    choices = row.get("choices")
    if isinstance(question, Mapping):  # the official files have the choices in the question
        choices = question["choices"]
        question = question["stem"]
    if isinstance(choices, list):
        choices = {"text": [one["text"] for one in choices], "label": [one["label"] for one in choices]}
    assert choices is not None
    labels = list(choices["label"])
    return choose_continuation(f"Question: {question}\nAnswer:", list(choices["text"]), labels.index(row["answerKey"]))


def _boolq(row: Row) -> Question:
    label = row["label"] if "label" in row else row["answer"]
    context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return choose_continuation(context, ["no", "yes"], int(label))


def _blimp(row: Row) -> Question:
    return choose_continuation("", [row["sentence_good"], row["sentence_bad"]], 0)


_ALL = [
    Protocol("hellaswag", _hellaswag, "the best of four endings", "Rowan/hellaswag", "validation"),
    Protocol(
        "lambada_openai",
        _last_word,
        "the last word of OpenAI's de-tokenised text",
        "EleutherAI/lambada_openai",
        "test",
    ),
    Protocol(
        "lambada_last_token",
        _whole_text,
        "the last token of OpenAI's de-tokenised text, as the figures of GPT-2's paper may have been made",
        "EleutherAI/lambada_openai",
        "test",
        only_last_token=True,
    ),
    Protocol(
        "lambada_standard",
        _last_word,
        "the last word of the original text, in lower case with blanks before punctuation",
        "cimec/lambada",
        "test",
        tfds="lambada",
    ),
    Protocol("piqa", _piqa, "the better of two solutions", "baber/piqa", "validation", tfds="piqa"),
    Protocol(
        "winogrande",
        _winogrande,
        "the option after which the rest of the sentence is likelier",
        "allenai/winogrande/winogrande_xl",
        "validation",
        has_lengths=False,
    ),
    Protocol(
        "arc_easy", _arc, "the best of up to five answers", "allenai/ai2_arc/ARC-Easy", "test", tfds="ai2_arc/ARC-Easy"
    ),
    Protocol(
        "arc_challenge",
        _arc,
        "the best of up to five answers",
        "allenai/ai2_arc/ARC-Challenge",
        "test",
        tfds="ai2_arc/ARC-Challenge",
    ),
    Protocol(
        "boolq",
        _boolq,
        "yes or no after a passage",
        "aps/super_glue/boolq",
        "validation",
        tfds="bool_q",
        has_lengths=False,
    ),
    Protocol(
        "blimp",
        _blimp,
        "the grammatical one of two sentences",
        "nyu-mll/blimp",
        "train",
        tfds="blimp",
        has_lengths=False,
    ),
]
PROTOCOLS = {protocol.name: protocol for protocol in _ALL}
