"""Published questions from the Hub and from TFDS, by a fake server and fake data sets."""

import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds

from gptjax.errors import DataError, UnavailableError
from gptjax.tasks.fetch import fetch_tasks
from gptjax.tasks.store import open_tasks
from tests.convert import hub_server
from tests.convert.hub_server import Hub
from tests.tasks.test_results import ROWS


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with Hub() as server:
        hub_server.use(server, monkeypatch, tmp_path / "cache")
        yield server


def parquet(rows):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "repo", "path"),
    [
        ("hellaswag", "Rowan/hellaswag", "data/validation-00000-of-00001.parquet"),
        ("lambada_openai", "EleutherAI/lambada_openai", "default/test-00000-of-00001.parquet"),
        ("winogrande", "allenai/winogrande", "winogrande_xl/validation-00000-of-00001.parquet"),
    ],
)
def test_questions_come_from_the_files_of_the_split(hub, tmp_path, name, repo, path):
    row, question = ROWS[name]
    other = path.replace("validation", "train").replace("test-", "train-")
    hub.add(f"datasets/{repo}", {"README.md": b"#", path: parquet([row, row]), other: parquet([row] * 5)})
    lines = []
    fetch_tasks(name, log=lines.append, directory=str(tmp_path / "tasks"))
    stored = [json.loads(line) for line in (tmp_path / "tasks" / f"{name}.jsonl").read_text().splitlines()]
    assert stored == [question, question]
    record = json.loads((tmp_path / "tasks" / f"{name}.json").read_text())
    assert record["origin"].startswith(f"hf:{repo}")
    assert len(record["origin"].rpartition("@")[2]) == 40, "the commit"
    requests = len(hub.requests) if hasattr(hub, "requests") else None
    fetch_tasks(name, log=lines.append, directory=str(tmp_path / "tasks"))
    assert lines[-1] == f"{name}: already stored in {tmp_path}/tasks"
    assert requests is None or len(hub.requests) == requests


def test_data_set_without_the_split_is_refused(hub, tmp_path):
    hub.add("datasets/Rowan/hellaswag", {"README.md": b"#", "data/train-0.parquet": parquet([ROWS["hellaswag"][0]])})
    with pytest.raises(DataError, match="validation"):
        fetch_tasks("hellaswag", log=str, directory=str(tmp_path / "tasks"))


def test_hub_that_does_not_answer_is_reported(tmp_path, monkeypatch):
    with Hub() as server:
        hub_server.use(server, monkeypatch, tmp_path / "cache")
    with pytest.raises((UnavailableError, DataError)):
        fetch_tasks("hellaswag", log=str, directory=str(tmp_path / "tasks"))
    assert not (tmp_path / "tasks").exists()


def make_builder(tmp_path, name, features, rows, *, split, config=""):
    """A data set that TFDS prepares from rows, in place of the published one."""

    class Fake(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(rows)

    Fake.name = name
    return Fake(data_dir=str(tmp_path / "tfds" / config), file_format="array_record")


def test_questions_come_from_tfds(tmp_path, monkeypatch):
    text = tfds.features.Text()
    choices = tfds.features.Sequence({"label": tfds.features.ClassLabel(names="ABCDE"), "text": text})
    arc = {"question": text, "choices": choices, "answerKey": tfds.features.ClassLabel(names="ABCDE")}
    row = {"question": "Why?", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "B"}
    builders = {
        "ai2_arc/ARC-Easy": make_builder(tmp_path, "ai2_arc", arc, [row], split="test"),
        "bool_q": make_builder(
            tmp_path,
            "bool_q",
            {"answer": tfds.features.Scalar(np.bool_), "passage": text, "question": text},
            [{"answer": True, "passage": "P.", "question": "is it"}],
            split="validation",
        ),
        "lambada": make_builder(tmp_path, "lambada", {"passage": text}, [ROWS["lambada_standard"][0]], split="test"),
    }
    monkeypatch.setattr(tfds, "builder", lambda name, file_format: builders[name])
    for task, expected in {"arc_easy": "arc_easy", "boolq": "boolq", "lambada_standard": "lambada_standard"}.items():
        fetch_tasks(task, log=str, directory=str(tmp_path / "tasks"))
        [stored] = (tmp_path / "tasks" / f"{task}.jsonl").read_text().splitlines()
        assert json.loads(stored) == ROWS[expected][1]
        assert open_tasks([task], directory=str(tmp_path / "tasks"))


def test_all_configs_of_blimp_are_one_task(tmp_path, monkeypatch):
    features = {"sentence_good": tfds.features.Text(), "sentence_bad": tfds.features.Text()}
    configs = [tfds.core.BuilderConfig(name=name) for name in ("agreement", "islands")]
    builders = {}
    for config in configs:
        rows = [{"sentence_good": f"{config.name} is", "sentence_bad": f"{config.name} are"}]
        builders[f"blimp/{config.name}"] = make_builder(
            tmp_path, "blimp", features, rows, split="train", config=config.name
        )
    first = builders["blimp/agreement"]
    type(first).BUILDER_CONFIGS = configs
    monkeypatch.setattr(tfds, "builder", lambda name, file_format: builders.get(name, first))
    fetch_tasks("blimp", log=str, directory=str(tmp_path / "tasks"))
    [task] = open_tasks(["blimp"], directory=str(tmp_path / "tasks"))
    assert [item.continuations for item in task.items] == [
        (" agreement is", " agreement are"),
        (" islands is", " islands are"),
    ]
