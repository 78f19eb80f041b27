"""The run id: which run a work directory and its checkpoints belong to.

The first start of a run makes a random id, and writes it to config.json and to the history in each checkpoint's record.
Another run's checkpoint may have the same shapes, so it is refused by its id, unless the user asks for it. A copy of a
work directory keeps the id. Checkpoints of an earlier version have no id. They are adopted once: config.json then lists
their steps.
"""

import dataclasses
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.errors import one_line
from gptjax.record import Record
from gptjax.strict_json import InvalidTextError, parse_json
from gptjax.workdir import CONFIG_FILE, read_file

log = logging.getLogger("gptjax")
RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclasses.dataclass(frozen=True)
class Identity:
    """The run that a work directory belongs to, according to its config.json."""

    run_id: str = ""  # "" before the first start, and in a work directory of an earlier version
    adopted_steps: tuple[int, ...] = ()  # steps of checkpoints without an id that belong to this run

    def to_json(self) -> dict[str, Any]:
        """Returns the keys that config.json has in addition to the config."""
        keys: dict[str, Any] = {"run_id": self.run_id}
        if self.adopted_steps:
            keys["adopted_steps"] = list(self.adopted_steps)
        return keys

    def owns(self, record: Record) -> bool:
        """Returns whether a checkpoint belongs to this run. A work directory without an id owns every checkpoint."""
        if not self.run_id:
            return True
        checkpoint_id = _id_of(record)
        if not checkpoint_id:
            return record.step in self.adopted_steps
        return checkpoint_id == self.run_id

    def explain(self, record: Record) -> str:
        """Returns the problem with a foreign checkpoint: its run, and this run."""
        checkpoint_id = _id_of(record)
        other = f"run {checkpoint_id}" if checkpoint_id else "a run without an id"
        return f"is of {other}, and the work directory is of run {self.run_id}"

    def complete(self, history_id: str, steps: Sequence[int]) -> "Identity":
        """Returns the identity of a run that starts now: its own, or its newest checkpoint's, or a new one.

        history_id: the run id in the restored checkpoint's history, "" where it has none.
        steps: the steps of all checkpoints.
        """
        if self.run_id:
            return self
        found = Identity(history_id or secrets.token_hex(16), tuple(steps))
        if steps and not history_id:
            log.info(
                "note: the checkpoints have no run id yet: they are now of run %s (steps %s)",
                found.run_id,
                ", ".join(map(str, steps)),
            )
        return found


def parse_identity(values: Mapping[str, Any]) -> Identity:
    """Returns the identity in the content of a config.json. An invalid id counts as missing."""
    run_id = values.get("run_id")
    if not isinstance(run_id, str) or not RUN_ID.fullmatch(run_id):
        return Identity()
    steps = values.get("adopted_steps", [])
    if not isinstance(steps, list):
        return Identity(run_id)
    return Identity(run_id, tuple(step for step in steps if type(step) is int))  # True is an int, but no step


def read_identity(workdir: str) -> Identity:
    """Returns the identity in the config.json of a work directory, local or in a bucket.

    A damaged or missing config.json has no identity. One that cannot be read has none either, with a warning.
    """
    try:
        content = read_file(workdir, CONFIG_FILE)
        if content is None:
            return Identity()
        return parse_identity(parse_json(content, dict))
    except InvalidTextError:
        return Identity()
    except Exception as error:  # of the file system, or of the library that reaches the bucket
        log.warning(
            "%s/%s: cannot be read, so checkpoints of other runs are not recognised: %s",
            workdir,
            CONFIG_FILE,
            one_line(error),
        )
        return Identity()


def _id_of(record: Record) -> str:
    """Returns the run id of a checkpoint, "" where it has none or an invalid one."""
    run_id = record.history.get("run_id")
    return run_id if isinstance(run_id, str) and RUN_ID.fullmatch(run_id) else ""
