"""What a replayed step looks like: documents, tokens, tables, and that nothing in them can do harm."""

import html.parser
import math
import re

import numpy as np
import pytest

from gptjax.data.tokenizer import load_tokenizer
from gptjax.documents import EndOfText
from gptjax.loss import NOT_COUNTED
from gptjax.replay import report

EOT = 256


@pytest.fixture(scope="module")
def words():
    tokenizer = load_tokenizer("bytes")
    return report.TokenText(lambda i: tokenizer.decode_bytes([i]), tokenizer.eot_id, tokenizer.vocab_size)


def make_row(text, losses, number=0, eot_position="last"):
    tokens = np.array([EOT if c == 256 else c for c in text], np.int32)
    documents = report.split_documents(tokens, EndOfText(EOT, eot_position))
    return report.Row(number, 70 + number, "<a>.bin", 640, tokens, np.array(losses, np.float32), documents)


def replayed(words, rows, norms=None):
    return report.Replayed(
        title="step 7 of <runs>",
        notes=["equal & well"],
        metrics={"loss": 2.5, "grad_norm": math.nan},
        rows=rows,
        norms=norms or {"ln_f/bias": np.array([1.0])},
        words=words,
    )


@pytest.mark.parametrize(
    ("tokens", "position", "expected"),
    [
        ([1, 2, 9, 3, 9, 9], "last", [(0, 3), (3, 5), (5, 6)]),
        ([1, 2, 9, 3, 9, 9], "first", [(0, 2), (2, 4), (4, 5), (5, 6)]),
        ([9, 1, 2], "first", [(0, 3)]),
        ([9, 1, 2], "last", [(0, 1), (1, 3)]),
        ([1, 2, 9], "last", [(0, 3)]),
        ([1, 2], "last", [(0, 2)]),
    ],
)
def test_documents_are_cut_at_end_of_text(tokens, position, expected):
    found = report.split_documents(np.array(tokens), EndOfText(9, position))
    assert [(part.start, part.stop) for part in found] == expected


def test_row_loss_is_the_mean_over_counted_tokens():
    assert make_row(b"abcd", [1.0, NOT_COUNTED, 4.0]).loss == 2.5
    assert make_row(b"abcd", [NOT_COUNTED] * 3).loss == 0.0
    assert math.isnan(make_row(b"abcd", [1.0, math.nan, 4.0]).loss)


def test_nonfinite_rows_are_listed_before_high_losses():
    losses = [1.0, 3.0, math.nan, 2.0, math.inf]
    rows = [make_row(b"ab", [loss], number) for number, loss in enumerate(losses)]
    assert [row.number for row in report.worst_first(rows)] == [2, 4, 1, 3, 0]


NORMS = {
    "h/ln_1/bias": np.array([3.0, math.inf], np.float32),
    "h/mlp/c_fc/kernel": np.array([4.0, 1.0], np.float32),
    "ln_f/bias": np.array([3.0], np.float32),
    "ln_f/scale": np.array([4.0], np.float32),
    "wpe/embedding": np.array([2.0], np.float32),
    "wte/embedding": np.array([1.0], np.float32),
}


def test_norms_are_grouped_by_layer_and_parameter():
    assert report.layer_norms(NORMS) == {"wte": 1.0, "wpe": 2.0, "layer 0": 5.0, "layer 1": math.inf, "ln_f": 5.0}
    assert list(report.layer_norms(NORMS)) == ["wte", "wpe", "layer 0", "layer 1", "ln_f"]
    assert report.whole_norms(NORMS)["h/mlp/c_fc/kernel"] == pytest.approx(math.sqrt(17))
    assert next(iter(dict(report.nonfinite_first(report.layer_norms(NORMS))))) == "layer 1"


def test_multi_token_character_is_shown_at_its_last_token(words):
    ids = [*"aé€".encode(), 0xC3, EOT, ord("b"), 0xFF]
    circle = report.PART_OF_A_CHARACTER
    assert list(report.token_texts(ids, words)) == [
        "a", circle, "é", circle, circle, "€", circle, r"\xc3<|endoftext|>", "b", r"\xff"
    ]  # fmt: skip


def test_invisible_and_bidirectional_characters_are_escaped():
    assert report.visible("a\n\t\x1b[31m\u202eb\u2028") == "a↵\n\t\\x1b[31m\\u202eb\\u2028"


def test_shades_range_from_zero_loss_to_uniform_guessing(words):
    top = math.log(257)
    assert [report.shade(x, words) for x in (0.0, -1e-7, top / 2, top, 99.0)] == ["0", "0", "4", "9", "9"]
    assert [report.shade(x, words) for x in (math.nan, math.inf)] == ["n", "n"]
    assert report.shade(NOT_COUNTED, words) == ""


class Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def read(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    return reader


def test_page_shows_every_token_loss_and_loads_no_resources(words):
    evil = b"<script>alert(1)</script>&lt;'\""
    losses = [0.5 * n for n in range(len(evil) - 1)]
    text = "".join(report.render(replayed(words, [make_row(evil, losses)], NORMS)))
    reader = read(text)
    assert set(reader.tags) <= {
        "html", "meta", "title", "style", "h1", "h2", "ul", "li", "table", "tr", "th", "td", "p", "b", "details",
        "summary", "pre",
    }  # fmt: skip
    assert not {name for name, _ in reader.attributes} & {"src", "href", "onload", "onerror"}
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text
    titles = [value for name, value in reader.attributes if name == "title"]
    assert titles[0] == "not predicted, token 640, id 60"
    assert titles[1:] == [f"loss {loss:.4f}, token {641 + n}, id {evil[n + 1]}" for n, loss in enumerate(losses)]
    shown = "".join(reader.text)
    assert evil.decode() in shown
    assert "step 7 of <runs>" in shown
    assert "equal & well" in shown
    assert text.count("class=bad>nan") == 1
    assert text.index("layer 1<td class=bad>inf") < text.index("<td>wte<td>1")


def test_each_document_has_its_own_block(words):
    text = "".join(report.render(replayed(words, [make_row([97, 256, 98, 99], [1.0, 2.0, 3.0])])))
    blocks = re.findall(r"<pre>(.*?)</pre>", text, re.DOTALL)
    assert ["".join(re.findall(r">([^<]+)</b>", block)) for block in blocks] == ["a&lt;|endoftext|&gt;", "bc"]


def test_only_the_worst_rows_show_their_text(words):
    rows = [make_row(b"ab", [float(number)], number) for number in range(4)]
    text = "".join(report.render(replayed(words, rows), full_rows=2))
    assert re.findall(r"<summary>row (\d)", text) == ["3", "2"]
    assert "2 more rows" in text
    assert re.findall(r"<td>row (\d)", text) == ["1", "0"]
    everything = "".join(report.render(replayed(words, rows)))
    assert re.findall(r"<summary>row (\d)", everything) == ["3", "2", "1", "0"]


def test_the_text_is_short_and_safe(words):
    rows = [make_row(b"\x1b[31mred\n" * 4, [float(n)] * 35, n) for n in range(20)]
    lines = list(report.text_lines(replayed(words, rows, NORMS)))
    numbers = [int(line.split()[0]) for line in lines if re.match(r" +\d+ ", line)]
    assert numbers == list(range(19, 3, -1))
    assert any(line.strip() == "and 4 of lower loss" for line in lines)
    assert all(line.isprintable() for line in lines)
    at = next(number for number, line in enumerate(lines) if line.startswith("layer "))
    assert lines[at + 1] == f"{'layer 1':<22} inf  NOT FINITE"
