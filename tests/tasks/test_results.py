"""Accuracy, perplexity and standard errors, and the rows of published data."""

import json
import math
import statistics

import pytest

from gptjax.errors import ConfigError, DataError
from gptjax.tasks.ask import write_results
from gptjax.tasks.fetch import choose_names, fetch_tasks
from gptjax.tasks.item import Score, parse_item
from gptjax.tasks.protocols import PROTOCOLS
from gptjax.tasks.results import describe, summarize
from gptjax.tasks.store import identify, is_stored, metric_name, open_tasks, parse_names
from tests.helpers import raises

# One row of each task, in the form of the published data, and the question that lm-eval makes of it.
ROWS = {
    "hellaswag": (
        {
            "activity_label": "Roof shingle removal",
            "ctx_a": "A man is sitting on a roof.",
            "ctx_b": "he",
            "endings": ["is using wrap [title] Tiles.", "pulls  up [step] roofing.", "c", "d"],
            "label": "1",
        },
        {
            "context": "Roof shingle removal: A man is sitting on a roof. He",
            "choices": [" is using wrap. Tiles.", " pulls up roofing.", " c", " d"],
            "label": 1,
        },
    ),
    "lambada_openai": ({"text": "I said hello, Anna"}, {"context": "I said hello,", "continuation": " Anna"}),
    "lambada_standard": ({"passage": "i said `` hi , anna"}, {"context": "i said `` hi ,", "continuation": " anna"}),
    "lambada_last_token": (
        {"text": "I said hi"},
        {"context": "", "continuation": "I said hi"},
    ),
    "piqa": (
        {"goal": "Open a jar.", "sol1": "Turn it", "sol2": "Eat it", "label": 0},
        {"context": "Question: Open a jar.\nAnswer:", "choices": [" Turn it", " Eat it"], "label": 0},
    ),
    "winogrande": (
        {"sentence": "Ann hit Bo because _ was mad.", "option1": "Ann", "option2": "Bo", "answer": "2"},
        {
            "contexts": ["Ann hit Bo because Ann", "Ann hit Bo because Bo"],
            "continuation": " was mad.",
            "label": 1,
        },
    ),
    "arc_easy": (
        {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        {"context": "Question: Why?\nAnswer:", "choices": [" x", " y"], "label": 1},
    ),
    "arc_challenge": (
        {
            "question": {"stem": "Why?", "choices": [{"text": "x", "label": "1"}, {"text": "y", "label": "2"}]},
            "answerKey": "1",
        },
        {"context": "Question: Why?\nAnswer:", "choices": [" x", " y"], "label": 0},
    ),
    "boolq": (
        {"passage": "P.", "question": "is it", "answer": True},
        {"context": "P.\nQuestion: is it?\nAnswer:", "choices": [" no", " yes"], "label": 1},
    ),
    "blimp": (
        {"sentence_good": "He is.", "sentence_bad": "He are."},
        {"context": "", "choices": [" He is.", " He are."], "label": 0},
    ),
}


def test_each_protocol_has_an_example_here():
    assert set(ROWS) == set(PROTOCOLS)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_rows_of_published_data_become_questions(name, tmp_path):
    row, question = ROWS[name]
    assert PROTOCOLS[name].convert(row) == question
    lines = []
    (tmp_path / "official.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps(row) + "\n")
    fetch_tasks(f"{name}={tmp_path}/official.jsonl", log=lines.append, directory=str(tmp_path / "tasks"))
    assert lines == [f"{tmp_path}/tasks/{name}.jsonl: 2 questions from {tmp_path}/official.jsonl"]
    [task] = open_tasks([name], directory=str(tmp_path / "tasks"))
    assert (task.name, task.protocol, len(task.items)) == (name, name, 2)
    assert task.only_last_token == (name == "lambada_last_token")
    assert len(open_tasks([name], limit=1, directory=str(tmp_path / "tasks"))[0].items) == 1


def test_piqa_has_its_labels_beside_it(tmp_path):
    row = {"goal": "g", "sol1": "a", "sol2": "b"}
    (tmp_path / "valid.jsonl").write_text((json.dumps(row) + "\n") * 2)
    (tmp_path / "valid-labels.lst").write_text("1\n0\n")
    fetch_tasks(f"piqa={tmp_path}/valid.jsonl", log=str, directory=str(tmp_path))
    assert [item.label for item in open_tasks(["piqa"], directory=str(tmp_path))[0].items] == [1, 0]
    (tmp_path / "valid-labels.lst").write_text("1\n")
    with raises(DataError, f"{tmp_path}/valid.jsonl:2", match="no label"):
        fetch_tasks(f"piqa={tmp_path}/valid.jsonl", log=str, directory=str(tmp_path))


def test_original_lambada_is_plain_text(tmp_path):
    (tmp_path / "lambada.txt").write_text("a b c\nd e\n")
    fetch_tasks(f"lambada_standard={tmp_path}/lambada.txt", log=str, directory=str(tmp_path))
    [task] = open_tasks(["lambada_standard"], directory=str(tmp_path))
    assert [(item.contexts, item.continuations) for item in task.items] == [(("a b",), (" c",)), (("d",), (" e",))]


def test_wrong_files_and_names_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    with raises(DataError, f"{tmp_path}/rows.jsonl:1", match=r"no row of piqa \(KeyError.*fields: text"):
        fetch_tasks(f"piqa={tmp_path}/rows.jsonl", log=str, directory=str(tmp_path))
    with raises(DataError, f"{tmp_path}/none.jsonl", match="no such file"):
        fetch_tasks(f"piqa={tmp_path}/none.jsonl", log=str, directory=str(tmp_path))
    with raises(ConfigError, "--fetch_tasks", value="mmlu", remedy="hellaswag", match="no such task"):
        fetch_tasks("mmlu", log=str, directory=str(tmp_path))
    for names, problem in (
        ("mmlu", "no such task: mmlu"),
        ("piqa,piqa", "piqa twice"),
        ("piqa,file:x/piqa.jsonl", "twice"),
    ):
        with raises(ConfigError, "tasks.names", value=names, match=problem):
            parse_names(names, field="tasks.names")
    assert parse_names("piqa, file:my.jsonl") == ["piqa", "file:my.jsonl"]
    assert metric_name("file:a/my.v2.jsonl") == "my.v2"


@pytest.mark.parametrize(
    ("file", "content", "name"),
    [
        ("a.jsonl", "caf\u00e9".encode("latin-1"), "boolq"),
        ("a.parquet", b"PAR1 no more", "boolq"),
        ("a.jsonl", b'{"passage": "\\ud800", "question": "q", "answer": true}', "boolq"),
        ("a.jsonl", b'{"passage": "p", "question": "q", "answer": -1}', "boolq"),
        ("a.jsonl", b'{"sentence": "none", "option1": "a", "option2": "b", "answer": "1"}', "winogrande"),
    ],
)
def test_official_file_that_cannot_be_asked_is_named(tmp_path, file, content, name):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=str(tmp_path / file)):
        fetch_tasks(f"{name}={tmp_path}/{file}", log=str, directory=str(tmp_path / "tasks"))
    assert not (tmp_path / "tasks").exists()


def test_results_of_other_tasks_of_the_same_model_stay(tmp_path):
    write_results(str(tmp_path), "step 1", {"a": {"acc": 0.5}})
    write_results(str(tmp_path), "step 1", {"b": {"acc": 0.25}})
    assert json.loads((tmp_path / "results/tasks.json").read_text())["tasks"] == {"a": {"acc": 0.5}, "b": {"acc": 0.25}}
    write_results(str(tmp_path), "step 2", {"b": {"acc": 1.0}})
    assert json.loads((tmp_path / "results/tasks.json").read_text())["tasks"] == {"b": {"acc": 1.0}}


def test_hosts_must_have_the_same_questions(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "my.jsonl").write_text(json.dumps({"context": name, "continuation": " x"}) + "\n")
    one, two = (identify(open_tasks([f"file:{tmp_path}/{name}/my.jsonl"])) for name in ("a", "b"))
    assert set(one) == set(two) == {"my"}
    assert one != two


def test_task_that_is_missing_or_changed_is_refused(tmp_path):
    with raises(DataError, f"{tmp_path}/piqa.jsonl", remedy="--fetch_tasks=piqa"):
        open_tasks(["piqa"], directory=str(tmp_path))
    (tmp_path / "row.jsonl").write_text(json.dumps(ROWS["piqa"][0]) + "\n")
    fetch_tasks(f"piqa={tmp_path}/row.jsonl", log=str, directory=str(tmp_path))
    assert is_stored("piqa", str(tmp_path))
    path = tmp_path / "piqa.jsonl"
    path.write_text(path.read_text().replace("Turn", "Burn"))
    assert not is_stored("piqa", str(tmp_path))
    with raises(DataError, str(path), remedy="--fetch_tasks=piqa", match="changed since"):
        open_tasks(["piqa"], directory=str(tmp_path))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"context": "a", "choices": ["b", "c"], "label": 2}, "label is 2, expected 0 to 1"),
        ({"context": "a", "choices": ["b"], "label": 0}, "one choice"),
        ({"context": "a", "choices": ["b", " "], "label": 0}, "is blank"),
        ({"context": "a", "choices": ["b", ""], "label": 0}, "is empty"),
        ({"context": "a", "choices": [], "label": 0}, "is empty"),
        ({"context": "a", "choices": ["b", 3], "label": 0}, "no string"),
        ({"context": "a", "choices": ["b", "c"], "label": True}, "label is True"),
        ({"context": "a", "choices": ["b", "c"]}, "label is None"),
        ({"question": "a"}, "has the fields question"),
        ({"context": "a", "contexts": ["b", "d"], "continuation": "c"}, "has the fields"),
        ({"contexts": "ab", "continuation": "c", "label": 0}, "has the fields"),
    ],
)
def test_question_of_no_form_is_named(row, problem, tmp_path):
    with raises(DataError, "x:3", match=problem):
        parse_item(row, "x:3")
    path = tmp_path / "my.jsonl"
    path.write_text(json.dumps({"context": "a", "continuation": "b"}) + "\n" + json.dumps(row) + "\n")
    with raises(DataError, f"{path}:2"):
        open_tasks([f"file:{path}"])


