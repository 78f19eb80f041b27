"""A replayed step for the eye: a few tables of text, and one HTML file that needs nothing else."""

import codecs
import dataclasses
import html
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from gptjax.loss import NOT_COUNTED

SHOWN_ROWS = 16  # in the text
SHADES = 10  # of a token's loss, the last from log(vocabulary) on: what guessing would cost
PART_OF_A_CHARACTER = "\N{DOTTED CIRCLE}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One sequence of the batch."""

    number: int  # in the batch
    window: int  # of the training data
    shard: str  # file name
    start: int  # the first token's number in the shard
    tokens: np.ndarray  # [T+1]
    losses: np.ndarray  # [T], of predicting tokens[1:]; NOT_COUNTED where none counts
    documents: list[range]  # of positions in `tokens`

    @property
    def loss(self) -> float:
        """The mean over the tokens that count."""
        counted = self.losses[self.losses != NOT_COUNTED].astype(np.float64)
        return float(np.mean(counted)) if counted.size else 0.0


class Words(NamedTuple):
    """What a page must know of a tokenizer."""

    decode: Callable[[int], bytes]  # of one id
    eot_id: int
    vocab_size: int


@dataclasses.dataclass(frozen=True)
class Replayed:
    """One update, as it was computed again."""

    title: str
    notes: list[str]  # how it was computed, and whether it is what the run logged
    metrics: dict[str, float]
    rows: list[Row]
    norms: dict[str, np.ndarray]  # of the gradient, by parameter: [L] for those of the layers, [1] for others
    words: Words


def split_documents(tokens: np.ndarray, *, eot_id: int, eot_position: str) -> list[range]:
    """Returns where in `tokens` each document, or the part of one, lies, its end-of-text token included."""
    ends = np.flatnonzero(tokens == eot_id) + (1 if eot_position == "last" else 0)
    cuts = [0, *(int(end) for end in ends if 0 < end < len(tokens)), len(tokens)]
    return [range(a, b) for a, b in itertools.pairwise(cuts)]


