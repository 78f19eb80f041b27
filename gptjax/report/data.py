"""Gathers what a work directory says about its run: metrics, config, samples, checkpoints' records, and other pages."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from etils import epath

from gptjax.config import Config, flatten, from_dict
from gptjax.errors import UserError, one_line
from gptjax.history import History
from gptjax.log_reader import open_metrics
from gptjax.record import CorruptCheckpointError, Record, read_record
from gptjax.report.series import Series, read_series
from gptjax.strict_json import InvalidTextError, parse_json
from gptjax.workdir import CONFIG_FILE, METRICS_FILE, SAMPLES_FILE, TASKS_FILE, is_bucket, local_directory, read_file

IDENTITY = ("run_id", "adopted_steps")  # in config.json, next to the config
STEP_NAME = re.compile(r"0|[1-9][0-9]{0,15}")
REPLAY_NAME = re.compile(r"replay-(\d{1,16})\.html")
SAMPLE_HEADER = re.compile(r"^--- step (\d{1,16})\n", re.MULTILINE)
LARGEST_SAMPLES = 2**24  # bytes of samples.txt that are read, from its end
T = TypeVar("T")


class Sample(NamedTuple):
    """A text that the model wrote during training."""

    step: int
    text: str


@dataclasses.dataclass(frozen=True)
class RunData:
    """One run, as far as its work directory tells."""

    workdir: str  # local or in a bucket
    config: dict[str, Any]  # by field, as in "model.n_layer"; {} if it is not known
    series: dict[str, Series]  # of metrics.jsonl, by name
    samples: list[Sample]  # ascending steps
    record: Record | None  # of the newest readable checkpoint
    history: History
    tasks: dict[str, dict[str, Any]]  # results/tasks.json
    replays: list[tuple[int, str]]  # the steps that were replayed, and the pages of them
    flops_per_step: float  # 0 if it is not known
    notes: list[str]  # what could not be read

    @property
    def step(self) -> int:
        """The last step that is logged or saved."""
        ends = [int(series.steps[-1]) for series in self.series.values()]
        return max([*ends, self.record.step if self.record else 0])

    @property
    def num_steps(self) -> int:
        """The steps that the config asks for; 0 if it is not known."""
        value = self.config.get("train.num_steps")
        return value if type(value) is int and value > 0 else 0

    @property
    def tokens_per_step(self) -> float:
        """Tokens of one update; 0 if they are not known."""
        if seen := self.series.get("tokens_seen"):
            return float(seen.values[-1]) / max(1, int(seen.steps[-1]))
        return 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """Where the time went, in seconds by kind: as the last row that says it, or the newest checkpoint if later."""
        logged = {
            name.removeprefix("seconds/"): float(series.values[-1])
            for name, series in self.series.items()
            if name.startswith("seconds/")
        }
        saved = {name: float(value) for name, value in self.history.seconds.items()}
        return max(logged, saved, key=lambda spent: sum(spent.values()))


def has_run(workdir: str) -> bool:
    """Returns whether a directory, local or in a bucket, has the config or the metrics of a run."""
    names = (CONFIG_FILE, METRICS_FILE)
    if is_bucket(workdir):
        return any((epath.Path(workdir) / name).exists() for name in names)
    return any(os.path.lexists(os.path.join(workdir, name)) for name in names)


def is_finished(run: RunData) -> bool:
    """Returns whether a run has saved its last step, which it does after its last evaluation."""
    return run.record is not None and 0 < run.num_steps <= run.record.step


def read_run(workdir: str, *, logs: str = "", spent: Mapping[str, float] | None = None) -> RunData:
    """Returns everything that the page shows of a run. What cannot be read is missing, and the notes say so.

    logs: the directory of its logs, if that is not the work directory: those of a run in a bucket are older there.
    spent: where the time went, by kind, if a running process knows it better than its files.
    """
    notes: list[str] = []

    def attempt(what: str, read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        except FileNotFoundError:
            return otherwise
        except Exception as error:  # each library of a bucket has exceptions of its own
            notes.append(f"{what} cannot be read: {one_line(error)}")
            return otherwise

    config = attempt(CONFIG_FILE, lambda: _read_config(logs or workdir), {})
    record = attempt("checkpoints", lambda: _newest_record(workdir, notes), None)
    if record and not config:
        config = _flat(record.config)
    history = attempt("the history of the checkpoint", lambda: _history(record), History())
    if spent is not None:
        history = dataclasses.replace(history, seconds=dict(spent))
    return RunData(
        workdir=workdir,
        config=config,
        series=attempt(METRICS_FILE, lambda: _read_metrics(logs or workdir), {}),
        samples=attempt(SAMPLES_FILE, lambda: _read_samples(logs or workdir), []),
        record=record,
        history=history,
        tasks=attempt(TASKS_FILE, lambda: _read_tasks(logs or workdir), {}),
        replays=attempt("the list of its files", lambda: _find_replays(workdir), []),
        flops_per_step=attempt("the model's size", lambda: _flops_per_step(config), 0.0),
        notes=notes,
    )


def _read_metrics(workdir: str) -> dict[str, Series]:
    with open_metrics(workdir) as file:
        return read_series(file)


def _read_config(workdir: str) -> dict[str, Any]:
    content = read_file(workdir, CONFIG_FILE)
    if content is None:
        return {}
    values = parse_json(content, dict)
    return _flat({name: value for name, value in values.items() if name not in IDENTITY})


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested objects as one, with names such as "model.n_layer"."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _newest_record(workdir: str, notes: list[str]) -> Record | None:
    directory = epath.Path(workdir) / "checkpoints"
    if not directory.exists():
        return None
    steps = sorted((int(path.name) for path in directory.iterdir() if STEP_NAME.fullmatch(path.name)), reverse=True)
    for step in steps:
        try:
            return read_record(directory / str(step), step)
        except (CorruptCheckpointError, UserError) as error:
            notes.append(f"the checkpoint of step {step} is left out: {one_line(error)}")
    return None


def _history(record: Record | None) -> History:
    return History.from_json(record.history) if record else History()


def _read_samples(workdir: str) -> list[Sample]:
    content = read_file(workdir, SAMPLES_FILE) or b""
    text = content[-LARGEST_SAMPLES:].decode(errors="replace")
    parts = SAMPLE_HEADER.split(text)
    # The last one of a step counts: a resumed run writes the steps after its checkpoint again.
    found = {int(step): body.removesuffix("\n") for step, body in zip(parts[1::2], parts[2::2], strict=True)}
    return [Sample(step, found[step]) for step in sorted(found)]


def _read_tasks(workdir: str) -> dict[str, dict[str, Any]]:
    content = read_file(workdir, TASKS_FILE)
    if content is None:
        return {}
    tasks = parse_json(content, dict).get("tasks")
    if not isinstance(tasks, dict):
        raise InvalidTextError("it has no tasks")
    return {name: result for name, result in tasks.items() if isinstance(result, dict)}


def _find_replays(workdir: str) -> list[tuple[int, str]]:
    directory = local_directory(workdir)
    if not os.path.isdir(directory):
        return []
    matches = [REPLAY_NAME.fullmatch(name) for name in os.listdir(directory)]
    return sorted((int(match[1]), os.path.join(directory, match[0])) for match in matches if match)


def _flops_per_step(config: Mapping[str, Any]) -> float:
    if not config:
        return 0.0
    from gptjax.sizes import train_flops_per_token  # imports jax, which takes a second

    nested: dict[str, Any] = {}
    for name, value in config.items():
        section, _, field = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[field] = value
    try:
        parsed = from_dict(nested)
    except UserError:  # of another version, or damaged; the curves do not need it
        return 0.0
    tokens = parsed.data.global_batch_size * parsed.model.block_size
    return float(tokens * train_flops_per_token(parsed.model))


def differences(configs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Returns the fields in which configs differ, with the value in each; None where one lacks the field."""
    names = dict.fromkeys(name for config in configs for name in config)
    rows = {name: [config.get(name) for config in configs] for name in names}
    # Compared as text, so that 1 and true differ, and a list can be compared.
    return {name: values for name, values in rows.items() if len(set(map(repr, values))) > 1}


def unlike_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config that differ from the defaults of this version."""
    defaults = flatten(Config())
    return {name: value for name, value in config.items() if repr(defaults.get(name)) != repr(value)}
