"""Accelerator data sheet: matmul peaks, memory, links."""

import dataclasses
import math
import re
from typing import Any

from gptjax.gpu_memory import planned_fraction

GB = 1e9  # data sheets of GPUs and of bandwidths
GIB = 2.0**30  # TPU documentation
DEFAULT_SPLASH_BLOCK = 512  # positions


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one chip from its data sheet, in bytes and seconds."""

    kind: str  # a prefix of JAX's device_kind
    peak_flops: float  # dense bfloat16 FLOP/s; float32 where the chip has no bfloat16 units
    memory_bytes: float
    memory_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s per link and direction
    links: int  # to other chips: two for each dimension of a torus; 1 to a switch
    network_bandwidth: float  # bytes/s per direction to other slices or nodes: the chip's share of its host's
    has_bfloat16: bool = True  # matrix units for bfloat16
    splash_block: int = DEFAULT_SPLASH_BLOCK  # positions of a block of TPU splash attention, at most
    extra: str = ""  # the extra of pyproject.toml that installs jax for the chip, where the usual one does not

    @property
    def ring_bandwidth(self) -> float:
        """The bytes/s that a chip sends in a ring: in both directions of a torus dimension, where it has two links."""
        return min(2, self.links) * self.link_bandwidth

    @property
    def is_tpu(self) -> bool:
        """Whether the chip is a TPU; otherwise it is a GPU."""
        return self.kind.startswith("TPU")

    @property
    def run_bytes(self) -> float:
        """The memory available to a run, if nothing else uses the chip."""
        return self.memory_bytes if self.is_tpu else self.memory_bytes * planned_fraction()


# TPU figures are from Google Cloud's documentation, "System architecture" of v4, v5e, v5p and v6e, read on 2026-11-24.
# It gives a chip's bidirectional ICI bandwidth, which is 2 x links x link_bandwidth. For the data-center network it
# gives 50 Gbit/s per chip for v5p, and 6.4 and 25.6 Tbit/s per 256 chips for v5e and v6e. It gives none for v4, for
# which the table repeats v5p's.
# GPU figures are from NVIDIA's data sheets of T4, V100 SXM2 16 GB, A10, L4, L40S, RTX A6000, A100 40 and 80 GB, H100
# SXM, H200 and B200, and from its architecture papers for RTX 3090, 4090 and 5090 (dense, float32 accumulation). Links
# are NVLink where all GPUs of a node have it, otherwise PCIe; one direction. NVLink bridges are left out.
# The network is assumed to have one port of 400 Gbit/s per GPU in DGX systems (A100: 200; V100: 100 per two GPUs), and
# 100 Gbit/s for four GPUs elsewhere.
CHIPS = (
    Chip(
        kind="TPU v4",
        peak_flops=275e12,
        memory_bytes=32 * GIB,
        memory_bandwidth=1228 * GB,
        link_bandwidth=50 * GB,
        links=6,  # a 3D torus
        network_bandwidth=6.25 * GB,
    ),
    Chip(
        kind="TPU v5 lite",
        peak_flops=197e12,
        memory_bytes=16 * GIB,
        memory_bandwidth=819 * GB,
        link_bandwidth=50 * GB,
        links=4,
        network_bandwidth=3.125 * GB,
    ),
    Chip(
        kind="TPU v5",  # v5p; find_chip meets the longer "TPU v5 lite" first
        peak_flops=459e12,
        memory_bytes=95 * GIB,
        memory_bandwidth=2765 * GB,
        link_bandwidth=100 * GB,
        links=6,
        network_bandwidth=6.25 * GB,
    ),
    Chip(
        kind="TPU v6 lite",
        peak_flops=918e12,
        memory_bytes=32 * GIB,
        memory_bandwidth=1638 * GB,
        link_bandwidth=100 * GB,
        links=4,
        network_bandwidth=12.5 * GB,
        splash_block=1024,  # others measured a third more speed than with 512; not yet run by us
    ),
    Chip(
        kind="Tesla T4",
        peak_flops=8.1e12,  # float32
        memory_bytes=16 * GB,
        memory_bandwidth=320 * GB,
        link_bandwidth=16 * GB,  # PCIe 3.0
        links=1,
        network_bandwidth=3.125 * GB,
        has_bfloat16=False,
    ),
    Chip(
        kind="Tesla V100",
        peak_flops=15.7e12,  # float32
        memory_bytes=16 * GB,
        memory_bandwidth=900 * GB,
        link_bandwidth=150 * GB,
        links=1,
        network_bandwidth=6.25 * GB,
        has_bfloat16=False,
        extra="cuda12",  # CUDA 13 dropped compute capability 7.0
    ),
    Chip(
        kind="NVIDIA A10",
        peak_flops=125e12,
        memory_bytes=24 * GB,
        memory_bandwidth=600 * GB,
        link_bandwidth=32 * GB,  # PCIe 4.0, like the next five
        links=1,
        network_bandwidth=3.125 * GB,
    ),
    Chip(
        kind="NVIDIA L4",
        peak_flops=121e12,
        memory_bytes=24 * GB,
        memory_bandwidth=300 * GB,
        link_bandwidth=32 * GB,
        links=1,
        network_bandwidth=3.125 * GB,
    ),
    Chip(
        kind="NVIDIA L40S",
        peak_flops=362e12,
        memory_bytes=48 * GB,
        memory_bandwidth=864 * GB,
        link_bandwidth=32 * GB,
        links=1,
        network_bandwidth=3.125 * GB,
    ),
    Chip(
        kind="NVIDIA RTX A6000",
        peak_flops=154.8e12,
        memory_bytes=48 * GB,
        memory_bandwidth=768 * GB,
        link_bandwidth=32 * GB,
        links=1,
        network_bandwidth=3.125 * GB,
    ),
    Chip(
        kind="NVIDIA GeForce RTX 3090",
        peak_flops=71e12,
        memory_bytes=24 * GB,
        memory_bandwidth=936 * GB,
        link_bandwidth=32 * GB,
        links=1,
        network_bandwidth=3.125 * GB,
    ),
    Chip(
        kind="NVIDIA GeForce RTX 4090",
        peak_flops=165.2e12,
        memory_bytes=24 * GB,
        memory_bandwidth=1008 * GB,
        link_bandwidth=32 * GB,
        links=1,
        network_bandwidth=3.125 * GB,
    ),
    Chip(
        kind="NVIDIA GeForce RTX 5090",
        peak_flops=209.5e12,
        memory_bytes=32 * GB,
        memory_bandwidth=1792 * GB,
        link_bandwidth=64 * GB,  # PCIe 5.0
        links=1,
        network_bandwidth=3.125 * GB,
    ),
    Chip(
        kind="NVIDIA A100-SXM4-40GB",
        peak_flops=312e12,
        memory_bytes=40 * GB,
        memory_bandwidth=1555 * GB,
        link_bandwidth=300 * GB,
        links=1,
        network_bandwidth=25 * GB,
    ),
    Chip(
        kind="NVIDIA A100",
        peak_flops=312e12,
        memory_bytes=80 * GB,
        memory_bandwidth=2039 * GB,
        link_bandwidth=300 * GB,
        links=1,
        network_bandwidth=25 * GB,
    ),
    Chip(
        kind="NVIDIA H100",
        peak_flops=989e12,
        memory_bytes=80 * GB,
        memory_bandwidth=3350 * GB,
        link_bandwidth=450 * GB,
        links=1,
        network_bandwidth=50 * GB,
    ),
    Chip(
        kind="NVIDIA H200",
        peak_flops=989e12,
        memory_bytes=141 * GB,
        memory_bandwidth=4800 * GB,
        link_bandwidth=450 * GB,
        links=1,
        network_bandwidth=50 * GB,
    ),
    Chip(
        kind="NVIDIA B200",
        peak_flops=2250e12,
        memory_bytes=180 * GB,
        memory_bandwidth=7700 * GB,
        link_bandwidth=900 * GB,
        links=1,
        network_bandwidth=50 * GB,
    ),
)


def find_chip(device_kind: str) -> Chip | None:
    """Returns the chip of JAX's device_kind, None if it is not in the table.

    A longer name may be another chip: an A100 is no A10, an L40 no L4, and a laptop's RTX 4090 no desktop's.
    """
    if "Laptop" in device_kind:
        return None
    for chip in CHIPS:
        following = device_kind[len(chip.kind) :]
        if device_kind.startswith(chip.kind) and not re.match("[A-Z0-9]", following):
            return chip
    return None


def peak_flops(device: Any) -> float:
    """Returns the peak FLOP/s of a device (Chip.peak_flops), or nan where it is not known."""
    chip = find_chip(device.device_kind)
    return chip.peak_flops if chip else math.nan


def has_bfloat16(device: Any) -> bool:
    """Returns whether a GPU has matrix units for bfloat16; without them XLA converts to float32 and back."""
    chip = find_chip(getattr(device, "device_kind", ""))
    if chip:
        return chip.has_bfloat16
    return float(getattr(device, "compute_capability", 8)) >= 8


def device_memory(device: Any) -> float:
    """Returns the bytes of an accelerator that a run may use: JAX's limit, or the table's for a virtual device."""
    try:
        stats = device.memory_stats() or {}
    except RuntimeError:  # a virtual device: gptjax.plan compiles for chips that this machine does not have
        stats = {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    chip = find_chip(getattr(device, "device_kind", ""))
    return chip.run_bytes if chip else math.inf
