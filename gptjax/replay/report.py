"""Renders a replayed step as tables of text, and as one self-contained HTML file."""

import codecs
import dataclasses
import html
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gptjax.documents import EndOfText
from gptjax.loss import NOT_COUNTED
from gptjax.redaction import shown

SHOWN_ROWS = 16  # in the text
SHADES = 10  # of a token's loss; the last is log(vocabulary), the loss of a uniform guess, or more
PREVIEW_LENGTH = 40  # characters of a row's text in the text
PART_OF_A_CHARACTER = "\N{DOTTED CIRCLE}"
LINE_END = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n"


@dataclasses.dataclass(frozen=True)
class Row:
    """One sequence of the batch."""

    number: int  # in the batch
    window: int  # of the training data
    shard: str  # file name, after the name of its source in a mixture
    start: int  # the first token's number in the shard
    tokens: np.ndarray  # int [T+1]
    losses: np.ndarray  # float [T], of predicting tokens[1:]; NOT_COUNTED where a target does not count
    documents: list[range]  # of positions in `tokens`

    @property
    def loss(self) -> float:
        """The mean over the tokens that count."""
        is_counted = self.losses != NOT_COUNTED
        counted = self.losses[is_counted].astype(np.float64)
        return float(np.mean(counted)) if counted.size else 0.0


class TokenText(NamedTuple):
    """The part of a tokenizer that a page needs."""

    decode: Callable[[int], bytes]  # of one id
    eot_id: int
    vocab_size: int


@dataclasses.dataclass(frozen=True)
class Replayed:
    """One recomputed update."""

    title: str
    notes: list[str]  # how it was computed, and whether it equals the run's log
    metrics: dict[str, float]
    rows: list[Row]
    norms: dict[str, np.ndarray]  # of the gradient, by parameter: [L] for those of the layers, [1] for others
    words: TokenText


def split_documents(tokens: np.ndarray, eot: EndOfText) -> list[range]:
    """Returns the positions of each document, or part of one, in `tokens` [T+1], its end-of-text token included."""
    boundaries = np.flatnonzero(tokens == eot.id)
    if eot.position == "last":
        boundaries += 1
    inner = [int(at) for at in boundaries if 0 < at < len(tokens)]
    edges = [0, *inner, len(tokens)]
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]


def is_layered(path: str) -> bool:
    """Returns whether the parameter at `path` is stacked over layers."""
    return path.startswith("h/")


