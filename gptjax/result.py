"""What a training returns to a Python program."""

import dataclasses
from typing import Any

from gptjax.report.write import Report


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a training returned, and what metrics.jsonl says."""

    step: int  # the updates that are done
    val_loss: float | None  # of the last validation, nats per token; None if there was none
    history: list[dict[str, Any]]  # the rows of metrics.jsonl: of logged steps, validations and statistics
    exit_code: int  # 0: all steps are done; 75: it was interrupted, and the same call resumes
    workdir: str = ""

    def report(self) -> Report:
        """Returns the page with curves, samples and settings of the run; a notebook shows it."""
        return Report([self.workdir])