def test_files_of_a_task_are_checked(tmp_path):
    path = tmp_path / "my.jsonl"
    for content, field, problem in (
        ("", str(path), "no question"),
        ("[1]\n", f"{path}:1", "no JSON object"),
        ("{\n", f"{path}:1", "no JSON object"),
        (
            '{"context": "a", "continuation": "b"}\n{"context": "a", "choices": ["b", "c"], "label": 0}\n',
            str(path),
            "mixes",
        ),
    ):
        path.write_text(content)
        with raises(DataError, field, match=problem):
            open_tasks([f"file:{path}"])


def test_choose_names_takes_the_split_by_whole_words():
    names = ["data/validation-0.parquet", "data/train-0.parquet", "data/invalidation-0.parquet", "validation.jsonl"]
    assert choose_names(names, split="validation") == ["data/validation-0.parquet"]
    assert choose_names(["x/test.jsonl", "x/latest.jsonl"], split="test") == ["x/test.jsonl"]


# Metrics


def score(logprob, is_greedy=False, is_cut=False):
    return Score(logprob, is_greedy, is_cut)


def test_accuracy_is_by_likelihood_and_by_length():
    items = [
        parse_item({"context": "q", "choices": [" a", " long answer"], "label": 1}, ""),
        parse_item({"context": "q", "choices": [" éé", " bbb"], "label": 0}, ""),
    ]
    # The short answer is likelier, the long one per character. Then characters and bytes differ.
    result = summarize(items, [score(-2.0), score(-5.0), score(-3.0), score(-3.9, is_cut=True)])
    assert (result["acc"], result["acc_norm"], result["acc_bytes"]) == (0.5, 0.5, 1.0)
    assert result["acc_stderr"] == pytest.approx(statistics.stdev([0, 1]) / math.sqrt(2))
    assert (result["count"], result["cut"]) == (2, 1)
    assert "acc_norm" not in summarize(items, [score(-2.0), score(-5.0)] * 2, has_lengths=False)
    assert "perplexity" not in result
    assert describe("t", result) == (
        "t: acc 0.5000 ± 0.5000, acc_norm 0.5000 ± 0.5000, acc_bytes 1.0000 ± 0.0000 (2 questions, 1 contexts cut)"
    )


def test_first_of_equal_choices_counts():
    item = parse_item({"context": "q", "choices": ["a", "b"], "label": 1}, "")
    assert summarize([item], [score(-1.0), score(-1.0)])["acc"] == 0.0


def test_perplexity_is_of_whole_continuations():
    items = [parse_item({"context": "q", "continuation": " a"}, "")] * 4
    logprobs = [-1.0, -2.0, -3.5, -0.5]
    result = summarize(items, [score(value, is_greedy=value > -1.5) for value in logprobs])
    assert result["acc"] == 0.5
    assert result["perplexity"] == pytest.approx(math.exp(-statistics.mean(logprobs)))
    error = statistics.stdev(logprobs) / 2
    assert result["perplexity_stderr"] == pytest.approx(result["perplexity"] * error)
