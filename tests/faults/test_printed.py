"""E1, S2: what is printed controls no terminal, is no markup, and holds no secret."""

import dataclasses
import logging
import time

import pytest

from gptjax import cli, redaction, sample
from gptjax.config import Config, flatten
from gptjax.convert import card, formats
from gptjax.data.tokenizer import load_tokenizer
from gptjax.errors import ConfigError
from gptjax.logs import RunLog
from gptjax.replay import report
from tests.convert.models import CONFIG, write_hf
from tests.helpers import failing, raises
from tests.replay.test_report import make_row, replayed, words

pytestmark = pytest.mark.faults
__all__ = ["words"]  # a fixture

ESCAPES = {
    "\x1b[31mred\x1b[0m": r"\x1b[31mred\x1b[0m",
    "a\rb\x00\x07\x7f": r"a\rb\x00\x07\x7f",
    "\x9b31m": r"\x9b31m",  # the same in one byte, for some terminals
    "\u202eabc\u2066": r"\u202eabc\u2066",  # turns the text around
    "\udcff": r"\udcff",  # a byte that is no UTF-8, in the name of a file
    "line\n\ttab": "line\n\ttab",
    "é 走\u3000る 👩\u200d🚀 \xa0": "é 走\u3000る 👩\u200d🚀 \xa0",
}


