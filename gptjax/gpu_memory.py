"""The share of a GPU's memory that JAX preallocates for a run, which must be decided before JAX starts."""

import dataclasses
import importlib.util
import math
import os
import subprocess
from collections.abc import Mapping

RUN_FRACTION = 0.92  # on an unused card; CUDA, cuDNN and NCCL need the rest, outside of JAX's pool
JAX_FRACTION = 0.75  # JAX's default
REST_MIB = 1536.0  # the minimum outside of JAX's pool, which counts on a small card
VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
FRACTIONS = (VARIABLE, "XLA_CLIENT_MEM_FRACTION")  # JAX refuses to start when both are set
SHARING = ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR")  # whoever sets these wants to share the card
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
EMPTY = 0.01  # a card with a smaller share in use is unused: the driver itself takes up to about 600 MiB of 80 GiB
QUERY = ("nvidia-smi", "--query-gpu=index,uuid,memory.used,memory.total", "--format=csv,noheader,nounits")
QUERY_SECONDS = 20.0


def planned_fraction(environ: Mapping[str, str] = os.environ) -> float:
    """Returns the share of an unused card's memory that a run in this environment will get."""
    for name in FRACTIONS:
        try:
            return float(environ[name])
        except (KeyError, ValueError):
            continue
    is_sharing = any(environ.get(name) for name in SHARING)
    return JAX_FRACTION if is_sharing else RUN_FRACTION


def choose_fraction(environ: Mapping[str, str] = os.environ) -> float:
    """Returns the share of its GPUs' memory that this process should take, 0 to leave the choice to JAX.

    It is above 0 where the process will use NVIDIA GPUs, no variable sets their share, and all of them are unused. Call
    it before JAX starts in this process: JAX preallocates its share, and the cards are no longer unused.
    """
    if any(environ.get(name) for name in (*FRACTIONS, *SHARING)):
        return 0.0
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms and {"cuda", "gpu"}.isdisjoint(platforms.split(",")):
        return 0.0
    if not any(map(importlib.util.find_spec, PLUGINS)):
        return 0.0
    return empty_fraction(_query(), environ.get("CUDA_VISIBLE_DEVICES"))


def _query() -> str:
    """Returns a line "index, uuid, MiB used, MiB in total" for each card; '' where nvidia-smi fails."""
    try:
        result = subprocess.run(
            QUERY,
            capture_output=True,
            text=True,
            timeout=QUERY_SECONDS,  # a driver in a bad state hangs it
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout


def empty_fraction(answer: str, visible: str | None) -> float:
    """Returns the share to take of the visible cards, 0 unless all of them are unused.

    answer: the output of nvidia-smi: see `_query`.
    visible: CUDA_VISIBLE_DEVICES; None means all cards.
    """
    try:
        cards = [_parse_card(line) for line in answer.splitlines() if line.strip()]
    except ValueError:  # "[N/A]", for example for a card that is partitioned (MIG)
        return 0.0
    chosen = cards
    # CUDA may enumerate cards of different sizes in another order than nvidia-smi. Then all of them must be unused.
    have_one_size = len({card.total_mib for card in cards}) == 1
    if visible is not None and have_one_size:
        names = [name.strip() for name in visible.split(",")]
        chosen = [card for name in names for card in cards if card.is_called(name)]
        if len(chosen) != len(names):  # an unknown or ambiguous name
            return 0.0
    if not chosen or not all(card.is_unused for card in chosen):
        return 0.0
    smallest = min(card.total_mib for card in chosen)
    percent = math.floor(100 * (1 - REST_MIB / smallest))
    return min(RUN_FRACTION, percent / 100)


@dataclasses.dataclass(frozen=True)
class _Card:
    index: str
    uuid: str
    used_mib: float
    total_mib: float

    @property
    def is_unused(self) -> bool:
        return self.used_mib <= EMPTY * self.total_mib

    def is_called(self, name: str) -> bool:
        """Returns whether CUDA_VISIBLE_DEVICES means this card by `name`: its index, or how its UUID begins."""
        return name == self.index or (name != "" and self.uuid.startswith(name))


def _parse_card(line: str) -> _Card:
    index, uuid, used, total = line.split(", ")
    return _Card(index, uuid, float(used), float(total))