def layer_norms(norms: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns the gradient's norm of each layer, and of each module outside the layers, in the order of the model.

    norms: [L] or [1] by parameter, as in `Replayed`.
    """
    outside: dict[str, list[float]] = {}
    for path, norm in norms.items():
        if not is_layered(path):
            module = path.split("/")[0]
            outside.setdefault(module, []).append(float(norm[0]))
    modules = {name: math.hypot(*values) for name, values in outside.items()}
    embeddings = [name for name in ("wte", "wpe") if name in modules]
    ordered = {name: modules.pop(name) for name in embeddings}
    squares = []
    for path, norm in norms.items():
        if is_layered(path):
            squares.append(np.square(norm, dtype=np.float64))
    if squares:
        for number, square in enumerate(np.sum(squares, axis=0)):
            ordered[f"layer {number}"] = math.sqrt(square)
    return ordered | modules


def whole_norms(norms: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns the gradient's norm of each parameter, over all layers; norms: [L] or [1] by parameter."""
    whole = {}
    for path, norm in norms.items():
        squares = np.square(norm, dtype=np.float64)
        whole[path] = math.sqrt(np.sum(squares))
    return whole


def _infinite_if_nan(loss: float) -> float:
    """Returns `loss`, or infinity for one that is not finite, so that it counts as the highest."""
    return loss if math.isfinite(loss) else math.inf


def worst_first(rows: Iterable[Row]) -> list[Row]:
    """Returns the rows with a non-finite loss, then the others from the highest loss to the lowest."""
    return sorted(rows, key=lambda row: -_infinite_if_nan(row.loss))


def nonfinite_first(norms: dict[str, float]) -> list[tuple[str, float]]:
    """Returns the (name, norm) pairs of `norms`, those that are not finite first."""
    return sorted(norms.items(), key=lambda item: math.isfinite(item[1]))


def text_lines(step: Replayed) -> Iterator[str]:
    """Yields the lines for a screen."""
    yield one_line(step.title)
    for note in step.notes:
        yield f"  {note}"
    metrics = [f"{name} {value:.6g}" for name, value in step.metrics.items()]
    yield "  " + "  ".join(metrics)
    yield ""
    yield from _row_lines(step)
    yield from _norm_lines("layer", layer_norms(step.norms))
    yield from _norm_lines("parameter", whole_norms(step.norms))


def _row_lines(step: Replayed) -> Iterator[str]:
    widths = [len(one_line(row.shard)) for row in step.rows]
    width = max(widths, default=5)
    yield f"{'row':>5} {'window':>10}  {'shard':<{width}} {'from token':>12} {'loss':>8} {'highest':>8}  documents"
    for row in worst_first(step.rows)[:SHOWN_ROWS]:
        shard = one_line(row.shard)
        highest = max(row.losses.tolist(), key=_infinite_if_nan)
        place = f"{row.number:>5} {row.window:>10}  {shard:<{width}} {row.start:>12}"
        documents = f"{len(row.documents)}: {preview(row, step.words, PREVIEW_LENGTH)}"
        yield f"{place} {row.loss:>8.4f} {highest:>8.4f}  {documents}"
    hidden = len(step.rows) - SHOWN_ROWS
    if hidden > 0:
        yield f"  and {hidden} of lower loss"


def _norm_lines(title: str, norms: dict[str, float]) -> Iterator[str]:
    yield ""
    yield f"{title:<22} gradient norm"
    for name, norm in nonfinite_first(norms):
        mark = "" if math.isfinite(norm) else "  NOT FINITE"
        yield f"{name:<22} {norm:.6g}{mark}"


def preview(row: Row, words: TokenText, length: int) -> str:
    """Returns the start of a row's text in quotes, on one line, safe to print."""
    first = [int(token) for token in row.tokens[:length] if token != words.eot_id]
    text = b"".join(map(words.decode, first)).decode(errors="replace")
    return _escaped(repr(text))[:length]


def _escaped(text: str) -> str:
    """Returns `text` with escapes for the characters that are not printable."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def token_texts(ids: Iterable[int], words: TokenText) -> Iterator[str]:
    """Yields the text of each token: a character of several tokens appears at the last, invalid bytes are escaped."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="backslashreplace")
    for token in ids:
        if token == words.eot_id:
            incomplete = decoder.decode(b"", final=True)
            decoder.reset()
            yield visible(incomplete) + "<|endoftext|>"
        else:
            text = decoder.decode(words.decode(token))
            yield visible(text) or PART_OF_A_CHARACTER


def one_line(name: str) -> str:
    """Returns a file's name on one line, with escapes for control characters and markup of a terminal."""
    return shown(name).replace("\n", "\\n").replace("\t", "\\t")


def visible(text: str) -> str:
    """Returns `text` with line ends marked, and escapes for invisible characters and those that reverse the text."""
    marked = {"\n": LINE_END, "\t": "\t"}
    return "".join(marked[c] if c in marked else _escaped(c) for c in text)


def shade(loss: float, words: TokenText) -> str:
    """Returns the style of a token's loss: a digit, "n" for a non-finite loss, "" where the token does not count."""
    if loss == NOT_COUNTED:
        return ""
    if not math.isfinite(loss):
        return "n"
    share = loss / math.log(words.vocab_size)
    digit = int(share * (SHADES - 1))
    return str(min(SHADES - 1, max(0, digit)))


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
    """Yields one HTML file that loads nothing; it has the text of the `full_rows` rows of highest loss, 0: of all."""
    title = html.escape(one_line(step.title))
    yield f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{title}</title>"
    yield f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>\n<h1>{title}</h1>"
    yield "<ul>"
    for note in step.notes:
        yield f"<li>{html.escape(shown(note))}"
    yield "</ul>"
    metrics = ["this update", *step.metrics.values()]
    yield table(["", *step.metrics], [metrics])
    yield "<h2>Gradient norms</h2>"
    layers = nonfinite_first(layer_norms(step.norms))
    yield table(["layer", "norm"], layers)
    yield _parameter_table(step.norms)
    yield "<h2>Rows, highest loss first</h2>"
    yield f"<p>The colour of a token is the loss of predicting it: {scale(step.words)}. Point at one for the number."
    rows = worst_first(step.rows)
    full = rows[:full_rows] if full_rows else rows
    for row in full:
        yield from render_row(row, step.words)
    if rest := rows[len(full) :]:
        yield f"<p>{len(rest)} more rows, without their text (--rows=0 shows all):"
        yield _row_table(rest)
    yield "</html>\n"


def _parameter_table(norms: dict[str, np.ndarray]) -> str:
    """Returns the table of the norm of each parameter, and of its part in each layer."""
    sizes = [norm.size for norm in norms.values()]
    depth = max(sizes, default=0)
    has_layers = depth > 1  # the norms of a single layer would repeat the first column
    layers = [f"layer {number}" for number in range(depth)] if has_layers else []
    lines = []
    for path, norm in nonfinite_first(whole_norms(norms)):
        line: list[object] = [path, norm]
        if has_layers and is_layered(path):
            line += norms[path].tolist()
        lines.append(line)
    return table(["parameter", "norm", *layers], lines)


def _row_table(rows: Iterable[Row]) -> str:
    lines = []
    for row in rows:
        lines.append(
            [
                f"row {row.number}",
                row.window,
                one_line(row.shard),
                row.start,
                row.loss,
                len(row.documents),
            ]
        )
    return table(["", "window", "shard", "from token", "loss", "documents"], lines)


def scale(words: TokenText) -> str:
    """Returns the HTML of the colour scale of token losses."""
    top = math.log(words.vocab_size)
    parts = []
    for number in range(SHADES):
        loss = top * number / (SHADES - 1)
        parts.append(f"<b class=s{number}>&nbsp;{loss:.1f}&nbsp;</b>")
    return "".join(parts) + f" nats, <b class=n>not finite</b>; guessing would cost {top:.1f}"


def table(head: list[str], lines: Sequence[Sequence[object]]) -> str:
    """Returns an HTML table; floats that are not finite are marked."""
    parts = ["<table><tr>"]
    for name in head:
        parts.append(f"<th>{html.escape(name)}")
    for line in lines:
        parts.append("<tr>")
        parts += map(_cell, line)
    parts.append("</table>\n")
    return "".join(parts)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return f"<td>{html.escape(str(value))}"
    mark = "" if math.isfinite(value) else " class=bad"
    return f"<td{mark}>{value:.6g}"


def render_row(row: Row, words: TokenText) -> Iterator[str]:
    """Yields the HTML of one row: its loss, its place in the data, and its tokens by document."""
    mark = "" if math.isfinite(row.loss) else " class=bad"
    last = row.start + len(row.tokens) - 1
    shard = html.escape(one_line(row.shard))
    yield f"<details open><summary{mark}>row {row.number}: loss {row.loss:.4f}, window {row.window}, "
    yield f"tokens {row.start} to {last} of {shard}, {len(row.documents)} documents</summary>"
    ids = row.tokens.tolist()
    texts = list(token_texts(ids, words))
    losses = [NOT_COUNTED, *row.losses.tolist()]  # no position predicts the first token
    for document in row.documents:
        yield "<pre>"
        for at in document:
            token = f"token {row.start + at}, id {ids[at]}"
            yield _token(texts[at], losses[at], words, token=token)
        yield "</pre>\n"
    yield "</details>\n"


def _token(text: str, loss: float, words: TokenText, *, token: str) -> str:
    """Returns the HTML of one token, in the colour of its loss."""
    outcome = "not predicted" if loss == NOT_COUNTED else f"loss {loss:.4f}"
    style = shade(loss, words)
    if style.isdigit():
        style = f"s{style}"
    attribute = f" class={style}" if style else ""
    return f'<b{attribute} title="{outcome}, {token}">{html.escape(text)}</b>'