def layer_norms(norms: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns the gradient's norm of each layer, and of each parameter that is of none, in the order of the model."""
    layers = [norm for path, norm in norms.items() if path.startswith("h/")]
    squares = np.sum([np.square(norm, dtype=np.float64) for norm in layers], axis=0) if layers else []
    found = {f"layer {number}": math.sqrt(square) for number, square in enumerate(squares)}
    groups: dict[str, list[float]] = {}
    for path, norm in norms.items():
        if not path.startswith("h/"):
            groups.setdefault(path.split("/")[0], []).append(float(norm[0]))
    rest = {name: math.hypot(*values) for name, values in groups.items()}
    first = {name: norm for name, norm in rest.items() if name in ("wte", "wpe")}
    return dict(sorted(first.items(), reverse=True)) | found | {n: norm for n, norm in rest.items() if n not in first}


def whole_norms(norms: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns the gradient's norm of each parameter, over all layers."""
    return {path: math.sqrt(np.sum(np.square(norm, dtype=np.float64))) for path, norm in norms.items()}


def worst_first(rows: Iterable[Row]) -> list[Row]:
    """Returns the rows of highest loss first, and those that are not finite before them."""
    return sorted(rows, key=lambda row: -row.loss if math.isfinite(row.loss) else -math.inf)


def nonfinite_first(norms: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(norms.items(), key=lambda item: math.isfinite(item[1]))


def text_lines(step: Replayed) -> Iterator[str]:
    """Yields the lines for a screen."""
    yield step.title
    yield from (f"  {note}" for note in step.notes)
    yield "  " + "  ".join(f"{name} {value:.6g}" for name, value in step.metrics.items())
    yield ""
    width = max((len(row.shard) for row in step.rows), default=5)
    yield f"{'row':>5} {'window':>10}  {'shard':<{width}} {'from token':>12} {'loss':>8} {'highest':>8}  documents"
    for row in worst_first(step.rows)[:SHOWN_ROWS]:
        worst = max(row.losses.tolist(), key=lambda loss: loss if math.isfinite(loss) else math.inf)
        said = f"{len(row.documents)}: {preview(row, step.words, 40)}"
        yield (f"{row.number:>5} {row.window:>10}  {row.shard:<{width}} {row.start:>12} "
               f"{row.loss:>8.4f} {worst:>8.4f}  {said}")  # fmt: skip
    if len(step.rows) > SHOWN_ROWS:
        yield f"  and {len(step.rows) - SHOWN_ROWS} of lower loss"
    for name, norms in (("layer", layer_norms(step.norms)), ("parameter", whole_norms(step.norms))):
        yield ""
        yield f"{name:<22} gradient norm"
        for path, norm in nonfinite_first(norms):
            yield f"{path:<22} {norm:.6g}" + ("" if math.isfinite(norm) else "  NOT FINITE")


def preview(row: Row, words: Words, length: int) -> str:
    """Returns the start of a row's text in quotes, on one line, safe to print."""
    text = b"".join(words.decode(int(i)) for i in row.tokens[:length] if i != words.eot_id)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in repr(text.decode(errors="replace")))[:length]


def token_texts(ids: Iterable[int], words: Words) -> Iterator[str]:
    """Yields what each token shows: a character of several tokens stands with its last; what is no text is escaped."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="backslashreplace")
    for token in ids:
        if token == words.eot_id:
            yield visible(decoder.decode(b"", final=True)) + "<|endoftext|>"
            decoder.reset()
        else:
            yield visible(decoder.decode(words.decode(token))) or PART_OF_A_CHARACTER


def visible(text: str) -> str:
    """Returns `text` with line ends marked, and escapes for what would not show, or would turn the text around."""
    marked = {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n", "\t": "\t"}
    return "".join(marked.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in text)


def shade(loss: float, words: Words) -> str:
    """Returns the style of a token's loss: none, n for not finite, or a digit."""
    if loss == NOT_COUNTED:
        return ""
    if not math.isfinite(loss):
        return "n"
    return str(min(SHADES - 1, max(0, int(loss / math.log(words.vocab_size) * (SHADES - 1)))))


STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
td, th { padding: .15rem .6rem; text-align: right; font-variant-numeric: tabular-nums; }
td:first-child, th:first-child { text-align: left; }
th { border-bottom: 1px solid; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.7 ui-monospace, monospace; margin: .3rem 0;
  border-left: 2px solid rgb(128 128 128 / .5); padding-left: .6rem; }
b { font-weight: normal; border-radius: 2px; }
.bad, .n { outline: 2px solid rgb(200 0 200); font-weight: bold; }
summary { cursor: pointer; }
""" + "\n".join(f".s{i} {{ background: rgb(225 60 30 / {0.07 * i:.2f}); }}" for i in range(SHADES))


def render(step: Replayed, *, full_rows: int = 0) -> Iterator[str]:
    """Yields one HTML file, which loads nothing; the text of the `full_rows` rows of highest loss, 0 means of all."""
    title, rows = html.escape(step.title), worst_first(step.rows)
    yield f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{title}</title>"
    yield f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>\n<h1>{title}</h1>"
    yield "<ul>" + "".join(f"<li>{html.escape(note)}" for note in step.notes) + "</ul>"
    yield table(["", *step.metrics], [["this update", *step.metrics.values()]])
    yield "<h2>Gradient norms</h2>"
    yield table(["layer", "norm"], [list(item) for item in nonfinite_first(layer_norms(step.norms))])
    depth = max((norm.size for norm in step.norms.values()), default=0)
    whole = whole_norms(step.norms)
    columns = [f"layer {number}" for number in range(depth)] if depth > 1 else []
    yield table(
        ["parameter", "norm", *columns],
        [
            [path, norm, *(step.norms[path].tolist() if path.startswith("h/") and columns else [])]
            for path, norm in nonfinite_first(whole)
        ],
    )
    yield "<h2>Rows, highest loss first</h2>"
    yield f"<p>The colour of a token is the loss of predicting it: {scale(step.words)}. Point at one for the number."
    shown = rows[: full_rows or None]
    for row in shown:
        yield from render_row(row, step.words)
    if rest := rows[len(shown) :]:
        yield f"<p>{len(rest)} more rows, without their text (--rows=0 shows all):"
        lines = [[f"row {r.number}", r.window, r.shard, r.start, r.loss, len(r.documents)] for r in rest]
        yield table(["", "window", "shard", "from token", "loss", "documents"], lines)
    yield "</html>\n"


def scale(words: Words) -> str:
    top = math.log(words.vocab_size)
    steps = (f"<b class=s{i}>&nbsp;{top * i / (SHADES - 1):.1f}&nbsp;</b>" for i in range(SHADES))
    return "".join(steps) + f" nats, <b class=n>not finite</b>; guessing would cost {top:.1f}"


def table(head: list[str], lines: list[list[object]]) -> str:
    """Returns a table; numbers that are not finite are marked."""
    parts = ["<table><tr>", *(f"<th>{html.escape(name)}" for name in head)]
    for line in lines:
        parts.append("<tr>")
        for cell in line:
            text = f"{cell:.6g}" if isinstance(cell, float) else html.escape(str(cell))
            bad = isinstance(cell, float) and not math.isfinite(cell)
            parts.append(f"<td class=bad>{text}" if bad else f"<td>{text}")
    return "".join([*parts, "</table>\n"])


def render_row(row: Row, words: Words) -> Iterator[str]:
    end = row.start + len(row.tokens)
    bad = "" if math.isfinite(row.loss) else " class=bad"
    yield f"<details open><summary{bad}>row {row.number}: loss {row.loss:.4f}, window {row.window}, "
    yield f"tokens {row.start} to {end - 1} of {html.escape(row.shard)}, {len(row.documents)} documents</summary>"
    texts = list(token_texts(map(int, row.tokens), words))
    losses = [NOT_COUNTED, *row.losses.tolist()]
    for document in row.documents:
        yield "<pre>"
        for at in document:
            loss, about = losses[at], f"token {row.start + at}, id {int(row.tokens[at])}"
            about = f"loss {loss:.4f}, {about}" if loss != NOT_COUNTED else f"not predicted, {about}"
            kind = shade(loss, words)
            style = f" class={kind if kind == 'n' else 's' + kind}" if kind else ""
            yield f'<b{style} title="{about}">{html.escape(texts[at])}</b>'
        yield "</pre>\n"
    yield "</details>\n"