@pytest.mark.parametrize("text", ESCAPES)
def test_e1_control_characters_are_escaped(text, capsys):
    assert redaction.shown(text) == ESCAPES[text]
    redaction.say(text)
    redaction.print_error(text)
    line = logging.LogRecord("gptjax", logging.INFO, "", 0, "%s", (text,), None)
    told = capsys.readouterr()
    assert (told.out, told.err) == (ESCAPES[text] + "\n",) * 2
    assert cli._Redacting("%(message)s").format(line) == ESCAPES[text]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_e1_a_sample_is_escaped_on_a_terminal_only(is_terminal, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    text = "\x1b[31m\xe9\r\n\t\x9b"

    def run(on_token=None):
        for token in text.encode() if on_token else ():
            on_token(0, token)
        return [list(text.encode())] * 2

    expected = "\\x1b[31m\xe9\\r\n\t\\x9b" if is_terminal else text
    sample.print_samples(run, bytes, ["\x1b"])
    sample.print_samples(run, bytes, ["\x1b"] * 2)
    prompt = "\\x1b" if is_terminal else "\x1b"
    assert capsys.readouterr().out == f"{prompt}{expected}\n" + f"{prompt}{expected}\n{sample.SEPARATOR}\n" * 2
    assert "a terminal" in sample.__doc__.lower()


def test_e1_shard_name_is_escaped_in_a_replay(words):
    name = "\x1b]0;title\x07\n<b>\udcff\u202e.bin"
    row = make_row(b"ab", [1.0])
    step = replayed(words, [dataclasses.replace(row, shard=name)] * 2)
    shown = r"\x1b]0;title\x07\n<b>\udcff\u202e.bin"
    assert sum(shown in line for line in report.text_lines(step)) == 2
    content = "".join(report.render(step, full_rows=1))
    content.encode()
    assert content.count(shown.replace("<b>", "&lt;b&gt;")) == 2
    assert "\x1b" not in content + "".join(report.text_lines(step))


NAMES = {
    "gpt2": "gpt2",
    "runs/my_run-1@5": "runs/my_run-1@5",
    "a | b\n\n# x": "a &#124; b &#35; x",
    "<img src=//e.org/x>": "&#60;img src=//e.org/x&#62;",
    "[click](https://e.org) `code`": "&#91;click&#93;(https&#58;//e.org) &#96;code&#96;",
    "**b** _it_ ~~x~~ \\| &amp;": (
        "&#42;&#42;b&#42;&#42; &#95;it&#95; &#126;&#126;x&#126;&#126; &#92;&#124; &#38;amp&#59;"
    ),
    "www.e.org a@e.org": "www&#46;e.org a&#64;e.org",
    "\x1b[31m": "&#92;x1b&#91;31m",
}


@pytest.mark.parametrize("name", NAMES)
def test_e1_markup_in_a_name_is_escaped_for_model_cards(name, tmp_path):
    assert card.as_text(name) == NAMES[name]


def test_e1_model_card_escapes_tokenizer_source_and_data_names(tmp_path):
    write_hf(tmp_path, config=CONFIG)
    weights = formats.open_weights(formats.ModelRef("hf", str(tmp_path)), dropout=0.0)
    words = dataclasses.replace(load_tokenizer("bytes"), name="x |\n<script>")
    weights = dataclasses.replace(weights, tokenizer=words, origin="hf:<o>", history={"data": "<d>"})
    text = card.model_card(weights, "float32")
    for row in ("tokenizer | x &#124; &#60;script&#62;", "converted from | hf:&#60;o&#62;", "data | &#60;d&#62;"):
        assert f"\n| {row} |\n" in text


def test_e1_samples_are_preformatted_in_tensorboard(tmp_path):
    log = RunLog(str(tmp_path), Config(), resumed_from=0)
    log.write_text("sample", "![x](http://e.org)\x1b\n# b", 1)
    log.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert rb"    ![x](http://e.org)\x1b" + b"\n    # b\n" in events.read_bytes()


# Secrets

PEM = """-----BEGIN PRIVATE KEY-----
MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQDVq7h2fXy
kq8ZzM4uT1vWnL0cYb3eRjHs
Qw==
-----END PRIVATE KEY-----
"""
HIDDEN = {  # (variable, its value): texts and what is printed of them
    ("GITHUB_PAT", "f3a9c17be2d04451"): {"key f3a9c17be2d04451!": "key [GITHUB_PAT]!"},
    ("GH", "ghp_0123456789abcdefABCDEF"): {"x ghp_0123456789abcdefABCDEF": "x [GH]"},
    ("DB_PASS", "s3cretPassw0rd"): {"as s3cretPassw0rd": "as [DB_PASS]"},
    ("SERVICE_TOKEN_2", "s3cretPassw0rd"): {"as s3cretPassw0rd": "as [SERVICE_TOKEN_2]"},
    ("DATABASE_URL", "postgres://joe:p%40ss@db:5432/x"): {
        "postgres://joe:p%40ss@db:5432/x is away": "postgres://joe:[DATABASE_URL]@db:5432/x is away",
        "connect 'mysql://joe:p@ss@h'": "connect 'mysql://joe:[DATABASE_URL]@h'",
    },
    ("HTTPS_PROXY", "http://joe:Xy7kQ2mPz9@proxy:80"): {"no: Xy7kQ2mPz9": "no: [HTTPS_PROXY]"},
    ("REMOTE", "https://Xy7kQ2mPz9Xy7kQ2mPz9@e.org/r"): {"no Xy7kQ2mPz9Xy7kQ2mPz9@": "no [REMOTE]@"},
    ("NONE", ""): {"s3://a:b@c http://h/a:b@c": "s3://a:[password]@c http://h/a:b@c"},
    ("DB", "postgres://u:p@ss/w0rdlong@h/x"): {
        "postgres://u:p@ss/w0rdlong@h/x": "postgres://u:[DB]@h/x",
        "no p@ss/w0rdlong": "no [DB]",
        "redis://:a/b@c/d@h and e@f": "redis://:[password]@h and e@f",
    },
    ("URLS", "a://u:Xy7kQ2mPz9@h,b://u:Zt5rW8nLq3@k"): {
        "b://u:Zt5rW8nLq3@k": "b://u:[URLS]@k",
        "Xy7kQ2mPz9, Zt5rW8nLq3": "[URLS], [URLS]",
        "a://u:Xy7kQ2mPz9@h,b://u:other@k": "a://u:[password]@k",
    },
    ("PGPASS", "s3cretPassw0rd"): {"as s3cretPassw0rd": "as [PGPASS]"},
    ("MYSQL_PWD", "s3cretPassw0rd"): {"as s3cretPassw0rd": "as [MYSQL_PWD]"},
    ("COMPASS", "s3cretPassw0rd"): {"as s3cretPassw0rd": "as s3cretPassw0rd"},
    ("AZURE", "AccountName=joe;AccountKey=Xy7kQ2mPz9Xy7k==;EndpointSuffix=e.org"): {
        "AccountKey=Xy7kQ2mPz9Xy7k==;EndpointSuffix=e.org": "AccountKey=[AZURE];EndpointSuffix=e.org",
        "no Xy7kQ2mPz9Xy7k==": "no [AZURE]",
        "accountkey=anotherLongOne;x": "accountkey=[password];x",
    },
    ("SORT_KEY", "constant"): {"a constant": "a constant"},
    ("PWD", "/a1B2/c3D4e5F6"): {"in /a1B2/c3D4e5F6": "in /a1B2/c3D4e5F6"},
    ("SSH_PRIVATE_KEY", PEM): {
        PEM: "[SSH_PRIVATE_KEY]\n",
        repr(PEM): "'[SSH_PRIVATE_KEY]\\n'",
        " ".join(PEM.split()): "[SSH_PRIVATE_KEY]",
        f"x={PEM[:60]!r}..."[:70]: "x='[SSH_PRIVATE_KEY]\\n[SSH_PRIVATE_KEY]'...",
        f"at {PEM.split()[4]} end": "at [SSH_PRIVATE_KEY] end",
        "line 4: Qw==": "line 4: [SSH_PRIVATE_KEY]",
        "a PRIVATE KEY": "a PRIVATE KEY",
        "Qw==\nQw": "[SSH_PRIVATE_KEY]\nQw",
    },
}


@pytest.mark.parametrize("variable", HIDDEN, ids=lambda v: v[0])
def test_s2_secrets_of_any_form_are_not_printed(variable, monkeypatch):
    monkeypatch.setenv(*variable)
    for text, expected in HIDDEN[variable].items():
        assert redaction.redact(text) == expected


def test_s2_a_long_text_takes_no_time_to_search():
    begin = time.process_time()
    redaction.redact("a://b:" * 20_000)
    assert time.process_time() - begin < 10


def test_s2_multiline_secret_is_redacted_in_an_error(monkeypatch, capsys):
    monkeypatch.setenv("SSH_PRIVATE_KEY", PEM)
    monkeypatch.setattr(cli, "start_logging", lambda: None)
    monkeypatch.setattr(cli, "_exit", lambda code: None)

    cli.run_cli(failing(ConfigError(f"a: {PEM}\nb: \x1b")))
    assert capsys.readouterr().err == "error: a: [SSH_PRIVATE_KEY]\nerror: b: \\x1b\n"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(f"{kind}_KEY", word) for kind in ("SORT", "API") for word in ("constant", "bfloat16", "stdlib-bytes")],
        ("DB_PASSWORD", "data/gpt2"),
        ("CACHE_KEY", "20241128"),
        ("ACCESS_TOKEN", "short1"),
        ("HTTPS_PROXY", "http://joe:constant@proxy"),
        ("CACHE_PATH", "f3a9c17be2d04451"),
    ],
)
def test_s2_ordinary_environment_values_are_allowed_in_settings(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    word = value.partition("joe:")[2].partition("@")[0] or value
    redaction.refuse_secrets(flatten(Config()) | {"data.path": f"/data/{word}/x", "optim.schedule": word})


def test_s2_path_in_a_variable_is_not_a_secret(monkeypatch, tmp_path):
    path = tmp_path / "f3a9c17be2d04451-credentials.json"
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    assert redaction.redact(f"{path}: missing") == f"{path}: missing"
    redaction.refuse_secrets({"data.path": str(tmp_path)})


@pytest.mark.parametrize(
    ("name", "value", "setting"),
    [
        ("GITHUB_PAT", "f3a9c17be2d04451", "x f3a9c17be2d04451"),
        ("DATABASE_URL", "postgres://joe:pw@db/x", "postgres://joe:pw@db/x"),
        ("SSH_PRIVATE_KEY", PEM, PEM[40:80]),
        ("X", "hf_abcdefghijklmnop", "hf_abcdefghijklmnop"),
    ],
    ids=lambda value: "x",  # pytest puts the id into the environment
)
def test_s2_a_setting_with_a_secret_of_any_form_is_refused(name, value, setting, monkeypatch):
    monkeypatch.setenv(name, value)
    with raises(ConfigError, "data.path", match=f" {name}"):
        redaction.refuse_secrets({"data.path": setting})
