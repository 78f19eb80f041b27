"""lm-eval's own tasks and command line, on local tasks of every output type."""

import json
import math
import subprocess
import sys

import pytest

from gptjax.errors import UnavailableError
from tests.helpers import raises
from tests.runs import copy_until

lm_eval = pytest.importorskip("lm_eval")

COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
num_fewshot: {shots}
"""
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "word": """
output_type: loglikelihood
doc_to_text: "{{q}}"
doc_to_target: " {{choices[label]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "page": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}} {{long}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "write": """
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n", "e"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks, and the rows of their data."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"q": f"def f{n}(self):", "choices": ["return", "zebra", "pass"], "label": n % 3, "long": "import os\n" * n}
        for n in range(8)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        shots = 2 if name == "choices" else 0
        (folder / f"{name}.yaml").write_text(f"task: {name}{COMMON.format(folder=folder, shots=shots)}{text}")
    return folder, rows


@pytest.fixture(scope="module")
def model(lab, reference, tmp_path_factory):
    from gptjax.lm_eval import GptjaxLM

    return GptjaxLM(workdir=str(copy_until(reference, tmp_path_factory.mktemp("run") / "run", 16)))


def evaluate(model, tasks, names):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks[0]), include_defaults=False)
    return lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0)["results"]


def test_every_output_type_is_answered(model, tasks):
    results = evaluate(model, tasks, list(TASKS))
    assert set(results) == set(TASKS)
    assert 0 <= results["choices"]["acc,none"] <= 1
    assert results["word"]["perplexity,none"] > 1
    assert results["page"]["bits_per_byte,none"] > 0
    assert results["write"]["exact_match,none"] == 0.0


def test_loglikelihoods_are_those_of_our_own_tasks(model, tasks, tmp_path):
    from gptjax.tasks.ask import ask, encode_task
    from gptjax.tasks.store import open_tasks

    ours = [{"context": row["q"], "continuation": f" {row['choices'][row['label']]}"} for row in tasks[1]]
    (tmp_path / "word.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ours))
    [task] = open_tasks([f"file:{tmp_path}/word.jsonl"])
    [result] = ask(model._scorer, model._params, [encode_task(task, model._tokenizer)]).values()
    theirs = evaluate(model, tasks, ["word"])["word"]
    assert result["perplexity"] == pytest.approx(theirs["perplexity,none"], rel=1e-9)
    assert result["acc"] == theirs["acc,none"]


def test_long_texts_are_scored_in_windows_token_by_token(model, tasks):
    from lm_eval.api.instance import Instance

    text = "import os\nclass A:\n    pass\n" * 8
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    [total] = model.loglikelihood_rolling([request])
    ids = model.tok_encode(text)
    assert len(ids) > 2 * model.max_length
    assert total < -0.5 * len(ids) * math.log(2) / 8, "no token is left out"
    [short] = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("import",), 0)])
    [(whole, _)] = model.loglikelihood([Instance("loglikelihood", {}, ("", "import"), 0)])
    assert short == pytest.approx(whole, rel=1e-6)


def test_text_ends_at_a_stop_string(model):
    from lm_eval.api.instance import Instance

    def write(**settings):
        return model.generate_until([Instance("generate_until", {}, ("def f(", settings), 0)])[0]

    plain = write(until=[], max_gen_toks=12)
    assert len(plain.encode()) >= 10
    stop = plain[5]
    assert write(until=[stop], max_gen_toks=12) == plain[: plain.index(stop)]
    assert write(until=stop, max_gen_toks=12) == plain[: plain.index(stop)]
    assert write(until=[], max_gen_toks=3) == plain[:3]
    assert write(until=[], max_gen_toks=12, do_sample=True, temperature=2.0) != plain


def test_command_line_of_lm_eval_runs_on_a_work_directory(lab, reference, tasks, tmp_path):
    folder, _ = tasks
    command = [sys.executable, "-m", "gptjax.lm_eval", "--model_args", f"workdir={reference}", "--tasks", "choices"]
    done = lab.call([*command, "--include_path", str(folder), "--output_path", str(tmp_path)], HF_HUB_OFFLINE="1")
    assert "|choices|" in done.stdout
    [results] = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["choices"]["acc,none"] >= 0


def test_torch_is_not_imported(model):
    code = "import sys; import gptjax.lm_eval as m; m.GptjaxLM; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_harness_is_an_extra_to_install(monkeypatch):
    import gptjax.lm_eval
    import gptjax.tasks

    monkeypatch.delattr(gptjax.tasks, "harness")
    monkeypatch.setitem(sys.modules, "gptjax.tasks.harness", None)
    with raises(UnavailableError, remedy="gptjax[lm-eval]", match="needs the package lm_eval"):
        gptjax.lm_eval.GptjaxLM  # noqa: B018
