"""Work directories as runs leave them, made by hand."""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from gptjax.config import from_dict
from gptjax.record import RECORD_FILE, Record, seal

HOSTILE = (
    "</script><script>window.bad = 1</script><img src=http://127.0.0.1:9/x onerror='window.bad = 2'>\x1b[31m\u202e"
)
SPIKE = 37  # a step whose loss no mean shows
VERSIONS = {"gptjax": "0.1.0", "jax": "0.10.2"}


def make_rows(steps: int, *, offset: float = 0.0) -> list[dict[str, Any]]:
    """Returns rows with every group of metrics."""
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 2 + 6 * math.exp(-step / 20) + 0.1 * math.sin(step) + offset
        row = {
            "step": step,
            "loss": 20.0 if step == SPIKE else loss,
            "loss_mean": loss,
            "grad_norm": 1 + math.cos(step) / 3,
            "lr": 1e-3 * step / steps,
            "tokens_seen": 640 * step,
            "tokens_per_second": None if step == 1 else 5000.0 + step,
            "mfu": None,
            "step_seconds": None if step == 1 else 0.125,
            "memory/peak_bytes": 1_000_000 + step,
        }
        if step % 50 == 0:
            row |= {"goodput": 0.5, "seconds/step": step / 8, "seconds/compile": 3.0, "seconds/data_wait": 1.5}
        rows.append(row)
        if step % 20 == 0:
            tasks = {"tasks/blimp/acc": 0.5 + step / 1000, "tasks/blimp/acc_stderr": 0.02}
            rows.append(
                {"step": step, "val_loss": loss + 0.1, "val_bits_per_byte": loss / 3, "val_loss/web": loss, **tasks}
            )
    return rows


def add_layers(workdir: pathlib.Path, layers: int, *, every: int = 10, steps: int = 100) -> list[dict[str, Any]]:
    """Appends rows of statistics of layers to a run's metrics, and returns them."""
    rows = []
    for step in range(every, steps + 1, every):
        row: dict[str, Any] = {"step": step}
        for statistic in ("attention_logit", "grad_rms", "update_rms", "param_rms", "residual_rms"):
            # The layer in the middle has the highest value.
            for layer in range(layers):
                row[f"stats/{statistic}/h{layer}"] = step + 100 - abs(layer - layers // 2)
        rows.append(row | {"stats/grad_rms/wte": step / 2, "stats/residual_rms/embedding": 1.0})
    with open(workdir / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


@pytest.fixture
def make_run(tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
    """make_run("a", steps=100, changes={"optim": {...}}, text="...") writes runs/a below tmp_path."""

    def make(
        name: str, *, steps: int = 100, changes: dict | None = None, text: str = "Once", offset: float = 0.0
    ) -> Any:
        workdir = tmp_path / "runs" / name
        workdir.mkdir(parents=True)
        config = from_dict({"train": {"num_steps": 100}, "mesh": {"fsdp": 1}, **(changes or {})}).to_dict()
        rows = make_rows(steps, offset=offset)
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (workdir / "config.json").write_text(json.dumps(config | {"run_id": "ab" * 16}))
        (workdir / "samples.txt").write_text(f"--- step 20\nearly\n--- step 40\n{text}\n")
        (workdir / "replay-7.html").write_text("a page")
        history = {
            "restarts": 2,
            "rollbacks": 1,
            "skipped_ranges": [{"step": 40, "batches": 9, "rollback": 1, "spike": 45, "why": f"why {text}"}],
            "seconds": {"step": 1.0},
            "started_at": 1.79e9,
            "machine": f"8 devices {text}",
        }
        folder = workdir / "checkpoints" / str(steps)
        folder.mkdir(parents=True)
        record = Record(steps, config, history, {"directory": f"data {text}"}, {}, VERSIONS)
        (folder / RECORD_FILE).write_text(json.dumps({"custom_metadata": seal(record)}))
        return workdir

    return make
